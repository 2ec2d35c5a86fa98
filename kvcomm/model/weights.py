"""The identity of a live model: one digest over its settings, parameters and persistent buffers.

Taken from the tensors that compute, not from files, so a model has the same identity whether kvcomm loaded it
or the caller did, and another one as soon as a weight was fine-tuned, cast or quantized. Adapters that are attached to
it do not count: they have identities of their own. Half a gigabyte takes about 0.1 s on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.errors import UnsupportedModel
from kvcomm.model.adapters import plain_name

IRRELEVANT_SETTINGS = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"})
"""Config entries that do not change what the weights compute, or that saving a model adds (dtypes count per tensor)."""


def weights_digest(model: PreTrainedModel) -> str:
    """BLAKE3 (hex) over the config and the name, dtype, shape and bytes of every parameter and persistent
    buffer of the model without its adapters.

    Tied tensors are read once. Tensors on an accelerator are copied to the host one at a time.

    Raises:
        UnsupportedModel: a tensor has no bytes here (offloaded, on the meta device) or is not a plain tensor.
    """
    read: dict[tuple[Any, ...], str] = {}
    rows = [
        [name, str(value.dtype), list(value.shape), _digest_once(value, read)]
        for name, value in sorted(_plain_state(model).items())
    ]
    identity = {"config": config_settings(model.config), "tensors": rows}
    return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def config_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a config that matter, as JSON values; no paths, versions or implementation choices."""
    settings: dict[str, Any] = _without_irrelevant(json.loads(config.to_json_string(use_diff=False)))
    return settings


def vocab_size_of(model: PreTrainedModel) -> int:
    """Logits of a position.

    Raises:
        UnsupportedModel: it gives none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel(
            f"{type(model).__name__} is not supported: it has no head for logits; load it by AutoModelForCausalLM"
        )
    # A head whose weight is kept in another form has no tensor of that name.
    return int(head.weight.shape[0] if hasattr(head, "weight") else head.out_features)


def _without_irrelevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_irrelevant(inner)
            for key, inner in value.items()
            if key not in IRRELEVANT_SETTINGS and not key.startswith("_")
        }
    return value


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = plain_name(model, key)
        if name is None:
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            raise UnsupportedModel(
                f"{type(model).__name__}: the bytes of {name} are not in memory, so the weights cannot be"
                " identified; load the model fully onto one device"
            )
        state.update(plain_parts(name, value))
    return state


def plain_parts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the plain ones that one of a class of its own, such as a quantized one, is made of; with names."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        yield name, value
        return
    for attribute in flatten()[0]:
        yield from plain_parts(f"{name}.{attribute}", getattr(value, attribute))


def _digest_once(value: Tensor, read: dict[tuple[Any, ...], str]) -> str:
    memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
    if memory not in read:
        read[memory] = tensor_digest(value)
    return read[memory]


def tensor_digest(value: Tensor) -> str:
    """BLAKE3 (hex) of a tensor's bytes; neither its shape nor its dtype count."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(max_threads=blake3.AUTO).update(data.data).hexdigest()
