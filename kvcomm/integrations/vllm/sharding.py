"""KV of one tensor-parallel shard: which heads a rank holds, and how records of shards are cut, joined and found.

vLLM gives each of `size` ranks an equal, contiguous part of the KV heads; where there are more ranks than heads, as
many neighbours hold copies of one head. Everything that moves, rotates or corrects KV works head by head, so a shard's
KV is the whole model's with fewer heads, and nothing else about it is different.

A tier holds one object per part, not one per model: a record is verified as a whole after every get, so a rank that
read its heads out of a whole model's record would read all of it, and a rank that saves would have to wait for the
others. The part stands in the namespace of the shard's space, by its heads and not by its rank: ranks with copies share
an object. Readers with another number of ranks ask for the parts that cover their heads (`covering`) and cut theirs out
of them (`heads_of`). What one rank has and another lacks is not there: `common_length`. Sums over ranks are rounded in
another order for another number of ranks, so the connector puts that number into the producer and reads only parts that
as many ranks wrote; joining parts of others is proven here and used by nobody yet.

Proven by simulated shards; it has never run on more than one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import KV, TierSpace


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


def all_shards(size: int) -> tuple[Shard, ...]:
    """Every rank of a model, in order."""
    return tuple(Shard(rank, size) for rank in range(size))


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


def cut(kv: KV, shard: Shard) -> KV:
    """The part of the whole model's KV that a rank holds: views, per layer [num_tokens, own heads, dim].

    Raises:
        UnsupportedModel: as `Shard.heads`.
    """
    return KV([_own(each, shard) for each in kv.keys], [_own(each, shard) for each in kv.values])


def join(parts: Sequence[KV], num_kv_heads: Sequence[int]) -> KV:
    """The whole model's KV of the parts of all ranks, in order; new tensors.

    Args:
        num_kv_heads: of the whole model, per layer: copies are taken once.

    Raises:
        ValueError: the parts hold other heads, or other tokens, than such ranks do.
    """
    shards = all_shards(len(parts))
    keys = [_joined([part.keys[at] for part in parts], shards, heads) for at, heads in enumerate(num_kv_heads)]
    values = [_joined([part.values[at] for part in parts], shards, heads) for at, heads in enumerate(num_kv_heads)]
    return KV(keys, values)


def covering(shard: Shard, size: int, num_kv_heads: Sequence[int]) -> tuple[Shard, ...]:
    """The writers among `size` ranks that together hold all heads of `shard`, in order.

    Args:
        num_kv_heads: of the whole model, per layer.
    """
    wanted = [shard.heads(heads) for heads in num_kv_heads]
    return tuple(
        each
        for each in all_shards(size)
        if any(
            each.writes(heads) and _overlap(each.heads(heads), own)
            for heads, own in zip(num_kv_heads, wanted, strict=True)
        )
    )


def heads_of(shard: Shard, writers: Sequence[Shard], parts: Sequence[KV], num_kv_heads: Sequence[int]) -> KV:
    """A rank's KV of the parts that `covering` named, written by another number of ranks; new tensors.

    Raises:
        ValueError: the parts do not hold all heads of the rank.
    """

    def gather(tensors: Sequence[Tensor], num_heads: int) -> Tensor:
        return _gathered(shard.heads(num_heads), tensors, writers, num_heads)

    keys = [gather([part.keys[at] for part in parts], heads) for at, heads in enumerate(num_kv_heads)]
    values = [gather([part.values[at] for part in parts], heads) for at, heads in enumerate(num_kv_heads)]
    return KV(keys, values)


def common_length(space: TierSpace, size: int, length_of: Callable[[TierSpace], int]) -> int:
    """Leading tokens that a tier holds for every rank: a rank that died while it saved makes it shorter.

    Args:
        length_of: such as `lambda each: tier.prefix_length(each, token_ids)`.
    """
    spaces = {space_of(space, shard) for shard in all_shards(size)}
    return min(map(length_of, spaces))


def _own(tensor: Tensor, shard: Shard) -> Tensor:
    heads = shard.heads(tensor.shape[1])
    return tensor[:, heads.start : heads.stop]


def _joined(tensors: Sequence[Tensor], shards: Sequence[Shard], num_heads: int) -> Tensor:
    return _gathered(range(num_heads), tensors, shards, num_heads)


def _gathered(wanted: range, tensors: Sequence[Tensor], shards: Sequence[Shard], num_heads: int) -> Tensor:
    """Heads `wanted` out of the tensors of shards."""
    where: dict[int, Tensor] = {}
    for shard, tensor in zip(shards, tensors, strict=True):
        heads = shard.heads(num_heads)
        if tensor.shape[1] != len(heads):
            raise ValueError(f"rank {shard.rank} of {shard.size} holds {len(heads)} heads, not {tensor.shape[1]}")
        where |= {head: tensor[:, at] for at, head in enumerate(heads)}
    missing = [head for head in wanted if head not in where]
    if missing:
        raise ValueError(f"no part holds the heads {missing} of {num_heads}")
    return torch.stack([where[head] for head in wanted], dim=1)


def _overlap(left: range, right: range) -> bool:
    return left.start < right.stop and right.start < left.stop
