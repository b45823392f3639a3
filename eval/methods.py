"""One line for every method: sizes, perplexity and divergence of the shipped recipes on one model.

    python eval/methods.py MODEL CALIBRATION EVALUATION --out results.md

Each recipe keeps its own settings; the calibration text and its amount are replaced.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from checkout import commit

from llmquant import api
from llmquant.report import COLUMNS, cells, markdown

RECIPES = (
    "rtn-w4g128",
    "hqq-w4g64",
    "awq-w4g128",
    "gptq-plain-w4g128",
    "gptq-w4g128",
    "gptq-w4g128-asym",
    "awq-gptq-w4g128",
    "gguf-q4_k_m",
    "awq-q4_k_m",
    "gptq-q4_k_m",
    "best-q4_k_m",
    "gguf-auto",
    "gguf-q2_k",
    "gptq-q2_k",
    "best-q2_k",
    "nf4",
    "fp4",
    "gptq-nf4",
    "awq-w3g128",
    "gptq-w3g128",
    "best-w3g128",
    "int8",
    "w8a8-dynamic",
    "w8a8-static",
    "w8a8-smoothquant",
    "fp8",
    "fp8-dynamic",
    "fp8-static",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = f"{{path: {args.calibration}, sequences: {args.sequences}, length: {args.length}}}"
    with tempfile.TemporaryDirectory() as folder:
        rows = api.compare(
            args.model,
            args.recipes,
            Path(folder) / "compared",
            changes=[f"calibration={text}"],
            text=args.evaluation,
            max_tokens=args.max_tokens,
        )
    lines = [
        "# Every method on one model",
        "",
        f"Commit {commit()}; {Path(args.model).absolute().name}; {args.sequences} sequences of "
        f"{args.length} tokens to calibrate on.",
        "",
        markdown(COLUMNS, [cells(row) for row in rows]),
        "",
        *sorted({f"{row.protocol}." for row in rows}),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
