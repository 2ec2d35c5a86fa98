"""Where one answer stands in its grammar: which tokens may come, which must, and whether it is complete.

The state follows the answer token by token and never goes back: a guess is only looked at, and tokens are taken once
they belong to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest

MAX_MESSAGE = 300
"""Letters of an error that come from the library."""


class GrammarState:
    """The state of one answer. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar, end_token_ids: Sequence[int], vocab_size: int) -> None:
        """`matcher`: its own, at the beginning of the answer."""
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

    def forbidden(self, *, with_ends: bool = True) -> Tensor:
        """The tokens that may not come next: [vocab_size] bool; end tokens may come where the answer may end.

        Args:
            with_ends: False: they may not, wherever it is.

        Raises:
            InvalidRequest: going on costs more than a step may take.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_sound()
        allowed = np.unpackbits(mask, bitorder="little", count=self._vocab_size)
        forbidden = ~torch.from_numpy(allowed.view(np.bool_))
        if not with_ends:
            forbidden[self._end_token_ids] = True
        return forbidden

    def take(self, token_id: int) -> None:
        """The answer goes on with this token.

        Raises:
            InvalidRequest: going on costs more than a step may take.
        """
        self._matcher.consume_token(token_id)
        self._require_sound()

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is only one way to write them; none are taken."""
        return self._matcher.compute_ff_tokens()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(list(token_ids))

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            message = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
            raise InvalidRequest(f"the answer cannot go on under {self._grammar!r}: {message[:MAX_MESSAGE]}")
