"""Sketches: a short vector for every token by which similar tokens on similar places are found.

The un-rotated keys and the values of a few layers, projected at random (Johnson-Lindenstrauss), the logarithm of the
token's index in its segment, and how much it repeats of what its source had not seen. The projection follows from the
model's shape alone, so sketches made by two processes can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.repeats import NUM_ENTRIES
from kvcomm.align.spans import SpanKV, read_span
from kvcomm.model.geometry import ModelGeometry


class SketchSettings(NamedTuple):
    """How a sketch is made.

    Attributes:
        num_groups: groups of consecutive layers that look for their own neighbors.
        layers_per_group: layers, evenly spaced over the group, whose KV is looked at.
        dim: entries of a sketch, those of position and repeats included.
        position_weight: of log(1 + index), relative to the typical norm of the rest.
        repeat_weight: of the entries of `repeats`, likewise.
    """

    num_groups: int = 3
    layers_per_group: int = 5
    dim: int = 195
    position_weight: float = 0.35
    repeat_weight: float = 0.35


class Sketcher:
    """Makes sketches for one model."""

    def __init__(self, geometry: ModelGeometry, settings: SketchSettings | None = None, seed: int = 0) -> None:
        self.settings = settings or SketchSettings()
        num_layers = len(geometry.layers)
        num_groups = self.num_groups = min(self.settings.num_groups, num_layers)
        bounds = [round(group * num_layers / num_groups) for group in range(num_groups + 1)]
        self.group_of_layer = tuple(
            group for group in range(num_groups) for _ in range(bounds[group], bounds[group + 1])
        )
        self._layer_ids = [
            _evenly(bounds[group], bounds[group + 1], self.settings.layers_per_group) for group in range(num_groups)
        ]
        self._known: WeakKeyDictionary[object, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()
        self._lock = Lock()
        generator = torch.Generator().manual_seed(seed)
        self._projections = [
            _projection(geometry, layer_ids, self.settings.dim - 1 - NUM_ENTRIES, generator)
            for layer_ids in self._layer_ids
        ]

    def __call__(self, layers: Sequence[LayerStore], move: Move) -> Tensor:
        """Sketches of the tokens of a move, [num_groups, num_tokens, dim] float32."""
        of_source = self._of_source(layers, move.source, move.index)
        repeated = self.settings.repeat_weight * move.repeats.to(of_source.device)
        return torch.cat((of_source, repeated.expand(len(of_source), -1, -1)), dim=2)

    def prepare(self, layers: Sequence[LayerStore], place: Place) -> None:
        """Make what `__call__` needs of a whole text that somebody may move from here, and keep it with its owner."""
        self._of_source(layers, place, 0)

    def _of_source(self, layers: Sequence[LayerStore], place: Place, first_index: int) -> Tensor:
        """All entries but those of repeats, which depend on the target; not to be written.

        Made once for the same span of the same owner: texts are read by several agents.
        """
        if place.owner is None:
            return self._make(layers, place, first_index)
        with self._lock:
            known = self._known.setdefault(place.owner, {})
        span = first_index, place.num_tokens
        if span not in known:
            known[span] = self._make(layers, place, first_index)
        return known[span]

    def _make(self, layers: Sequence[LayerStore], place: Place, first_index: int) -> Tensor:
        return torch.stack(
            [
                self._sketch(read_span(layers, place, layer_ids), projection, first_index)
                for layer_ids, projection in zip(self._layer_ids, self._projections, strict=True)
            ]
        )

    def _sketch(self, span: SpanKV, projection: Tensor, first_index: int) -> Tensor:
        features = torch.cat([part.flatten(1) for part in (*span.keys, *span.values)], dim=1)
        short = features @ projection.to(features.device)
        # One unit for all models: what a token's sketch measures on average. The position counts in that unit.
        short = short / short.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        index = torch.arange(first_index, first_index + len(short), device=short.device)
        return torch.cat((short, self.settings.position_weight * torch.log1p(index.float())[:, None]), dim=1)


def _evenly(first: int, end: int, count: int) -> list[int]:
    step = max(1, (end - first) // count)
    return list(range(first, end, step))


def _projection(geometry: ModelGeometry, layer_ids: Sequence[int], dim: int, generator: torch.Generator) -> Tensor:
    chosen = [geometry.layers[layer_id] for layer_id in layer_ids]
    num_features = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in chosen)
    return torch.randn(num_features, dim, generator=generator) / math.sqrt(dim)
