"""The contract every attention back end fulfils.

One forward pass computes any set of *runs*. A back end is told once per pass which runs there are (`prepare`) and is
then called once per layer. It always writes the new keys and values of all runs to their slots first, and only then
attends; so runs of one sequence may depend on each other within the same pass, and recomputation in the middle of a
sequence needs no special case. A back end knows slots and positions; it does not know sequences, trees or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int32]


class RunTable(NamedTuple):
    """Where one run of a pass reads and writes.

    A page that is written belongs to one sequence. Runs in any order are computed rightly; those of one sequence are
    read together where they follow each other by position.

    Attributes:
        pages: [>= ceil(end / page_size)] int32, page ids of positions 0..end-1 in order.
        start: first position computed in this pass.
        end: one past the last position computed; end > start.
    """

    pages: IntArray
    start: int
    end: int


class AttentionStep(Protocol):
    """One pass over fixed runs, called once per layer."""

    def __call__(
        self,
        layer_id: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write key and value of all runs to their slots, then attend.

        Args:
            layer_id: index into the storages given to `prepare`.
            query: [1, num_heads, num_tokens, key_dim], the runs concatenated.
            key: [1, num_kv_heads, num_tokens, key_dim], rotated.
            value: [1, num_kv_heads, num_tokens, value_dim].
            scale: factor on the scores.
            sliding_window: a query at p sees keys in (p - sliding_window, p]; None: [0, p].
            softcap: scaled scores become softcap * tanh(score / softcap), before anything is hidden (Gemma 2,
                arXiv 2408.00118v3, Sec. 2); None: they stay.
            sinks: [num_heads], any float dtype: for each head a logit that takes part in the sum of a row's softmax and
                has no value, so that the weights of a row sum up to less than one (gpt-oss, arXiv 2508.10925v1,
                Sec. 2.2); None: no such logit.

        Returns:
            [1, num_tokens, num_heads, value_dim], dtype of `query`.
        """
        ...


class AttentionBackend(Protocol):
    """Makes the step of a pass. Chosen explicitly by name; never changed by an exception."""

    @property
    def name(self) -> str:
        """The name the user chooses it by."""
        ...

    def prepare(
        self, runs: Sequence[RunTable], keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int
    ) -> AttentionStep:
        """Plan one pass.

        Args:
            runs: the runs in the order in which their tokens are concatenated.
            keys, values: per layer [num_slots, num_kv_heads, key_dim or value_dim]; slot = page * page_size + offset.
            page_size: tokens per page.
        """
        ...
