"""The namespace of cached KV: a digest of everything that a key or value depends on besides the tokens.

Two states share a cache only if their namespaces are equal. Parts are hashed as length-prefixed canonical
JSON, so no two different sets of parts have the same bytes. This module decides what counts; it keeps no
state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.model.weights import config_settings

FORMAT_VERSION = 1
"""Part of every namespace; raised when the meaning of cached KV changes."""


def model_identity(
    *,
    weights_digest: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | Mapping[str, str] | None,
) -> str:
    """SHA-256 (hex) of everything but the tenant that separates one cache from another.

    An engine computes it once, and each namespace from it.

    Args:
        weights_digest: identity of the weights, from `weights.weights_digest`.
        config: the model's config; its paths, versions and implementation choices do not count.
        dtype: of the cached keys and values.
        attention: rope and attention settings as JSON values, beyond what the config says (quantization too).
        tokenizer: its vocabulary, merges and normalization count; padding and truncation do not.
        chat_template: of the tokenizer, or what the caller uses in its place.

    Raises:
        TypeError: `attention` holds something that JSON cannot express.
    """
    return _digest(
        format_version=FORMAT_VERSION,
        weights=weights_digest,
        config=config_settings(config),
        dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=chat_template,
    )


def tenant_namespace(identity: str, tenant: str) -> str:
    """The namespace of one tenant of the model with that identity."""
    return _digest(identity=identity, tenant=tenant)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what maps text to ids; padding and truncation set by earlier calls do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(kind=type(tokenizer).__name__, vocab=tokenizer.get_vocab())
    if backend.padding is not None or backend.truncation is not None:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    return _digest(kind="tokenizers", backend=backend.to_str())


def _digest(**parts: Any) -> str:
    digest = hashlib.sha256()
    for name, value in parts.items():
        for text in (name, json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_dict)):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a namespace is made of JSON values, not of {type(value).__name__}: {value!r}")
