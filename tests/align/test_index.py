"""Indices: the same neighbors whoever looks for them."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvcomm.align.index import FaissIndex, NeighborIndex, TorchIndex, make_index
from kvcomm.errors import InvalidRequest


def indices(rows: torch.Tensor) -> list[NeighborIndex]:
    found: list[NeighborIndex] = [TorchIndex(rows)]
    with contextlib.suppress(InvalidRequest):
        found.append(FaissIndex(rows))
    return found


def test_neighbors_are_those_of_a_naive_search() -> None:
    generator = torch.Generator().manual_seed(1)
    # Far from the origin, where a search by scalar products loses the small differences.
    rows = torch.randn(200, 12, generator=generator) * 0.01 + 5
    queries = torch.randn(9, 12, generator=generator) * 0.01 + 5
    squared = ((queries.double()[:, None] - rows.double()[None]) ** 2).sum(-1).numpy()
    for index in indices(rows):
        distances, found = index.search(queries, 5)
        assert np.array_equal(found.numpy(), np.argsort(squared, axis=1)[:, :5])
        assert np.allclose(distances.numpy(), np.sort(squared, axis=1)[:, :5], rtol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 7, 13, 900])
def test_what_components_leave_out_costs_no_neighbor(num_rows: int) -> None:
    """Rows that differ in every direction: 64 of 150 axes tell little about who is near."""
    generator = torch.Generator().manual_seed(num_rows)
    rows, queries = torch.randn(num_rows, 150, generator=generator), torch.randn(40, 150, generator=generator)
    rows[num_rows // 2] = rows[0]
    queries[3] = rows[0]
    squared = ((queries.double()[:, None] - rows.double()[None]) ** 2).sum(-1).numpy()
    squared[3, [0, num_rows // 2]] = 0
    distances, found = TorchIndex(rows).search(queries, 8)
    order = np.argsort(squared, axis=1, kind="stable")[:, :8]
    assert np.array_equal(found.numpy(), order)
    assert np.allclose(distances.numpy(), np.take_along_axis(squared, order, axis=1), rtol=1e-4, atol=1e-5)


def test_loops_leave_the_number_of_torch_threads_alone() -> None:
    """numba's first loop in a process set it to the number of cores, and a model was faster after it than before."""
    program = """
import torch
torch.set_num_threads(1)
from kvcomm.align.index import TorchIndex
TorchIndex(torch.randn(50, 9)).search(torch.randn(5, 9), 3)
print(torch.get_num_threads())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"


def test_of_no_rows_nobody_is_near() -> None:
    distances, found = TorchIndex(torch.empty(0, 5)).search(torch.zeros(2, 5), 8)
    assert distances.shape == found.shape == (2, 0)


def test_ties_go_to_the_first_row_and_k_may_exceed_the_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for index in indices(rows):
        distances, found = index.search(torch.tensor([[1.0, 0.0]]), 9)
        assert found.tolist() == [[0, 2, 1]]
        assert distances[0].tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_the_kind_is_chosen_by_name_and_never_by_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(3, 2)
    assert isinstance(make_index(rows), TorchIndex)
    with pytest.raises(InvalidRequest, match="'annoy'"):
        make_index(rows, "annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InvalidRequest, match=r"kvcomm\[faiss\]"):
        make_index(rows, "faiss")
