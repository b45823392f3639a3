"""How much memory this process has used at most, since it was last reset, and how much there is to be had."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import psutil
import torch

_PROC = Path("/proc/self")


def reset_peak() -> None:
    """Begin a new measurement, where the system can (Linux); elsewhere the peak is that since the start."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return


def trim() -> None:
    """Give freed memory back to the system, where its C library keeps it (glibc).

    Else the pieces add up: without it around every site, GPTQ peaked at 871 MB with 8 layers and at 927 with 32.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def peak_bytes() -> int:
    """Return the peak resident memory in bytes."""
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Meter:
    """Measures how long a run takes and the memory it needs at most, and the same of its parts, one after the other.

    device: which computes. The memory of a part is its own where that is a GPU, else this process's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.monotonic()
        self._before = 0
        reset_peak()
        self.begin()

    def begin(self) -> None:
        """Begin a part."""
        self._before = self.peak_rss_bytes
        reset_peak()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._begun = time.monotonic()

    def part(self) -> dict[str, float]:
        """Return what the part that was begun last has taken so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = peak_bytes()
        return {"seconds": round(time.monotonic() - self._begun, 3), "peak_bytes": peak}

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 2)

    @property
    def peak_rss_bytes(self) -> int:
        """The process's resident memory at most, of all parts and of what was between them."""
        return max(self._before, peak_bytes())


def room_bytes(device: torch.device) -> int:
    """Return how much of a device's memory this process can have: what it has, and what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
