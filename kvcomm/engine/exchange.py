"""KV in and out of the pool: snapshots and transformers caches, both ways. Every direction copies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as AnySequence
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.engine import hf_cache
from kvcomm.engine.context import Context
from kvcomm.errors import InvalidRequest, SnapshotCorrupt
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import LayerShape
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence
from kvcomm.memory.snapshots import SegmentRecord, SnapshotHeader, read_snapshot, write_snapshot
from kvcomm.model.geometry import ModelGeometry


class Restored(NamedTuple):
    """What a context is made of again."""

    sequence: Sequence
    segments: tuple[Segment, ...]
    name: str | None
    last_logits: Tensor | None
    note: str | None


def layer_shapes(geometry: ModelGeometry) -> list[LayerShape]:
    """What each layer of a model stores per token."""
    return [LayerShape(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers]


class KVExchange:
    """Reads whole sequences from the pool and writes them into it, holding the engine's lock meanwhile."""

    def __init__(self, memory: Memory, geometry: ModelGeometry, lock: RLock) -> None:
        self._memory = memory
        self._geometry = geometry
        self._lock = lock

    def save(self, context: Context, file: Path, namespace: str) -> None:
        """Write a snapshot of an idle context.

        Raises:
            SnapshotError: the file cannot be written.
        """
        with self._lock:
            keys, values = self._read(context.sequence, context.sequence.num_computed)
            logits = context.ready_logits
            header = SnapshotHeader(
                namespace=namespace,
                architecture=self._geometry.architecture,
                dtype=str(self._geometry.dtype),
                name=context.name,
                note=context.note,
                token_ids=context.tokens,
                num_computed=context.sequence.num_computed,
                path=tuple(SegmentRecord(num_tokens=len(s.token_ids), name=s.name) for s in context.segments),
                fidelity=context.fidelity,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                payload_blake3="",
            )
        write_snapshot(file, header, keys, values, logits)

    def restore(self, file: Path, namespace: str) -> Restored:
        """Read a snapshot into the pool.

        Raises:
            SnapshotError: unreadable, altered, too new, or of another namespace; see the subclasses.
            PoolExhausted: no pages for it; nothing is kept.
        """
        shapes = layer_shapes(self._geometry)
        snapshot = read_snapshot(file, namespace=namespace, shapes=shapes, dtype=self._geometry.dtype)
        header = snapshot.header
        if max(header.token_ids, default=0) >= self._geometry.vocab_size:
            raise SnapshotCorrupt(
                f"{file} holds token {max(header.token_ids)}; the model knows {self._geometry.vocab_size} tokens"
            )
        ends = itertools.accumulate(step.num_tokens for step in header.path)
        segments = tuple(
            Segment(header.token_ids[end - step.num_tokens : end], step.name)
            for end, step in zip(ends, header.path, strict=True)
        )
        sequence = self._write(header.token_ids, snapshot.keys, snapshot.values, header.fidelity)
        logits = None if snapshot.logits is None else snapshot.logits.clone().to(self._memory.pool.keys[0].device)
        return Restored(sequence, segments, header.name, logits, header.note)

    def to_hf_cache(self, sequence: Sequence, config: PreTrainedConfig, *, whole: bool) -> DynamicCache:
        """The computed tokens of a sequence as a transformers cache, unless `whole` without the sequence's last one."""
        with self._lock:
            num_tokens = sequence.num_computed if whole else min(sequence.num_computed, sequence.num_tokens - 1)
            keys, values = self._read(sequence, max(0, num_tokens))
        return hf_cache.to_cache(keys, values, config)

    def from_hf_cache(self, cache: DynamicCache, token_ids: AnySequence[int]) -> Sequence:
        """A sequence from a transformers cache and its tokens, marked approximate: nobody can vouch for that KV.

        Raises:
            InvalidRequest: the cache does not fit the model or the tokens.
            PoolExhausted: no pages for it; nothing is kept.
        """
        num_computed = cache.get_seq_length()
        if not 0 < num_computed <= len(token_ids):
            raise InvalidRequest(f"the cache holds {num_computed} tokens, the prompt has {len(token_ids)}")
        keys, values = hf_cache.from_cache(cache, self._geometry, num_computed)
        return self._write(token_ids, keys, values, Fidelity.APPROXIMATE)

    def _read(self, sequence: Sequence, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first tokens, all computed, per layer [num_tokens, num_kv_heads, dim]."""
        pool = self._memory.pool
        slots = pool.slots(sequence.pages, num_tokens)
        keys = [layer[slots].clone() for layer in pool.keys]
        values = [layer[slots].clone() for layer in pool.values]
        return keys, values

    def _write(
        self, token_ids: AnySequence[int], keys: AnySequence[Tensor], values: AnySequence[Tensor], fidelity: Fidelity
    ) -> Sequence:
        pool, num_computed = self._memory.pool, len(keys[0])
        sequence = Sequence(pool, token_ids)
        with self._lock:
            self._memory.make_writable(sequence, 0, num_computed)
            slots = pool.slots(sequence.pages, num_computed)
            for stored, new in zip((*pool.keys, *pool.values), (*keys, *values), strict=True):
                stored[slots] = new.to(stored.device)
            sequence.num_computed = num_computed
            if fidelity is Fidelity.APPROXIMATE:
                sequence.mark_approximate(0)
        return sequence
