"""Estimators: what the KV of a moved segment would be in its new context.

All behind one interface. `rotate` only turns the keys; `token` adds, token by token, the offsets of the most similar
anchor tokens; those of others are in `kvcomm.lab`. Each owns what it learns. A `Correction` is a snapshot: nothing
learned later changes what a request in flight gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvcomm.align.attention_mass import damaged_layers
from kvcomm.align.bank import AnchorStore, BankSnapshot
from kvcomm.align.edges import Edge
from kvcomm.align.expected_error import anchor_errors, neighbor_weights
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore, Neighbors, Ops, Place
from kvcomm.align.sketch import Sketcher
from kvcomm.align.spans import read_span


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

    def corrects(self, edge: Edge) -> bool:
        """Whether it does with this edge what no other estimator does."""
        ...

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """Whether enough has been learned about an edge, so that further examples change nothing."""
        ...

    def evidence(self, namespace: str, edge: Edge) -> int:
        """How much is known about exactly this edge: tokens or texts."""
        ...

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """Learn from what could be moved and is known in both contexts; returns how many tokens were kept."""
        ...

    def correction(self, namespace: str, edge: Edge) -> Correction | None:
        """What is known about the edge now; None: too little."""
        ...


class RotateEstimator:
    """Turns the keys to their new positions and corrects nothing."""

    name = "rotate"

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def corrects(self, edge: Edge) -> bool:
        """Turning is what it does."""
        return True

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """There is nothing to learn."""
        return True

    def evidence(self, namespace: str, edge: Edge) -> int:
        """Nothing."""
        return 0

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """There is nothing to learn."""
        return 0

    def correction(self, namespace: str, edge: Edge) -> Correction:
        """Always the same."""
        return self

    def write(self, layers: Sequence[LayerStore], move: Move, target: Place, *, with_errors: bool) -> Written:
        """See `Correction`; every text is as near as any other, every token as far off."""
        self._ops.rotate(layers, move.source, target)
        return Written(0.0, alike(layers, move) if with_errors else None)


class TokenSettings(NamedTuple):
    """How offsets of neighbors are combined.

    Attributes:
        k: neighbors of each token.
        alpha: factor on the weighted offsets; below 1 it shrinks the noise that neighbors bring with them.
        temperature: of the softmax over negative distances, each relative to the token's mean distance.
        min_tokens: anchor tokens below which an edge is not used.
        mature_tokens: anchor tokens from which on an edge is taught no more, if its bank holds as many.
        alphas: factors on `alpha`, one per group of layers; empty: all 1.
    """

    k: int = 8
    alpha: float = 1.0
    temperature: float = 4.0
    min_tokens: int = 64
    mature_tokens: int = 512
    alphas: tuple[float, ...] = ()


class TokenEstimator:
    """Adds the offsets of each token's nearest anchor tokens."""

    name = "token"

    def __init__(self, anchors: AnchorStore, sketcher: Sketcher, ops: Ops, settings: TokenSettings | None = None):
        self.anchors = anchors
        self.settings = settings or TokenSettings()
        self._sketcher = sketcher
        self._ops = ops

    @property
    def num_enough(self) -> int:
        """Anchor tokens of an edge from which on none are added."""
        return min(self.settings.mature_tokens, self.anchors.max_bank_tokens)

    def corrects(self, edge: Edge) -> bool:
        """Not between slots of one row (documents).

        What their KV lacks depends on the neighbors of the moment, and offsets of others made it worse.
        """
        return edge.source != edge.target

    def is_ready(self, namespace: str, edge: Edge) -> bool:
        """Whether the edge's own bank is mature or full.

        The one for its slots in any context does not count: it mixes contexts, and an edge that rested on it would
        never get a bank of its own.
        """
        if not self.corrects(edge):
            return True
        return self.evidence(namespace, edge) >= self.num_enough

    def evidence(self, namespace: str, edge: Edge) -> int:
        """Tokens in the edge's own bank."""
        snapshot = self.anchors.find(namespace, edge, 1)
        return snapshot.num_tokens if snapshot is not None and snapshot.edge == edge else 0

    def learn(self, namespace: str, layers: Sequence[LayerStore], move: Move, truth: Place) -> int:
        """Add the offsets between source and truth to the edge's bank and to the one for its slots in any context."""
        if not self.corrects(move.edge):
            return 0
        known = read_span(layers, move.source)
        # Layer 0 sees the token and its position only: there is nothing to correct.
        offsets = read_span(layers, truth).minus(known, range(1, len(layers)))
        sketches = self._sketcher(layers, move)
        banks = (self.anchors.bank(namespace, each) for each in (move.edge, move.edge.general))
        return max([bank.learn(sketches, offsets) for bank in banks])

    def correction(self, namespace: str, edge: Edge) -> Correction | None:
        """The snapshot of the most specific bank that is old enough."""
        if not self.corrects(edge):
            return RotateEstimator(self._ops)
        snapshot = self.anchors.find(namespace, edge, self.settings.min_tokens)
        return None if snapshot is None else _TokenCorrection(snapshot, self._sketcher, self._ops, self.settings)


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
        scaled = weights * self._settings.alpha
        if self._settings.alphas:
            scaled *= torch.tensor(self._settings.alphas, device=scaled.device)[:, None, None]
        neighbors = Neighbors(indices, scaled, self._sketcher.group_of_layer)
        self._ops.align(layers, move.source, target, self._snapshot.offsets, neighbors)
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


def alike(layers: Sequence[LayerStore], move: Move) -> Tensor:
    """Errors of an estimator that does not tell tokens apart."""
    return torch.ones(move.num_tokens, device=layers[0].keys.device)
