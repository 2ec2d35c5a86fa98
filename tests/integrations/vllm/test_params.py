from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.errors import InvalidRequest, TierError
from kvcomm.integrations.vllm.params import RequestParams, read_params
from kvcomm.integrations.vllm.settings import read_settings
from kvcomm.reuse.policy import ReusePolicy

DOCUMENT = {"start": 3, "end": 7, "slot": "document", "kind": "dynamic"}


def test_other_connectors_parameters_are_none_of_ours() -> None:
    assert read_params(None) is None
    assert read_params({"do_remote_prefill": True}) is None


def test_a_request_that_says_nothing_is_exact() -> None:
    params = read_params({"kvcomm": {}})
    assert params == RequestParams()
    assert params.policy == ReusePolicy.exact()
    assert not params.may_move


def test_spans_become_segments() -> None:
    params = read_params({"kvcomm": {"segments": [{"start": 0, "end": 3}, DOCUMENT], "reuse": {}}})
    assert params is not None
    parts = params.split(range(10))
    assert [(part.name, part.token_ids) for part in parts] == [
        (None, (0, 1, 2)),
        ("document", (3, 4, 5, 6)),
        (None, (7, 8, 9)),
    ]
    assert params.may_move
    assert params.policy == ReusePolicy(0.05, 0.9)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=6), st.integers(0, 4))
def test_segments_are_the_prompt(gaps: list[tuple[int, int, bool]], rest: int) -> None:
    spans, at = [], 0
    for gap, length, is_dynamic in gaps:
        more = {"slot": "s", "kind": "dynamic"} if is_dynamic else {}
        spans.append({"start": at + gap, "end": at + gap + length, **more})
        at += gap + length
    token_ids = list(range(100, 100 + at + rest))
    params = read_params({"kvcomm": {"segments": spans}})
    assert params is not None
    parts = params.split(token_ids)
    assert [token for part in parts for token in part.token_ids] == token_ids
    assert [part.token_ids for part in parts if part.name] == [
        tuple(token_ids[span["start"] : span["end"]]) for span in spans if "slot" in span
    ]
    assert read_params(params.as_transfer_params()) == params


@pytest.mark.parametrize("reuse", [None, {"mode": "exact"}, {"max_divergence": 0.0}])
def test_what_must_be_exact_is_not_moved(reuse: dict[str, Any] | None) -> None:
    given_reuse = {} if reuse is None else {"reuse": reuse}
    params = read_params({"kvcomm": {"segments": [DOCUMENT], **given_reuse}})
    assert params is not None
    assert not params.may_move


@pytest.mark.parametrize(
    ("given_params", "named"),
    [
        (7, "kv_transfer_params.kvcomm: "),
        ({"segment": []}, "kvcomm.segment:"),
        ({"segments": [{"start": 4, "end": 4}]}, "got [4, 4)"),
        ({"segments": [{"start": -1, "end": 4}]}, "segments.0.start"),
        ({"segments": [{"start": 0.5, "end": 4}]}, "segments.0.start"),
        ({"segments": [{"start": 0, "end": 4, "kind": "dynamic"}]}, "[0, 4) needs a slot"),
        ({"segments": [DOCUMENT, {"start": 6, "end": 8}]}, "[3, 7) before [6, 8)"),
        ({"reuse": {"confidence": 1.0}}, "reuse.confidence"),
        ({"reuse": {"max_divergence": float("nan")}}, "reuse.max_divergence"),
        ({"reuse": {"mode": "some"}}, "reuse.mode"),
        ({"tenant": ""}, "tenant"),
    ],
)
def test_bad_parameters_are_named(given_params: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_params({"kvcomm": given_params})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spans_behind_the_prompt() -> None:
    params = read_params({"kvcomm": {"segments": [DOCUMENT]}})
    assert params is not None
    with pytest.raises(InvalidRequest, match=r"\[3, 7\) ends behind the prompt of 6 tokens"):
        params.split(range(6))


@pytest.mark.parametrize(
    ("given_settings", "named"),
    [
        ({"pool": 3}, "kv_connector_extra_config.pool"),
        ({"pool_tokens": 3}, "pool_tokens"),
        ({"learning_share": 1}, "learning_share"),
        ({"tier_bytes": 10}, "need a tier"),
        ({"read_s": 0}, "read_s"),
    ],
)
def test_bad_settings_are_named(given_settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_settings(given_settings)
    assert named in str(caught.value)


def test_a_secret_comes_from_its_file(tmp_path: Any) -> None:
    file = tmp_path / "secret"
    settings = read_settings({"tier": "/tier", "tier_secret_file": str(file)})
    with pytest.raises(TierError, match="No such file"):
        _ = settings.secret
    file.write_text("\n")
    with pytest.raises(TierError, match="has 0 bytes"):
        _ = settings.secret
    file.write_text("of all who share the tier\n")
    assert settings.secret == b"of all who share the tier"
