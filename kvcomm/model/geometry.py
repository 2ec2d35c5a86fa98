"""What KV means for one model: shapes, windows and rotation of every layer.

Read from the config where it says so and *measured* where code decides: two one-token passes at different positions
show which layers exist, what they hand to attention, and by which rotation their keys follow the position (a lone
token attends to itself only, so its keys differ between positions by the rotation alone, in every layer). A model
whose KV cannot be cached soundly is refused by name; one whose KV can be cached but not moved says why (`immovable`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.errors import UnsupportedModel, first_line
from kvcomm.model.attention import hook
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.rope import LENGTH_DEPENDENT_ROPES, RopeGeometry, rotate
from kvcomm.model.runner import ModelRunner, Run
from kvcomm.model.weights import vocab_size_of

CACHEABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
PROBE_POSITIONS = (0, 37)
ROTATION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of a key against its predicted rotation, relative to the largest key channel."""

OWN_ATTENTION = "its layers attend by code of their own, which cannot be replaced"

NUM_TRIAL_TOKENS, NUM_FIRST_TOKENS = 12, 7
LOGIT_TOLERANCE = {torch.float32: 1e-2}
LOW_PRECISION_LOGIT_TOLERANCE = 0.5
"""Largest error of the trial's logits, relative to their spread. In bfloat16 even stock chunking reaches 0.1."""


@dataclass(frozen=True)
class LayerGeometry:
    """KV of one layer, and how it is attended to.

    Attributes:
        rope: None where keys do not depend on the position or follow no known rotation.
        softcap, has_sinks: see `AttentionStep`.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    sliding_window: int | None
    rope: RopeGeometry | None
    softcap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True)
class ModelGeometry:
    """KV of a model.

    Attributes:
        architecture: class name of the model.
        layers: one entry per layer, in order.
        max_context: tokens the model may see; for length-dependent rope, up to where its frequencies stay fixed.
        immovable: why cached keys cannot be moved to other positions, or None if they can.
    """

    architecture: str
    layers: tuple[LayerGeometry, ...]
    max_context: int
    vocab_size: int
    dtype: torch.dtype
    immovable: str | None

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        channels = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return channels * self.dtype.itemsize

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> ModelGeometry:
        """Read and measure a decoder.

        Raises:
            UnsupportedModel: its KV cannot be cached soundly; the message names the model and the reason.
        """
        config = model.config.get_text_config()
        _refuse_by_config(model, config)
        probes = [_probe(model, position) for position in PROBE_POSITIONS]
        _refuse_missing_layers(model, config, probes[0])
        _refuse_other_positions(model, probes)
        candidates = list(_rope_candidates(model))
        ropes = [_measure_rope(first, second, candidates) for first, second in zip(*probes, strict=True)]
        layers = tuple(_layer(seen, rope) for seen, (rope, _) in zip(probes[0], ropes, strict=True))
        _refuse_hidden_windows(model, config, layers)
        _refuse_other_logits(model, layers)
        unknown = [index for index, (_, known) in enumerate(ropes) if not known]
        return cls(
            architecture=type(model).__name__,
            layers=layers,
            max_context=_max_context(config),
            vocab_size=vocab_size_of(model),
            dtype=model.dtype,
            immovable=_why_immovable(config, unknown),
        )


@dataclass(frozen=True)
class _Seen:
    """What one layer handed to attention in a probe."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


class _AttendsAgain(Exception):
    """A layer hands over two sets of keys and values."""


class _ProbeStep:
    """An attention step that only records; a lone token's attention output is its value."""

    def __init__(self) -> None:
        self.layers: dict[int, _Seen] = {}

    def __call__(
        self,
        layer_id: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if layer_id in self.layers:
            raise _AttendsAgain(f"layer {layer_id} attends more than once")
        self.layers[layer_id] = _Seen(query, key, value, scale, sliding_window, softcap, sinks is not None)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)


def _probe(model: PreTrainedModel, position: int) -> list[_Seen]:
    hook.register()
    step = _ProbeStep()
    device = model.device
    token, positions = torch.tensor([[1]], device=device), torch.tensor([[position]], device=device)
    try:
        with torch.inference_mode(), hook.pass_lock(model), hook.switched(hook.configs_of(model)):
            model(input_ids=token, position_ids=positions, use_cache=False, **{hook.STEP_KEYWORD: step})
    except _AttendsAgain as error:
        raise UnsupportedModel(_refusal(model, str(error))) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Code that was written for masks, caches or settings that a pass here does not bring.
        raise UnsupportedModel(_refusal(model, _why_it_fails(model, step, error))) from error
    if not step.layers:
        raise UnsupportedModel(_refusal(model, OWN_ATTENTION))
    return [step.layers[layer_id] for layer_id in sorted(step.layers)]


