"""KV of one tensor-parallel shard: which heads a rank holds, and where a tier keeps what it saves.

vLLM gives each of `size` ranks an equal, contiguous part of the KV heads; where there are more ranks than heads, as
many neighbours hold copies of one head. Everything that moves, rotates or corrects KV works head by head, so a shard's
KV is the whole model's with fewer heads, and nothing else about it is different.

A tier holds one object per part, not one per model: a record is verified as a whole after every get, so a rank that
read its heads out of a whole model's record would read all of it, and a rank that saves would have to wait for the
others. The part stands in the namespace of the shard's space, by its heads and not by its rank: ranks with copies share
an object. Sums over ranks are rounded in another order for another number of ranks, so the connector puts that number
into the producer and reads only parts that as many ranks wrote: parts are never joined.

Proven by simulated shards; it has never run on more than one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvcomm.errors import UnsupportedModel
from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import TierSpace


@dataclass(frozen=True)
class Shard:
    """One rank of a model that `size` ranks compute together.

    Raises:
        ValueError: there is no such rank.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"there is no rank {self.rank} of {self.size}")

    def heads(self, num_kv_heads: int) -> range:
        """The KV heads of a layer that this rank holds.

        Raises:
            UnsupportedModel: heads and ranks do not divide evenly, which vLLM does not serve either.
        """
        if num_kv_heads >= self.size and num_kv_heads % self.size == 0:
            share = num_kv_heads // self.size
            return range(self.rank * share, (self.rank + 1) * share)
        if num_kv_heads < self.size and self.size % num_kv_heads == 0:
            head = self.rank * num_kv_heads // self.size
            return range(head, head + 1)
        raise UnsupportedModel(
            f"{num_kv_heads} KV heads cannot be shared by {self.size} tensor-parallel ranks: one must divide the other"
        )

    def writes(self, num_kv_heads: int) -> bool:
        """Whether this rank is the first that holds its heads: copies need to be saved once."""
        heads = self.heads(num_kv_heads)
        return self.rank == 0 or Shard(self.rank - 1, self.size).heads(num_kv_heads) != heads

    def shapes(self, shapes: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
        """What this rank stores per layer, of what the whole model stores."""
        return tuple(shape._replace(num_kv_heads=len(self.heads(shape.num_kv_heads))) for shape in shapes)


def space_of(space: TierSpace, shard: Shard) -> TierSpace:
    """The space of a shard's KV, of that of the whole model. One rank alone is the whole model: the same space.

    Raises:
        UnsupportedModel: as `Shard.heads`.
    """
    if shard.size == 1:
        return space
    heads = (shard.heads(shape.num_kv_heads) for shape in space.shapes)
    named = ",".join(f"{each.start}-{each.stop}" for each in heads)
    return replace(space, namespace=f"{space.namespace}|heads {named}", shapes=shard.shapes(space.shapes))
