"""Does GPTQ diverge less from the float model than rounding to nearest, at 4, 3 and 2 bits?

    python eval/gptq_against_rtn.py --out results.md MODEL CALIBRATION EVALUATION [MODEL CALIBRATION EVALUATION ...]

For each model (with a text to calibrate and one to evaluate on): mean KL divergence
of rounding and of GPTQ in its variants, for one scale in 128 columns (4 and 3 bits)
or 64 (2 bits); a weight whose columns do not divide gets one scale a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from checkout import commit

from llmquant import evaluation, recipe, run
from llmquant.report import markdown

VARIANTS = {
    "rtn": ["algorithm.name=rtn"],
    "rtn mse": ["algorithm.name=rtn", "grid.observer=mse"],
    "gptq": ["algorithm.actorder=false"],
    "gptq static": ["algorithm.actorder=false", "algorithm.static_groups=true"],
    "gptq actorder": ["algorithm.actorder=true"],
    "gptq actorder mse": ["algorithm.actorder=true", "grid.observer=mse"],
    "gptq actorder true_sequential": ["algorithm.actorder=true", "true_sequential=true"],
}
GRIDS = {
    "w4g128 sym": ["grid.bits=4", "grid.group_size=128"],
    "w3g128 asym": ["grid.bits=3", "grid.group_size=128", "grid.symmetric=false"],
    "w2g64 asym": ["grid.bits=2", "grid.group_size=64", "grid.symmetric=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="MODEL CALIBRATION EVALUATION, repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=10240)
    parser.add_argument("--protocol", default="llama.cpp")
    args = parser.parse_args()
    assert len(args.inputs) % 3 == 0, "give MODEL CALIBRATION EVALUATION for each model"
    facts, sections = [], []
    for model, calibration, text in zip(*(args.inputs[i::3] for i in range(3)), strict=True):
        windows = evaluation.read_windows(model, text, args.protocol, args.max_tokens)
        reference = evaluation.Reference(model)
        base = [
            f"calibration.path={calibration}",
            f"calibration.sequences={args.sequences}",
            f"calibration.length={args.length}",
            "fallback=substitute",
            "true_sequential=false",
            "formats=[compressed_tensors]",
        ]
        table = []
        for grid, grid_changes in GRIDS.items():
            line = [Path(model).name, grid]
            for variant, changes in VARIANTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    chosen = recipe.load("gptq-plain-w4g128", [*base, *grid_changes])
                    if "algorithm.name=rtn" in changes:
                        chosen = recipe.Recipe(**(chosen.model_dump() | {"algorithm": {"name": "rtn"}}))
                    values = [c for c in changes if c != "algorithm.name=rtn"]
                    path = Path(folder) / "recipe.yaml"
                    path.write_text(recipe.dump(chosen))
                    report, _ = run.quantize(model, recipe.load(path, values), out)
                    row = evaluation.evaluate(out, windows, reference)
                facts.append(
                    {"model": Path(model).name, "grid": grid, "variant": variant}
                    | dataclasses.asdict(row)
                    | {"seconds": report.seconds}
                )
                line.append(f"{row.kld_mean:.5f} ± {row.kld_error:.5f}")
                print(Path(model).name, grid, variant, line[-1], f"{report.seconds} s", flush=True)
            table.append(line)
        sections += [markdown(("model", "grid", *VARIANTS), table), "", f"Protocol: {windows.label}.", ""]
    head = [
        "# GPTQ against rounding to nearest: mean KL divergence from the float model, with its standard error",
        "",
        f"Commit {commit()}; {args.sequences} sequences of {args.length} tokens to calibrate on.",
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([*head, *sections]))
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
