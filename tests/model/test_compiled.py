"""Compiling loops where nothing can be written, and the number of threads they leave behind."""

from __future__ import annotations

import numba
import pytest
import torch

from kvcomm.model.compiled import jit, threads


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
