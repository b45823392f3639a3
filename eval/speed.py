"""How fast are GGUF types encoded, file to file, beside llama-quantize?

    python eval/speed.py --llama-quantize PATH --out results.md

A Llama of random bfloat16 weights is made; both programs quantize all its matrices to
one type, with importance for every column (an imatrix of random squares), in turns,
with the same number of threads. llmquant reads the Hugging Face folder, llama-quantize
a finished bfloat16 GGUF file, so only llmquant's time includes the conversion. Wall
time and peak memory are those of the whole process, start-up included; both read
pages that the system has cached. ``million weights/s`` counts the quantized weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checkout import commit
from safetensors.torch import save_file

from llmquant import api, demo, gguf_file, imatrix
from llmquant.checkpoint import write_json
from llmquant.recipe import Recipe
from llmquant.report import markdown

TYPES = {
    name: name.upper() for name in ("q2_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs")
} | {name: f"{name.upper()}_S" for name in ("q3_k", "q4_k", "q5_k")}
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def random_model(folder: Path, layers: int, hidden: int, inner: int) -> int:
    """Write a Llama of random weights with the demo model's tokenizer; return how many weights its matrices have."""
    source = Path(demo.__file__).parent / "model"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    vocabulary = 3072
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    )
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        """Return weights with the heavier tails of trained ones."""
        spread = torch.randn(rows, cols // 32, 1, generator=generator).mul(0.3).exp()
        return (torch.randn(rows, cols // 32, 32, generator=generator) * spread * 0.02).view(rows, cols).bfloat16()

    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": matrix(inner, hidden) for name in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = matrix(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(t.numel() for t in tensors.values() if t.dim() == 2)


def random_imatrix(model: Path, path: Path) -> None:
    """Write random squares (log-normal) for every column of every matrix of a GGUF file."""
    generator = torch.Generator().manual_seed(1)
    entries = {}
    for name, tensor in gguf_file.read(model).tensors.items():
        if len(tensor.shape) == 2:
            squares = torch.randn(1, tensor.shape[1], generator=generator).exp() * 1000
            entries[name] = imatrix.Entry(squares, torch.tensor([1000]))
    imatrix.write(path, imatrix.Imatrix(entries, ("random",), 2, 512))


MEASURE = """
import resource, subprocess, sys, time
started = time.monotonic()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, errors="replace")
seconds = time.monotonic() - started
if done.returncode:
    sys.exit(done.stdout[-1000:] + done.stderr[-2000:])
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Run by a small process of its own: a child's peak memory begins with that of its parent."""


def timed(command: list[str], threads: int) -> tuple[float, int]:
    """Run a command; return its wall time in seconds and its peak memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("llmquant", "llama-quantize"), help="run one side")
    parser.add_argument("--scratch", type=Path, help="a folder for the files (default: the system's)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        model = folder / "random"
        weights = random_model(model, args.layers, args.hidden, args.inner)
        api.quantize(model, Recipe(name="bf16", mixture={"name": "bf16"}, formats=["gguf"]), folder / "float")
        (source,) = (folder / "float").glob("*.gguf")
        random_imatrix(source, folder / "im.gguf")
        for type_ in args.types:
            recipe = folder / f"{type_}.yaml"
            recipe.write_text(
                f"name: {type_}\nmixture: {{name: {TYPES[type_].lower()}, pure: true}}\nformats: [gguf]\n"
            )
            ours, theirs = folder / "ours", folder / "theirs.gguf"
            matrix = str(folder / "im.gguf")
            ours_ = [
                sys.executable,
                "-m",
                "llmquant",
                "quantize",
                str(model),
                str(recipe),
                "--out",
                str(ours),
                "--no-eval",
            ]
            theirs_ = [args.llama_quantize, "--imatrix", matrix, "--pure", str(source), str(theirs), TYPES[type_]]
            commands = {
                "llmquant": [*ours_, "--set", f"imatrix={matrix}", "--device", "cpu"],
                "llama-quantize": [*theirs_, str(args.threads)],
            }
            measured: dict[str, list[tuple[float, int]]] = {side: [] for side in commands}
            for _ in range(args.repeat):
                for side, command in commands.items():
                    if args.only in (None, side):
                        measured[side].append(timed(command, args.threads))
                subprocess.run(["rm", "-rf", str(ours), str(theirs)], check=True)
            speeds = {side: [weights / s / 1e6 for s, _ in runs] for side, runs in measured.items()}
            line = [type_]
            for side, runs in measured.items():
                line.append(f"{statistics.median(speeds[side]):.1f}" if runs else "")
                line.append(f"{max(peak for _, peak in runs) / 1e9:.2f}" if runs else "")
            ratios = [a / b for a, b in zip(*speeds.values(), strict=False)]
            line.append(f"{statistics.median(ratios):.2f}" if ratios else "")
            rows.append(line)
            print(*line, flush=True)
    columns = ("type", "llmquant M/s", "peak GB", "llama-quantize M/s", "peak GB", "llmquant / llama-quantize")
    lines = [
        "# Encoding throughput with importance, million weights a second, file to file",
        "",
        f"Commit {commit()}; {weights / 1e6:.0f} million weights ({args.layers} layers, hidden size "
        f"{args.hidden}, inner {args.inner}), {args.threads} threads, median of {args.repeat} runs each, in turns.",
        "",
        markdown(columns, rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
