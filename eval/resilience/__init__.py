"""What a server does when things go wrong: see `__main__`."""
