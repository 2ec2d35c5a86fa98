"""Families are tried for real: what is right passes, and what a back end or a move gets wrong is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomm.lab import families as trial
from kvcomm.lab.families import FamilyOutcome, byte_tokenizer, try_family, try_model
from kvcomm.model import families as known
from kvcomm.model.attention import torch_backend
from kvcomm.model.families import families, random_model, tiny_config


@pytest.mark.parametrize(
    ("name", "outcome", "attention", "reason"),
    [
        ("llama", FamilyOutcome.WORKS, "full", ""),
        ("gemma2", FamilyOutcome.WORKS, "windows and full, capped scores", ""),
        ("gpt_oss", FamilyOutcome.WORKS, "windows and full, sinks", ""),
        ("gpt2", FamilyOutcome.EXACT_ONLY, "full", "keys of layers 0, 1, 2 follow the position by no known rotation"),
        ("falcon", FamilyOutcome.REFUSED, "", "its layers attend by code of their own, which cannot be replaced"),
        ("mamba", FamilyOutcome.REFUSED, "", "layers of type linear_attention keep a state that is not per-token KV"),
    ],
)
def test_what_is_found(name: str, outcome: FamilyOutcome, attention: str, reason: str) -> None:
    row = try_family(name)
    assert (row.family, row.model, row.outcome) == (name, families()[name], outcome), row.reason
    assert (row.attention, row.reason) == (attention, reason)


def test_a_sink_with_the_wrong_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model's own forward already when it is measured."""
    monkeypatch.setattr(torch_backend, "weight_beside", lambda lse, sinks: torch.sigmoid(lse + sinks))
    row = try_family("gpt_oss")
    assert row.outcome is FamilyOutcome.REFUSED
    assert "logits differ by" in row.reason


def test_keys_turned_the_wrong_way_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(keys: Tensor, delta: int, rope: object) -> Tensor:
        return keys

    monkeypatch.setattr(trial, "rotate", wrong)
    row = try_family("llama")
    assert (row.outcome, row.reason) == (FamilyOutcome.WRONG, "not as stock: keys at another place")


def test_answers_other_than_stock_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_stock", lambda engine, ids: (0,) * trial.NUM_NEW)
    row = try_family("llama")
    assert row.outcome is FamilyOutcome.WRONG
    assert row.reason == "not as stock: a cold answer, an answer from the cache, answers in forks"


def test_what_cannot_be_made_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.OTHER_SIZES, "llama", {"hidden_size": 63})
    row = try_family("llama")
    assert row.outcome is FamilyOutcome.NOT_TRIED
    assert row.reason.startswith("no tiny model of it runs (")
    monkeypatch.setitem(known.OTHER_SIZES, "llama", {"hidden_size": 2**16})
    row = try_family("llama")
    assert row.outcome is FamilyOutcome.NOT_TRIED
    assert row.reason.endswith(" parameters")


def test_a_model_of_ones_own_can_be_tried() -> None:
    row = try_model("mine", random_model(tiny_config("qwen3"), seed=5))
    assert (row.family, row.model, row.outcome) == ("mine", "Qwen3ForCausalLM", FamilyOutcome.WORKS)


def test_families_are_decoders_under_their_own_names() -> None:
    found = families()
    assert {"llama", "qwen2", "qwen3", "mistral", "mixtral", "gpt2", "opt", "granite", "phi", "cohere"} <= found.keys()
    assert not {"bert", "bart", "t5", "gpt-sw3", "fuyu", "roberta"} & found.keys()
    assert list(found) == sorted(found)


def test_tiny_configs_have_every_kind_of_layer_that_their_family_has() -> None:
    for name in ("gemma2", "gpt_oss", "olmo3", "cohere2"):
        assert set(tiny_config(name).layer_types) == {"sliding_attention", "full_attention"}


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer.encode("aé")) == 3
    assert tokenizer.decode(tokenizer.encode("aé b")) == "aé b"
