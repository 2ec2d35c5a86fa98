"""Cuts the runs of a pass into pieces (see `pieces`).

What always holds: for every row, the slots of its pieces are disjoint and together are exactly what the row may see.
Pages shared by several sequences become one piece for all of them, recursively, so nested forks are served at every
depth; short runs of one sequence close behind each other (recomputed tokens) are attended together, with a mask; slots
that lie next to each other in the pool are read in place; what single rows (decode) see alone is planned for all of
them together (`single_rows`). Where short runs can be joined (`short_runs`), those that share little with others are
planned whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.pieces import (
    CausalPiece,
    FullPiece,
    Index,
    MaskedPiece,
    Piece,
    Scratch,
    SlotArray,
    TailPiece,
    index_of,
    tensor_of,
    views_and_gather,
)
from kvcomm.model.attention.short_runs import is_short
from kvcomm.model.attention.single_rows import SingleRow, plan_single_rows

MIN_SHARED_TOKENS = 64
"""Shared stretches shorter than this are attended per sequence: a merge would cost more than it saves."""

MAX_TAIL_ROWS = 64
"""Runs of at most this many rows, alone behind their prefix, are attended in one piece."""

MAX_CLUSTER_TOKENS = 512
"""Positions from the first to the last row of a cluster: what its rows do not see of them is computed for nothing."""

MIN_DISTINCT_SHARE = 0.5
"""Short runs are attended each for itself if more than this share of the pages they read are different ones."""


@dataclass(frozen=True)
class _Cluster:
    """Runs of one sequence close behind each other, in the order of the pass; mostly a single one.

    What all its rows see ends where its first run begins.
    """

    runs: list[RunTable]
    rows: slice

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        return self.runs[-1].pages

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def end(self) -> int:
        return self.runs[-1].end

    def is_short(self, dtype: torch.dtype) -> bool:
        """Whether it is one run behind a prefix, short enough to join others in this dtype."""
        is_one_behind = len(self.runs) == 1 and self.start > 0
        return is_one_behind and is_short(self.end - self.start, self.end, dtype)

    def pages_read(self, page_size: int) -> npt.NDArray[np.int32]:
        """Pages that the last row reads, the one that is written included."""
        return self.pages[: -(-self.end // page_size)]

    def row_positions(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.arange(run.start, run.end) for run in self.runs])

    def admits(self, run: RunTable, page_size: int) -> bool:
        """Whether `run`, the next of the pass, belongs to the same sequence and is close enough to join."""
        before = self.runs[-1]
        if before.end > run.start or run.end - self.start > MAX_CLUSTER_TOKENS:
            return False
        last = (before.end - 1) // page_size
        return bool(run.pages[last] == before.pages[last])  # which is being written, so that no other sequence has it


class PassPlanner:
    """Plans the pieces of one pass for a given window width."""

    def __init__(
        self, runs: Sequence[RunTable], page_size: int, device: torch.device, *, joined_dtype: torch.dtype | None = None
    ) -> None:
        """Make one.

        Args:
            joined_dtype: of keys and values whose pieces will go through `join_short_runs`; None: none will.
        """
        self._joined_dtype = joined_dtype
        self._runs = list(runs)
        self._page_size = page_size
        self._device = device
        self._longest = max(run.end for run in self._runs)
        ends = np.cumsum([run.end - run.start for run in self._runs])
        starts = np.concatenate([[0], ends[:-1]])
        self._rows = [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]

    def write_slots(self) -> Index:
        """The slots of all new tokens of the pass, in order."""
        return self._index(np.concatenate([self._slots(run.pages, run.start, run.end) for run in self._runs]))

    def effective_window(self, sliding_window: int | None) -> int | None:
        """None when the window is wide enough to hide nothing in this pass."""
        if sliding_window is None or sliding_window >= self._longest:
            return None
        return sliding_window

    def pieces(self, window: int | None) -> list[Piece]:
        """All pieces, in an order in which every `merge` piece comes after the one it is merged into."""
        if window is not None:
            return [piece for index in range(len(self._runs)) for piece in self._windowed(index, window)]
        if len(self._runs) == 1 and self._runs[0].start == 0:  # a prompt that is computed alone
            run = self._runs[0]
            return [CausalPiece(self._index(self._slots(run.pages, 0, run.end)), self._rows[0], merge=False)]
        pieces: list[Piece] = []
        remainders: dict[int, int] = {}
        alone = self._short_runs_alone()
        pieces.extend(self._tail(self._clusters[index]) for index in alone)
        others = [index for index in range(len(self._clusters)) if index not in alone]
        self._plan_shared(others, 0, 0, pieces, remainders)
        self._plan_remainders(remainders, pieces)
        return pieces

    def _short_runs_alone(self) -> list[int]:
        """Clusters that the loop of short runs takes whole: several, which together read few pages twice."""
        dtype = self._joined_dtype
        if dtype is None:
            return []
        short = [index for index, cluster in enumerate(self._clusters) if cluster.is_short(dtype)]
        if len(short) < 2:
            return []
        pages = np.concatenate([self._clusters[index].pages_read(self._page_size) for index in short])
        return short if len(np.unique(pages)) > MIN_DISTINCT_SHARE * len(pages) else []

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch()

    @cached_property
    def _clusters(self) -> list[_Cluster]:
        clusters: list[_Cluster] = []
        for run, rows in zip(self._runs, self._rows, strict=True):
            if clusters and clusters[-1].admits(run, self._page_size):
                before = clusters.pop()
                clusters.append(_Cluster([*before.runs, run], slice(before.rows.start, rows.stop)))
            else:
                clusters.append(_Cluster([run], rows))
        return clusters

    def _plan_shared(
        self, members: list[int], from_page: int, at_page: int, pieces: list[Piece], remainders: dict[int, int]
    ) -> None:
        """Plan pages that several clusters share; note for each the first page that is left to it alone.

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
            slices = [self._clusters[index].rows for index in group]
            rows = self._index(np.concatenate([np.arange(each.start, each.stop) for each in slices]))
            start, end = from_page * self._page_size, to_page * self._page_size
            self._add_full(self._clusters[group[0]].pages, start, end, rows, from_page > 0, pieces)
            self._plan_shared(group, to_page, to_page, pieces, remainders)

    def _group_by_page(self, members: list[int], page_index: int) -> Iterable[list[int]]:
        """Members that hold the same page at `page_index` wholly before their start; every other one for itself."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for index in members:
            cluster = self._clusters[index]
            is_past = (page_index + 1) * self._page_size <= cluster.start
            key = (True, int(cluster.pages[page_index])) if is_past else (False, index)
            groups.setdefault(key, []).append(index)
        return groups.values()

    def _num_common_pages(self, group: list[int], from_page: int) -> int:
        to_page = min(self._clusters[index].start // self._page_size for index in group)
        first = self._clusters[group[0]].pages[from_page:to_page]
        common = len(first)
        for index in group[1:]:
            differs = self._clusters[index].pages[from_page : from_page + common] != first[:common]
            common = int(differs.argmax()) if differs.any() else common
        return common

    def _plan_remainders(self, remainders: dict[int, int], pieces: list[Piece]) -> None:
        """Plan what each cluster sees alone, from the page noted for it up to its own end."""
        single_rows: list[SingleRow] = []
        for index, page_index in sorted(remainders.items()):
            cluster, start = self._clusters[index], page_index * self._page_size
            num_rows = cluster.rows.stop - cluster.rows.start
            if num_rows == 1:
                single_rows.append(
                    SingleRow(cluster.rows.start, self._slots(cluster.pages, start, cluster.end), start > 0)
                )
            elif len(cluster.runs) == 1 and start == 0 and cluster.start > 0 and num_rows <= MAX_TAIL_ROWS:
                pieces.append(self._tail(cluster))
            elif len(cluster.runs) == 1:
                if start < cluster.start:
                    self._add_full(cluster.pages, start, cluster.start, cluster.rows, start > 0, pieces)
                diagonal = self._index(self._slots(cluster.pages, cluster.start, cluster.end))
                pieces.append(CausalPiece(diagonal, cluster.rows, merge=cluster.start > 0))
            else:
                self._plan_with_gaps(cluster, start, pieces)
        if single_rows:
            pieces.extend(plan_single_rows(single_rows, self._device))

    def _plan_with_gaps(self, cluster: _Cluster, start: int, pieces: list[Piece]) -> None:
        """What all rows see in one piece, the stretch they lie in with a mask; a short piece before it joins it."""
        masked_from = start
        if cluster.start - start >= MIN_SHARED_TOKENS:
            self._add_full(cluster.pages, start, cluster.start, cluster.rows, start > 0, pieces)
            masked_from = cluster.start
        visible = np.arange(masked_from, cluster.end) <= cluster.row_positions()[:, None]
        slots = self._index(self._slots(cluster.pages, masked_from, cluster.end))
        pieces.append(MaskedPiece(slots, cluster.rows, tensor_of(visible, self._device), merge=masked_from > 0))

    def _tail(self, cluster: _Cluster) -> TailPiece:
        return TailPiece(self._tail_parts(cluster), cluster.rows, self._scratch)

    def _tail_parts(self, cluster: _Cluster) -> tuple[Index, ...]:
        whole = self._index(self._slots(cluster.pages, 0, cluster.end))
        if isinstance(whole, slice):
            return (whole,)
        own = self._index(self._slots(cluster.pages, cluster.start, cluster.end))
        return (*views_and_gather(self._slots(cluster.pages, 0, cluster.start), self._device), own)

    def _add_full(
        self, pages: npt.NDArray[np.int32], start: int, end: int, rows: Index, merge: bool, pieces: list[Piece]
    ) -> None:
        for slots in views_and_gather(self._slots(pages, start, end), self._device):
            pieces.append(FullPiece(slots, rows, merge))
            merge = True

    def _windowed(self, index: int, window: int) -> Iterable[Piece]:
        """Blocks of rows with a banded mask; a block is as wide as the window, so the work stays linear."""
        run, rows = self._runs[index], self._rows[index]
        for start in range(run.start, run.end, window):
            end = min(start + window, run.end)
            first = max(0, start - window + 1)
            slots = self._index(self._slots(run.pages, first, end))
            block = slice(rows.start + start - run.start, rows.start + end - run.start)
            if end - start == 1:
                yield FullPiece(slots, block, merge=False)
                continue
            query_at, key_at = np.arange(start, end)[:, None], np.arange(first, end)
            visible = (key_at <= query_at) & (key_at > query_at - window)
            yield MaskedPiece(slots, block, tensor_of(visible, self._device))

    def _slots(self, pages: npt.NDArray[np.int32], start: int, end: int) -> SlotArray:
        positions = np.arange(start, end, dtype=np.int64)
        return pages[positions // self._page_size].astype(np.int64) * self._page_size + positions % self._page_size

    def _index(self, values: npt.NDArray[np.integer]) -> Index:
        return index_of(values, self._device)
