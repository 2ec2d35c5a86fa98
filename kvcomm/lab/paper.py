"""KVCOMM's published estimator (arXiv 2510.12872v2, Eq. 5-7), for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.align.edges import Edge
from kvcomm.align.estimators import Correction, Written, alike
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.spans import SpanKV, read_span
from kvcomm.model.rope import rotate


class _Text(NamedTuple):
    """One whole anchor text, float32: source KV and what leads from it to the target."""

    known: SpanKV
    offsets: SpanKV


class PaperEstimator:
    """KVCOMM as published: anchors aligned by token index, weighed by a softmax over their distances.

    Source: arXiv 2510.12872v2, Eq. 5-7 and its entropy gate. Deviation: key offsets are kept un-rotated and added in
    the frame of position 0; the publication adds them in the anchor's absolute frame, wrong by the rotation between.
    """

    name = "paper"
    max_texts = 20

    def __init__(self) -> None:
        self._texts: dict[tuple[str, Edge], list[_Text]] = {}

    def corrects(self, edge: Edge) -> bool:
        """Any."""
        return True

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """Whether the anchor pool is full."""
        return len(self._texts.get((namespace, edge), ())) >= self.max_texts

    def evidence(self, namespace: str, edge: Edge) -> int:
        """Anchor texts of the edge."""
        return len(self._texts.get((namespace, edge), ()))

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """Keep the text as an anchor, in place of the oldest if the pool is full."""
        if move.index:
            return 0  # anchors are aligned from the first token of a segment on
        known, true = read_span(layers, move.source), read_span(layers, truth)
        offsets = SpanKV(_differences(true.keys, known.keys), _differences(true.values, known.values))
        texts = self._texts.setdefault((namespace, move.edge), [])
        texts.append(_Text(known, offsets))
        del texts[: -self.max_texts]
        return move.num_tokens

    def correction(self, namespace: str, edge: Edge) -> Correction | None:
        """The texts known now."""
        texts = tuple(self._texts.get((namespace, edge), ()))
        return _PaperCorrection(texts) if texts else None


class _PaperCorrection:
    def __init__(self, texts: tuple[_Text, ...]) -> None:
        self._texts = texts

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        """See `Correction`; the distance is the published gate's: entropy of the weights over that of equal ones."""
        known, last = read_span(layers, move.source), move.index + move.num_tokens
        texts = [text for text in self._texts if text.known.num_tokens >= last]
        span, entropy = slice(move.index, last), 1.0
        if texts:
            key_weights = _index_weights(known.keys, [text.known.keys for text in texts], span)
            value_weights = _index_weights(known.values, [text.known.values for text in texts], span)
            for weights, text in zip(key_weights, texts, strict=True):
                _add_weighted(known.keys, text.offsets.keys, weights, span)
            for weights, text in zip(value_weights, texts, strict=True):
                _add_weighted(known.values, text.offsets.values, weights, span)
            entropy = _entropy_ratio(key_weights)
        _write_span(layers, target, known)
        return Written(entropy, alike(layers, move) if with_errors else None)


# Layer by layer: what all layers take at once is handed out by the system anew every time, and that takes longer than
# the arithmetic.


def _differences(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(first - second for first, second in zip(one, other, strict=True))


def _index_weights(known: Sequence[Tensor], anchors: Sequence[Sequence[Tensor]], span: slice) -> Tensor:
    """[num_texts, num_tokens]: softmax over texts of the negative mean distance at the same index."""
    distances = torch.zeros(len(anchors), len(known[0]), device=known[0].device)
    for place, anchor in enumerate(anchors):
        for own, other in zip(known, anchor, strict=True):
            distances[place] += (own - other[span]).abs_().sum((1, 2))
    return torch.softmax(-distances / sum(layer[0].numel() for layer in known), dim=0)


def _add_weighted(known: Sequence[Tensor], offsets: Sequence[Tensor], weights: Tensor, span: slice) -> None:
    for own, offset in zip(known, offsets, strict=True):
        own.addcmul_(offset[span], weights[:, None, None])


def _entropy_ratio(weights: Tensor) -> float:
    if len(weights) == 1:
        return 0.0
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(0).mean()
    return float(entropy) / math.log(len(weights))


def _write_span(layers: Sequence[LayerStore], target: Place, span: SpanKV) -> None:
    """Write KV with un-rotated keys to the target's slots."""
    positions = torch.arange(target.start, target.start + target.num_tokens, device=span.keys[0].device)
    for layer, keys, values in zip(layers, span.keys, span.values, strict=True):
        turned = keys if layer.rope is None else rotate(keys, positions, layer.rope)
        layer.keys[target.slots] = turned.to(layer.keys.dtype)
        layer.values[target.slots] = values.to(layer.values.dtype)
