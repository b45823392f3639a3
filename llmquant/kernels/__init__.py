"""Fast twins of pure functions, for float32 on the CPU: same signature, tested against the plain twin.

They are compiled when first called (numba), for any processor, and the result is
kept on disk. They release the interpreter, and rows are shared among as many
threads as torch is told to use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)  # Python's numbers would make everything float64
F = TypeVar("F", bound=Callable[..., Any])


def compiled(*, fused: bool, reordered: bool = False) -> Callable[[F], F]:
    """Compile a function over numpy arrays; it then runs without the interpreter's lock.

    fused: a product and a sum may become one operation, which is faster and rounds once instead of twice.
    reordered: sums may be added up in another order, several at a time; results then differ between processors.
    """

    def decorate(function: F) -> F:
        plain = inspect.unwrap(function)  # without the wrapper of a shape checker
        options = {name for name, wanted in (("contract", fused), ("reassoc", reordered)) if wanted} or False
        fast: F = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=options)(plain)
        return fast

    return decorate


def suit(x: torch.Tensor) -> bool:
    """Whether the fast twins take this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def shared_out(work: Callable[[int, int], None], rows: int, least: int) -> None:
    """Call ``work(start, stop)`` for ranges that cover all rows, in parallel where each has ``least`` rows or more."""
    parts = max(min(torch.get_num_threads(), rows // least), 1)
    edges = [rows * i // parts for i in range(parts + 1)]
    if parts == 1:
        work(0, rows)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
