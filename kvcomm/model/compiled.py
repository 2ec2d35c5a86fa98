"""How loops for the CPU are compiled by numba, and the threads they run on.

Files of such loops import numba, which takes time, so they are imported by calls only. Compiled code is kept beside
them, or where NUMBA_CACHE_DIR says, and where nothing can be written it is compiled anew in every process.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar, cast

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., object])

one_caller = threading.RLock()
"""To be held by whoever calls a parallel loop: where numba has no OpenMP its threads may serve one caller only."""


def jit(function: F, **options: Any) -> F:
    """`numba.njit` with these options, its code kept where that can be."""
    import numba

    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for compiled code can be written
        return cast(F, numba.njit(**options)(function))


def processor() -> str:
    """The processor as compilers know it: what timings and products depend on beside threads and libraries."""
    from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

    features = sha256(get_host_cpu_features().flatten().encode()).hexdigest()[:16]
    return f"{platform.machine()} {get_host_cpu_name()} {features}"


def share_threads() -> None:
    """Give the parallel loops that this thread calls as many threads as torch has."""
    import numba

    num_threads = torch.get_num_threads()
    numba.set_num_threads(min(num_threads, vars(numba.config)["NUMBA_NUM_THREADS"]))
    torch.set_num_threads(num_threads)  # numba's OpenMP layer sets torch's as well when it starts


@contextmanager
def threads() -> Iterator[None]:
    """Torch's number of threads for parallel loops, for this caller alone."""
    num_threads = torch.get_num_threads()
    with one_caller:
        try:
            share_threads()
            yield
        finally:
            torch.set_num_threads(num_threads)  # see `share_threads`: the first loop starts them


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as loops take it: bfloat16 by its bits, as uint16, see `bits`."""
    plain = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = plain.numpy()
    return array
