"""Where one answer stands in its grammar: which tokens may come, which must, and whether it is complete.

The state follows the answer token by token and never goes back: a guess is only looked at, and tokens are taken once
they belong to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import thread_time

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher
from torch import Tensor

from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest

MAX_MESSAGE = 300
"""Letters of an error that come from the library."""


DEAR_S = 0.001
"""Of computing, from which on a grammar is dear; an ordinary one takes a fifth of it."""

MaskBytes = npt.NDArray[np.uint8]


class GrammarState:
    """The state of one answer. Used by one thread at a time.

    Attributes:
        cost_s: of computing, what the next look at all tokens is taken to cost: what the latest one did, or half of
            what was expected of it, so that one that is dear now and then counts as dear between.
        num_waited: steps that the answer has been left out of lately, see `grammar_turns`.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        grammar: Grammar,
        end_token_ids: Sequence[int],
        vocab_size: int,
        *,
        mask: MaskBytes | None = None,
        cost_s: float = 0.0,
    ) -> None:
        """Make one.

        Args:
            matcher: its own, at the beginning of the answer.
            mask: what it says about the first token, if that is known.
            cost_s: of computing that.
        """
        self.cost_s = cost_s
        self.num_waited = 0
        self._mask = mask
        self._matcher = matcher
        self._grammar = grammar
        self._end_token_ids = torch.tensor([each for each in end_token_ids if each < vocab_size], dtype=torch.int64)
        self._vocab_size = vocab_size

    def copy(self) -> GrammarState:
        """The same state for another answer."""
        copy = object.__new__(GrammarState)
        copy.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy())
        return copy

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether it must end here."""
        return self._matcher.is_stopped()

    @property
    def is_dear(self) -> bool:
        """Whether looking at the next tokens takes long, as far as is known."""
        return self.cost_s >= DEAR_S

    @property
    def must_look(self) -> bool:
        """Whether `look` would cost anything."""
        return self._mask is None

    def look(self) -> None:
        """Find out what `forbidden` will say. It is the dearest part of a step, and needs no lock."""
        if self._mask is None:
            begun_s = thread_time()
            self._mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self.cost_s = max(thread_time() - begun_s, self.cost_s / 2)

    def forbidden(self, *, with_ends: bool = True) -> Tensor:
        """The tokens that may not come next: [vocab_size] bool; end tokens may come where the answer may end.

        Args:
            with_ends: False: they may not, wherever it is.

        Raises:
            InvalidRequest: going on costs more than a step may take.
        """
        self.look()
        assert self._mask is not None
        self._require_sound()
        allowed = np.unpackbits(self._mask, bitorder="little", count=self._vocab_size)
        forbidden = ~torch.from_numpy(allowed.view(np.bool_))
        if not with_ends:
            forbidden[self._end_token_ids] = True
        return forbidden

    def take(self, token_id: int) -> None:
        """The answer goes on with this token.

        Raises:
            InvalidRequest: going on costs more than a step may take.
        """
        self._mask = None
        self._matcher.consume_token(token_id)
        self._require_sound()

    def take_forced(self) -> list[int]:
        """Take the tokens that must come next, as far as there is only one way to write them; returns them.

        Raises:
            InvalidRequest: going on costs more than a step may take.
        """
        forced = self._matcher.compute_ff_tokens()
        for token_id in forced:
            self.take(token_id)
        return forced

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(list(token_ids))

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            message = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
            raise InvalidRequest(f"the answer cannot go on under {self._grammar!r}: {message[:MAX_MESSAGE]}")
