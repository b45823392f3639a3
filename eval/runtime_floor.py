"""How much of a GGUF file's divergence comes from llama.cpp's own arithmetic, and do channel scales lower it?

    python eval/runtime_floor.py MODEL --calib FILE --text FILE --out results.md [--outliers]

llama.cpp rounds what a k-quant is multiplied with to 8 bits, 256 values to a scale, so
the same file diverges more when it runs than when it is decoded; the difference is the
floor. AWQ's scales, folded into what feeds a linear, even out the activations too. Rows:
GPTQ without scales, with AWQ's (the default preset), and with AWQ's when its search
counts the rounding of activations in its loss, as it is and a few times over.

Results are compared on --text, which is for selection. results.json beside the tables
keeps the rows: another model's are added, those of the same model and settings replaced,
and those of other settings refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy import DEFAULT
from accuracy_report import without_folders
from checkout import commit
from outliers import write_outliers
from splits import check_disjoint

from llmquant import evaluation, recipe, run
from llmquant.report import markdown

SCALES = {"none": "[]", "AWQ": "[{name: awq, clip: false}]"}
SCALES |= {f"AWQ, inputs: {n}": f"[{{name: awq, clip: false, inputs: {n}}}]" for n in (1, 4)}
"""What a row is called -> its transforms."""
COLUMNS = ("scales", "decoded", "run by llama.cpp", "floor")


def earlier(path: Path, model: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return what the file of a run before holds; stop the study where it has the model with other settings."""
    known: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"models": {}, "rows": []}
    before = known["models"].get(model, about)
    others = [f"{name} {before[name]}, now {about[name]}" for name in about if before[name] != about[name]]
    if others:
        sys.exit(f"{path} has {model} with other settings: {'; '.join(others)}. Give another --out or --name.")
    return known


def report(known: dict[str, Any]) -> str:
    """Return the table of each model as Markdown, under the settings that its rows were measured with."""
    lines = ["# The floor of llama.cpp's arithmetic", ""]
    lines += ["Mean KL divergence, nats a token; floor: what it is more when llama.cpp runs the file.", ""]
    for model, about in known["models"].items():
        figures = [(r["scales"], r["decoded"], r["as_run"]) for r in known["rows"] if r["model"] == model]
        cells = [[scales, *(f"{x:.6f}" for x in (a, b, b - a))] for scales, a, b in figures]
        lines += [
            f"## {model}, {about['mixture'].upper()}",
            "",
            f"Commit {about['commit']}; {about['sequences']} sequences of {about['length']} tokens to calibrate on. "
            f"Protocol: {about['protocol']}.",
            "",
            f"    {about['command']}",
            "",
            markdown(COLUMNS, cells),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="selection text to measure on")
    parser.add_argument("--name", help="what the table calls the model (default: its folder's name)")
    parser.add_argument("--outliers", action="store_true", help="measure the copy with outlier channels")
    parser.add_argument("--mixture", default="q5_k_m")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_disjoint({"--calib": args.calib, "--text": args.text})
    torch.set_num_threads(args.threads)
    name = (args.name or args.model.absolute().name) + (", outliers" if args.outliers else "")
    text = f"calibration={{path: {args.calib}, sequences: {args.sequences}, length: {args.length}}}"
    windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
    about = {
        "texts": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (args.calib, args.text)},
        **{name: getattr(args, name) for name in ("mixture", "sequences", "length")},
        "protocol": windows.label,
    }
    path = args.out.with_suffix(".json")
    known = earlier(path, name, about)
    rows = [row for row in known["rows"] if row["model"] != name]
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.outliers:
            model = Path(folder) / "model"
            write_outliers(args.model, model)
        reference = evaluation.Reference(model)
        for scales, transforms in SCALES.items():
            changes = [text, f"mixture.name={args.mixture}", *DEFAULT[1::2], f"transforms={transforms}"]
            out = Path(folder) / scales
            run.quantize(model, recipe.load("gptq-q4_k_m", changes), out)
            (file,) = out.glob("*.gguf")
            decoded, as_run = (
                evaluation.evaluate(file, windows, reference, runtime=how).kld_mean for how in ("torch", "llama.cpp")
            )
            rows.append({"model": name, "scales": scales, "decoded": decoded, "as_run": as_run})
            print(*rows[-1].values(), flush=True)
    about |= {"commit": commit(), "command": without_folders(" ".join(sys.argv))}
    known = {"models": known["models"] | {name: about}, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(known), "utf-8")
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
