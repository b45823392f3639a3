"""Independent parts of a computation, side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Yield ``work(item)`` of every item, in order, computed by as many threads as torch is told to use.

    Each of them runs torch's operations alone: threads that meet after every
    operation wait for the slowest each time. No more than three results a thread
    wait to be taken. Close it where it is not taken to its end, so that torch has
    its threads back.
    """
    threads = torch.get_num_threads()
    if threads < 2:
        yield from map(work, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[R]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 3 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
