"""Segments: what their digest tells apart."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.memory.segments import Segment


def test_the_digest_is_what_the_docstring_says() -> None:
    expected = hashlib.sha256(
        b"kvcomm segment 1\0" + struct.pack("<Q", 3) + "né".encode() + struct.pack("<3i", 1, -1, 70_000)
    ).hexdigest()
    assert Segment((1, -1, 70_000)).digest("né") == expected


def test_the_name_is_no_part_of_the_identity_but_namespace_and_tokens_are() -> None:
    assert Segment((1, 2), "a").digest("ns") == Segment((1, 2), "b").digest("ns")
    digests = {
        Segment((1, 2)).digest("ns"),
        Segment((1, 2)).digest("other"),
        Segment((2, 1)).digest("ns"),
        Segment((1, 2, 0)).digest("ns"),
        Segment(()).digest("ns"),
        # Without a length prefix, bytes could move from the namespace to the tokens.
        Segment((2,)).digest("ns\x01\0\0\0"),
    }
    assert len(digests) == 6
    with pytest.raises(OverflowError):
        Segment((2**31,)).digest("ns")


@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 2**31 - 1)), st.text(), st.text())
@settings(deadline=None)
def test_different_segments_have_different_digests(left: list[int], right: list[int], a: str, b: str) -> None:
    same = (left, a) == (right, b)
    assert (Segment(tuple(left)).digest(a) == Segment(tuple(right)).digest(b)) == same
