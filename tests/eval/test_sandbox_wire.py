"""What crosses the border between tests and program: types survive, objects stay the same ones, nonsense is refused."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval.sandbox.inside import wire
from eval.sandbox.inside.wire import Reader, WireError, Writer

TEXT = st.text(st.characters(codec=None, categories=None))  # lone surrogates and pairs of them included
HASHABLE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.builds(lambda n, bits: n << bits, st.integers(), st.integers(0, 20_000)),
        st.floats(),
        st.complex_numbers(),
        TEXT,
        st.binary(),
        st.decimals(allow_nan=False),
        st.fractions(),
        st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=8,
)
VALUES = st.recursive(
    HASHABLE | st.binary().map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.dictionaries(HASHABLE, inner, max_size=4),
        st.sets(HASHABLE, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4).map(lambda held: held.keys()),
        st.dictionaries(HASHABLE, inner, max_size=4).map(lambda held: held.items()),
    ),
    max_leaves=12,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["ref", "int", "str", "bytes", "decimal", "list", "tuple", "dict", "set", "keys", "iterator"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=16,
)
KINDS = sorted(wire._MUTABLE | wire._IMMUTABLE)


def over(value: object) -> Any:
    """A value as it arrives."""
    writer = Writer()
    found = writer.value(value)
    nodes, found = json.loads(json.dumps([writer.finish(), found]))
    return Reader(nodes).value(found)


def shape(value: Any) -> Any:
    """Types and contents, in which -0.0, 0, 0.0 and False differ and nan equals itself."""
    name = type(value).__name__
    if isinstance(value, dict):
        return name, [(shape(key), shape(held)) for key, held in value.items()]
    if isinstance(value, (set, frozenset)):
        return name, sorted(map(repr, map(shape, value)))
    if isinstance(value, (list, tuple, deque, type({}.keys()), type({}.items()))):
        return name, [shape(each) for each in value]
    return name, repr(value) if not isinstance(value, int) else hex(value)


@given(VALUES)
@example(float("nan"))
@example(-0.0)
@example("\ud83d\ude00 \U0001f600 \udc00")
@example([1, 1.0, True, (1,), [1]])
@example({(1, "a"): [2], None: {3}, b"x": frozenset({(4,)})})
def test_types_and_contents_survive(value: Any) -> None:
    assert shape(over(value)) == shape(value)


def test_one_list_stays_one_list() -> None:
    row = [0]
    found = over({"rows": (row, row), "again": row})
    found["again"].append(1)
    assert found["rows"] == ([0, 1], [0, 1])


def test_cycles_are_passed() -> None:
    value: list[Any] = [1]
    value.append((value, {"self": value}))
    found = over(value)
    assert found[1][0] is found
    assert found[1][1]["self"] is found


def test_deep_lists_are_passed() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    found, depth = over(value), 0
    while found:
        (found,), depth = found, depth + 1
    assert depth == 100_000
    while value:  # taken apart step by step, as above
        value = value.pop()


class Liar(int):
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __index__(self) -> int:
        return 99


class LyingList(list):  # type: ignore[type-arg]
    """Holds one thing and shows another."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Any:
        return iter([99])


