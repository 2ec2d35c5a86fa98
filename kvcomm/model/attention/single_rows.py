"""Plans what single rows see alone (decode): many rows, each with slots of its own.

One call per row would cost more in calls than in attention, and the few heads of one row do not fill the cores. So
rows whose stretches lie evenly spaced in the pool (any two do) share one call that reads them in place, and what is
left of each row, a few slots, goes into one padded batch for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvcomm.model.attention.pieces import (
    FullPiece,
    PaddedPiece,
    Piece,
    SlotArray,
    StridedPiece,
    consecutive_parts,
    index_of,
    tensor_of,
    views_and_gather,
)

MAX_PADDED_TOKENS = 128
"""Rests of at most this many slots share a padded batch; a longer one is attended for its row alone."""


class SingleRow(NamedTuple):
    """A row of the pass and the slots, at least one, that it has still to see.

    Attributes:
        merge: whether the row has a partial result already.
    """

    row: int
    slots: SlotArray
    merge: bool


class _Stretch(NamedTuple):
    """Consecutive slots of a row, read in place."""

    row: int
    first: int
    num_slots: int
    merge: bool


def plan_single_rows(rows: Iterable[SingleRow], device: torch.device) -> list[Piece]:
    """Pieces in which every row sees its slots once, each `merge` piece after the one it is merged into."""
    pieces: list[Piece] = []
    stretches: list[_Stretch] = []
    rests: dict[int, tuple[SlotArray, bool]] = {}
    for row, slots, merge in rows:
        first, end = max(consecutive_parts(slots), key=lambda part: part[1] - part[0])
        if end - first <= MAX_PADDED_TOKENS:
            rests[row] = slots, merge
            continue
        stretches.append(_Stretch(row, int(slots[first]), end - first, merge))
        rests[row] = np.concatenate([slots[:first], slots[end:]]), True
    for group in _groups(stretches):
        num_slots = min(stretch.num_slots for stretch in group)
        pieces.append(_strided(group, num_slots, device))
        for row, first, length, _ in group:
            left = np.arange(first + num_slots, first + length, dtype=np.int64)
            rests[row] = np.concatenate([left, rests[row][0]]), True
    pieces.extend(_plan_rests(rests, device))
    return pieces


def _groups(stretches: Sequence[_Stretch]) -> Iterable[list[_Stretch]]:
    """Stretches that can share a call: about one length, evenly spaced, all to be merged or none."""
    by_length = sorted(stretches, key=lambda stretch: (stretch.merge, stretch.num_slots))
    alike: list[_Stretch] = []
    for stretch in by_length:
        if alike and (
            stretch.merge != alike[0].merge or stretch.num_slots - alike[0].num_slots > MAX_PADDED_TOKENS // 2
        ):
            yield from _evenly_spaced(alike)
            alike = []
        alike.append(stretch)
    yield from _evenly_spaced(alike)


def _evenly_spaced(stretches: Sequence[_Stretch]) -> Iterable[list[_Stretch]]:
    group: list[_Stretch] = []
    for stretch in sorted(stretches, key=lambda stretch: stretch.first):
        if len(group) > 1 and stretch.first - group[-1].first != group[1].first - group[0].first:
            yield group
            group = []
        group.append(stretch)
    if group:
        yield group


def _strided(group: Sequence[_Stretch], num_slots: int, device: torch.device) -> Piece:
    rows = index_of(np.array([stretch.row for stretch in group]), device)
    first, merge = group[0].first, group[0].merge
    if len(group) == 1:
        return FullPiece(slice(first, first + num_slots), rows, merge)
    return StridedPiece(first, group[1].first - first, len(group), num_slots, rows, merge)


def _plan_rests(rests: dict[int, tuple[SlotArray, bool]], device: torch.device) -> Iterable[Piece]:
    for is_merged in (False, True):
        due = {row: slots for row, (slots, merge) in rests.items() if merge == is_merged and len(slots)}
        short = {row: slots for row, slots in due.items() if len(slots) <= MAX_PADDED_TOKENS}
        if len(short) > 1:
            yield _padded(short, is_merged, device)
            due = {row: slots for row, slots in due.items() if row not in short}
        for row, slots in due.items():
            merge = is_merged
            for index in views_and_gather(slots, device):
                yield FullPiece(index, slice(row, row + 1), merge)
                merge = True


def _padded(rests: dict[int, SlotArray], merge: bool, device: torch.device) -> PaddedPiece:
    lengths = np.array([len(slots) for slots in rests.values()])
    padded = np.stack([np.pad(slots, (0, lengths.max() - len(slots)), mode="edge") for slots in rests.values()])
    visible = np.arange(lengths.max()) < lengths[:, None]
    rows = index_of(np.array(list(rests)), device)
    return PaddedPiece(tensor_of(padded, device), rows, tensor_of(visible, device), merge)
