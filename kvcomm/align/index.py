"""Nearest rows by squared Euclidean distance: one small interface, FAISS for large banks, own loops below that."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcomm.align.ops import cpu
from kvcomm.errors import InvalidRequest

FAISS_FROM_ROWS = 10_000
"""Below that a matrix product is as fast as a flat FAISS index."""
NUM_AXES = 64
"""Principal components that are looked at first."""
ROUNDING = 1e-5
"""Of squared norms, that a product may be off by."""


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
    """Exact search on the rows' device: a matrix product chooses whom to measure.

    On the CPU the product is taken of principal components and of the norm of what they leave out, which makes it at
    most the distance (Cauchy-Schwarz): what it puts beyond the k-th distance measured need not be measured.
    """

    def __init__(self, rows: Tensor) -> None:
        """Make one.

        Args:
            rows: [num_rows, dim] float32, not copied if contiguous.
        """
        self._rows = rows.contiguous()
        # Around their middle, so that rounding depends on how far rows are from each other and not from the origin.
        self._middle = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        centered = self._rows - self._middle
        self._squares = centered.square().sum(-1)
        self._axes = _principal_axes(centered) if rows.device.type == "cpu" else None
        self._short = self._shortened(centered, self._squares)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `NeighborIndex`."""
        centered = queries - self._middle
        squares = centered.square().sum(-1)
        # ||b||^2 - 2ab is fast, but near neighbors drown in its rounding.
        rough = torch.addmm(self._squares, self._shortened(centered, squares), self._short.T, alpha=-2)
        count = min(k, len(self._rows))
        if self._axes is not None:
            largest = self._squares.max() if count else 0.0
            return cpu.nearest(rough, squares - ROUNDING * (squares + largest), queries, self._rows, count)
        chosen = rough.topk(min(k + cpu.NUM_SPARE, len(self._rows)), largest=False).indices.sort(dim=-1).values
        distances = (self._rows[chosen] - queries[:, None]).square_().sum(-1)
        found, order = distances.sort(dim=-1, stable=True)
        return found[:, :count], chosen.gather(1, order[:, :count])

    def _shortened(self, centered: Tensor, squares: Tensor) -> Tensor:
        """Components along the axes and the norm of the rest, [num_vectors, num_axes + 1]; as it is without axes."""
        if self._axes is None:
            return centered
        along = centered @ self._axes
        rest = (squares - along.square().sum(-1)).clamp_min_(0).sqrt_()
        return torch.cat((along, rest[:, None]), dim=1)


class FaissIndex:
    """A flat FAISS index; on the GPU when the rows are there and this FAISS can."""

    def __init__(self, rows: Tensor) -> None:
        """Index rows.

        Raises:
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


def _principal_axes(centered: Tensor) -> Tensor:
    """[dim, at most NUM_AXES], orthonormal, along which rows differ most."""
    axes: Tensor = torch.linalg.eigh(centered.T @ centered).eigenvectors
    return axes[:, -NUM_AXES:].contiguous()


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
