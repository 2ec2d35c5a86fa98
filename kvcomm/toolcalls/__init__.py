"""Tools: how they are shown to a model, and how what it writes becomes calls.

Knows nothing about HTTP. A chat template shows tools, calls and results where it has a place for them (`template`); an
answer is read as it comes into neutral events (`events`, `reader`), one parser for each way of writing calls
(`formats`); a choice of tools becomes a grammar (`choice`).
"""
