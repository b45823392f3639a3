"""What does each option of GPTQ gain, alone and beside the others, and what does it cost?

    python eval/ablation.py MODEL --calib FILE --text FILE --out results.md [--option NAME+KEY=VALUE[+KEY=VALUE...]]
    python eval/ablation.py --combine FILE.json [FILE.json ...] --out results.md

Two tables. ``options``: for each of BASES rounding, GPTQ without any option, with each
option alone, with the options of DEFAULT together, with each of these left out and each
other one put in. ``grids``: for each of GRIDS, the output matrix and the embedding in
float, the ways in which GPTQ orders columns and fits scales.

Choices are made by these tables, so --text is for selection and not what files are
compared on in the end. A row is the mean KL divergence of the written file, decoded,
and the processor time of quantizing. What is measured goes into results.json beside
the tables, row by row: the same command goes on with the rows that are missing, and one
with another MODEL (--name if two folders have one name) adds that model's. --combine makes
the tables of several such files: runs side by side need a file each, and a model stands in one.

--option adds a change of recipe to the table of options. Transforms of several options
are done one after the other, those of DEFAULT first. The first run in a checkout
compiles kernels: run it once before timing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accuracy_report import geometric_mean, standard_error, without_folders
from checkout import commit
from splits import check_disjoint

from llmquant import evaluation, recipe, run
from llmquant.errors import LlmquantError
from llmquant.metrics import Scores
from llmquant.protocols import Windows
from llmquant.report import markdown


def affine(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    return {"grid": {"name": "affine", "bits": bits, "group_size": group, "symmetric": symmetric}}


def pure(mixture: str) -> dict[str, Any]:
    kept = {"output": "bf16", "token_embedding": "bf16"}
    return {"mixture": {"name": mixture, "pure": True, **kept}, "formats": ["gguf"]}


BASES = {name: {"mixture": {"name": name}, "formats": ["gguf"]} for name in ("q2_k", "q3_k_m", "q4_k_m")}
BASES |= {"w3g128": affine(3, 128, False), "w4g128": affine(4, 128, True)}
GRIDS = {name: pure(f"{name}_s") for name in ("q2_k", "q3_k", "q4_k", "q5_k")}
GRIDS |= {name: pure(name) for name in ("q6_k", "iq4_nl", "iq4_xs", "mxfp4")}
GRIDS["nf4"] = {
    "grid": {"name": "nf4", "block_size": 64, "double_quant": False, "observer": "mse"},
    "formats": ["bitsandbytes"],
}
GRIDS |= {"w2g64": affine(2, 64, False), "w3g128": affine(3, 128, False)}
GRIDS |= {"w4g128": affine(4, 128, True), "w8g128": affine(8, 128, True)}

RTN = ["algorithm={name: rtn, calibrated: true}"]
GPTQ = ["algorithm={name: gptq, scale_search: false, sweeps: 0}"]
OPTIONS = {
    "actorder": ["algorithm.actorder=true"],
    "static_groups": ["algorithm.static_groups=true"],
    "scale_search": ["algorithm.scale_search=true"],
    **{f"sweeps {n}": [f"algorithm.sweeps={n}"] for n in (1, 2)},
    "refit": ["algorithm.scale_search=true", "algorithm.sweeps=1", "algorithm.refit=true"],  # a part of these two
    "two_sided": ["algorithm.two_sided=true"],
    "mismatch_correction": ["mismatch_correction=true"],
    "awq": ["transforms=[{name: awq, clip: false}]"],
    "magr": ["transforms=[{name: magr}]"],
    "rotations": ["rotations=[residual, heads]"],
    "rotations: heads": ["rotations=[heads]"],  # what a model with tied embeddings can have
    "learned_rounding": ["learned_rounding={}"],
}
DEFAULT = ("scale_search", "sweeps 1", "two_sided", "mismatch_correction", "awq")
ORDERS = {  # scale_search and sweeps as they are by default
    "none": ["algorithm={name: gptq}"],
    "static_groups": ["algorithm={name: gptq, static_groups: true}"],
    "actorder": ["algorithm={name: gptq, actorder: true}"],
}
Row = dict[str, Any]


def option_rows(options: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the changes of every row of the table of options."""

    def gptq(names: Sequence[str]) -> list[str]:
        return [*GPTQ, *(change for name in names for change in options[name])]

    yield "rtn", RTN
    yield "gptq", gptq(())
    yield "default", gptq(DEFAULT)
    for name in options:
        yield f"gptq + {name}", gptq((name,))
    for name in DEFAULT:
        yield f"default - {name}", gptq([other for other in DEFAULT if other != name])
    for name in options:
        if name not in DEFAULT:
            yield f"default + {name}", gptq((*DEFAULT, name))


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, str, dict[str, Any], list[str]]]:
    """Yield the table, the base, the option, the recipe and its changes of all rows, what matters most first."""
    added = {name: changes for name, *changes in (given.split("+") for given in args.option)}
    if "options" in args.tables:
        for option, changes in option_rows({n: c for n, c in (OPTIONS | added).items() if n not in args.skip}):
            yield from (("options", base, option, BASES[base], changes) for base in args.bases)
    if "grids" in args.tables:
        for base in args.grids:
            yield from (("grids", base, option, GRIDS[base], changes) for option, changes in ORDERS.items())


