"""Processes that quantize one model together, as ``torchrun`` starts them (torch.distributed; gloo, nccl for a GPU).

Every rank computes its batches of the calibration text and its rows of each linear; sums over all batches, and all
rows, are known to every rank after each site. The first rank alone writes. All others read its work folder, which
processes on several machines therefore share.

Ranks do the same things in the same order: what leads to a decision is either computed from sums that all have, bit
by bit the same, or told by the first rank. So they write what one process does; but ranges of static activations are
chosen on another sample of the values, and differ in the third digit.

A rank that meets an error, or is killed, leaves the others waiting for a sum that never comes. The first is noticed at
once, when the connection ends, the second at the latest after ``SILENCE`` seconds by the signs of life that each rank
gives in the store that they met in.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from llmquant.errors import LlmquantError, PeerError

T = TypeVar("T")
BEAT = 5.0  # seconds between signs of life
SILENCE = 40.0  # seconds without one, after which a rank is given up; a compiler may hold a process up that long
MEETING = timedelta(minutes=5)  # until all ranks have come
PATIENCE = timedelta(days=30)  # for a sum: how long a rank may compute is nobody's to limit
DONE, FAILED = "done", "failed"
_MEETINGS = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes, the ``rank``-th; ``ALONE`` is a process without others, and moves nothing.

    local: how many of them share this machine. Each method is to be called by all ranks, in the same order.
    """

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def add(self, *sums: Tensor) -> None:
        """Replace tensors by their sums over all ranks."""
        self._reduce(sums, dist.ReduceOp.SUM)

    def largest(self, *values: Tensor) -> None:
        """Replace tensors by the largest of all ranks, element by element."""
        self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Sequence[Tensor], by: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            with _connected():
                for tensor in tensors:
                    dist.all_reduce(tensor, by)

    def total(self, count: int) -> int:
        """Return the sum of a number over all ranks."""
        return sum(self.each(lambda: count))

    def least(self, number: int) -> int:
        """Return the smallest of a number of each rank."""
        return min(self.each(lambda: number))

    def each(self, compute: Callable[[], T]) -> list[T]:
        """Return what every rank computes, in their order, tensors on the CPU; raise on all what one of them raises."""
        if self.size == 1:
            return [compute()]
        mine: tuple[T | None, LlmquantError | None]
        try:
            mine = compute(), None
        except LlmquantError as error:
            mine = None, error
        found: list[tuple[T, LlmquantError | None]] = [None] * self.size  # type: ignore[list-item]
        with _connected():
            dist.all_gather_object(found, mine)
        for _, failed in found:
            if failed is not None:
                raise failed
        return [value for value, _ in found]

    def joined(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, one after the other."""
        if self.size == 1:
            return x
        return torch.cat(self.each(x.cpu)).to(x.device)

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return what the first rank computes, tensors on the CPU; raise on all what it raises."""
        if self.size == 1:
            return compute()
        told: list[tuple[T | None, LlmquantError | None]] = [(None, None)]
        if self.first:
            try:
                told = [(compute(), None)]
            except LlmquantError as error:
                told = [(None, error)]
        with _connected():
            dist.broadcast_object_list(told, src=0)
        value, failed = told[0]
        if failed is not None:
            raise failed
        return value  # type: ignore[return-value]

    def wait(self) -> None:
        """Return when all ranks have come here."""
        self.from_first(lambda: None)


ALONE = Ranks()


@contextmanager
def meeting(device: str = "auto") -> Iterator[Ranks]:
    """Give the ranks that ``torchrun`` started with this process; ``ALONE`` where it did not.

    device: "cuda", or "auto" where there is one: every local rank takes a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if not dist.is_initialized():  # once: the store that they meet in still knows who met before
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))  # waits for all
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(
                f"the processes cannot meet: {str(error).splitlines()[0]:.200}. One of them may have stopped before, "
                "and told why; start them all again."
            ) from None
        atexit.register(dist.destroy_process_group)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    signs = _SignsOfLife(ranks)
    try:
        yield ranks
    finally:
        signs.end(DONE if sys.exc_info()[0] is None else FAILED)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(_lost("another rank of this run", str(error).splitlines()[0])) from None


def _lost(who: str, why: str) -> str:
    return (
        f"{who} has stopped ({why:.200}), so this one stops too. Its own message, if it could write one, tells why. "
        "Finished layers are kept: the same command goes on from there, with any number of processes."
    )


class _SignsOfLife:
    """Gives them, and watches those of the others; ends the process when one of these has stopped.

    Threads of their own: the main one may wait for a sum, in which nothing can interrupt it, and the one that talks may
    wait for the store, which is kept by one of the ranks. Ending the process is what a power failure does, too: nothing
    in the work folder is half written.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._meeting = next(_MEETINGS)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)  # type: ignore[attr-defined]
        self._store.set(self._key(ranks.rank), "0")
        ranks.wait()  # so that every key is there
        now = time.monotonic()
        self._heard = {rank: ("0", now) for rank in range(ranks.size) if rank != ranks.rank}
        self._end = threading.Event()
        for task in (self._talk, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def end(self, state: str) -> None:
        """Stop watching, and tell the others how this rank ended."""
        self._end.set()
        with suppress(RuntimeError):  # the store goes with the rank that keeps it
            self._store.set(self._key(self._ranks.rank), state)

    def _key(self, rank: int) -> str:
        return f"llmquant/alive/{self._meeting}/{rank}"

    def _talk(self) -> None:
        for beat in itertools.count(1):
            if self._end.wait(BEAT):
                return
            try:
                self._store.set(self._key(self._ranks.rank), str(beat))
                for rank, (before, _) in list(self._heard.items()):
                    state = self._store.get(self._key(rank)).decode()
                    if state != before:
                        self._heard[rank] = state, time.monotonic()
            except RuntimeError:
                return  # without the store there are no signs of life

    def _watch(self) -> None:
        while not self._end.wait(BEAT):
            for rank, (state, since) in list(self._heard.items()):
                silent = state != DONE and time.monotonic() - since > SILENCE
                if state != FAILED and not silent:
                    continue
                if self._end.wait(BEAT):  # the main thread may have noticed, and know better
                    return
                why = f"no sign of life for {SILENCE:.0f} s" if silent else "it failed"
                print(f"error: {_lost(f'rank {rank} of {self._ranks.size}', why)}", file=sys.stderr, flush=True)
                os._exit(2)
