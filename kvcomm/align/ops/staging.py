"""Reading and writing spans of the pool in float32: views where a span is contiguous and float32, copies elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kvcomm.align.ops.contract import Place


class Staging:
    """One span on its way from source to target slots of one tensor of the pool.

    Attributes:
        source: [num_tokens, num_kv_heads, dim] float32, not to be written.
        out: the same shape, to be filled; on leaving it is in the target's slots, rounded once.
    """

    def __init__(self, stored: Tensor, source: Place, target: Place) -> None:
        self._stored, self._target = stored, target
        self.source = stored[source.slots].float()
        self._is_view = isinstance(target.slots, slice) and stored.dtype == torch.float32
        self.out = stored[target.slots] if self._is_view else torch.empty_like(self.source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_view and error is None:
            self._stored[self._target.slots] = self.out.to(self._stored.dtype)
