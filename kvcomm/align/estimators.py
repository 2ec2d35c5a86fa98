"""Estimators: what the KV of a moved segment would be in its new context.

All behind one interface. `rotate` only turns the keys; `token` (the default) adds, token by token, the offsets of the
most similar anchor tokens; `paper` is KVCOMM's published estimator (arXiv 2510.12872v2, Eq. 5-7), for comparison. Each
owns what it learns. A `Correction` is a snapshot: nothing learned later changes what a request in flight gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvcomm.align.attention_mass import damaged_layers
from kvcomm.align.bank import AnchorStore, BankSnapshot
from kvcomm.align.edges import Edge
from kvcomm.align.expected_error import anchor_errors, neighbor_weights
from kvcomm.align.moves import Move
from kvcomm.align.ops.choice import Ops
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.sketch import Sketcher
from kvcomm.align.spans import SpanKV, read_span
from kvcomm.model.rope import rotate


class Written(NamedTuple):
    """What is known of an estimate that has been written.

    Attributes:
        distance: of the text to what is known: 0 where the estimator has no notion of it.
        errors: [num_tokens] float32, expected, only compared with each other; None where nobody asked.
    """

    distance: float
    errors: Tensor | None


class Correction(Protocol):
    """What an estimator knows about one edge, unchangeable."""

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        """Write the estimate of what is moved to the target's slots.

        Args:
            with_errors: whether expected errors are wanted.
        """
        ...


class Estimator(Protocol):
    """One way to estimate."""

    @property
    def name(self) -> str:
        """The name the user chooses it by."""
        ...

    @property
    def strengths(self) -> tuple[float, ...]:
        """Factors on the correction worth comparing, the last one 0 if there are several."""
        ...

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """Whether enough has been learned about an edge, so that further examples change nothing."""
        ...

    def evidence(self, namespace: str, edge: Edge) -> int:
        """How much is known about exactly this edge; only compared."""
        ...

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """Learn from what could be moved and is known in both contexts; returns how many tokens were kept."""
        ...

    def correction(self, namespace: str, edge: Edge, strength: float = 1.0) -> Correction | None:
        """What is known about the edge now, with `strength`, one of `strengths`; None: too little."""
        ...


class RotateEstimator:
    """Turns the keys to their new positions and corrects nothing."""

    name = "rotate"
    strengths = (1.0,)

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """There is nothing to learn."""
        return True

    def evidence(self, namespace: str, edge: Edge) -> int:
        """Nothing."""
        return 0

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """There is nothing to learn."""
        return 0

    def correction(self, namespace: str, edge: Edge, strength: float = 1.0) -> Correction:
        """Always the same."""
        return self

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        """See `Correction`; every text is as near as any other, every token as far off."""
        self._ops.rotate(layers, move.source, target)
        return Written(0.0, _alike(layers, move) if with_errors else None)


class TokenSettings(NamedTuple):
    """How offsets of neighbors are combined.

    Attributes:
        k: neighbors of each token.
        alpha: factor on the weighted offsets; below 1 it shrinks the noise that neighbors bring with them.
        temperature: of the softmax over negative distances, each relative to the token's mean distance.
        min_tokens: anchor tokens below which an edge is not used.
        mature_tokens: anchor tokens from which on an edge is calibrated instead of taught, if its bank holds as many.
        alphas: factors on `alpha`, one per group of layers; empty: all 1.
    """

    k: int = 8
    alpha: float = 1.0
    temperature: float = 4.0
    min_tokens: int = 64
    mature_tokens: int = 1200
    alphas: tuple[float, ...] = ()


class TokenEstimator:
    """Adds the offsets of each token's nearest anchor tokens."""

    name = "token"
    strengths = (1.0, 0.75, 0.5, 0.0)

    def __init__(self, anchors: AnchorStore, sketcher: Sketcher, ops: Ops, settings: TokenSettings | None = None):
        self.anchors = anchors
        self.settings = settings or TokenSettings()
        self._sketcher = sketcher
        self._ops = ops

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """Whether the edge's own bank is mature or full.

        The one for its slots in any context does not count: it mixes contexts, and an edge that rested on it would
        never get a bank of its own.
        """
        return self.evidence(namespace, edge) >= min(self.settings.mature_tokens, self.anchors.max_bank_tokens)

    def evidence(self, namespace: str, edge: Edge) -> int:
        """Tokens in the edge's own bank."""
        snapshot = self.anchors.find(namespace, edge, 1)
        return snapshot.num_tokens if snapshot is not None and snapshot.edge == edge else 0

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """Add the offsets between source and truth to the edge's bank and to the one for its slots in any context."""
        known = read_span(layers, move.source)
        # Layer 0 sees the token and its position only: there is nothing to correct.
        offsets = read_span(layers, truth).minus(known, range(1, len(layers)))
        sketches = self._sketcher(layers, move)
        banks = (self.anchors.bank(namespace, each) for each in (move.edge, move.edge.general))
        return max([bank.learn(sketches, offsets) for bank in banks])

    def correction(self, namespace: str, edge: Edge, strength: float = 1.0) -> Correction | None:
        """The snapshot of the most specific bank that is old enough; at strength 0 it only tells the distance."""
        snapshot = self.anchors.find(namespace, edge, self.settings.min_tokens)
        if snapshot is None:
            return None
        settings = self.settings._replace(alpha=strength * self.settings.alpha)
        return _TokenCorrection(snapshot, self._sketcher, self._ops, settings)


