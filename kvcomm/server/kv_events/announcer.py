"""What to announce, given what the radix tree tells: whole blocks of the namespaces that have an owner.

The tree splits and cuts its paths at any token; vLLM's events are about blocks of a fixed size. A token of a path is in
the tree once, so a block comes with its last token and goes with it, whatever has happened to the path between. Always
holds, after any events: what was announced and not taken back are the whole blocks of the owned namespaces. Knows
neither sockets nor threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvcomm.memory.events import CacheEvent, EventKind
from kvcomm.memory.node import TokenIds
from kvcomm.server.kv_events.blocks import DEFAULT_SEED, Owner, as_int, block_hash, root_hash


class BlocksStored(NamedTuple):
    """Consecutive blocks of one path are here now.

    Attributes:
        block_hashes: low 64 bits of their names.
        parent_block_hash: of the block before the first of them; None: they begin the path.
        token_ids: of all of them.
        first_index: of the first of them in its path.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    first_index: int
    owner: Owner


class BlocksRemoved(NamedTuple):
    """Blocks are here no more."""

    block_hashes: list[int]


class AllCleared(NamedTuple):
    """Nothing is here."""


KVEvent = BlocksStored | BlocksRemoved | AllCleared


class _Block(NamedTuple):
    """A block by what names it, within its namespace."""

    parent: bytes
    tokens: bytes  # int32


class Announcer:
    """Turns the tree's events into announcements, and remembers what it has announced."""

    def __init__(self, block_size: int, seed: str = DEFAULT_SEED) -> None:
        """Make one.

        Args:
            block_size: in tokens; independent of the pool's pages.
        """
        self.block_size = block_size
        self._root = root_hash(seed)
        self._announced: dict[str, dict[_Block, bytes]] = {}  # by namespace: each block's name

    @property
    def num_blocks(self) -> int:
        """Announced, and not taken back."""
        return sum(len(blocks) for blocks in self._announced.values())

    def announce(self, events: Iterable[CacheEvent], owners: Mapping[str, Owner]) -> list[KVEvent]:
        """What to say about events of the tree, in their order; none of them may be LOST.

        Args:
            owners: by namespace; what happens in others is nobody's business.
        """
        said: list[KVEvent | None] = []
        for event in events:
            owner = owners.get(event.namespace)
            if owner is not None:
                is_stored = event.kind is EventKind.STORED
                said.append(self._stored(event, owner) if is_stored else self._removed(event, owner))
        return [each for each in said if each is not None]

    def begin_again(self, stored: Iterable[CacheEvent], owners: Mapping[str, Owner]) -> list[KVEvent]:
        """What to say where events were lost, or namespaces have other owners: what has gone, then what is new.

        Args:
            stored: all that is in the tree now (`RadixTree.all_stored`).
        """
        before, self._announced = self._announced, {}
        told = self.announce(stored, owners)
        known = {name for blocks in before.values() for name in blocks.values()}
        present = {name for blocks in self._announced.values() for name in blocks.values()}
        gone = [as_int(name) for name in known - present]
        unknown = {as_int(name) for name in present - known}
        new = [each for each in told if isinstance(each, BlocksStored) and not unknown.isdisjoint(each.block_hashes)]
        return [*([BlocksRemoved(gone)] if gone else []), *new]

    def _stored(self, event: CacheEvent, owner: Owner) -> BlocksStored | None:
        """The blocks that end in [start, end) of the path, unless they are known."""
        size, blocks = self.block_size, self._announced.setdefault(event.namespace, {})
        first, last = event.start // size, event.end // size
        parent = before = self._name_before(event, owner, first)
        names: list[bytes] = []
        for index in range(first, last):
            block = _Block(parent, _tokens(event.path, index, size).tobytes())
            parent = self._name(block, owner, index)
            blocks[block] = parent
            names.append(parent)
        if not names:
            return None
        return BlocksStored(
            block_hashes=[as_int(name) for name in names],
            parent_block_hash=as_int(before) if first else None,
            token_ids=event.path[first * size : last * size].tolist(),
            first_index=first,
            owner=owner,
        )

    def _removed(self, event: CacheEvent, owner: Owner) -> BlocksRemoved | None:
        size, blocks = self.block_size, self._announced.get(event.namespace, {})
        first, last = event.start // size, event.end // size
        parent = self._name_before(event, owner, first)
        gone: list[int] = []
        for index in range(first, last):
            name = blocks.pop(_Block(parent, _tokens(event.path, index, size).tobytes()), None)
            if name is None:
                break
            gone.append(as_int(name))
            parent = name
        return BlocksRemoved(gone) if gone else None

    def _name_before(self, event: CacheEvent, owner: Owner, index: int) -> bytes:
        """The name of the block before the one with that index."""
        name, blocks = self._root, self._announced.get(event.namespace, {})
        for before in range(index):
            block = _Block(name, _tokens(event.path, before, self.block_size).tobytes())
            name = blocks.get(block) or self._name(block, owner, before)
        return name

    def _name(self, block: _Block, owner: Owner, index: int) -> bytes:
        return block_hash(block.parent, memoryview(block.tokens).cast("i").tolist(), owner.keys(index))


def _tokens(path: TokenIds, index: int, size: int) -> TokenIds:
    return path[index * size : (index + 1) * size]
