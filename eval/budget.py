"""Does a budgeted mixed-precision recipe diverge less than the uniform recipe of the same size?

    python eval/budget.py --out eval/results/budget.md --work FOLDER MODEL CALIBRATION TEXT [MODEL CALIBRATION TEXT ...]

For each model and uniform recipe: the sensitivity of every unit on the first part of
TEXT, a recipe within the size of the uniform one's files, both quantized, and the mean
KL divergence from the float model of each on the second part of TEXT, which nothing was
chosen by. CALIBRATION is for the recipes that read activations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from checkout import commit

from llmquant import api, evaluation, recipe
from llmquant.report import markdown, size

UNIFORM = {
    "gguf-q4_k_s": ("q3_k,q4_k,q5_k,q6_k", []),
    "gguf-q3_k_m": ("q2_k,q3_k,q4_k,q5_k", []),
    "rtn-w4g128": ("3,4,w4g32,8", ["grid.symmetric=false"]),
    "gptq-w3g128": ("2,3,4,8", []),
}
"""A shipped recipe -> the grids that its budget may be spent on, and changes."""
COLUMNS = ("model", "recipe", "uniform: bytes", "budgeted: bytes", "sum of parts", "budgeted, selection", "uniform KLD")
COLUMNS = (*COLUMNS, "budgeted KLD", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="MODEL CALIBRATION TEXT, repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where models and sensitivities are kept")
    parser.add_argument("--recipes", nargs="+", default=list(UNIFORM), choices=UNIFORM)
    parser.add_argument("--by", default="linear")
    parser.add_argument("--tokens", type=int, default=6144, help="of the selection split")
    parser.add_argument("--test-tokens", type=int, default=20480)
    args = parser.parse_args()
    assert len(args.inputs) % 3 == 0, "give MODEL CALIBRATION TEXT for each model"
    args.work.mkdir(parents=True, exist_ok=True)
    facts, table = [], []
    for model, calibration, text in zip(*(args.inputs[i::3] for i in range(3)), strict=True):
        name = f"{Path(model).parent.name}-{Path(model).name}"
        whole = Path(text).read_text("utf-8")
        cut = whole.rindex("\n", 0, len(whole) // 3)
        selection, test = args.work / f"{name}-selection.txt", args.work / f"{name}-test.txt"
        selection.write_text(whole[:cut], "utf-8")
        test.write_text(whole[cut:], "utf-8")
        splits = {
            "selection": evaluation.read_windows(model, selection, "llama.cpp", args.tokens),
            "test": evaluation.read_windows(model, test, "llama.cpp", args.test_tokens),
        }
        for uniform in args.recipes:
            grids, changes = UNIFORM[uniform]
            chosen = recipe.load(uniform, changes)
            if chosen.calibration is not None:
                text_of = [f"calibration.path={calibration}", "calibration.sequences=48", "calibration.length=256"]
                chosen = recipe.load(uniform, [*changes, *text_of])
            place = args.work / f"{name}-{uniform}-{args.by}"
            found = api.sensitivity(
                model,
                chosen,
                place,
                text=selection,
                max_tokens=args.tokens,
                by=args.by,
                grids=grids,
                announce=lambda cost: print(cost, flush=True),
            )
            limit = next(iter(api.plan(model, chosen).files.values()))
            filled = api.budget(model, chosen, f"{limit}B", found, place / "budgeted.yaml")
            row: dict[str, object] = {"model": name, "recipe": uniform, "choices": dict(filled.choices)}
            row |= {"sum_of_parts": filled.kld}
            for kind, one in (("uniform", chosen), ("budgeted", filled.recipe)):
                out = place / kind
                if not out.exists():
                    api.quantize(model, one, out, evaluate=False)
                for split, windows in splits.items():
                    reference = evaluation.Reference(model)
                    result = evaluation.evaluate(out, windows, reference)
                    row |= {f"{kind}_{split}": result.kld_mean, f"{kind}_{split}_error": result.kld_error}
                    row |= {f"{kind}_bytes": result.bytes}
            facts.append(row)
            table.append(
                [
                    name,
                    uniform,
                    f"{row['uniform_bytes']:,}",
                    f"{row['budgeted_bytes']:,}",
                    f"{row['sum_of_parts']:.5f}",
                    f"{row['budgeted_selection']:.5f}",
                    f"{row['uniform_test']:.5f} ± {row['uniform_test_error']:.5f}",
                    f"{row['budgeted_test']:.5f} ± {row['budgeted_test_error']:.5f}",
                    f"{row['budgeted_test'] / row['uniform_test']:.3f}",  # type: ignore[operator]
                ]
            )
            print(table[-1], size(limit), flush=True)
            _write(args, table, facts)


def _write(args: argparse.Namespace, table: list[list[str]], facts: list[dict[str, object]]) -> None:
    lines = [
        "# A budgeted mixed-precision recipe beside the uniform recipe of the same size",
        "",
        f"Commit {commit()}; sensitivity by {args.by} on {args.tokens} tokens of one part of the text, "
        f"divergence on {args.test_tokens} tokens of another. Sum of parts: of the divergences that were measured one "
        "by one, which the divergence of the whole on the selection split should come near to.",
        "",
        markdown(COLUMNS, table),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), "utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
