"""Compiling loops where nothing can be written, and the number of threads they leave behind."""

from __future__ import annotations

import numba
import pytest
import torch

from kvcomm.model.compiled import jit, share_threads, threads


def _double(x: int) -> int:
    return 2 * x


def test_where_nothing_can_be_written_loops_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = numba.njit

    def njit(*functions: object, **options: object) -> object:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*functions, **options)

    monkeypatch.setattr(numba, "njit", njit)
    doubled = jit(_double)
    assert doubled(21) == 42


def test_loops_get_the_threads_torch_has() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads():
            assert numba.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_torch_keeps_its_threads_where_loops_share_its_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(numba, "set_num_threads", lambda number: torch.set_num_threads(number + 1))
    try:
        share_threads()
        assert torch.get_num_threads() == before
        with threads():
            torch.set_num_threads(before + 1)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)
