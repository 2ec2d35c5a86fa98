"""Repeats: longest matches against what a text's source had, and had not, read."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.repeats import LONGEST, Surroundings, repeats

TEXT = st.lists(st.integers(0, 2), max_size=12).map(tuple)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)


def longest(own: tuple[int, ...], end: int, text: tuple[int, ...]) -> int:
    """By trying every length: of what ends before `end` and stands in `text`."""
    lengths = range(1, min(end, LONGEST) + 1)
    return max(
        (
            length
            for length in lengths
            for start in range(len(text) - length + 1)
            if text[start : start + length] == own[end - length : end]
        ),
        default=0,
    )


@given(own=TEXT, seen=TEXTS, unseen=TEXTS)
def test_as_trying_every_length(own: tuple[int, ...], seen: tuple[tuple[int, ...]], unseen: tuple[tuple[int, ...]]):
    found = repeats(Surroundings(own, seen, unseen))
    wanted = np.zeros((len(own), 2))
    for token in range(len(own)):
        new = max((longest(own, token + 1, text) for text in unseen), default=0)
        known = [longest(own, token + 1, text) for text in (*seen, own[:token])]
        wanted[token] = math.log1p(new), max(0.0, math.log1p(new) - math.log1p(max(known)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_quotation_grows_to_the_longest_that_counts() -> None:
    quoted = tuple(range(100, 112))
    found = repeats(Surroundings((1, *quoted, 2), seen=((5, 6),), unseen=((7, 8), (3, *quoted))))
    lengths = [0, *range(1, LONGEST), *[LONGEST] * (len(quoted) - LONGEST + 1), 0]
    np.testing.assert_allclose(found[:, 0], np.log1p(lengths), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], found[:, 0])


def test_nothing_goes_on_from_one_text_to_the_next() -> None:
    found = repeats(Surroundings((1, 2, 3), unseen=((1, 2), (3,))))
    np.testing.assert_allclose(found[:, 0], np.log1p([1, 2, 1]), rtol=1e-6)
