"""Choosers: which of the moved tokens a rung computes after all.

Most look first: a pass over glue and tail tells what the end of the prompt attends to, and with it how much each moved
token is worth. Others know at once. Choosers that serve comparison only are in `kvcomm.lab`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kvcomm.align.ladder import ATTENTION, top_tokens
from kvcomm.align.moves import Move
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray


class View(NamedTuple):
    """What a chooser may look at.

    Attributes:
        moves: ascending, disjoint.
        num_exact: tokens of the exact prefix that was found.
        sequence: the prompt; its slots behind the exact prefix may be written until something is chosen.
        scores: [number of moved tokens], how much each is worth computing; None for choosers that do not look.
        exact: the same prompt with exact KV, in replays; None: nobody has it.
    """

    moves: Sequence[Move]
    num_exact: int
    sequence: KVSequence
    scores: Tensor | None = None
    exact: KVSequence | None = None


class Chooser(Protocol):
    """One way to choose."""

    @property
    def name(self) -> str:
        """The name that rungs have it by."""
        ...

    @property
    def looks(self) -> bool:
        """Whether it needs scores, and so the first pass."""
        ...

    def choose(self, view: View, share: float) -> IntArray:
        """Positions to compute, ascending; at most `share` of the moved tokens.

        Costlier shares hold all of cheaper ones.
        """
        ...


class AttentionChooser:
    """The tokens with the largest scores."""

    name = ATTENTION
    looks = True

    def choose(self, view: View, share: float) -> IntArray:
        """See `Chooser`."""
        assert view.scores is not None
        return top_tokens(view.moves, share, view.scores)
