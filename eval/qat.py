"""What does quantization-aware training gain over what a recipe finds without, and in how much time?

    python eval/qat.py MODEL --calib FILE --text FILE --out results.md [--train FILE] [--recipes NAME ...] [--set KEY=V]

Each recipe quantizes the model, by `llmquant quantize` and by `llmquant train`, in a process each; seconds are those of
whole processes. Both files are measured on --text, decoded and, if they are GGUF files, run by llama.cpp. With --kills
the training is done once more, gets SIGKILL so often at random moments, and has to end with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from accuracy_report import without_folders
from checkout import commit
from splits import check_disjoint

from llmquant import evaluation
from llmquant.checkpoint import read_json
from llmquant.packed import open_model
from llmquant.protocols import Windows
from llmquant.report import Table, size
from llmquant.run import REPORT

COLUMNS = ("recipe", "weights", "size", "perplexity", "KLD", "run by llama.cpp", "seconds", "steps")


def command(verb: str, recipe: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the command that writes "out" in a folder; changes of the training are for "train" alone."""
    changes = [f"calibration.path={args.calib.absolute()}", f"calibration.sequences={args.sequences}"]
    changes += [f"calibration.length={args.length}"]
    if verb == "train":
        changes += [f"training.text.path={args.train.absolute()}"] if args.train else []
    changes += [change for change in args.set if verb == "train" or not change.startswith("training.")]
    shared = verb == "train" and args.processes > 1
    starter = ["-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)] if shared else []
    words = [sys.executable, *starter, "-m", "llmquant", verb, str(args.model.absolute()), recipe]
    words += ["--out", str(folder / "out")]
    words += ["--no-eval"] if verb == "quantize" else ["--text", str(args.text.absolute())]
    return [*words, *(word for change in changes for word in ("--set", change))]


def run(words: list[str], threads: int, lives: Sequence[float] = ()) -> tuple[float, int]:
    """Run a command that goes on after it was killed; return the seconds of all its runs, and how often it was killed.

    lives: seconds after which it is killed, unless it ends before.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started, kills = time.monotonic(), 0
    for life in (*lives, None):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(life)
        except subprocess.TimeoutExpired:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            process.wait()
            kills += 1
            continue
        if code:
            sys.exit(f"{' '.join(words)}: exit code {code}")
        break
    return time.monotonic() - started, kills


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that hold weights."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")}


def measured(recipe: str, out: Path, seconds: float, windows: Windows, reference: evaluation.Reference) -> list[str]:
    """Return the row of a written folder."""

    def divergence(runtime: evaluation.Runtime) -> tuple[evaluation.Row, str]:
        row = evaluation.evaluate(out, windows, reference, recipe, runtime=runtime)
        return row, f"{row.kld_mean:.5f} ± {row.kld_error:.5f}"

    row, decoded = divergence("torch")
    program = divergence("llama.cpp")[1] if open_model(out).format == "gguf" else ""
    training = read_json(out / REPORT, "llmquant wrote it").get("training")
    weights, steps = ("trained", str(training["step"])) if training else ("quantized", "")
    return [recipe, weights, size(row.bytes), f"{row.perplexity:.3f}", decoded, program, f"{seconds:.0f}", steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--train", type=Path, help="text to train on (default: the one of --calib)")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--recipes", nargs="+", default=["gptq-w2g64", "gptq-q2_k"])
    parser.add_argument(
        "--set", action="append", default=[], help="a change of the recipes, such as training.steps=1000"
    )
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=1, help="that share a training, and the threads")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    learned_from = args.train or args.calib
    check_disjoint({"--calib": args.calib, "--text": args.text})
    check_disjoint({"--train": learned_from, "--text": args.text})
    torch.set_num_threads(args.threads)
    windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
    reference = evaluation.Reference(args.model)
    floats = evaluation.evaluate(args.model, windows, reference)
    rows, notes = [["", "float", size(floats.bytes), f"{floats.perplexity:.3f}", "", "", "", ""]], []
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as place:
            whole, killed = Path(place) / "whole", Path(place) / "killed"
            for verb in ("quantize", "train"):
                threads = args.threads // args.processes if verb == "train" else args.threads
                seconds, _ = run(command(verb, recipe, whole / verb, args), threads)
                rows.append(measured(recipe, whole / verb / "out", seconds, windows, reference))
                print(*rows[-1], sep="\t", flush=True)
            if args.kills:
                moments = random.Random(0)
                lives = [moments.uniform(0.1, 0.9) * seconds / args.kills for _ in range(args.kills)]
                _, kills = run(command("train", recipe, killed, args), args.threads // args.processes, lives)
                same = contents(whole / "train" / "out") == contents(killed / "out")
                notes.append(f"{recipe}: killed {kills} times, its bytes are {'the same' if same else 'others'}.")
                print(notes[-1], flush=True)
    lines = [
        "# Quantization-aware training",
        "",
        f"Commit {commit()}; {args.model.absolute().name}; {args.threads} threads, of "
        f"{args.processes} process(es) that train. Calibrated on {args.sequences} "
        f"sequences of {args.length} tokens of {args.calib.name}, trained on {learned_from.name} but for what is "
        f"held out. KLD: mean, from the float model, nats a token. Protocol: {windows.label}.",
        "",
        f"    {without_folders(' '.join(sys.argv))}",
        "",
        Table(COLUMNS, rows).markdown(),
        "",
        *notes,
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    main()