class LyingText(str):
    """Equal to everything, and another text when asked."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __str__(self) -> str:
        return "other"


class Color(IntEnum):
    """One of the standard library's subclasses."""

    RED = 3


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Liar(5), 5),
        (LyingList([1, 2]), [1, 2]),
        (LyingText("own"), "own"),
        ([Liar(5)], [5]),
        (Color.RED, 3),
        (Point(1, [2]), (1, [2])),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, {1: [2]}), {1: [2]}),
        (deque([1, 2], maxlen=2), deque([1, 2])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_subclasses_arrive_as_what_they_hold(value: object, arrives: object) -> None:
    assert shape(over(value)) == shape(arrives)


@pytest.mark.parametrize(
    "value",
    [object(), print, int, (each for each in ()), ..., [object()], {1: print}],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_cannot_be_passed(value: object) -> None:
    with pytest.raises(WireError, match="cannot be passed"):
        over(value)


def test_what_a_function_does_to_its_arguments_is_seen_by_the_caller() -> None:
    rows = [[3, 1], {"a": {1}}, bytearray(b"x"), deque([1])]
    kept, text = list(rows), ("same", 1.0)
    writer = Writer()
    args = [writer.value(each) for each in (rows, text)]
    nodes = writer.finish()

    reader = Reader(nodes)
    there, there_text = (reader.value(each) for each in args)
    there[0].sort()
    there[1]["a"].add(there_text)
    there[1]["own"] = there
    there[2] += b"y"
    there[3].clear()
    answer = Writer(reader.objects, nodes)
    result = answer.value([there[0], there_text])

    found = Reader(json.loads(json.dumps(answer.finish())), writer.objects).value(result)
    assert rows[:4] == kept
    assert kept[0] == [1, 3]
    assert kept[1] == {"a": {1, text}, "own": rows}
    assert kept[1]["own"] is rows
    assert kept[2:] == [bytearray(b"xy"), deque()]
    assert found[0] is kept[0]
    assert found[1] is text


def test_arguments_that_were_left_alone_keep_their_very_contents() -> None:
    """A nan is equal to itself only as long as it is the same one."""
    values = [math.nan, 1, True]
    writer = Writer()
    writer.value(values)
    nodes = writer.finish()
    answer = Writer(Reader(nodes).objects, nodes)
    assert answer.finish() == [None]
    Reader(answer.finish(), writer.objects)
    assert values == [values[0], 1, True]
    changed = Reader(nodes).objects
    changed[0][2] = 1  # equal, and yet another value
    assert Writer(changed, nodes).finish() != [None]


@given(st.lists(JSON | st.tuples(st.sampled_from(KINDS), JSON).map(list), max_size=5) | JSON, JSON)
def test_whatever_is_read_is_of_exact_types_or_refused(nodes: Any, value: Any) -> None:
    reader = None
    try:
        reader = Reader(nodes, [[1], (2,)], lambda number: iter(()))
        found = reader.value(value)
    except WireError:
        return
    allowed = {type(None), bool, *wire._PLAIN, *wire._KINDS, type(iter(()))}
    assert {type(each) for each in (found, *reader.objects)} <= allowed


@pytest.mark.parametrize(
    "nodes",
    [
        [["tuple", [["ref", 1]]], ["tuple", []]],
        [["tuple", [["ref", 0]]]],
        [["set", [["ref", 0]]]],
        [["dict", [["ref", 1], 1]], ["list", []]],
        [["dict", [1, 2, 3]]],
        [["bytearray", "1"]],
        [["deque", []]],
        [["deque", {}]],
        [["object", []]],
        [["list", [["ref", 1]]]],
        [["list", [["ref", -1]]]],
        [["list", [["iterator", 0]]]],
        [["list", [["fraction", 1, 0]]]],
        [["deque", [-2]]],
        [["list", [["int", "1", 99]]]],
        [["list", 5]],
        None,
    ],
    ids=repr,
)
def test_what_is_out_of_shape_is_refused(nodes: Any) -> None:
    with pytest.raises(WireError):
        Reader(nodes)


def test_a_message_is_cut_off_at_a_limit() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(WireError, match="bytes is more than"):
            wire.send(writing, "x" * (wire.MAX_FRAME - 1))
        os.write(writing, (wire.MAX_FRAME + 1).to_bytes(4, "big"))
        with pytest.raises(WireError, match="bytes is more than"):
            wire.receive(reading)
        os.write(writing, (3).to_bytes(4, "big") + b"[[[")
        with pytest.raises(WireError, match="not JSON"):
            wire.receive(reading)
        os.write(writing, (9).to_bytes(4, "big") + b"{")
        os.close(writing)
        with pytest.raises(wire.Closed):
            wire.receive(reading)
        reading, closed = os.dup(reading), reading
        os.close(closed)
    finally:
        os.close(reading)
