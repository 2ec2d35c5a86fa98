"""A move: a segment of a prompt whose KV is known from another context, and the two places of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kvcomm.align.edges import Edge
from kvcomm.align.repeats import Surroundings, repeats

if TYPE_CHECKING:
    from torch import Tensor

    from kvcomm.align.ops.contract import Place
    from kvcomm.memory.pool import PageIds


@dataclass(frozen=True, eq=False)
class Move:
    """Tokens `[start, end)` of a prompt that could be moved here from a source.

    Attributes:
        edge: from which context to which.
        start, end: positions in the prompt.
        index: of the first moved token in its segment; what stands before it is cached exactly or was not stored.
        source: where its KV is.
        source_pages: the pages of `source`; whoever keeps the move holds a reference on each.
        around: what stands around the segment, here and there.
        risk: nats of divergence to be expected of the source itself at most; 0 if it is exact.
        is_exact: whether the source is exact.
    """

    edge: Edge
    start: int
    end: int
    index: int
    source: Place
    source_pages: PageIds
    around: Surroundings
    risk: float = 0.0
    is_exact: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens that could be moved."""
        return self.end - self.start

    @property
    def num_unread(self) -> int:
        """Texts before it in the prompt that its source had not read."""
        return len(self.around.unseen)

    @cached_property
    def repeats(self) -> Tensor:
        """How much the moved tokens repeat that their source had not seen, [num_tokens, 2] float32; see `repeats`."""
        import torch

        return torch.from_numpy(repeats(self.around)[self.index : self.index + self.num_tokens])


def num_moved(moves: Sequence[Move]) -> int:
    """Tokens of all moves."""
    return sum(move.num_tokens for move in moves)


def edges_of(moves: Sequence[Move]) -> list[Edge]:
    """The edge of each move."""
    return [move.edge for move in moves]