def _why_it_fails(model: PreTrainedModel, step: _ProbeStep, error: Exception) -> str:
    if not step.layers and not model._supports_attention_backend:
        return OWN_ATTENTION
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"a pass over one token, with neither a mask nor a cache, fails in its code ({what})"


def _refuse_by_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder or model.config.is_encoder_decoder:
        raise UnsupportedModel(_refusal(model, "it is an encoder-decoder; kvcomm caches decoder-only models"))
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModel(_refusal(model, "multi-head latent attention (MLA) caches latents, not keys and values"))
    foreign = set(getattr(config, "layer_types", None) or ()) - CACHEABLE_LAYER_TYPES
    if foreign:
        names = ", ".join(sorted(foreign))
        raise UnsupportedModel(_refusal(model, f"layers of type {names} keep a state that is not per-token KV"))
    if getattr(config, "use_bidirectional_attention", False) is True or getattr(config, "is_causal", True) is False:
        raise UnsupportedModel(_refusal(model, "its attention is not causal"))


def _refuse_missing_layers(model: PreTrainedModel, config: PreTrainedConfig, seen: Sequence[_Seen]) -> None:
    num_layers = config.num_hidden_layers
    if len(seen) == num_layers:
        return
    if len(seen) > num_layers:
        reason = f"{len(seen)} layers attend, and its config names {num_layers}"
        raise UnsupportedModel(_refusal(model, reason))
    recurrent = sorted(
        {type(module).__name__ for module in model.modules() if hasattr(module, "A_log") or hasattr(module, "conv1d")}
    )
    why = f"; {', '.join(recurrent)} keeps a recurrent state" if recurrent else ""
    reason = f"only {len(seen)} of its {num_layers} layers are attention kvcomm can replace{why}"
    raise UnsupportedModel(_refusal(model, reason))


def _refuse_hidden_windows(model: PreTrainedModel, config: PreTrainedConfig, layers: Sequence[LayerGeometry]) -> None:
    """Some models put their sliding window into the mask only; it would silently be lost."""
    types = getattr(config, "layer_types", None) or ()
    hidden = [
        index
        for index, (kind, layer) in enumerate(zip(types, layers, strict=False))
        if kind == "sliding_attention" and layer.sliding_window is None
    ]
    is_wide = not types and all(layer.sliding_window is None for layer in layers)
    if hidden or (is_wide and getattr(config, "sliding_window", None)):
        raise UnsupportedModel(_refusal(model, "it hides its sliding window in masks instead of passing it on"))


def _refuse_other_positions(model: PreTrainedModel, probes: Sequence[Sequence[_Seen]]) -> None:
    for first, second in zip(*probes, strict=True):
        for name in ("query", "key", "value"):
            if not torch.equal(getattr(first, name), getattr(second, name)):
                return
    raise UnsupportedModel(_refusal(model, "it ignores the positions it is given and counts tokens by itself"))


def _refuse_other_logits(model: PreTrainedModel, layers: Sequence[LayerGeometry]) -> None:
    """The last resort: compute a few tokens in two passes over pages and compare with the model's own forward."""
    own, got = _trial(model, layers)
    row_errors = (got - own).norm(dim=-1) / (own - own.mean(-1, keepdim=True)).norm(dim=-1)
    error = float(row_errors.median())
    if error > LOGIT_TOLERANCE.get(model.dtype, LOW_PRECISION_LOGIT_TOLERANCE):
        reason = (
            f"computed in two passes its logits differ by {error:.2g} of their spread: it is not causal, takes "
            "positions from elsewhere, or keeps a state besides keys and values"
        )
        raise UnsupportedModel(_refusal(model, reason))


