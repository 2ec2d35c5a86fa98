"""Namespaces: equal for equal parts, different as soon as one part differs, and nothing ambiguous between parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvcomm.model import namespace
from kvcomm.model.namespace import model_identity, tenant_namespace, tokenizer_digest
from tests.tiny import tiny_tokenizer

Parts = dict[str, Any]


def parts() -> Parts:
    """What one engine would pass, made afresh."""
    tokenizer = tiny_tokenizer()
    return {
        "weights_digest": "ab" * 32,
        "config": LlamaConfig(num_hidden_layers=2),
        "dtype": torch.float32,
        "attention": {"layers": [{"window": None, "rope": "default"}]},
        "tokenizer": tokenizer,
        "chat_template": tokenizer.chat_template,
        "tenant": "default",
    }


def namespace_of(*, tenant: str, **identity: Any) -> str:
    return tenant_namespace(model_identity(**identity), tenant)


def test_deterministic() -> None:
    digest = namespace_of(**parts())

    assert namespace_of(**parts()) == digest
    assert len(bytes.fromhex(digest)) == 32


def set_part(name: str, value: object) -> Callable[[Parts], None]:
    return lambda given_parts: given_parts.__setitem__(name, value)


CHANGES: dict[str, Callable[[Parts], object]] = {
    "weights": set_part("weights_digest", "cd" * 32),
    "rope": lambda it: it["config"].rope_parameters.update(rope_theta=1.0),
    "layers": set_part("config", LlamaConfig(num_hidden_layers=3)),
    "dtype": set_part("dtype", torch.bfloat16),
    "attention": set_part("attention", {"layers": [{"window": 512, "rope": "default"}]}),
    "added token": lambda it: it["tokenizer"].add_tokens(["<new>"]),
    "template": set_part("chat_template", "{{ messages }}"),
    "no template": set_part("chat_template", None),
    "tenant": set_part("tenant", "other"),
    "empty tenant": set_part("tenant", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_counts(change: str) -> None:
    changed = parts()
    CHANGES[change](changed)

    assert namespace_of(**changed) != namespace_of(**parts())


def test_format_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = namespace_of(**parts())
    monkeypatch.setattr(namespace, "FORMAT_VERSION", namespace.FORMAT_VERSION + 1)

    assert namespace_of(**parts()) != before


def test_padding_and_truncation_of_earlier_calls_do_not_count() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=8)

    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_digest(tokenizer) == before


def test_tokenizer_without_backend_counts_by_class_and_vocabulary() -> None:
    class Slow:
        def __init__(self, **vocab: int) -> None:
            self.vocab = vocab

        def get_vocab(self) -> dict[str, int]:
            return self.vocab

    digests = {tokenizer_digest(Slow(**vocab)) for vocab in ({"a": 0, "b": 1}, {"a": 1, "b": 0})}  # type: ignore[arg-type]
    assert len(digests) == 2
    assert tokenizer_digest(Slow(b=1, a=0)) in digests  # type: ignore[arg-type]


def test_mapping_order_does_not_count() -> None:
    first, second = parts(), parts()
    first["attention"] = {"a": 1, "b": 2}
    second["attention"] = {"b": 2, "a": 1}

    assert namespace_of(**first) == namespace_of(**second)


def test_what_json_cannot_express_is_refused() -> None:
    with pytest.raises(TypeError, match="JSON values, not of Tensor"):
        namespace_of(**parts() | {"attention": {"inv_freq": torch.ones(2)}})


def test_tenant_namespace_by_hand() -> None:
    texts = ["identity", '"ab"', "tenant", '"al\\u00e9"']
    by_hand = b"".join(len(text).to_bytes(8, "little") + text.encode() for text in texts)

    assert tenant_namespace("ab", "alé") == hashlib.sha256(by_hand).hexdigest()


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_no_two_pairs_share_a_namespace(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert (tenant_namespace(*first) == tenant_namespace(*second)) == (first == second)


@given(st.text(max_size=3), st.text(max_size=3), st.text(max_size=3))
def test_moving_text_between_parts_changes_the_namespace(head: str, middle: str, tail: str) -> None:
    same = tenant_namespace(head + middle, tail) == tenant_namespace(head, middle + tail)
    assert same == (middle == "")
