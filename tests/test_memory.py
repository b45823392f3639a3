"""What is measured of a run's time and memory."""

import time
from pathlib import Path

import pytest
import torch

from llmquant.memory import Meter

MB = 1_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is reset on Linux alone")
def test_a_part_has_its_own_time_and_peak_and_the_run_the_largest():
    meter = Meter(torch.device("cpu"))
    parts = []
    for size, seconds in ((200 * MB, 0.05), (MB, 0.0), (100 * MB, 0.0)):
        meter.begin()
        torch.ones(size // 4)
        time.sleep(seconds)
        parts.append(meter.part())
    first, second, third = (part["peak_bytes"] for part in parts)
    assert first - second > 150 * MB
    assert 50 * MB < third - second < 150 * MB
    assert meter.peak_rss_bytes >= first
    assert parts[0]["seconds"] > 0.05 > parts[1]["seconds"]
    assert meter.seconds >= 0.05
