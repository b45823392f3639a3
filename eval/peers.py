"""GPTQ by llmquant, GPTQModel and llm-compressor on the same tokens: divergence and wall time.

    python eval/peers.py MODEL --calib FILE --text FILE --gptqmodel PYTHON --llmcompressor PYTHON --out results.md

Each peer runs in the interpreter of its own environment (PYTHON), all with the same
number of threads, in turns. Wall time is that of the whole process: imports,
loading, quantizing, saving. What they wrote is measured by llmquant's reader, which
the tests hold against the peers' own decoders. With ``--check-load`` GPTQModel also
decodes llmquant's folder, and the floats must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmquant import data, evaluation
from llmquant.packed import open_model
from llmquant.report import markdown
from llmquant.stream import Stream

GPTQMODEL = """
import json, sys
from safetensors.torch import load_file
from gptqmodel import GPTQModel, QuantizeConfig
model, tokens, out, settings = sys.argv[1:5]
settings = json.loads(settings)
model = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu")
rows = load_file(tokens)["tokens"].tolist()
model.quantize([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows], batch_size=1)
model.save(out)
"""

LLMCOMPRESSOR = """
import json, sys
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
model_path, tokens, out, settings = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
rows = load_file(tokens)["tokens"]
loader = DataLoader([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=1)
modifier = GPTQModifier(targets="Linear", ignore=["lm_head"], scheme="W4A16", **json.loads(settings))
oneshot(model=model, dataset=loader, recipe=modifier, num_calibration_samples=len(rows))
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
"""

DECODE = """
import sys
import torch
from gptqmodel import GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend="torch").model
weights = {}
for name, module in model.named_modules():
    if hasattr(module, "dequantize_weight"):
        weights[name] = module.dequantize_weight().T.float().contiguous()
save_file(weights, sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gptqmodel", help="the interpreter of an environment with GPTQModel")
    parser.add_argument("--llmcompressor", help="the interpreter of an environment with llm-compressor")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--check-load", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    threads = str(args.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = data.Calibration(path=args.calib, sequences=args.sequences, length=args.length)
        tokenizer = data.load_tokenizer(args.model)
        context = Stream(open_model(args.model), torch.device("cpu"), weights=False).context
        text = data.calibration_tokens(source, tokenizer, context)
        save_file({"tokens": text.tokens}, folder / "tokens.safetensors")

        def ours(*changes: str) -> list[str]:
            changes = (
                f"calibration.path={args.calib}",
                f"calibration.sequences={args.sequences}",
                f"calibration.length={args.length}",
                *changes,
            )
            sets = [x for change in changes for x in ("--set", change)]
            return [sys.executable, "-m", "llmquant", "quantize", str(args.model), "gptq-w4g128", *sets, "--no-eval"]

        def theirs(python: str, script: str, settings: dict[str, object]) -> list[str]:
            path = folder / f"{len(list(folder.glob('*.py')))}.py"
            path.write_text(script)
            return [python, str(path), str(args.model), str(folder / "tokens.safetensors"), "OUT", json.dumps(settings)]

        runs = {"llmquant": ours(), "llmquant actorder": ours("algorithm.actorder=true")}
        if args.gptqmodel:
            setting = {"bits": 4, "group_size": 128, "sym": True}
            runs["GPTQModel"] = theirs(args.gptqmodel, GPTQMODEL, setting)
            runs["GPTQModel desc_act"] = theirs(args.gptqmodel, GPTQMODEL, setting | {"desc_act": True})
        if args.llmcompressor:
            runs["llm-compressor"] = theirs(args.llmcompressor, LLMCOMPRESSOR, {})
            runs["llm-compressor static"] = theirs(args.llmcompressor, LLMCOMPRESSOR, {"actorder": "static"})
        seconds: dict[str, list[float]] = {run: [] for run in runs}
        for turn in range(args.repeat):
            for run, command in runs.items():
                out = folder / f"{run}-{turn}".replace(" ", "-")
                command = [str(out) if word == "OUT" else word for word in command]
                command += ["--out", str(out)] if run.startswith("llmquant") else []
                started = time.monotonic()
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                seconds[run].append(time.monotonic() - started)
                if done.returncode:
                    sys.exit(f"{run} failed:\n{done.stderr[-3000:]}")
                print(run, f"{seconds[run][-1]:.1f} s", flush=True)
        if args.check_load:
            decoded = folder / "decoded.safetensors"
            subprocess.run([args.gptqmodel, "-c", DECODE, folder / "llmquant-0", decoded], env=environment, check=True)
            judge, mine = load_file(decoded), open_model(folder / "llmquant-0")
            differences = [float((w - mine.read(f"{n}.weight")).abs().max()) for n, w in judge.items()]
            print(f"GPTQModel decodes {len(differences)} linears of llmquant; largest difference {max(differences):g}")
        windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
        reference = evaluation.Reference(args.model)
        base = statistics.median(seconds["llmquant"])
        rows, facts = [], []
        for run in runs:
            row = evaluation.evaluate(folder / f"{run}-0".replace(" ", "-"), windows, reference, run)
            median = statistics.median(seconds[run])
            facts.append(row.as_dict() | {"seconds": seconds[run], "command": runs[run]})
            kld = f"{row.kld_mean:.6f} ± {row.kld_error:.6f}"
            rows.append([run, kld, f"{row.kld_p99:.5f}", f"{row.top1:.2%}", f"{median:.1f}", f"{median / base:.2f}"])
            print(*rows[-1], flush=True)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        columns = ("program", "mean KLD", "KLD 99 %", "top-1", "seconds, whole process", "times llmquant's")
        lines = [
            f"# GPTQ w4g128, symmetric, {args.model.name}: the same tokens in three programs",
            "",
            f"Commit {commit.stdout.strip()}; {args.sequences} sequences of {args.length} tokens of {args.calib.name}; "
            f"{args.threads} thread(s), median of {args.repeat}. Protocol: {windows.label}.",
            "",
            markdown(columns, rows),
            "",
        ]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))
        args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
