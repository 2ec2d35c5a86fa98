"""Cutting real texts to a number of tokens: whole paragraphs, lines and words only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

BREAKS = ("\n\n", "\n", " ")
"""Where a text may be cut, the most wanted first."""

CountTokens = Callable[[str], int]


def cut(text: str, max_tokens: int, count: CountTokens, breaks: Sequence[str] = BREAKS) -> str:
    """As many leading paragraphs as there is room for; where the first one is too long, of it the leading lines, words.

    Empty only if not even a word has room.
    """
    separator, *finer = breaks
    taken = ""
    for part in text.strip().split(separator):
        longer = f"{taken}{separator}{part}" if taken else part
        if count(longer) > max_tokens:
            return taken if taken.strip() or not finer else cut(part, max_tokens, count, finer)
        taken = longer
    return taken


def pieces(text: str, max_tokens: int, count: CountTokens) -> Iterator[str]:
    """The text's paragraphs, as many together as there is room for; those that are too long themselves are cut."""
    taken = ""
    for part in text.strip().split(BREAKS[0]):
        longer = f"{taken}{BREAKS[0]}{part}" if taken else part
        if count(longer) <= max_tokens:
            taken = longer
            continue
        if taken:
            yield taken
        taken = cut(part, max_tokens, count)
    if taken:
        yield taken
