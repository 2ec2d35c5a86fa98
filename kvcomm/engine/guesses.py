"""Guesses at the next tokens of an answer, from text that the sequence already holds.

Agents quote: a critic repeats the solution it reads, code repeats names, a calculation the numbers of the question. A
step that decodes one answer reads all weights for a single row, and two rows more take a fifth longer; so a step takes
guesses along and keeps those that turn out to be what would have been drawn anyway. The answer is the same, token by
token, however it is drawn. How many are worth it is for `guess_gain` to say.

Source: prompt lookup decoding (A. Saxena, 2023), verified as in speculative decoding (arXiv 2211.17192v2) where the
draft is certain: here the next token is drawn as always, and a guess only saves its pass if it equals what was drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcomm.model.attention.contract import IntArray

MAX_MATCH = 8
"""Tokens before the guess that are compared. In teams' answers (SmolLM2) the guess behind up to three repeated tokens
is right in 35 of 100 cases, behind eight in 87."""

CERTAIN = MAX_MATCH + 1
"""In place of repeated tokens: these are no guesses, they will come."""


class Found(NamedTuple):
    """Guesses at the next tokens, and how many tokens before them are a repetition; none are found behind 0."""

    token_ids: IntArray
    num_matched: int


def repeated(token_ids: IntArray, num: int) -> Found:
    """What came after the last earlier place that ends like the sequence.

    Args:
        token_ids: [num_tokens] int32, at least one token.
        num: guesses wanted.

    Returns:
        [num] int32, or [0] where the last token stands nowhere else. The place with the longest match of up to
        MAX_MATCH tokens is taken, the latest of several; a repetition that reaches the end goes on in circles.
    """
    if num < 1:
        return Found(token_ids[:0], 0)
    places = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    if not len(places):
        return Found(token_ids[:0], 0)
    num_matched = 1
    while num_matched < MAX_MATCH:
        longer = places[places >= num_matched]
        longer = longer[token_ids[longer - num_matched] == token_ids[-1 - num_matched]]
        if not len(longer):
            break
        places, num_matched = longer, num_matched + 1
    return Found(np.resize(token_ids[places[-1] + 1 :], num), num_matched)
