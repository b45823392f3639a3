"""GPTQ by llmquant, GPTQModel and llm-compressor on the same tokens: divergence and wall time.

    python eval/peers.py MODEL --calib FILE --text FILE --gptqmodel PYTHON --llmcompressor PYTHON --out results.md

Each peer runs in the interpreter of its own environment (PYTHON), all with the same
number of threads, in turns. Wall and processor time are those of the whole process:
imports, loading, quantizing, saving. GPTQModel has two workers at the least, so
compare processor time too. Its first run in an environment compiles an extension, and
so does llmquant's: run both once before timing. What they wrote is measured by llmquant's reader, which
the tests hold against the peers' own decoders. With ``--check-load`` GPTQModel also
decodes llmquant's folder, to float16, which is the widest it can; the study stops
unless that equals llmquant's own decoding, rounded to float16.

The peers compute in their own choice of type, bfloat16 for a bfloat16 model; on a
processor without bfloat16 instructions ``--peer-dtype float32`` is the faster one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from checkout import commit
from safetensors.torch import load_file, save_file

from llmquant import data, evaluation
from llmquant.packed import open_model
from llmquant.report import markdown
from llmquant.stream import Stream

GPTQMODEL = """
import json, sys
import torch
from safetensors.torch import load_file
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
if not torch.accelerator.is_available():  # a CPU is 20 times faster in float32, which its AWQ refuses (7.7.0) ...
    AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]  # ... and writes float16 from
model, tokens, out, dtype, settings = sys.argv[1:6]
settings = json.loads(settings)
dtype = "auto" if dtype == "auto" else getattr(torch, dtype)  # the name of a type is silently taken for "auto"
model = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu", dtype=dtype)
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
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
if not torch.accelerator.is_available():  # what AWQ pins is for copies to one, and without one it fails (0.14.0.1)
    IntermediatesCache.pin_memory = lambda cache, batch, names=None: None