class _TokenCorrection:
    """Offsets of one snapshot's nearest anchors."""

    def __init__(self, snapshot: BankSnapshot, sketcher: Sketcher, ops: Ops, settings: TokenSettings) -> None:
        self._snapshot = snapshot
        self._sketcher = sketcher
        self._ops = ops
        self._settings = settings

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        """See `Correction`; the distance is the mean over tokens of that to the nearest anchor token."""
        distances, indices = self._snapshot.nearest(self._sketcher(layers, move), self._settings.k)
        weights = neighbor_weights(distances, self._settings.temperature)
        if self._settings.alpha:
            scaled = weights * self._settings.alpha
            if self._settings.alphas:
                scaled *= torch.tensor(self._settings.alphas, device=scaled.device)[:, None, None]
            neighbors = Neighbors(indices, scaled, self._sketcher.group_of_layer)
            self._ops.align(layers, move.source, target, self._snapshot.offsets, neighbors)
        else:
            self._ops.rotate(layers, move.source, target)
        errors = self._errors(len(layers), weights, indices) if with_errors else None
        return Written(float(distances[..., 0].mean()), errors)

    def _errors(self, num_layers: int, weights: Tensor, indices: Tensor) -> Tensor:
        """Those of the neighbors, weighed as their offsets are, in the layers that carry most of the damage."""
        layer_ids = damaged_layers(num_layers)
        group = self._sketcher.group_of_layer[layer_ids[len(layer_ids) // 2]]
        k, alpha, temperature = self._settings.k, self._settings.alpha, self._settings.temperature
        alpha *= self._settings.alphas[group] if self._settings.alphas else 1.0
        known = self._snapshot.errors.get(alpha)
        if known is None:
            known = anchor_errors(self._snapshot, layer_ids, group, k=k, alpha=alpha, temperature=temperature)
            self._snapshot.errors[alpha] = known
        return (weights[group] * known[indices[group]]).sum(-1)


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
    strengths = (1.0,)
    max_texts = 20

    def __init__(self) -> None:
        self._texts: dict[tuple[str, Edge], list[_Text]] = {}

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

    def correction(self, namespace: str, edge: Edge, strength: float = 1.0) -> Correction | None:
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
        return Written(entropy, _alike(layers, move) if with_errors else None)


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


def _alike(layers: Sequence[LayerStore], move: Move) -> Tensor:
    """Errors of an estimator that does not tell tokens apart."""
    return torch.ones(move.num_tokens, device=layers[0].keys.device)


def _write_span(layers: Sequence[LayerStore], target: Place, span: SpanKV) -> None:
    """Write KV with un-rotated keys to the target's slots."""
    positions = torch.arange(target.start, target.start + target.num_tokens, device=span.keys[0].device)
    for layer, keys, values in zip(layers, span.keys, span.values, strict=True):
        turned = keys if layer.rope is None else rotate(keys, positions, layer.rope)
        layer.keys[target.slots] = turned.to(layer.keys.dtype)
        layer.values[target.slots] = values.to(layer.values.dtype)
