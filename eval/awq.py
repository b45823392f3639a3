"""Does AWQ diverge less than rounding to nearest, and AWQ with GPTQ less than either, at 4 and 3 bits?

    python eval/awq.py --out results.md MODEL CALIBRATION EVALUATION [MODEL CALIBRATION EVALUATION ...]

For each model and a copy of it with outlier channels (outliers.py): perplexity and
mean KL divergence on held-out text, for a scale and a zero point in 128 columns. Each
method calibrates on several samples of the text, since one sample's luck is about as
large as the difference between the better methods; the means over them are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from checkout import commit
from outliers import write_outliers

from llmquant import evaluation, recipe, run
from llmquant.report import markdown

GPTQ = {"name": "gptq", "actorder": True}
VARIANTS = {
    "rtn": {},
    "awq": {"transforms": [{"name": "awq"}]},
    "awq, no clip": {"transforms": [{"name": "awq", "clip": False}]},
    "gptq": {"algorithm": GPTQ},
    "awq+gptq": {"algorithm": GPTQ, "transforms": [{"name": "awq", "clip": False}]},
    "awq+gptq, clip": {"algorithm": GPTQ, "transforms": [{"name": "awq"}]},
}
COLUMNS = ("model", "grid", "method", "perplexity", "KLD", "its spread", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="MODEL CALIBRATION EVALUATION, repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="samples of the calibration text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--protocol", default="llama.cpp")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--copies", nargs="+", default=["plain", "outliers"], choices=["plain", "outliers"])
    args = parser.parse_args()
    assert len(args.inputs) % 3 == 0, "give MODEL CALIBRATION EVALUATION for each model"
    facts, lines, protocols = [], [], []
    for model, calibration, text in zip(*(args.inputs[i::3] for i in range(3)), strict=True):
        for copy in args.copies:
            with tempfile.TemporaryDirectory() as folder:
                source, name = Path(model), Path(model).absolute().name
                if copy == "outliers":
                    source, name = Path(folder) / "copy", f"{name}, outliers"
                    write_outliers(model, source)
                windows = evaluation.read_windows(source, text, args.protocol, args.max_tokens)
                reference = evaluation.Reference(source)
                text_of = {"path": calibration, "sequences": args.sequences, "length": args.length}
                rows = [("float", "", [evaluation.evaluate(source, windows, reference)], 0.0)]
                for bits in args.bits:
                    for variant in args.variants:
                        found, seconds = [], []
                        for seed in range(args.seeds):
                            chosen = recipe.Recipe(
                                name="study",
                                grid={"name": "affine", "bits": bits, "group_size": 128, "symmetric": False},
                                calibration={**text_of, "seed": seed},
                                **VARIANTS[variant],
                            )
                            out = Path(folder) / f"{bits}-{variant}-{seed}"
                            report, _ = run.quantize(source, chosen, out)
                            found.append(evaluation.evaluate(out, windows, reference))
                            seconds.append(report.seconds)
                            print(name, bits, variant, seed, f"{found[-1].kld_mean:.6f}", flush=True)
                        rows.append((variant, f"w{bits}g128", found, statistics.median(seconds)))
                for variant, grid, found, seconds in rows:
                    facts += [{"model": name, "grid": grid, "method": variant} | dataclasses.asdict(r) for r in found]
                    klds = [row.kld_mean for row in found]
                    perplexity = statistics.mean(row.perplexity for row in found)
                    spread = f"{min(klds):.5f} to {max(klds):.5f}"
                    kld = f"{statistics.mean(klds):.5f}"
                    lines.append([name, grid, variant, f"{perplexity:.3f}", kld, spread, f"{seconds:.0f}"])
            protocols.append(f"{name}: {windows.label}.")
    head = [
        "# AWQ beside rounding to nearest and GPTQ: perplexity and mean KL divergence from the float model",
        "",
        f"Commit {commit()}; means over {args.seeds} samples of {args.sequences} sequences of "
        f"{args.length} tokens to calibrate on; asymmetric groups of 128 columns.",
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([*head, markdown(COLUMNS, lines), "", *protocols, ""]))
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
