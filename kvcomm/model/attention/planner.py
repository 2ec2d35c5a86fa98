"""Cuts the runs of a pass into pieces (see `pieces`).

What always holds: for every row, the slots of its pieces are disjoint and together are exactly what the row may see.
Pages shared by several sequences become one piece for all of them, recursively, so nested forks are served at every
depth; slots that lie next to each other in the pool are read in place; what single rows (decode) see alone is planned
for all of them together (`single_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.pieces import CausalPiece, FullPiece, MaskedPiece, Piece, Scratch, TailPiece
from kvcomm.model.attention.single_rows import SingleRow, plan_single_rows
from kvcomm.model.attention.slots import Index, SlotArray, index_of, tensor_of, views_and_gather

MIN_SHARED_TOKENS = 64
"""Shared stretches shorter than this are attended per sequence: a merge would cost more than it saves."""

MAX_TAIL_ROWS = 64
"""Runs of at most this many rows, alone behind their prefix, are attended in one piece."""

MAX_CLUSTER_TOKENS = 512
"""Positions from the first to the last row of a cluster: what its rows do not see of them is computed for nothing."""


class PassPlanner:
    """Plans the pieces of one pass for a given window width."""

    def __init__(self, runs: Sequence[RunTable], page_size: int, device: torch.device) -> None:
        self._runs = list(runs)
        self._page_size = page_size
        self._device = device
        self._scratch = Scratch()
        self._longest = max(run.end for run in self._runs)
        ends = np.cumsum([run.end - run.start for run in self._runs])
        starts = np.concatenate([[0], ends[:-1]])
        self._rows = [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]

    def write_slots(self) -> Index:
        """The slots of all new tokens of the pass, in order."""
        return self._index(np.concatenate([self._slots(run, run.start, run.end) for run in self._runs]))

    def effective_window(self, sliding_window: int | None) -> int | None:
        """None when the window is wide enough to hide nothing in this pass."""
        if sliding_window is None or sliding_window >= self._longest:
            return None
        return sliding_window

    def pieces(self, window: int | None) -> list[Piece]:
        """All pieces, in an order in which every `merge` piece comes after the one it is merged into."""
        if window is not None:
            return [piece for index in range(len(self._runs)) for piece in self._windowed(index, window)]
        pieces: list[Piece] = []
        remainders: dict[int, int] = {}
        alone: list[int] = []
        for members in self._clusters():
            if len(members) > 1:
                self._plan_cluster(members, pieces)
            else:
                alone += members
        self._plan_shared(alone, 0, 0, pieces, remainders)
        self._plan_remainders(remainders, pieces)
        return pieces

    def _clusters(self) -> list[list[int]]:
        """Runs of one sequence close behind each other, in the order of the pass; every other run alone."""
        clusters: list[list[int]] = []
        for index, run in enumerate(self._runs):
            if clusters and self._is_close(self._runs[clusters[-1][0]], self._runs[index - 1], run):
                clusters[-1].append(index)
            else:
                clusters.append([index])
        return clusters

    def _is_close(self, first: RunTable, before: RunTable, run: RunTable) -> bool:
        if before.end > run.start or run.end - first.start > MAX_CLUSTER_TOKENS:
            return False
        last = (before.end - 1) // self._page_size
        return bool(run.pages[last] == before.pages[last])  # which is being written, so that no other sequence has it

    def _plan_cluster(self, members: list[int], pieces: list[Piece]) -> None:
        """Two pieces instead of two for each of many short runs: what all of them see, and the rest with a mask."""
        first, last = self._runs[members[0]], self._runs[members[-1]]
        rows = slice(self._rows[members[0]].start, self._rows[members[-1]].stop)
        if first.start:
            self._add_full(last, 0, first.start, rows, False, pieces)
        at = np.concatenate([np.arange(self._runs[index].start, self._runs[index].end) for index in members])
        visible = np.arange(first.start, last.end) <= at[:, None]
        slots = self._index(self._slots(last, first.start, last.end))
        pieces.append(MaskedPiece(slots, rows, tensor_of(visible, self._device), merge=first.start > 0))

    def _plan_shared(
        self, members: list[int], from_page: int, at_page: int, pieces: list[Piece], remainders: dict[int, int]
    ) -> None:
        """Plan pages that several members share; note for each run the first page that is left to it alone.

        The members share their pages up to `at_page`, of which those before `from_page` are in pieces already: a
        shared stretch that is too short for them all may become long enough for some that share more.
        """
        for group in self._group_by_page(members, at_page):
            if len(group) == 1:
                remainders[group[0]] = from_page
                continue
            to_page = at_page + self._num_common_pages(group, at_page)
            if (to_page - from_page) * self._page_size < MIN_SHARED_TOKENS:
                self._plan_shared(group, from_page, to_page, pieces, remainders)
                continue
            rows = self._index(np.concatenate([np.arange(self._rows[i].start, self._rows[i].stop) for i in group]))
            start, end = from_page * self._page_size, to_page * self._page_size
            self._add_full(self._runs[group[0]], start, end, rows, from_page > 0, pieces)
            self._plan_shared(group, to_page, to_page, pieces, remainders)

    def _group_by_page(self, members: list[int], page_index: int) -> Iterable[list[int]]:
        """Members that hold the same page at `page_index` wholly before their start; every other one for itself."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for index in members:
            run = self._runs[index]
            is_past = (page_index + 1) * self._page_size <= run.start
            key = (True, int(run.pages[page_index])) if is_past else (False, index)
            groups.setdefault(key, []).append(index)
        return groups.values()

    def _num_common_pages(self, group: list[int], from_page: int) -> int:
        to_page = min(self._runs[index].start // self._page_size for index in group)
        first = self._runs[group[0]].pages[from_page:to_page]
        common = len(first)
        for index in group[1:]:
            differs = self._runs[index].pages[from_page : from_page + common] != first[:common]
            common = int(differs.argmax()) if differs.any() else common
        return common

    def _plan_remainders(self, remainders: dict[int, int], pieces: list[Piece]) -> None:
        """Plan what each run sees alone, from the page noted for it up to its own end."""
        single_rows: list[SingleRow] = []
        for index, page_index in sorted(remainders.items()):
            run, rows, start = self._runs[index], self._rows[index], page_index * self._page_size
            num_rows = run.end - run.start
            if num_rows == 1:
                single_rows.append(SingleRow(rows.start, self._slots(run, start, run.end), page_index > 0))
            elif page_index == 0 and run.start > 0 and num_rows <= MAX_TAIL_ROWS:
                pieces.append(TailPiece(self._tail_parts(run), rows, self._scratch))
            else:
                if start < run.start:
                    self._add_full(run, start, run.start, rows, page_index > 0, pieces)
                diagonal = self._index(self._slots(run, run.start, run.end))
                pieces.append(CausalPiece(diagonal, rows, merge=run.start > 0))
        pieces.extend(plan_single_rows(single_rows, self._device))

    def _tail_parts(self, run: RunTable) -> tuple[Index, ...]:
        whole = self._index(self._slots(run, 0, run.end))
        if isinstance(whole, slice):
            return (whole,)
        own = self._index(self._slots(run, run.start, run.end))
        return (*views_and_gather(self._slots(run, 0, run.start), self._device), own)

    def _add_full(self, run: RunTable, start: int, end: int, rows: Index, merge: bool, pieces: list[Piece]) -> None:
        for slots in views_and_gather(self._slots(run, start, end), self._device):
            pieces.append(FullPiece(slots, rows, merge))
            merge = True

    def _windowed(self, index: int, window: int) -> Iterable[Piece]:
        """Blocks of rows with a banded mask; a block is as wide as the window, so the work stays linear."""
        run, rows = self._runs[index], self._rows[index]
        for start in range(run.start, run.end, window):
            end = min(start + window, run.end)
            first = max(0, start - window + 1)
            slots = self._index(self._slots(run, first, end))
            block = slice(rows.start + start - run.start, rows.start + end - run.start)
            if end - start == 1:
                yield FullPiece(slots, block, merge=False)
                continue
            query_at, key_at = np.arange(start, end)[:, None], np.arange(first, end)
            visible = (key_at <= query_at) & (key_at > query_at - window)
            yield MaskedPiece(slots, block, tensor_of(visible, self._device))

    def _slots(self, run: RunTable, start: int, end: int) -> SlotArray:
        positions = np.arange(start, end, dtype=np.int64)
        pages = run.pages[positions // self._page_size].astype(np.int64)
        return pages * self._page_size + positions % self._page_size

    def _index(self, values: npt.NDArray[np.integer]) -> Index:
        return index_of(values, self._device)
