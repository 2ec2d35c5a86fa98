"""Numbers and texts as callers give them: what is taken as what it says, and what is refused by name."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from kvcomm.errors import InvalidRequest
from kvcomm.values import items, real_number, shown, text, told, truth_value, whole_number


class Unshowable:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers(value: object) -> None:
    found = whole_number("n", value)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", b"3", None, [3], Unshowable()])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(InvalidRequest, match="n must be a whole number, not "):
        whole_number("n", value)


@pytest.mark.parametrize("value", [2, 2.0, np.int32(2), np.float32(2), np.float64(2), Fraction(2)])
def test_real_numbers(value: object) -> None:
    found = real_number("x", value)
    assert (found, type(found)) == (2.0, float)


@pytest.mark.parametrize("value", [False, np.False_, "2", None, 1j, 10**400, [2.0], Unshowable()])
def test_what_is_no_real_number(value: object) -> None:
    with pytest.raises(InvalidRequest, match="x must be a number, not "):
        real_number("x", value)


def test_truth_values() -> None:
    assert truth_value("flag", np.True_) is True
    assert truth_value("flag", False) is False
    for value in (0, 1, "yes", None):
        with pytest.raises(InvalidRequest, match="flag must be True or False"):
            truth_value("flag", value)


def test_items() -> None:
    for value in ((1, 2), [1, 2], range(1, 3), np.array([1, 2])):
        assert items("ids", value, "ids") == (1, 2)
    for wrong in ("ab", b"ab", {1: 2}, {1, 2}, 5, None, np.array(5), np.array([[1]]), iter([1])):
        with pytest.raises(InvalidRequest, match="ids must be a list of ids, not"):
            items("ids", wrong, "a list of ids")


def test_text() -> None:
    assert text("the prompt", "é😀") == "é😀"
    with pytest.raises(InvalidRequest, match="the prompt must be text, not b'a' \\(bytes\\)"):
        text("the prompt", b"a")
    with pytest.raises(InvalidRequest, match=r"the lone surrogate '\\ud83d' at character 1"):
        text("the prompt", "a\ud83d")


def test_values_are_shown_in_a_few_words() -> None:
    assert shown([1, 2]) == "[1, 2]"
    assert len(shown("x" * 10_000)) < 100
    assert shown(10**5000) == "an object whose repr raises ValueError"
    assert told(Unshowable()) == "an object whose repr raises RuntimeError (Unshowable)"
