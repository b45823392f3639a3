"""How far are the weights of each GGUF type from the float ones, beside llama-quantize's?

    python eval/gguf_errors.py MODEL TEXT [MODEL TEXT ...] --llama-quantize PATH --out results.md

For every matrix of the decoder layers, without and with an imatrix of the text
(``llmquant imatrix``): sum(importance * error²) of llmquant's plain rounding over
that of llama-quantize --pure, both decoded by the gguf package.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from checkout import commit

from llmquant import api, gguf_file, imatrix
from llmquant.recipe import Recipe
from llmquant.report import markdown

PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q6_k", "iq4_nl", "iq4_xs", "q2_k")
TYPES = {name: name.upper() for name in PLAIN} | {name: f"{name.upper()}_S" for name in ("q3_k", "q4_k", "q5_k")}


def errors(path: Path, truth: dict[str, torch.Tensor], weight: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the weighted squared error of every matrix of a file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in truth:
            decoded = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
            found[tensor.name] = float(((decoded - truth[tensor.name]).square() * weight[tensor.name]).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="MODEL TEXT, repeated")
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for model, text in zip(args.inputs[::2], args.inputs[1::2], strict=True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            api.quantize(model, Recipe(name="f32", mixture={"name": "f32"}, formats=["gguf"]), folder / "float")
            (source,) = (folder / "float").glob("*.gguf")
            api.imatrix(model, text, folder / "im.gguf", sequences=args.sequences)
            file = gguf_file.read(source)
            truth = {
                name: gguf_file.to_float(t)
                for name, t in file.tensors.items()
                if name.startswith("blk.") and len(t.shape) == 2
            }
            known = imatrix.read(folder / "im.gguf")
            for type_, theirs in TYPES.items():
                line = [Path(model).name, type_]
                for importance in ([], [f"imatrix={folder / 'im.gguf'}"]):
                    weight = {
                        name: known.square_mean(name, w.shape[1])[0] if importance else torch.ones(w.shape[1])
                        for name, w in truth.items()
                    }
                    out = folder / f"{type_}{len(importance)}"
                    recipe = Recipe(
                        name=type_,
                        mixture={"name": theirs, "pure": True},
                        imatrix=folder / "im.gguf" if importance else None,
                        formats=["gguf"],
                    )
                    api.quantize(model, recipe, out, evaluate=False)
                    command = [args.llama_quantize, "--pure", str(source), str(folder / "theirs.gguf"), theirs, "1"]
                    if importance:
                        command[1:1] = ["--imatrix", str(folder / "im.gguf")]
                    subprocess.run(command, check=True, capture_output=True)
                    (mine,) = out.glob("*.gguf")
                    ours, judge = (errors(path, truth, weight) for path in (mine, folder / "theirs.gguf"))
                    ratios = [ours[name] / judge[name] for name in truth]
                    line += [f"{statistics.mean(ratios):.3f}", f"{max(ratios):.3f}"]
                rows.append(line)
                print(*line, flush=True)
    columns = ("model", "type", "plain: mean", "plain: worst matrix", "imatrix: mean", "imatrix: worst matrix")
    lines = [
        "# Weighted squared error of the GGUF types, over that of llama-quantize (below 1: nearer to the float)",
        "",
        f"Commit {commit()}; imatrix of {args.sequences} sequences of 512 tokens.",
        "",
        markdown(columns, rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
