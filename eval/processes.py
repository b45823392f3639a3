"""What do several processes gain over one, and do they write the same?

    python eval/processes.py --text TEXT --work FOLDER --out eval/results/processes.md [--recipes NAME ...]

A random Llama (``memory.py``'s) is quantized by each recipe, by one process of one thread and by several of them
(torchrun), in turns. Seconds are those of whole processes: imports, loading, quantizing, saving. Codes are compared
linear by linear. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkout import commit
from memory import generate

from llmquant.packed import open_model
from llmquant.report import markdown

CONTAINER = {"gptq-plain-w4g128": "compressed_tensors", "gptq-q4_k_m": "gguf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=CONTAINER, default=["gptq-plain-w4g128"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 512), help="sequences, and tokens of each")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    model = args.work / f"{args.hidden}x{args.layers}"
    if not model.exists():
        generate(model, args.hidden, args.layers)
    rows = []
    for recipe in args.recipes:
        seconds: dict[int, list[float]] = {1: [], args.processes: []}
        for _ in range(args.runs):
            for count, found in seconds.items():
                found.append(quantized(model, recipe, count, args))
        alone, together = (statistics.median(found) for found in seconds.values())
        same, linears = agreement(*(args.work / f"out-{count}" for count in seconds))
        rows.append([recipe, f"{alone:.0f}", f"{together:.0f}", f"{together / alone:.3f}", f"{same:.6%} of {linears}"])
        print(*rows[-1], sep="\t", flush=True)
    lines = [
        "# Several processes beside one",
        "",
        f"Commit {commit()}; a bfloat16 Llama of random weights, {args.layers} layers of {args.hidden} columns; "
        f"{args.tokens[0]} sequences of {args.tokens[1]} tokens; {args.processes} processes of one thread each, "
        f"{os.cpu_count()} cores; medians over {args.runs} runs in turns.",
        "",
        markdown(("recipe", "1, s", f"{args.processes}, s", "ratio", "weights that are the same"), rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), "utf-8")


def quantized(model: Path, recipe: str, processes: int, args: argparse.Namespace) -> float:
    """Quantize by so many processes; return their wall time in seconds."""
    out = args.work / f"out-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    starter = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    settings = [f"calibration.path={args.text.absolute()}", f"formats=[{CONTAINER[recipe]}]"]
    settings += [f"calibration.sequences={args.tokens[0]}", f"calibration.length={args.tokens[1]}"]
    command = [
        sys.executable,
        *starter,
        "-m",
        "llmquant",
        "quantize",
        str(model),
        recipe,
        "--no-eval",
        "--out",
        str(out),
    ]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def agreement(one: Path, other: Path) -> tuple[float, int]:
    """Return the share of decoded weights that are the same bit for bit in two folders, and how many there are."""
    first, second = (
        open_model(sorted(path.glob("*.gguf"))[0] if list(path.glob("*.gguf")) else path) for path in (one, other)
    )
    same = total = 0
    for name, info in first.infos.items():
        if len(info.shape) == 2:
            equal = torch.eq(first.read(name), second.read(name))
            same, total = same + int(equal.sum()), total + equal.numel()
    return same / total, total


if __name__ == "__main__":
    main()
