"""KV in and out of the pool: snapshots and transformers caches, both ways. Every direction copies.

Files are read, hashed and written, and KV is copied, without the engine's lock, which is held to fork, to take pages
and to put a sequence in place. Meanwhile references keep the pages as they are: nobody writes a shared page, and pages
that are being filled belong to a sequence that nobody else knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import NamedTuple, TypeVar

from torch import Tensor
from transformers import DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.engine import hf_cache
from kvcomm.engine.holdings import Holdings
from kvcomm.errors import InvalidRequest
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import LayerShape
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.memory.snapshots import SegmentRecord, SnapshotHeader, read_snapshot, write_snapshot
from kvcomm.model.geometry import ModelGeometry


class ContextState(NamedTuple):
    """What a snapshot says of a context besides its KV.

    Attributes:
        last_logits: [vocab_size] behind the last token, where they are at hand.
    """

    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    name: str | None
    note: str | None
    fidelity: Fidelity
    last_logits: Tensor | None


class Loaded(NamedTuple):
    """A snapshot that fits the model, still outside the pool; KV per layer [num_computed, num_kv_heads, dim]."""

    state: ContextState
    keys: list[Tensor]
    values: list[Tensor]


T = TypeVar("T")


def layer_shapes(geometry: ModelGeometry) -> list[LayerShape]:
    """What each layer of a model stores per token."""
    return [LayerShape(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers]


class KVExchange:
    """Reads whole sequences from the pool and writes them into it."""

    def __init__(
        self,
        memory: Memory,
        geometry: ModelGeometry,
        holdings: Holdings,
        lock: RLock,
        require_open: Callable[[], None],
    ) -> None:
        """`require_open` raises EngineClosed once the engine is closed."""
        self._memory = memory
        self._geometry = geometry
        self._holdings = holdings
        self._lock = lock
        self._require_open = require_open

    def save(self, file: Path, namespace: str, sequence: KVSequence, state: ContextState, *, is_new: bool) -> None:
        """Write a snapshot.

        Args:
            sequence: a fork of the caller's own, whose pages stay as they are while this goes on.

        Raises:
            SnapshotExists: `is_new`, and there is a file.
            SnapshotError: the file cannot be written.
        """
        keys, values = self._read(sequence, sequence.num_computed)
        header = SnapshotHeader(
            namespace=namespace,
            architecture=self._geometry.architecture,
            dtype=str(self._geometry.dtype),
            name=state.name,
            note=state.note,
            token_ids=state.token_ids,
            num_computed=sequence.num_computed,
            path=tuple(SegmentRecord(num_tokens=len(each.token_ids), name=each.name) for each in state.segments),
            fidelity=state.fidelity,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            payload_blake3="",
        )
        write_snapshot(file, header, keys, values, state.last_logits, is_new=is_new)

    def load(self, file: Path, namespace: str) -> Loaded:
        """Read and check a snapshot.

        Raises:
            SnapshotError: unreadable, altered, too new, or of another namespace; see the subclasses.
        """
        snapshot = read_snapshot(
            file,
            namespace=namespace,
            shapes=layer_shapes(self._geometry),
            dtype=self._geometry.dtype,
            vocab_size=self._geometry.vocab_size,
        )
        header = snapshot.header
        ends = itertools.accumulate(step.num_tokens for step in header.path)
        segments = tuple(
            Segment(header.token_ids[end - step.num_tokens : end], step.name)
            for end, step in zip(ends, header.path, strict=True)
        )
        device = self._memory.pool.keys[0].device
        logits = None if snapshot.logits is None else snapshot.logits.clone().to(device)
        state = ContextState(header.token_ids, segments, header.name, header.note, header.fidelity, logits)
        return Loaded(state, snapshot.keys, snapshot.values)

    def to_hf_cache(self, sequence: KVSequence, config: PreTrainedConfig, *, whole: bool) -> DynamicCache:
        """The computed tokens of a sequence as a transformers cache, unless `whole` without its last token.

        Args:
            sequence: a fork of the caller's own.
        """
        num_tokens = sequence.num_computed if whole else min(sequence.num_computed, sequence.num_tokens - 1)
        found = self._read(sequence, max(0, num_tokens))
        keys, values = ([layer.clone() for layer in layers] for layers in found)
        return hf_cache.to_cache(keys, values, config)

    def from_hf_cache(self, cache: DynamicCache, token_ids: Sequence[int]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of a transformers cache, checked against the model and its tokens; views of the cache.

        Raises:
            InvalidRequest: the cache does not fit the model or the tokens.
        """
        num_computed = cache.get_seq_length()
        if not 0 < num_computed <= len(token_ids):
            raise InvalidRequest(f"the cache holds {num_computed} tokens, the prompt has {len(token_ids)}")
        return hf_cache.from_cache(cache, self._geometry, num_computed)

    def place(
        self,
        namespace: str,
        token_ids: Sequence[int],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        fidelity: Fidelity,
        finish: Callable[[KVSequence], T],
    ) -> T:
        """Copy KV into pages of its own and make something of them that holds them.

        Args:
            keys, values: per layer [num_computed, num_kv_heads, dim], of the leading tokens.
            finish: makes it of a sequence whose KV is in place; called under the engine's lock.

        Raises:
            PoolExhausted: no pages for it, in the pool or in the namespace's quota; nothing is kept.
            EngineClosed: the engine is closed, or was meanwhile; nothing is kept.
        """
        pool, num_computed = self._memory.pool, len(keys[0])
        sequence = KVSequence(pool, token_ids)
        with self._lock:
            self._require_open()
            self._holdings.require_quota(namespace, -(-len(token_ids) // pool.page_size), num_held=0)
            self._memory.make_writable(sequence, 0, num_computed)
            self._holdings.hold(sequence, namespace)
        try:
            slots = pool.slots(sequence.pages, num_computed)
            for stored, new in zip((*pool.keys, *pool.values), (*keys, *values), strict=True):
                stored[slots] = new.to(stored.device)
            with self._lock:
                self._require_open()
                sequence.count(num_computed)
                if fidelity is Fidelity.APPROXIMATE:
                    sequence.mark_approximate(0)
                return finish(sequence)
        except BaseException:
            with self._lock:
                self._holdings.let_go(sequence)
                sequence.release()
            raise

    def _read(self, sequence: KVSequence, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first tokens, all computed, per layer [num_tokens, num_kv_heads, dim].

        Views where they can be: to be read only while a reference of the caller's own keeps the pages.
        """
        pool = self._memory.pool
        slots = pool.slots(sequence.pages, num_tokens)
        return [layer[slots] for layer in pool.keys], [layer[slots] for layer in pool.values]