@torch.inference_mode()
def _trial(model: PreTrainedModel, layers: Sequence[LayerGeometry]) -> tuple[Tensor, Tensor]:
    """Logits of a second pass, [num_rows, vocab_size] float32: the model's own and those of runs over pages."""
    # Tokens from all over the vocabulary: the first ones are often special or never trained.
    vocab_size = vocab_size_of(model)
    token_ids = np.linspace(0.1 * vocab_size, 0.9 * vocab_size, NUM_TRIAL_TOKENS).astype(np.int32)
    whole = torch.from_numpy(token_ids.astype(np.int64))[None].to(model.device)
    own = model(input_ids=whole, use_cache=False).logits[0, NUM_FIRST_TOKENS:]
    shapes = [(NUM_TRIAL_TOKENS, layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers]
    runner = ModelRunner(
        model,
        keys=[own.new_zeros(slots, heads, key_dim, dtype=model.dtype) for slots, heads, key_dim, _ in shapes],
        values=[own.new_zeros(slots, heads, value_dim, dtype=model.dtype) for slots, heads, _, value_dim in shapes],
        page_size=NUM_TRIAL_TOKENS,
        backend=TorchBackend(),
    )
    page = np.zeros(1, dtype=np.int32)
    runner.forward([Run(token_ids[:NUM_FIRST_TOKENS], page, 0)])
    second = token_ids[NUM_FIRST_TOKENS:]
    got = runner.forward([Run(second, page, NUM_FIRST_TOKENS, num_logits=len(second))])
    return own.float(), got.float()


def _refusal(model: nn.Module, reason: str) -> str:
    return f"{type(model).__name__} is not supported: {reason}"


def _layer(seen: _Seen, rope: RopeGeometry | None) -> LayerGeometry:
    return LayerGeometry(
        num_heads=seen.query.shape[1],
        num_kv_heads=seen.key.shape[1],
        key_dim=seen.key.shape[-1],
        value_dim=seen.value.shape[-1],
        scale=seen.scale,
        sliding_window=seen.sliding_window,
        rope=rope,
        softcap=seen.softcap,
        has_sinks=seen.has_sinks,
    )


def _rope_candidates(model: nn.Module) -> Iterator[RopeGeometry]:
    """Every rotation the model's rotary modules could mean, in both channel layouts."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                prefix = name.removesuffix("inv_freq")
                kind = getattr(module, "rope_type", "default")
                kind = kind.get(prefix.removesuffix("_"), "default") if isinstance(kind, dict) else kind
                scaling = float(getattr(module, f"{prefix}attention_scaling", None) or 1.0)
                for direction in (1, -1):  # a few turn the other way round
                    inv_freq = tuple((direction * buffer.float()).tolist())
                    for interleaved in (False, True):
                        yield RopeGeometry(str(kind), inv_freq, interleaved, scaling)


def _measure_rope(first: _Seen, second: _Seen, candidates: Sequence[RopeGeometry]) -> tuple[RopeGeometry | None, bool]:
    """The rotation that takes a layer's probe keys from the first to the second position, and whether one was found."""
    tolerance = ROTATION_TOLERANCE.get(first.key.dtype, 5e-2) * float(first.key.abs().max())
    if float((first.key - second.key).abs().max()) <= tolerance:
        return None, True
    delta = PROBE_POSITIONS[1] - PROBE_POSITIONS[0]
    for rope in candidates:
        if rope.rotary_dim <= first.key.shape[-1]:
            error = float((rotate(first.key, delta, rope).float() - second.key.float()).abs().max())
            if error <= tolerance:
                return rope, True
    return None, False


def _rope_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return per_layer_type or [parameters]


def _rope_kinds(config: PreTrainedConfig) -> set[str]:
    return {str(entry.get("rope_type", "default")) for entry in _rope_settings(config)}


def _max_context(config: PreTrainedConfig) -> int:
    longest = int(getattr(config, "max_position_embeddings", 0) or 2**20)
    if not _rope_kinds(config) & LENGTH_DEPENDENT_ROPES:
        return longest
    # Beyond this length the frequencies change with the length, and with them every cached key.
    originals = [entry.get("original_max_position_embeddings") for entry in _rope_settings(config)]
    return min([longest, *(int(original) for original in originals if original)])


def _why_immovable(config: PreTrainedConfig, unknown: Sequence[int]) -> str | None:
    changing = sorted(_rope_kinds(config) & LENGTH_DEPENDENT_ROPES)
    if changing:
        return f"{', '.join(changing)} rope changes its frequencies with the length"
    if unknown:
        return f"keys of layers {', '.join(map(str, unknown))} follow the position by no known rotation"
    return None