def load(values: dict[str, Any], changes: list[str], calibration: dict[str, Any]) -> recipe.Recipe:
    """Return the recipe with all changes; those of the key ``transforms`` are joined."""
    transforms = [x for c in changes if c.startswith("transforms=") for x in yaml.safe_load(c.partition("=")[2])]
    values = values | {"name": "study", "calibration": calibration, "transforms": transforms}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(values), "utf-8")
        return recipe.load(path, [c for c in changes if not c.startswith("transforms=")])


def measure(model: Path, chosen: recipe.Recipe, windows: Windows, reference: evaluation.Reference) -> Row:
    """Return the figures of what a recipe writes, or why it writes nothing; KLD of every window for paired errors."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        try:
            run.quantize(model, chosen, Path(folder) / "out")
        except LlmquantError as error:
            return {"error": str(error)}
        seconds = time.process_time() - before
        scores = Scores()
        row = evaluation.evaluate(Path(folder) / "out", windows, reference, scores=scores)
    each = scores.kld.view(len(windows.tokens), -1).double().mean(1)
    figures = {name: getattr(row, name) for name in ("bytes", "perplexity", "kld_mean", "kld_error", "kld_p99", "top1")}
    return {"error": None, "seconds": seconds, **figures, "windows": each.tolist()}


def study(args: argparse.Namespace) -> None:
    """Measure the rows of one model that are missing, and write all after each."""
    check_disjoint({"--calib": args.calib, "--text": args.text})
    torch.set_num_threads(args.threads)
    windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
    reference = evaluation.Reference(args.model)
    calibration = {"path": str(args.calib), "sequences": args.sequences, "length": args.length, "seed": args.seed}
    about = {
        "texts": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (args.calib, args.text)},
        **{name: getattr(args, name) for name in ("sequences", "length", "seed")},
        "protocol": windows.label,
    }
    path = args.out.with_suffix(".json")
    known = json.loads(path.read_text("utf-8")) if path.exists() else {"models": {}, "rows": []}
    before = known["models"].setdefault(args.name, about | {"commands": []})
    commands = before["commands"]
    if {name: before[name] for name in about} != about:
        sys.exit(f"{path}: {args.name} was measured with other texts or settings: {before}, now {about}")
    if sys.argv not in commands:
        commands.append(sys.argv)
    done = {(row["model"], row["table"], row["base"], row["option"]) for row in known["rows"]}
    for table, base, option, values, changes in jobs(args):
        if (args.name, table, base, option) in done:
            continue
        found = measure(args.model, load(values, changes, calibration), windows, reference)
        named = {"model": args.name, "table": table, "base": base, "option": option, "changes": changes}
        known["rows"].append(named | {"commit": commit()} | found)
        told = found["error"] or f"{found['kld_mean']:.6f} ± {found['kld_error']:.6f}, {found['seconds']:.1f} s"
        print(args.name, table, base, option, told, flush=True)
        write(known, args.out)


def write(known: dict[str, Any], out: Path) -> None:
    """Write the tables, and all rows beside them."""
    beside = out.with_suffix(".part")
    beside.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    beside.replace(out.with_suffix(".json"))
    out.write_text(report(known), "utf-8")


def combine(files: Sequence[Path], out: Path) -> None:
    """Write the tables of several files; each model stands in one of them."""
    found = [json.loads(path.read_text("utf-8")) for path in files]
    models = {name: about for one in found for name, about in one["models"].items()}
    if len(models) < sum(len(one["models"]) for one in found):
        sys.exit("--combine: a model stands in two of the files")
    write({"models": models, "rows": [row for one in found for row in one["rows"]]}, out)


def report(known: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    rows = {(r["model"], r["table"], r["base"], r["option"]): r for r in known["rows"]}
    models = list(known["models"])
    lines = [
        "# What each option of GPTQ gains and costs",
        "",
        "Mean KL divergence from the float model on selection text, decoded. ±: standard error, of KLD over tokens, of "
        "ratios paired and over windows; another sample of calibration text moves the figures, too. Seconds: of a "
        "processor, to quantize. Default: "
        f"GPTQ with {', '.join(DEFAULT)}; rtn: with the columns' mean squares where a grid searches scales.",
        "",
    ]
    options = list(dict.fromkeys(option for _, table, _, option in rows if table == "options"))
    options.sort(key=lambda option: option.partition(" ")[0] == "default")
    if options:
        table = [mean_line(rows, models, option) for option in options]
        lines += ["## Options, over the models", ""]
        lines += ["Geometric mean of the ratios of KLD and of seconds, over the models that have both rows.", ""]
        lines += [markdown(("option", "over", *BASES, "seconds", "models"), table), ""]
    if means := list(grid_means(rows, models)):
        lines += ["## Grids, over the models", "", "Geometric mean of the ratios of KLD to `none`.", ""]
        lines += [markdown(("grid", "static_groups", "actorder", "models"), means), ""]
    for model in models:
        about = known["models"][model]
        commits = ", ".join(dict.fromkeys(r["commit"] for r in known["rows"] if r["model"] == model))
        lines += [f"## {model}", ""]
        lines += [
            f"Commit {commits}; {about['sequences']} sequences of {about['length']} tokens to calibrate on (seed "
            f"{about['seed']}). Protocol: {about['protocol']}.",
            "",
            *(f"    {without_folders(' '.join(command))}" for command in about["commands"]),
            "",
        ]
        for base in BASES:
            table = [option_line(rows, model, base, x) for x in options if (model, "options", base, x) in rows]
            if table:
                columns = ("option", "KLD", "over gptq", "over default", "seconds")
                lines += [f"### {model}, {base}", "", markdown(columns, table), ""]
        table = [grid_line(rows, model, g) for g in GRIDS if (model, "grids", g, "none") in rows]
        if table:
            columns = ("grid", *ORDERS, "static_groups / none", "actorder / none")
            lines += [f"### {model}, grids", "", markdown(columns, table), ""]
    return "\n".join(lines)


Rows = dict[tuple[str, str, str, str], Row]


def ratio(rows: Rows, key: tuple[str, str, str, str], other: str) -> tuple[float, float] | None:
    """Return the ratio of mean KLD to another option's and its standard error, by the delta method over windows."""
    pair = [rows.get(key), rows.get((*key[:3], other))]
    if any(row is None or row["error"] for row in pair):
        return None
    a, b = (np.array(row["windows"]) for row in pair if row)
    found = float(a.mean() / b.mean())
    return found, standard_error(a - found * b) / float(b.mean())


