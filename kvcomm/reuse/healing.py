"""Healing: the exact twin of a sequence whose KV is approximate, computed until it can take its place.

A twin is a second sequence of the same tokens. It shares what is exact already, of its sequence and of the tree, and is
computed from there on, left to right, on pages of its own: moved text, glue, tail, and what was decoded behind them.
Once it has caught up it is put in place, and the sequence goes on with it. Who computes it and when is not known here:
a request does while it is decoded (`engine.healing_work`), a repair beside requests (`repair`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvcomm.memory.memory import Memory
    from kvcomm.memory.sequences import KVSequence


class NotHealed(StrEnum):
    """Why a request whose policy heals has left approximate KV behind."""

    NO_ROOM = "no_room"
    """The pool cannot hold the prompt twice."""
    QUOTA = "quota"
    """The tenant's quota of held tokens leaves no room for it."""
    SEVERAL_ANSWERS = "several_answers"
    """Every choice stands on the same moved KV, and none of them is kept."""
    NO_ANSWER = "no_answer"
    """Only a prompt was asked for; the answer behind it will heal it."""


class Healing:
    """The exact twin of one sequence. Called under the engine's lock.

    Attributes:
        own: the sequence that is healed.
        twin: its pages are this object's until they are put in place; left empty then.
        approximate_from: where the KV of the sequence was approximate from on, before it was healed.
        has_begun: whether the twin is one: before, it only holds pages.
        is_in_place: whether the sequence has the twin's KV.
    """

    def __init__(self, memory: Memory, namespace: str, own: KVSequence) -> None:
        from kvcomm.memory.sequences import KVSequence  # which imports torch

        self.own = own
        self.twin = KVSequence(memory.pool)
        self.approximate_from = own.approximate_from
        self.has_begun = False
        self.is_in_place = False
        self._memory = memory
        self._namespace = namespace

    @property
    def has_caught_up(self) -> bool:
        """Whether as much is computed of the twin as of its sequence, and the same."""
        return self._is_alike and self.twin.num_computed >= self.own.num_computed

    def reserve(self, num_pages: int) -> None:
        """Hold so many pages for a twin that `begin` makes of them."""
        self.twin.make_writable(0, num_pages * self._memory.pool.page_size)

    def begin(self, num_tokens: int) -> None:
        """Share what is exact already, and own pages for the rest of `num_tokens` tokens.

        Raises:
            PoolExhausted: no pages for them.
        """
        self.has_begun = True
        self.approximate_from = self.own.approximate_from
        self.twin.release()
        self._take_tokens(self.own.num_computed)
        self._share()
        self._memory.make_writable(self.twin, self.twin.num_computed, num_tokens)

    def grow(self, num_tokens: int) -> bool:
        """Let the twin have the sequence's first `num_tokens` tokens; False if those that it has are others by now.

        Raises:
            PoolExhausted: no pages for them.
        """
        if not self._is_alike:
            return False
        self._take_tokens(num_tokens)
        self._memory.make_writable(self.twin, self.twin.num_computed, num_tokens)
        return True

    def stretch(self, num_tokens: int) -> tuple[int, int]:
        """`[start, end)` of what is to be computed of the first `num_tokens` tokens; may be empty."""
        return self.twin.num_computed, max(self.twin.num_computed, num_tokens)

    def put_in_place(self) -> None:
        """Let the sequence have the twin's KV, which must have caught up; its own is given back."""
        self.own.exchange(self.twin)
        self.is_in_place = True

    def release(self) -> None:
        """Give the twin's pages back. Idempotent."""
        self.twin.release()

    @property
    def _is_alike(self) -> bool:
        """Whether the sequence still begins with the twin's tokens: it may have been rolled back, and gone on."""
        return np.array_equal(self.own.token_ids[: self.twin.num_tokens], self.twin.token_ids)

    def _take_tokens(self, num_tokens: int) -> None:
        self.twin.append(self.own.token_ids[self.twin.num_tokens : num_tokens])

    def _share(self) -> None:
        own, twin, page_size = self.own, self.twin, self._memory.pool.page_size
        match = self._memory.tree.look(self._namespace, twin.token_ids)
        pages, num_tokens = match.pages, match.num_tokens
        if own.num_exact > num_tokens:
            pages, num_tokens = own.pages[: -(-own.num_exact // page_size)], own.num_exact
        if num_tokens > twin.num_computed:
            twin.adopt(pages, num_tokens)
