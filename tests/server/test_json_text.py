"""JSON of strangers: at every cap it is read, one past it refused; what is read is what Python's own reader says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.server import json_text
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json

CAPS = JsonCaps(depth=4, containers=5, members=5, values=9, digits=10)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(value=VALUES, window=st.integers(2, 40), is_plain=st.booleans())
def test_what_is_read_is_what_was_written(value: Any, window: int, is_plain: bool) -> None:
    """Wherever windows end: in strings, behind backslashes, between the bytes of a letter."""
    text = json.dumps(value, ensure_ascii=is_plain, indent=1 if window % 2 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "WINDOW", window)
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            return
        if any("\ud800" <= letter <= "\udfff" for letter in json.dumps(json.loads(text), ensure_ascii=False)):
            with pytest.raises(JsonRefused, match="surrogate"):
                read_json(encoded, JsonCaps())
        else:
            assert read_json(encoded, JsonCaps()) == value


def measured(value: Any) -> JsonCaps:
    """How much a value holds, counted by walking it."""
    levels, most = [[value]], 0
    containers = members = items = 0
    while levels[-1]:
        below = []
        for item in levels[-1]:
            if isinstance(item, dict | list):
                containers += 1
                inner = list(item.values()) if isinstance(item, dict) else item
                members += len(item) if isinstance(item, dict) else 0
                items += max(0, len(inner) - 1) + 1
                below += inner
        if any(isinstance(item, dict | list) for item in levels[-1]):
            most += 1
        levels.append(below)
    return JsonCaps(most, containers, members, items, 1000)


@given(value=VALUES, window=st.integers(2, 40), field=st.sampled_from(["depth", "containers", "members", "values"]))
def test_a_text_is_measured_exactly(value: Any, window: int, field: str) -> None:
    """At what it holds it is read; with one less allowed it is refused."""
    caps = measured(value)
    text = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "WINDOW", window)
        patch.setattr(json_text, "_require_characters", lambda value: None)
        assert read_json(text, caps) == json.loads(text)
        if getattr(caps, field):
            with pytest.raises(JsonRefused):
                read_json(text, caps._replace(**{field: getattr(caps, field) - 1}))


@pytest.mark.parametrize(
    ("fits", "exceeds", "message"),
    [
        ("[[[[1]]]]", "[[[[[1]]]]]", "more than 4 levels"),
        ("[[],[],[],[]]", "[[],[],[],[],{}]", "more than 5 arrays and objects"),
        ('{"a":1,"b":2,"c":3,"d":4,"e":5}', '{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6}', "more than 5 members"),
        ("[1,1,1,1,1,1,1,1,1]", "[1,1,1,1,1,1,1,1,1,1]", "more than 9 values"),
        ("[1234567890]", "[12345678901]", "more than 10 digits"),
        ("[-1.23e+100]", "[-1.234e+100]", "more than 10 digits"),
        ('["[[[[[[,,,,,,,,,,:::::::12345678901"]', '["a",[[[["]"]]]]]', "more than 4 levels"),
        ('{"a":1,"b":1}', '{"a":1,"a":1}', "member 'a' twice"),
        ('["NaN"]', "[NaN]", "NaN is no number"),
        ("[1e400]", "[-Infinity]", "-Infinity is no number"),
        ('["\\ud83d\\ude00"]', '["\\ud83d"]', "lone surrogate"),
        ('{"\\u00e9":1}', '{"\\udc00":1}', "lone surrogate"),
    ],
)
def test_caps(fits: str, exceeds: str, message: str) -> None:
    assert read_json(fits.encode(), CAPS) == json.loads(fits)
    with pytest.raises(JsonRefused, match=message) as refused:
        read_json(exceeds.encode(), CAPS)
    assert refused.value.is_json


@pytest.mark.parametrize("text", [b"", b"{", b'"', b'"\\', b'"\\"', b"[1,]", b"]", b"\xff", b'"\xc3"', b"nan", b"1 2"])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(JsonRefused) as refused:
        read_json(text, CAPS)
    assert not refused.value.is_json


def test_a_mark_before_the_text_is_left_out() -> None:
    assert read_json(b"\xef\xbb\xbf[1]", CAPS) == [1]


def test_a_refusal_names_the_member() -> None:
    text = b'{"a":[1,{"x":"}"}],"list":[1,1,1,1,1,1,1,1,1,1],"b":1}'
    with pytest.raises(JsonRefused) as refused:
        read_json(text, CAPS)
    assert refused.value.param == "list"


def test_nothing_is_built_of_what_exceeds_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any, **settings: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(json, "loads", build)
    with pytest.raises(JsonRefused):
        read_json(b"[" + b",".join([b"{}"] * 100_000) + b"]", JsonCaps())


def test_a_long_context_has_room_for_its_ids() -> None:
    assert JsonCaps().for_context(1_000_000).values == 2_000_000
    assert JsonCaps().for_context(100).values == JsonCaps().values
