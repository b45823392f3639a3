"""Does a plan foretell the peak memory of a run?

    python eval/memory.py --text TEXT --work FOLDER --out eval/results/memory.md [--models 1024x8 1024x32 ...]

Random Llamas of some columns and layers, with the demo model's tokenizer, in files of 1 GB, are
quantized by each of some recipes, each in a process of its own, after the demo model: what Python,
torch, transformers and compiled kernels take is then there already. It is told beside.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from checkout import commit

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
    "gptq": ("gptq-plain-w4g128", ["TEXT"]),
    "gptq, a pass for each site": ("gptq-plain-w4g128", ["TEXT", "true_sequential=false"]),
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
    parser.add_argument("--models", nargs="+", default=["512x2", "1024x2", "2048x2"], help="COLUMNSxLAYERS")
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 512), help="sequences, and tokens of each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", action="store_true", help="measure the one case in this process and print it")
    args = parser.parse_args()
    if args.one:
        measure(args.work / args.models[0], args.text, args.tokens, args.cases[0], args.work / "out")
        return
    rows = []
    for name in args.models:
        model = args.work / name
        if not model.exists():
            generate(model, *map(int, name.split("x")))
        size = sum(info.bytes for info in run.load_float(model).infos.values())
        for case in args.cases:
            shutil.rmtree(args.work / "out", ignore_errors=True)
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--one", "--cases", case]
            started = time.monotonic()
            told = subprocess.run([*command, "--models", name], stdout=subprocess.PIPE, check=True, text=True).stdout
            base, predicted, peak = json.loads(told.splitlines()[-1])
            row = [name, f"{size / 1e6:.0f}", case, *(f"{n / 1e6:.0f}" for n in (base, peak, predicted))]
            rows.append([*row, f"{predicted / peak - 1:+.0%}", f"{time.monotonic() - started:.0f}"])
            print(*rows[-1], sep="\t", flush=True)
    lines = [
        "# The peak memory that a plan foretells",
        "",
        f"Commit {commit()}; bfloat16 Llamas of random weights, COLUMNSxLAYERS; {args.tokens[0]} sequences of "
        f"{args.tokens[1]} tokens where a recipe calibrates; {torch.get_num_threads()} thread(s), CPU. MB. Base: of a "
        f"process that has quantized the demo model; a plan takes it to be {footprint.RUNTIME / 1e6:.0f}.",
        "",
        markdown(("model", "its files", "recipe", "base", "peak", "predicted", "error", "seconds"), rows),
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
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
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
