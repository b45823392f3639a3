"""Does a plan foretell how long a run takes?

    python eval/duration.py --text TEXT --work FOLDER --out eval/results/duration.md [--models 512x2 1024x2 ...]

Random Llamas (``memory.py``'s) are quantized by some recipes in one process of one thread. Processor time, without
imports, beside what a plan says just before, in terms of how fast matrices are multiplied at that moment.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from checkout import commit
from memory import generate

from llmquant import demo, duration, recipe, run
from llmquant.report import markdown

CASES: dict[str, tuple[str, list[str]]] = {
    "rtn": ("rtn-w4g128", []),
    "gguf q4_k_m": ("gguf-q4_k_m", []),
    "gptq": ("gptq-plain-w4g128", ["TEXT"]),
    "gptq, no refinement": ("gptq-plain-w4g128", ["TEXT", "algorithm.scale_search=false", "algorithm.sweeps=0"]),
    "gptq, mismatch": ("gptq-plain-w4g128", ["TEXT", "mismatch_correction=true"]),
    "awq": ("awq-w4g128", ["TEXT"]),
    "awq, gptq": ("gptq-plain-w4g128", ["TEXT", "transforms=[{name: awq, clip: false}]"]),
    "default, q4_k_m": ("gptq-q4_k_m", ["TEXT"]),
    "default, q2_k": ("gptq-q2_k", ["TEXT"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["512x2", "1024x2"], help="COLUMNSxLAYERS")
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 512), help="sequences, and tokens of each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = [f"calibration.path={args.text}", f"calibration.sequences={args.tokens[0]}"]
    settings.append(f"calibration.length={args.tokens[1]}")
    chosen = {}
    for case in args.cases:
        name, changes = CASES[case]
        chosen[case] = recipe.load(name, [s for c in changes for s in (settings if c == "TEXT" else [c])])
        measured(demo.MODEL, chosen[case])  # compiles
    rows = []
    for name in args.models:
        model = args.work / name
        if not model.exists():
            generate(model, *map(int, name.split("x")))
        for case, one in chosen.items():
            told = sum(run.make_plan(model, one).seconds.values()) - duration.STARTING
            took = measured(model, one)
            rows.append([name, case, f"{took:.1f}", f"{told:.1f}", f"{told / took:.2f}"])
            print(*rows[-1], sep="\t", flush=True)
    lines = [
        "# How long a plan says that a run takes",
        "",
        f"Commit {commit()}; bfloat16 Llamas of random weights, COLUMNSxLAYERS; {args.tokens[0]} sequences of "
        f"{args.tokens[1]} tokens where a recipe calibrates; one thread. The factors were fitted to 512x2 and 1024x2.",
        "",
        markdown(("model", "recipe", "seconds", "foretold", "ratio"), rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), "utf-8")


def measured(model: Path, chosen: recipe.Recipe) -> float:
    """Return the processor seconds of a run."""
    folder = Path(tempfile.mkdtemp())
    started = time.process_time()
    run.quantize(model, chosen, folder / "out", device="cpu")
    took = time.process_time() - started
    shutil.rmtree(folder)
    return took


if __name__ == "__main__":
    main()
