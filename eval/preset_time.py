"""What does the default preset of an affine format cost beside plain GPTQ?

    python eval/preset_time.py MODEL --calib FILE --out results.md

Both quantize the same model in turns, in a process each, on the recipes' own amount of
calibration text (128 sequences of the model's context, at most 2048 tokens, or as many
as the text has) unless told otherwise. Plain GPTQ: act-order and the refinements that
are its defaults. Medians of the processes' wall time, start-up included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from accuracy import DEFAULT, execute
from checkout import SOURCE, commit

from llmquant import data
from llmquant.packed import open_model
from llmquant.report import markdown
from llmquant.stream import Stream

PRESETS = {"plain GPTQ": ["--set", "algorithm={name: gptq, actorder: true}"], "default": DEFAULT}


def seconds(model: Path, recipe: str, calibration: dict[str, object], options: list[str], threads: int) -> float:
    """Return the wall time of quantizing once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmquant", "quantize", str(model), recipe, *options]
        command += ["--set", f"calibration={json.dumps(calibration)}", "--no-eval", "--out", f"{folder}/out"]
        return execute(command, threads, SOURCE)[0]


def usual_length(model: Path, calib: Path, sequences: int) -> int:
    """Return the length of the sequences that a recipe takes by default, less where the text is too short."""
    stream = Stream(open_model(model), torch.device("cpu"), weights=False)
    tokens = len(data.load_tokenizer(model)(calib.read_text("utf-8"))["input_ids"])
    return min(stream.context, 2048, tokens // (sequences + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = lambda given: Path(given).absolute()  # noqa: E731  (quantized by a program that runs elsewhere)
    parser.add_argument("model", type=path)
    parser.add_argument("--calib", type=path, required=True, help="text to calibrate on")
    parser.add_argument("--recipe", default="gptq-plain-w4g128", help="whose format is quantized to")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="*", help="of the sequences (default: the recipes' own)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for length in args.lengths or [usual_length(args.model, args.calib, args.sequences)]:
        calibration = {"path": str(args.calib), "sequences": args.sequences, "length": length}
        short = calibration | {"sequences": 4, "length": 64}
        seconds(args.model, args.recipe, short, DEFAULT, args.threads)  # compiles the kernels, warms the cache
        times: dict[str, list[float]] = {name: [] for name in PRESETS}
        for _ in range(args.repeats):
            for name, options in PRESETS.items():
                times[name].append(seconds(args.model, args.recipe, calibration, options, args.threads))
        plain, default = (statistics.median(of) for of in times.values())
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([f"{args.sequences} x {length}", f"{plain:.1f}", f"{default:.1f}", told])
        print(*rows[-1], flush=True)
    columns = ("tokens", "plain GPTQ, s", "default, s", "ratio, median (range)")
    lines = [f"# The default preset's time beside plain GPTQ: {args.model.name}, {args.recipe}", ""]
    lines += [f"Commit {commit()}; {args.threads} thread(s), {args.repeats} runs of each in turns.", ""]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([*lines, markdown(columns, rows), ""]))


if __name__ == "__main__":
    main()
