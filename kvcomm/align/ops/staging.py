"""Reading and writing spans of the pool in float32: in place where it is float32 and contiguous, copies elsewhere."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcomm.align.ops.contract import Place


class Staging:
    """One span on its way from source to target slots of one tensor of the pool.

    Attributes:
        source, out: [num_rows, channels] float32; may be the same memory. `source` is not to be written.
        from_rows, to_rows: [num_tokens] int64, where the tokens are read in `source`, and where they are to be written
            in `out`; on leaving they are in the target's slots, rounded once.
    """

    def __init__(self, stored: Tensor, source: Place, target: Place) -> None:
        self._stored, self._target = stored, target
        self._copy: Tensor | None = None
        if stored.dtype == torch.float32 and stored.is_contiguous():
            self.source = self.out = stored.flatten(1).numpy()
            self.from_rows, self.to_rows = _numbers(source.slots), _numbers(target.slots)
        else:
            copied = stored[source.slots].float().contiguous()
            self._copy = torch.empty_like(copied)
            self.source, self.out = copied.flatten(1).numpy(), self._copy.flatten(1).numpy()
            self.from_rows = self.to_rows = np.arange(len(copied))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._copy is not None and error is None:
            self._stored[self._target.slots] = self._copy.to(self._stored.dtype)


def _numbers(slots: slice | Tensor) -> NDArray[np.int64]:
    return np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots.numpy()
