"""Keys of requests: equal beginnings have equal keys, others have others, and nothing that clients send is an error."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.integrations.ray.keys import MAX_KEYS, RUN_BYTES, wanted_of

MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=50)}),
    min_size=1,
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    "messages",
    "prompt",
    "input",
    "text",
    "token_ids",
    "segments",
    "tools",
    "system",
    "model",
    "cache_salt",
    "reuse",
)


def keys(body: dict[str, Any], *, tenant: str = "ann") -> list[str]:
    return [run.key for run in wanted_of(body, tenant=tenant).runs]


@given(MESSAGES, MESSAGES)
def test_messages_that_go_on_keep_the_keys_of_those_before(before: list[Any], more: list[Any]) -> None:
    first, second = keys({"messages": before}), keys({"messages": before + more})
    assert second[: len(first)] == first
    assert len(second) > len(first)


@given(MESSAGES, MESSAGES)
def test_runs_are_equal_exactly_where_the_messages_before_them_are(one: list[Any], two: list[Any]) -> None:
    num_equal = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    first, second = keys({"messages": one}), keys({"messages": two})
    assert first[:num_equal] == second[:num_equal]
    assert not set(first[num_equal:]) & set(second[num_equal:])


def test_a_long_text_has_runs_of_its_own() -> None:
    text = "x" * (3 * RUN_BYTES)
    other = text[: 2 * RUN_BYTES] + "y" * RUN_BYTES
    first, second = keys({"prompt": text}), keys({"prompt": other})
    assert len(first) == len(second) == 3
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_tenants_models_and_salts_share_no_key() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    others = [
        keys(body),
        keys(body, tenant="bob"),
        keys({**body, "model": "n"}),
        keys({**body, "cache_salt": "s"}),
    ]
    assert len({each for found in others for each in found}) == len(others)


def test_a_segment_has_one_key_wherever_it_stands() -> None:
    doc = {"id": "doc", "content": "The fox."}
    reuse = {"reuse": {"mode": "approximate"}}
    alone = wanted_of({"segments": [doc], **reuse}, tenant="ann").segments
    behind = wanted_of({"segments": [{"id": "role", "content": "You are."}, {**doc, "id": "d"}], **reuse}, tenant="ann")
    assert alone[0].key == behind.segments[1].key
    assert alone[0].start == 0
    assert behind.segments[1].start == behind.segments[0].end > 0


def test_segments_are_moved_only_where_that_is_allowed() -> None:
    body = {"segments": [{"id": "doc", "content": "The fox."}]}
    assert wanted_of(body, tenant="ann").segments == ()
    assert len(wanted_of(body, tenant="ann", may_move=True).segments) == 1
    for exact in ({"mode": "exact"}, {"max_divergence": 0}):
        assert wanted_of({**body, "reuse": exact}, tenant="ann", may_move=True).segments == ()


def test_keys_are_bounded() -> None:
    found = wanted_of({"prompt": "x" * (RUN_BYTES * (MAX_KEYS + 10))}, tenant="ann")
    assert len(found.runs) == MAX_KEYS
    assert found.num_tokens > found.runs[-1].end


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_a_body_holds_is_no_error(body: dict[str, Any]) -> None:
    found = wanted_of(body, tenant="ann", may_move=True)
    ends = [run.end for run in found.runs]
    assert ends == sorted(ends)
    assert all(0 <= each.start <= each.end <= found.num_tokens for each in found.segments)