model_path, tokens, out, dtype, settings = sys.argv[1:6]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
rows = load_file(tokens)["tokens"]
loader = DataLoader([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=1)
known = {kind.__name__: kind for kind in (GPTQModifier, AWQModifier, QuantizationModifier)}
modifiers = [known[name](**given) for name, given in json.loads(settings).items()]
oneshot(model=model, dataset=loader, recipe=modifiers, num_calibration_samples=len(rows))
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
"""

AUTOROUND = """
import json, sys
import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
model_path, tokens, out, dtype, settings = sys.argv[1:6]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
rows = load_file(tokens)["tokens"]
loader = DataLoader([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=1)
text = {"dataset": loader, "nsamples": len(rows), "seqlen": rows.shape[1]}
# it tunes in bfloat16 where the processor has instructions for it, unless the settings say amp: false
rounder = AutoRound(model, AutoTokenizer.from_pretrained(model_path), device_map="cpu", **text, **json.loads(settings))
rounder.quantize_and_save(out, format="auto_gptq")
"""

DECODE = """
import sys
import torch
from gptqmodel import GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend="torch", dtype=torch.float16).model
weights = {}
for name, module in model.named_modules():
    if hasattr(module, "dequantize_weight"):
        weights[name] = module.dequantize_weight().T.float().contiguous()
save_file(weights, sys.argv[2])
"""


def children_seconds() -> float:
    """Return the processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def version(python: str, package: str) -> str:
    """Return a package's version in another interpreter's environment."""
    script = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda given: Path(given).resolve())
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gptqmodel", help="the interpreter of an environment with GPTQModel")
    parser.add_argument("--llmcompressor", help="the interpreter of an environment with llm-compressor")
    parser.add_argument("--peer-dtype", choices=("auto", "float32"), default="auto", help="the peers compute in it")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of every program, each on another choice of sequences"
    )
    parser.add_argument("--actorder-only", action="store_true", help="each program with its best setting only")
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--check-load", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    threads = str(args.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    environment["GPTQMODEL_CPU_WORKERS"] = str(max(2, args.threads))  # fewer than two, and it does not start

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = data.load_tokenizer(args.model)
        context = Stream(open_model(args.model), torch.device("cpu"), weights=False).context

        def ours(seed: int, *changes: str) -> list[str]:
            changes = (
                f"calibration.path={args.calib}",
                f"calibration.sequences={args.sequences}",
                f"calibration.length={args.length}",
                f"calibration.seed={seed}",
                *changes,
            )
            sets = [x for change in changes for x in ("--set", change)]
            command = [
                sys.executable,
                "-m",
                "llmquant",
                "quantize",
                str(args.model),
                "gptq-plain-w4g128",
                *sets,
                "--no-eval",
            ]
            return [*command, "--out", "OUT"]

        def theirs(seed: int, python: str, script: str, settings: dict[str, object]) -> list[str]:
            path = folder / f"{len(list(folder.glob('*.py')))}.py"
            path.write_text(script)
            return [python, str(path), str(args.model), str(tokens(seed)), "OUT", args.peer_dtype, json.dumps(settings)]

        def tokens(seed: int) -> Path:
            return folder / f"tokens-{seed}.safetensors"

        def programs(seed: int) -> dict[str, list[str]]:
            runs = {"llmquant": ours(seed), "llmquant no actorder": ours(seed, "algorithm.actorder=false")}
            if args.gptqmodel:
                setting: dict[str, object] = {"bits": 4, "group_size": 128, "sym": True}
                runs["GPTQModel no desc_act"] = theirs(seed, args.gptqmodel, GPTQMODEL, setting)
                runs["GPTQModel desc_act"] = theirs(seed, args.gptqmodel, GPTQMODEL, setting | {"desc_act": True})
            if args.llmcompressor:
                for run, more in (("llm-compressor", {}), ("llm-compressor no actorder", {"actorder": None})):
                    given = {"targets": "Linear", "ignore": ["lm_head"], "scheme": "W4A16", **more}
                    runs[run] = theirs(seed, args.llmcompressor, LLMCOMPRESSOR, {"GPTQModifier": given})
            return {name: run for name, run in runs.items() if " no " not in name or not args.actorder_only}

        runs = programs(0)
        seconds: dict[str, list[float]] = {run: [] for run in runs}
        processor: dict[str, list[float]] = {run: [] for run in runs}
        for seed in range(args.seeds):
            source = data.Calibration(path=args.calib, sequences=args.sequences, length=args.length, seed=seed)
            text = data.calibration_tokens(source, tokenizer, context)
            save_file({"tokens": text.tokens}, tokens(seed))
            for run, command in programs(seed).items():
                out = folder / f"{run}-{seed}".replace(" ", "-")
                command = [str(out) if word == "OUT" else word for word in command]
                started, before = time.monotonic(), children_seconds()
                # GPTQModel leaves a folder `logs` wherever it runs
                place = None if run.startswith("llmquant") else folder
                done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
                seconds[run].append(time.monotonic() - started)
                processor[run].append(children_seconds() - before)
                if done.returncode:
                    sys.exit(f"{run} failed:\n{done.stderr[-3000:]}")
                print(run, f"{seconds[run][-1]:.1f} s, {processor[run][-1]:.1f} s of a processor", flush=True)
        checked = ""
        if args.check_load:
            decoded = folder / "decoded.safetensors"
            command = [args.gptqmodel, "-c", DECODE, str(folder / "llmquant-0"), str(decoded)]
            subprocess.run(command, env=environment, cwd=folder, check=True)
            judge, mine = load_file(decoded), open_model(folder / "llmquant-0")
            wrong = [n for n, w in judge.items() if not torch.equal(w, mine.read(f"{n}.weight").half().float())]
            if wrong or not judge:
                sys.exit(f"GPTQModel decodes {len(wrong)} of {len(judge)} linears of llmquant differently: {wrong[:3]}")
            checked = f"GPTQModel loads llmquant's folder and decodes its {len(judge)} linears to the same float16."
            print(checked, flush=True)
        windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
        reference = evaluation.Reference(args.model)
        base = statistics.median(seconds["llmquant"])
        rows, facts = [], []
        for run in runs:
            found = [
                evaluation.evaluate(folder / f"{run}-{seed}".replace(" ", "-"), windows, reference, run)
                for seed in range(args.seeds)
            ]
            median = statistics.median(seconds[run])
            busy = statistics.median(processor[run])
            times = {"seconds": seconds[run], "processor_seconds": processor[run]}
            facts.append({"run": run, "rows": [row.as_dict() for row in found], "command": runs[run], **times})

            def mean(key: str, found: list[evaluation.Row] = found) -> float:
                return statistics.mean(float(getattr(row, key)) for row in found)

            error = found[0].kld_error
            if args.seeds > 1:
                error = statistics.stdev(row.kld_mean or 0.0 for row in found) / args.seeds**0.5
            quality = [f"{mean('kld_mean'):.6f} ± {error:.6f}", f"{mean('kld_p99'):.5f}", f"{mean('top1'):.2%}"]
            quality.append(f"{mean('perplexity'):.3f}")
            rows.append([run, *quality, f"{median:.1f}", f"{median / base:.2f}", f"{busy:.1f}"])
            print(*rows[-1], flush=True)
        peers = {"gptqmodel": args.gptqmodel, "llmcompressor": args.llmcompressor}
        versions = {package: version(python, package) for package, python in peers.items() if python}
        named = ", ".join(f"{package} {number}" for package, number in versions.items())
        columns = (
            *("program", "mean KLD", "KLD 99 %", "top-1", "perplexity"),
            *("seconds", "times llmquant's", "processor s"),
        )
        lines = [
            f"# GPTQ w4g128, symmetric, {args.model.name}: the same tokens in three programs",
            "",
            f"Commit {commit()}; {named}, computing in {args.peer_dtype}; {args.sequences} sequences of "
            f"{args.length} tokens of {args.calib.name}, {args.seeds} choices of them (KLD: mean over them ± its "
            f"standard error; times: median); {args.threads} thread(s). "
            f"Protocol: {windows.label}.",
            "",
            markdown(columns, rows),
            "",
            *([checked, ""] if checked else []),
        ]
        about = {
            "commit": commit(),
            "versions": versions,
            "protocol": windows.label,
            "check_load": checked,
            "text": text.as_dict(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))
        args.out.with_suffix(".json").write_text(json.dumps(about | {"rows": facts}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
