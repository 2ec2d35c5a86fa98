"""Slots and rows as an attention call takes them: read in place where they are consecutive, gathered where not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = slice | Tensor
"""Rows or slots: a slice where they are consecutive (a view), else an int64 tensor (a gather)."""

SlotArray = npt.NDArray[np.int64]

MIN_VIEW_TOKENS = 256
"""Consecutive slots among scattered ones are read in place from this number on; fewer are gathered together."""


def index_of(values: npt.NDArray[np.integer], device: torch.device) -> Index:
    """Rows or slots, at least one, as a slice if they are consecutive."""
    first = int(values[0])
    if (np.diff(values) == 1).all():
        return slice(first, first + len(values))
    return tensor_of(values, device)


def tensor_of(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device; on CPU they share their memory."""
    return torch.from_numpy(values).to(device)


def consecutive_parts(slots: SlotArray) -> list[tuple[int, int]]:
    """The parts of consecutive slots, in order, each as positions [start, end) in `slots`."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    return list(pairwise([0, *breaks.tolist(), len(slots)]))


def views_and_gather(slots: SlotArray, device: torch.device) -> list[Index]:
    """Cover slots by views of their long consecutive parts and one gather of all the others."""
    parts = [slots[start:end] for start, end in consecutive_parts(slots)]
    if len(parts) == 1:
        return [index_of(slots, device)]
    scattered = [part for part in parts if len(part) < MIN_VIEW_TOKENS]
    views = [part for part in parts if len(part) >= MIN_VIEW_TOKENS]
    gathered = [np.concatenate(scattered)] if scattered else []
    return [index_of(part, device) for part in (*views, *gathered)]
