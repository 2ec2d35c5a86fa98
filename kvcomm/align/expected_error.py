"""How far off an anchor's offset was, had it been estimated from the anchors of other texts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomm.align.bank import BankSnapshot

ROWS = 256
"""Anchors that are looked at together."""


def anchor_errors(
    snapshot: BankSnapshot, layer_ids: range, group: int, *, k: int, alpha: float, temperature: float
) -> Tensor:
    """Norm of what is left of every anchor's key offset in some layers, [num_tokens] float32.

    Its own text is left out: a token next to it in the same text tells more about it than any other will.

    Args:
        group: of layers, by whose sketches neighbors are found.
        k, alpha, temperature: of the estimator; see `TokenSettings`.
    """
    sketches, texts = snapshot.sketches[group], snapshot.texts
    left = []
    for first in range(0, snapshot.num_tokens, ROWS):
        chosen = slice(first, first + ROWS)
        distances = torch.cdist(sketches[chosen], sketches)
        distances.masked_fill_(texts[chosen, None] == texts[None], torch.inf)
        near, rows = distances.topk(min(k, snapshot.num_tokens), largest=False)
        # Nothing is near where a bank holds one text only: then the whole offset is left.
        weights = alpha * neighbor_weights(near, temperature).nan_to_num_(0.0)
        squares = torch.zeros(len(near), device=near.device)
        for layer_id in layer_ids:
            offsets = snapshot.offsets.keys[layer_id]
            if offsets is not None:
                own, others = offsets.take(torch.arange(*chosen.indices(len(sketches)))), offsets.take(rows)
                estimate = (others.codes.float() * (weights * others.scales)[..., None]).sum(1)
                squares += (own.dequantize() - estimate).square().sum(1)
        left.append(squares.sqrt())
    return torch.cat(left) if left else torch.empty(0)


def neighbor_weights(distances: Tensor, temperature: float) -> Tensor:
    """Softmax over [..., k] distances, each relative to their mean; the weights sum to one."""
    finite = distances.where(distances.isfinite(), torch.nan)
    mean = finite.nanmean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.softmax(-temperature * distances / mean, dim=-1)
