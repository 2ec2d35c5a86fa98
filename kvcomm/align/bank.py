"""Anchor banks: for every edge, the offsets of some tokens and the sketches by which they are found.

A bank owns its anchors and which of them are worth keeping. Learning never changes what somebody already looks at: a
snapshot is immutable, and a new one takes its place. Banks of different namespaces never meet. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcomm.align.edges import Edge
from kvcomm.align.index import NeighborIndex, make_index
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.errors import InvalidRequest
from kvcomm.model.geometry import ModelGeometry

DEFAULT_BANK_BYTES = 16 * 2**20

MIN_NOVELTY = 0.05
"""Relative distance to the nearest anchor below which a token teaches nothing new."""


class BankShape(NamedTuple):
    """What every bank of a model holds per anchor token.

    Attributes:
        keys, values: channels per layer, None where a layer has no offsets.
        num_groups: groups of layers with sketches of their own.
        dim: entries of a sketch.
    """

    keys: tuple[int | None, ...]
    values: tuple[int | None, ...]
    num_groups: int
    dim: int

    @classmethod
    def of(cls, geometry: ModelGeometry, *, num_groups: int, dim: int) -> Self:
        """The shape of a model's banks; its first layer needs no offsets."""
        layers = geometry.layers
        keys = tuple(layer.num_kv_heads * layer.key_dim if index else None for index, layer in enumerate(layers))
        values = tuple(layer.num_kv_heads * layer.value_dim if index else None for index, layer in enumerate(layers))
        return cls(keys, values, num_groups, dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one anchor token: int8 codes and a float32 scale per row, a float32 sketch per group, its text."""
        rows = [channels for channels in (*self.keys, *self.values) if channels is not None]
        return sum(rows) + 4 * len(rows) + 4 * self.num_groups * self.dim + 4

    def require(self, sketches: Tensor, offsets: OffsetTable) -> None:
        """Raises InvalidRequest unless sketches and offsets are finite and of this shape."""
        wanted = (self.num_groups, offsets.num_tokens, self.dim)
        if tuple(sketches.shape) != wanted:
            raise InvalidRequest(f"sketches must be {wanted}, not {tuple(sketches.shape)}")
        for kind, sizes, rows in (("keys", self.keys, offsets.keys), ("values", self.values, offsets.values)):
            found = tuple(None if each is None else each.codes.shape[1] for each in rows)
            if found != sizes:
                raise InvalidRequest(f"offsets of {kind} must have {sizes} channels per layer, not {found}")
        scales = [rows.scales for rows in (*offsets.keys, *offsets.values) if rows is not None]
        if not all(bool(part.isfinite().all()) for part in (sketches, *scales)):
            raise InvalidRequest("anchors must be finite; the KV they were measured on is not")


@dataclass(frozen=True, eq=False)
class BankSnapshot:
    """A bank at one moment.

    Attributes:
        version: grows with every change of the bank.
        sketches: [num_groups, num_tokens, dim] float32.
        offsets: of the same tokens.
        texts: [num_tokens] int32; anchors of one text have the same number.
        errors: what estimators have found out about their anchors, by how strongly they correct.
    """

    edge: Edge
    version: int
    sketches: Tensor
    offsets: OffsetTable
    texts: Tensor
    errors: dict[float, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Anchor tokens."""
        return self.sketches.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of offsets and sketches."""
        return self.offsets.num_bytes + self.sketches.nbytes + self.texts.nbytes

    @cached_property
    def _indices(self) -> tuple[NeighborIndex, ...]:
        return tuple(make_index(sketches) for sketches in self.sketches)

    def nearest(self, sketches: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest anchors of [num_groups, num_queries, dim] sketches.

        Returns:
            Distances float32 and anchors int64, [num_groups, num_queries, min(k, num_tokens)], the nearest first.
        """
        found = [index.search(queries, k) for index, queries in zip(self._indices, sketches, strict=True)]
        return torch.stack([distances for distances, _ in found]).sqrt(), torch.stack([rows for _, rows in found])


class AnchorBank:
    """The anchors of one edge, bounded in bytes."""

    def __init__(self, edge: Edge, shape: BankShape, *, max_bytes: int = DEFAULT_BANK_BYTES) -> None:
        self.edge = edge
        self.shape = shape
        self.max_tokens = max(1, max_bytes // shape.token_bytes)
        self._lock = threading.Lock()
        self._snapshot = _empty(edge, shape)

    def snapshot(self) -> BankSnapshot:
        """The bank as it is now; never changes."""
        return self._snapshot

    def learn(self, sketches: Tensor, offsets: OffsetTable) -> int:
        """Take the tokens of one text that the bank has nothing like; returns how many.

        Over the byte cap the most redundant anchors go: of the two nearest to each other, the older one.

        Args:
            sketches: [num_groups, num_tokens, dim] float32.
            offsets: of the same tokens.

        Raises:
            InvalidRequest: of another shape, or not finite; the bank is unchanged.
        """
        self.shape.require(sketches, offsets)
        with self._lock:
            old = self._snapshot
            novel = _novel(old.sketches, sketches)
            if not len(novel):
                return 0
            grown_sketches = torch.cat((old.sketches, sketches[:, novel]), dim=1)
            grown_offsets = old.offsets.append(offsets.take(novel))
            text = int(old.texts.max()) + 1 if old.num_tokens else 0
            grown_texts = torch.cat((old.texts, torch.full((len(novel),), text, dtype=torch.int32)))
            if grown_sketches.shape[1] > self.max_tokens:
                kept = _least_redundant(grown_sketches, self.max_tokens)
                grown_sketches, grown_offsets = grown_sketches[:, kept], grown_offsets.take(kept)
                grown_texts = grown_texts[kept]
            self._snapshot = BankSnapshot(self.edge, old.version + 1, grown_sketches, grown_offsets, grown_texts)
            return len(novel)

    def replace(self, snapshot: BankSnapshot) -> None:
        """Take over what was loaded from a file.

        Raises:
            InvalidRequest: of another shape, or too large; the bank is unchanged.
        """
        self.shape.require(snapshot.sketches, snapshot.offsets)
        if snapshot.num_tokens > self.max_tokens:
            raise InvalidRequest(f"{snapshot.num_tokens} anchor tokens exceed the bank's {self.max_tokens}")
        with self._lock:
            version = self._snapshot.version + 1
            self._snapshot = replace(snapshot, edge=self.edge, version=version, errors={})

    def check_integrity(self) -> None:
        """Raises AssertionError if the snapshot is not of the bank's shape or too large."""
        snapshot = self._snapshot
        self.shape.require(snapshot.sketches, snapshot.offsets)
        assert snapshot.num_tokens <= self.max_tokens, (snapshot.num_tokens, self.max_tokens)
        assert snapshot.texts.shape == (snapshot.num_tokens,), (snapshot.texts.shape, snapshot.num_tokens)


class AnchorStore:
    """The banks of an engine, tenant by tenant."""

    def __init__(self, shape: BankShape, *, max_bank_bytes: int = DEFAULT_BANK_BYTES) -> None:
        self.shape = shape
        self._max_bank_bytes = max_bank_bytes
        self.max_bank_tokens = max(1, max_bank_bytes // shape.token_bytes)
        self._lock = threading.Lock()
        self._banks: dict[str, dict[Edge, AnchorBank]] = {}

    def bank(self, namespace: str, edge: Edge) -> AnchorBank:
        """The bank of an edge, made on first use."""
        with self._lock:
            banks = self._banks.setdefault(namespace, {})
            if edge not in banks:
                banks[edge] = AnchorBank(edge, self.shape, max_bytes=self._max_bank_bytes)
            return banks[edge]

    def find(self, namespace: str, edge: Edge, min_tokens: int) -> BankSnapshot | None:
        """The edge's own bank if it has `min_tokens`, else the one for its slots in any context if that has."""
        banks = self._banks.get(namespace, {})
        for each in (edge, edge.general):
            bank = banks.get(each)
            if bank is not None and bank.snapshot().num_tokens >= min_tokens:
                return bank.snapshot()
        return None

    def banks(self, namespace: str) -> Iterator[AnchorBank]:
        """Every bank of a namespace."""
        with self._lock:
            yield from list(self._banks.get(namespace, {}).values())

    def forget(self, namespace: str) -> None:
        """Forget every bank of a namespace."""
        with self._lock:
            self._banks.pop(namespace, None)

    def check_integrity(self) -> None:
        """Raises AssertionError if a bank is broken or under the wrong edge."""
        for banks in self._banks.values():
            for edge, bank in banks.items():
                assert bank.edge == edge, (bank.edge, edge)
                bank.check_integrity()


def _empty(edge: Edge, shape: BankShape) -> BankSnapshot:
    keys = tuple(None if size is None else OffsetRows.empty(size) for size in shape.keys)
    values = tuple(None if size is None else OffsetRows.empty(size) for size in shape.values)
    nothing = torch.empty(0, dtype=torch.int32)
    return BankSnapshot(edge, 0, torch.empty(shape.num_groups, 0, shape.dim), OffsetTable(keys, values), nothing)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """[num_first, num_second]: mean over groups of the distances of sketches, relative to the first ones' norms."""
    norms = first.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    relative: Tensor = torch.cdist(first, second) / norms
    return relative.mean(0)


def _novel(known: Tensor, fresh: Tensor) -> Tensor:
    """Indices of fresh tokens that are unlike the known ones and the fresh ones taken before them, ascending."""
    among = _distances(fresh, fresh)
    nearest = _distances(fresh, known).amin(1) if known.shape[1] else torch.full((fresh.shape[1],), torch.inf)
    taken = []
    for token in range(fresh.shape[1]):
        if nearest[token] > MIN_NOVELTY:
            taken.append(token)
            nearest = torch.minimum(nearest, among[:, token])
    return torch.tensor(taken, dtype=torch.int64)


def _least_redundant(sketches: Tensor, count: int) -> Tensor:
    """Indices of `count` tokens, ascending, after dropping, one by one, the older of the nearest two."""
    distances = _distances(sketches, sketches)
    distances.fill_diagonal_(torch.inf)
    nearest, partner = distances.min(1)
    alive = torch.ones(len(distances), dtype=torch.bool)
    for _ in range(len(distances) - count):
        token = int(nearest.argmin())
        loser = min(token, int(partner[token]))
        alive[loser] = False
        distances[loser] = distances[:, loser] = torch.inf
        nearest[loser] = torch.inf
        orphans = (partner == loser).nonzero().flatten()
        orphans = orphans[alive[orphans]]
        if len(orphans):
            nearest[orphans], partner[orphans] = distances[orphans].min(1)
    kept: Tensor = alive.nonzero().flatten()
    return kept
