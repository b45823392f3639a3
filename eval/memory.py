"""Does a plan foretell the peak memory of a run?

    python eval/memory.py --text TEXT --work FOLDER --out eval/results/memory.md

A random Llama with the demo model's tokenizer is quantized by each of some recipes, each in
a process of its own, after the demo model: what Python, torch, transformers and compiled
kernels take is then there already. It is told beside, and the errors are of what the run
takes above that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from llmquant import demo, footprint, memory, recipe, run
from llmquant.report import markdown

CASES: dict[str, tuple[str, list[str]]] = {
    "rtn": ("rtn-w4g128", []),
    "rtn, small shards": ("rtn-w4g128", ["max_shard_size=50MB"]),
    "hqq": ("hqq-w4g64", []),
    "one scale a tensor": ("rtn-w4g128", ["grid.strategy=tensor"]),
    "int8": ("int8", []),
    "fp8": ("fp8", []),
    "nf4": ("nf4", []),
    "rtn in two containers": ("rtn-w4g128", ["formats=[gptq, compressed_tensors]"]),
    "gguf q4_0": ("gguf-q4_0", []),
    "gguf q4_k_m": ("gguf-q4_k_m", []),
    "rtn, calibrated": ("rtn-w4g128", ["algorithm.calibrated=true", "TEXT"]),
    "gptq": ("gptq-w4g128", ["TEXT"]),
    "gptq, a pass for each site": ("gptq-w4g128", ["TEXT", "true_sequential=false"]),
    "gptq gguf q4_k_m": ("gptq-q4_k_m", ["TEXT"]),
    "awq": ("awq-w4g128", ["TEXT"]),
    "smoothquant": ("w8a8-smoothquant", ["TEXT"]),
    "static activations": ("w8a8-static", ["TEXT"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 512), help="sequences, and tokens of each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", action="store_true", help="measure the one case in this process and print it")
    args = parser.parse_args()
    model = args.work / f"random-{args.hidden}-{args.layers}"
    if args.one:
        measure(model, args.text, args.tokens, args.cases[0], args.work / "out")
        return
    if not model.exists():
        generate(model, args.hidden, args.layers)
    rows = []
    for case in args.cases:
        shutil.rmtree(args.work / "out", ignore_errors=True)
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--one", "--cases", case]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        base, predicted, peak = json.loads(told.splitlines()[-1])
        error = (predicted - footprint.RUNTIME) / (peak - base) - 1
        rows.append([case, *(f"{n / 1e6:.0f}" for n in (base, peak, predicted)), f"{error:+.0%}"])
        print(*rows[-1], sep="\t", flush=True)
    count, threads = sum(i.numel for i in run.load_float(model).infos.values()), torch.get_num_threads()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = [
        "# The peak memory that a plan foretells",
        "",
        f"Commit {commit.stdout.strip()}; a bfloat16 Llama of {count / 1e6:.0f} million random weights, {args.layers} "
        f"layers of {args.hidden} columns; {args.tokens[0]} sequences of {args.tokens[1]} tokens; {threads} threads, "
        "CPU. MB. Base: of a process that has quantized the demo model; a plan takes it to be "
        f"{footprint.RUNTIME / 1e6:.0f}. Error: of what comes on top.",
        "",
        markdown(("recipe", "base", "peak", "predicted peak", "error"), rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), "utf-8")


def generate(folder: Path, hidden: int, layers: int) -> None:
    """Write a random model."""
    config = transformers.LlamaConfig(
        vocab_size=json.loads((demo.MODEL / "config.json").read_text("utf-8"))["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        pad_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, folder)


def measure(model: Path, text: Path, tokens: tuple[int, int], case: str, out: Path) -> None:
    """Print what the process took before, what the plan says and what the run took at most."""
    name, changes = CASES[case]
    settings = [f"calibration.path={text}", f"calibration.sequences={tokens[0]}", f"calibration.length={tokens[1]}"]
    changes = [s for c in changes for s in (settings if c == "TEXT" else [c])]
    chosen = recipe.load(name, changes)
    few = chosen if chosen.calibration is None else recipe.load(name, [*changes, "calibration.sequences=1"])
    run.quantize(demo.MODEL, few, out / "demo", device="cpu")
    predicted = run.make_plan(model, chosen).peak_bytes
    memory.reset_peak()
    base = memory.peak_bytes()
    report, _ = run.quantize(model, chosen, out / "model", device="cpu")
    print(json.dumps([base, predicted, report.peak_rss_bytes]))


if __name__ == "__main__":
    main()
