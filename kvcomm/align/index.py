"""Nearest rows by squared Euclidean distance: one small interface, FAISS for large banks, own loops below that."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcomm.align.ops import cpu
from kvcomm.errors import InvalidRequest

FAISS_FROM_ROWS = 10_000
"""Below that a matrix product is as fast as a flat FAISS index."""


class NeighborIndex(Protocol):
    """Finds rows."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest rows of [num_queries, dim] float32 queries.

        Returns:
            Squared distances float32 and row numbers int64, [num_queries, min(k, number of rows)], ascending by
            distance, equal ones by row.
        """
        ...


class TorchIndex:
    """Exact search by distances to all rows, on their device."""

    def __init__(self, rows: Tensor) -> None:
        """Args:
        rows: [num_rows, dim] float32, not copied if contiguous.
        """
        self._rows = rows.contiguous()
        # Around their middle, so that rounding depends on how far rows are from each other and not from the origin.
        self._middle = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        self._centered = self._rows - self._middle
        self._squares = self._centered.square().sum(-1)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `NeighborIndex`."""
        # ||b||^2 - 2ab is fast, but near neighbors drown in its rounding: it only chooses whom to measure.
        rough = torch.addmm(self._squares, queries - self._middle, self._centered.T, alpha=-2)
        count = min(k, len(self._rows))
        if rough.device.type == "cpu":
            return cpu.nearest(rough, queries, self._rows, count)
        chosen = rough.topk(min(k + cpu.NUM_SPARE, len(self._rows)), largest=False).indices.sort(dim=-1).values
        distances = (self._rows[chosen] - queries[:, None]).square_().sum(-1)
        found, order = distances.sort(dim=-1, stable=True)
        return found[:, :count], chosen.gather(1, order[:, :count])


class FaissIndex:
    """A flat FAISS index; on the GPU when the rows are there and this FAISS can."""

    def __init__(self, rows: Tensor) -> None:
        """Raises:
        InvalidRequest: FAISS is not installed.
        """
        try:
            import faiss
        except ImportError as error:
            raise InvalidRequest("FAISS is not installed: pip install 'kvcomm[faiss]', or use index='torch'") from error
        self._device = rows.device
        self._count = len(rows)
        flat: faiss.Index = faiss.IndexFlatL2(rows.shape[1])
        if rows.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            self._resources = faiss.StandardGpuResources()
            flat = faiss.index_cpu_to_gpu(self._resources, rows.device.index or 0, flat)
        flat.add(rows.cpu().numpy())
        self._flat = flat

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `NeighborIndex`."""
        distances, indices = self._flat.search(queries.cpu().numpy(), min(k, self._count))
        return torch.from_numpy(distances).to(self._device), torch.from_numpy(indices).to(self._device)


def make_index(rows: Tensor, kind: str = "auto") -> NeighborIndex:
    """An index over [num_rows, dim] float32 rows: "torch", "faiss", or "auto" by the number of rows.

    Raises:
        InvalidRequest: unknown kind, or FAISS asked for and not installed.
    """
    if kind == "auto":
        kind = "faiss" if len(rows) >= FAISS_FROM_ROWS and _has_faiss() else "torch"
    if kind == "torch":
        return TorchIndex(rows)
    if kind == "faiss":
        return FaissIndex(rows)
    raise InvalidRequest(f"unknown index {kind!r}; there are auto, torch, faiss")


def _has_faiss() -> bool:
    from importlib.util import find_spec

    return find_spec("faiss") is not None
