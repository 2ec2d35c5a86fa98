"""How a back end gets into an unmodified transformers model.

transformers looks its attention function up by name at every call and hands keyword arguments of `model(...)` through
to it. One name is registered here; the step of a pass travels as the keyword `kvcomm_step`. The model's own attention
setting is switched only while a pass runs (`switched`), so the same model object still serves stock `generate`. If
another thread calls the model in just that moment it reaches the functions here without a step, and they hand on to
transformers' own SDPA.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcomm.errors import UnsupportedModel
from kvcomm.model.attention.contract import AttentionStep
from kvcomm.model.attention.merging import weight_beside
from kvcomm.model.attention.pieces import Scoring, attention_with_lse

IMPLEMENTATION = "kvcomm"
STEP_KEYWORD = "kvcomm_step"

STOCK = "sdpa"

_this_thread = threading.local()
"""Marks the thread that is inside `switched`; transformers' registries are process-wide, its config is not ours."""

_pass_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_pass_locks_lock = threading.Lock()

SCORE_CHANGING_KEYWORDS = (
    "attention_bias",
    "block_indices",
    "head_mask",
    "indices",
    "position_bias",
    "sinks",
)
"""Keywords through which a model asks for scores that no back end here computes.

`sinks` are other ones for each token; those of a head are called `s_aux`.
"""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kvcomm_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls; shapes as in `AttentionStep`, `s_aux` are the sinks.

    Raises:
        UnsupportedModel: the layer asks for scores no back end computes (biases, own masks), or is not causal.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kvcomm_step is None:
        if softcap is not None or s_aux is not None:
            return _masked_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
        return _stock_attention(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **keywords
        )
    asked = [name for name in SCORE_CHANGING_KEYWORDS if keywords.get(name) is not None]
    if asked:
        raise UnsupportedModel(f"{type(module).__name__} changes attention scores through {', '.join(asked)}")
    if attention_mask is not None:
        raise UnsupportedModel(f"{type(module).__name__} makes an attention mask of its own")
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModel(f"{type(module).__name__} is not causal: it sees tokens that come later")
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise UnsupportedModel(f"{type(module).__name__} has sinks of shape {list(s_aux.shape)}, not one for each head")
    layer_id = module.layer_idx
    assert isinstance(layer_id, int)
    out = kvcomm_step(
        layer_id, query, key, value, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return out.contiguous(), None  # which stock functions give, and some models view in another shape


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What stock SDPA cannot compute, for somebody else's pass; `mask` as SDPA takes it, None: causal."""
    is_causal = mask is None and query.shape[2] > 1
    if mask is not None and mask.dtype == torch.bool:
        # Finite, as in stock models: a row of padding sees nothing, and must not become NaN.
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    out, lse = attention_with_lse(query, key, value, Scoring(scale, softcap), causal=is_causal, bias=mask)
    if sinks is not None:
        out = (out * weight_beside(lse, sinks[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous()


def _stock_attention(*operands: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    out: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[STOCK](*operands, **keywords)
    return out


def _mask(*args: Any, **keywords: Any) -> Any:
    """No mask for a pass of ours: back ends know what a row may see. The stock mask for everybody else."""
    if getattr(_this_thread, "is_inside", False):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[STOCK](*args, **keywords)


def register() -> None:
    """Make the name known to transformers. Safe to call again."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def pass_lock(model: nn.Module) -> threading.Lock:
    """The lock to hold during a pass: one for each model, whoever runs it.

    Two engines may serve one model object. The first to leave `switched` would take the setting from under the other.
    """
    with _pass_locks_lock:  # not on the model itself: it could not be copied or pickled any more
        return _pass_locks.setdefault(model, threading.Lock())


@contextmanager
def switched(configs: Iterable[PreTrainedConfig]) -> Iterator[None]:
    """Point the configs' attention setting here, and back to what it was on leaving. Hold `pass_lock`."""
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config, _ in before:
        config._attn_implementation_internal = IMPLEMENTATION
    _this_thread.is_inside = True
    try:
        yield
    finally:
        _this_thread.is_inside = False
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The distinct config objects that modules of the model read their attention setting from."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
