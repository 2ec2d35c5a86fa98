"""`python -m eval.clients`: what unchanged clients and agent frameworks get from a server."""
