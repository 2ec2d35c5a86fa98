"""Values as JSON values: what becomes of each kind, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvcomm.plain import Plain, plain, short


class Color(StrEnum):
    RED = "red"


class Size(Enum):
    LARGE = 3


class Point(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class Sketch(Plain):
    name: str
    points: tuple[Point, ...]
    color: Color = Color.RED


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        ("text", "text"),
        (3, 3),
        (np.int32(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([1, 2]), [1, 2]),
        (0.25, 0.25),
        (float("inf"), None),
        (float("-inf"), None),
        (float("nan"), None),
        (Color.RED, "red"),
        (Size.LARGE, 3),
        ((1, (2, 3)), [1, [2, 3]]),
        (Point(1, 2.5), {"x": 1, "y": 2.5}),
        (MappingProxyType({Color.RED: (1,)}), {"red": [1]}),
        (Sketch("a", (Point(1, 2),)), {"name": "a", "points": [{"x": 1, "y": 2}], "color": "red"}),
    ],
)
def test_what_becomes_of_values(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected


@pytest.mark.parametrize("value", [object(), b"bytes", 1j, {"a": [object()]}])
def test_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises(TypeError, match="has no form in JSON"):
        plain(value)


def test_texts_are_cut() -> None:
    assert short("it's\n") == '"it\'s\\n"'
    assert short("x" * 40) == repr("x" * 40)
    assert short("x" * 41) == repr("x" * 39 + "…")