def told(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"


def kld(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        f"failed: {row['error'].splitlines()[-1]}"
        if row["error"]
        else f"{row['kld_mean']:.6f} ± {row['kld_error']:.6f}"
    )


def option_line(rows: Rows, model: str, base: str, option: str) -> list[str]:
    key = (model, "options", base, option)
    ratios = [told(ratio(rows, key, other)) if other != option else "" for other in ("gptq", "default")]
    seconds = "" if rows[key]["error"] else f"{rows[key]['seconds']:.1f}"
    return [option, kld(rows[key]), *ratios, seconds]


def mean_line(rows: Rows, models: Sequence[str], option: str) -> list[str]:
    """Return the geometric means over the models for one option: over gptq, or over default where it changes that.

    The last cell counts these models: the fewest and the most, where not all have every base.
    """
    other = "default" if option.startswith("default ") else "gptq"
    line, times, counts = [option, other], [], set()
    for base in BASES:
        keys = [(model, "options", base, option) for model in models]
        found = {key: r[0] for key in keys if (r := ratio(rows, key, other))}
        line.append(f"{geometric_mean([*found.values()]):.3f}" if found else "")
        times += [rows[key]["seconds"] / rows[(*key[:3], other)]["seconds"] for key in found]
        counts |= {len(found)} - {0}
    ends = sorted({min(counts, default=0), max(counts, default=0)})
    return [*line, f"{geometric_mean(times):.2f}" if times else "", " to ".join(map(str, ends))]


def grid_line(rows: Rows, model: str, grid: str) -> list[str]:
    key = (model, "grids", grid)
    line = [grid, *(kld(rows.get((*key, order))) for order in ORDERS)]
    return [*line, *(told(ratio(rows, (*key, order), "none")) for order in ("static_groups", "actorder"))]


def grid_means(rows: Rows, models: Sequence[str]) -> Iterator[list[str]]:
    for grid in GRIDS:
        found = [
            [r[0] for model in models if (r := ratio(rows, (model, "grids", grid, order), "none"))]
            for order in ("static_groups", "actorder")
        ]
        if all(found):
            yield [grid, *(f"{geometric_mean(ratios):.3f}" for ratios in found), str(min(map(len, found)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calib", type=Path, help="text to calibrate on")
    parser.add_argument("--text", type=Path, help="selection text to measure on")
    parser.add_argument("--name", help="what the tables call the model (default: its folder's name)")
    parser.add_argument("--tables", nargs="+", default=["options", "grids"], choices=("options", "grids"))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)
    others = [name for name in OPTIONS if name not in DEFAULT]
    parser.add_argument("--skip", nargs="*", default=[], choices=others, help="options that are left out")
    parser.add_argument("--option", action="append", default=[], help="NAME+KEY=VALUE[+KEY=VALUE...], one more option")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="chooses the sequences of the calibration text")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--combine", type=Path, nargs="+", help="what other runs have written")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.combine:
        combine(args.combine, args.out)
        return
    if None in (args.model, args.calib, args.text):
        parser.error("give MODEL, --calib and --text, or else --combine")
    args.name = args.name or args.model.absolute().name
    study(args)


if __name__ == "__main__":
    main()
