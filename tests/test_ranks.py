"""Several processes that quantize one model, as torchrun starts them; the judge is what one process writes."""

import itertools
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from llmquant import recipe, run, stream
from llmquant.ranks import ALONE, Ranks
from llmquant.sites import _dealt
from llmquant.stats import Accumulator
from tests.test_cli import ENVIRONMENT
from tests.test_moe import saved  # noqa: F401  (a fixture)
from tests.test_run import files as weights

BATCH = 256
HASTY = f"""
from datetime import timedelta
from llmquant import cli, ranks, stream
ranks.BEAT, ranks.SILENCE, stream.BATCH_TOKENS = 0.2, 8, {BATCH}
ranks.MEETING = timedelta(seconds=MEETING)
cli.main()
"""


def begin(size, *arguments, meeting=100):
    """Start processes that know of each other; each is one that torchrun could have started on a machine of its own.

    meeting: seconds within which they must have met.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", HASTY.replace("MEETING)", f"{meeting})"), *map(str, arguments)],
            env=ENVIRONMENT | {k: str(v) for k, v in {**known, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes):
    """Return exit code, output and errors of each."""
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def command(model, name, changes, out):
    return ["quantize", model, name, *(x for change in changes for x in ("--set", change)), "--no-eval", "--out", out]


EVERYTHING = [
    "algorithm.two_sided=true",
    "mismatch_correction=true",
    "transforms=[{name: awq, steps: 4}, {name: magr}]",
    "formats=[compressed_tensors]",
]
OUTSIDE = ["mixture={name: q4_0}"]


@pytest.mark.parametrize(
    ("size", "name", "changes"),
    [
        (3, "gptq-plain-w4g128", ["algorithm.actorder=true"]),
        (2, "gptq-plain-w4g128", EVERYTHING),
        (2, "gptq-q4_k_m", OUTSIDE),
    ],
)
def test_any_number_of_processes_writes_the_same_bytes(size, name, changes, llama, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_TOKENS", BATCH)
    changes = [*(calibrated[:-1] if changes is OUTSIDE else calibrated), *changes]
    told = end(begin(size, *command(llama, name, changes, tmp_path / "together")))
    assert [code for code, _, _ in told] == [0] * size, told
    assert all(not out for _, out, _ in told[1:])
    run.quantize(llama, recipe.load(name, changes), tmp_path / "alone")
    assert weights(tmp_path / "together") == weights(tmp_path / "alone")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "together"]


@pytest.mark.parametrize("key", ["qwen2-moe"])
def test_experts_are_the_same_too(key, saved, texts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stream, "BATCH_TOKENS", BATCH)
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 8, length: 128}}"
    changes = [
        text,
        "grid.group_size=32",
        "transforms=[{name: awq, steps: 4, clip: false}]",
        "mismatch_correction=true",
    ]
    changes.append("formats=[compressed_tensors]")
    told = end(begin(2, *command(saved(key), "gptq-plain-w4g128", changes, tmp_path / "together")))
    assert [code for code, _, _ in told] == [0, 0], told
    run.quantize(saved(key), recipe.load("gptq-plain-w4g128", changes), tmp_path / "alone")
    assert weights(tmp_path / "together") == weights(tmp_path / "alone")


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "has stopped"), (signal.SIGSTOP, "no sign of life for 8 s")]
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_stops_the_others_and_any_number_goes_on(
    number, why, lost, llama, calibrated, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "BATCH_TOKENS", BATCH)
    changes = [*calibrated, "mismatch_correction=true"]
    started = begin(2, *command(llama, "gptq-plain-w4g128", changes, tmp_path / "out"))
    first = tmp_path / "out.work" / "layer-00000.safetensors"
    while not first.exists() and started[0].poll() is None:
        time.sleep(0.01)
    started[lost].send_signal(number)
    since = time.monotonic()
    code, out, err = end([started[1 - lost]])[0]
    waited = time.monotonic() - since
    started[lost].kill()
    started[lost].communicate()
    assert (code, out) == (2, "")
    assert "error:" in err
    assert why in err
    assert "the same command goes on from there, with any number of processes" in " ".join(err.split())
    assert "Traceback" not in err
    assert waited < 30
    assert not (tmp_path / "out").exists()
    report, _ = run.quantize(llama, recipe.load("gptq-plain-w4g128", changes), tmp_path / "out")
    assert report.resumed_layers
    run.quantize(llama, recipe.load("gptq-plain-w4g128", changes), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_forever(lost, llama, calibrated, tmp_path):
    started = begin(2, *command(llama, "gptq-plain-w4g128", calibrated, tmp_path / "out"), meeting=2)
    started[lost].kill()
    started[lost].communicate()
    code, out, err = end([started[1 - lost]])[0]
    assert (code, out) == (2, "")
    assert "the processes cannot meet" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["calibration.sequences=1"], "1 sequences cannot be split over 2 processes. Start fewer"),
        (["learned_rounding={}"], "learned_rounding: is done by one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_by_all(changes, told, llama, calibrated, tmp_path):
    ended = end(begin(2, *command(llama, "gptq-plain-w4g128", [*calibrated, *changes], tmp_path / "out")))
    assert [code for code, _, _ in ended] == [2, 2]
    assert told in " ".join(ended[0][2].split())
    assert "Traceback" not in ended[0][2] + ended[1][2]
    assert not (tmp_path / "out").exists()


def test_other_commands_are_for_one_process(llama):
    for code, _, err in end(begin(2, "inspect", llama)):
        assert code == 2
        assert "inspect: runs in one process; torchrun is for `llmquant quantize`" in " ".join(err.split())


def test_rows_are_dealt_in_whole_pieces_about_evenly():
    for pieces in ([1] * 10, [512] * 7, [300, 20, 20, 300], [5]):
        for size in (1, 2, 3, 8):
            found = [_dealt(pieces, Ranks(rank, size)) for rank in range(size)]
            assert found[0].start == 0
            assert found[-1].stop == sum(pieces)
            assert all(a.stop == b.start for a, b in itertools.pairwise(found))
            assert all(
                sum(pieces) / size - max(pieces) <= x.stop - x.start <= sum(pieces) / size + max(pieces) for x in found
            )


def test_a_process_alone_moves_nothing():
    x = torch.ones(3)
    ALONE.add(x)
    assert ALONE.joined(x) is x
    assert ALONE.each(lambda: 5) == [5]
    assert ALONE.from_first(lambda: 6) == 6


def test_statistics_do_not_depend_on_the_order_of_batches_to_the_last_bit():
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(200, 96, generator=g) * torch.logspace(-3, 3, 96) for _ in range(16)]
    found = []
    for order in (batches, batches[::-1]):
        sums = Accumulator(96, "hessian", drift=True)
        for x in order:
            sums.add(x, 1.01 * x)
        found.append(sums.result())
    assert torch.equal(found[0].hessian, found[1].hessian)
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].drift.crosses[1], found[1].drift.crosses[1])
