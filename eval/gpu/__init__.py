"""What a GPU makes of kvcomm, in one command; see `eval.gpu.__main__`."""
