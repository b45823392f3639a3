"""At the same size, whose file is closest to the float model: llmquant's, or that of the programs people use?

    python eval/accuracy.py MODEL --calib FILE --select FILE --text FILE --llama-cpp DIR --out DIR --rows ROWS
        [--outliers] [--gptqmodel PYTHON] [--llmcompressor PYTHON] [--auto-round PYTHON]
        [--mixtures q4_k_m ...] [--types q4_k ...] [--affine w4g128 ...] [--ours VARIANT ...]
    python eval/accuracy.py --combine ROWS [ROWS ...] --out results.md

Measures one model (with ``--outliers`` the copy of it that outliers.py makes): GGUF
mixtures and pure types beside llama-quantize without and with an imatrix, formats of
integer groups beside GPTQModel, llm-compressor and auto-round, each in the interpreter
of its own environment (PYTHON). Everyone calibrates on the same sequences of --calib;
llama-imatrix reads them as text. Variants may choose on --select; everything is
measured on --text, once; the three may share no passage (splits.py makes them so).

A row is a file: its size, and its perplexity and KL divergence from the float model,
decoded to float, and for GGUF also as llama.cpp runs it, which rounds activations too.
Rows go into --rows as they are measured; the same command goes on with those that are
missing, ``--again`` measures rows of programs anew, ``--skip`` leaves programs out
(``--skip auto-round``, whose 200 steps are slow on a CPU). DIR is scratch space of one
model and its settings: another run with the same goes on with what is there.
``--combine`` makes tables and a plot of such files, of several models and several of
one model.

Peers are what a user gets: auto-round tunes in bfloat16 on a processor with bfloat16
instructions, whatever --peer-dtype says; ``auto-round float32`` does not.

A variant of llmquant is a name in VARIANTS, with changes to its recipe behind it if
need be: ``--ours default "default+algorithm.actorder=true"``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from accuracy_report import BASELINE, SETTLED, without_folders, write_report
from checkout import SOURCE, commit
from outliers import write_outliers
from peers import AUTOROUND, GPTQMODEL, LLMCOMPRESSOR, children_seconds, version
from safetensors.torch import save_file
from splits import check_disjoint

from llmquant import api, data, evaluation, plugins, run
from llmquant.errors import LlmquantError
from llmquant.metrics import Scores
from llmquant.packed import PackedCheckpoint, open_model
from llmquant.protocols import Windows
from llmquant.recipe import Recipe
from llmquant.stream import Stream

MIXTURES = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m")
TYPES = {"q2_k": "q2_k", "q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s", "q6_k": "q6_k"}
"""A type -> the mixture of which it is the base, for all matrices when that is pure."""
AFFINE = {"w4g128": (4, 128, True), "w3g128": (3, 128, False), "w2g64": (2, 64, False)}
"""A format -> bits, columns of a group, symmetric."""
DEFAULT = [
    *("--set", "algorithm={name: gptq, two_sided: true}"),
    *("--set", "transforms=[{name: awq, clip: false}]"),
    *("--set", "mismatch_correction=true"),
]
VARIANTS = {
    "rounding": ["--set", "algorithm={name: rtn}", "--set", "imatrix=$imatrix"],
    "gptq": ["--set", "algorithm={name: gptq, actorder: true}"],
    "default": DEFAULT,
    "best": [
        *DEFAULT,
        *("--set", "transforms=[{name: awq, clip: false$inputs}]"),
        *("--set", "algorithm.refit=true", "--set", "learned_rounding={}"),
    ],
    "auto": [*DEFAULT, "--budget-like", "$format", "--select", "$select"],
}
"""A name -> options of `llmquant quantize` for a recipe of nothing but a format and the calibration text.

$imatrix: the file that llama-quantize gets, or null for formats other than GGUF. $select: the text to choose on.
$format: "q4_k_m", "w4g128". $inputs: of INPUTS where llama.cpp rounds the activations, else nothing.
"""
INPUTS = ", inputs: 4.0"
TOKENS = "tokens.safetensors"
LLAMA_QUANTIZE = ("llama-quantize", BASELINE)
PEERS = {"gptqmodel": GPTQMODEL, "llmcompressor": LLMCOMPRESSOR, "auto-round": AUTOROUND}
"""A package -> the script that its interpreter runs."""


@dataclass(frozen=True)
class Job:
    """A program that writes a file of one format into the folder ``out``.

    kind: "mixture", "pure" or "affine".
    """

    kind: str
    format: str
    program: str
    version: str
    command: list[str]
    out: Path

    @property
    def key(self) -> str:
        return f"{self.kind} {self.format} {self.program}"


@dataclass(frozen=True)
class Prepared:
    """What all programs start from: the model's folder, the calibration tokens, a float GGUF file and an imatrix."""

    model: Path
    tokens: Path
    gguf: Path | None
    imatrix: Path | None


class Log:
    """The rows that are measured, in a file that is whole after each."""

    def __init__(self, path: Path, about: dict[str, Any], again: list[str]) -> None:
        """Stop the study where the file holds rows of other settings. again: programs to measure anew."""
        self._path = path
        self._about = about
        self._again = again
        self.rows: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            known = json.loads(self._path.read_text("utf-8"))
            check_same(path, known, about, "Give another --rows.")
            self.rows = {row["key"]: row for row in known["rows"]}
            about["commands"] = list(dict.fromkeys([*known["commands"], *about["commands"]]))
        self._write()

    def lacks(self, key: str, program: str) -> bool:
        """Return whether a row is still to be measured, or is to be measured anew."""
        return key not in self.rows or program in self._again

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in place of the one before; a measured one stays where the new one failed."""
        before = self.rows.get(row["key"])
        if before is None or before["error"] is not None or row["error"] is None:
            self.rows[row["key"]] = row
        self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".part")
        known = json.dumps(self._about | {"rows": list(self.rows.values())}, indent=1)
        beside.write_text(without_folders(known) + "\n", "utf-8")
        beside.replace(self._path)


def check_same(path: Path, known: dict[str, Any], about: dict[str, Any], remedy: str) -> None:
    """Stop the study where a file or folder was made for another model or with other settings."""
    others = [f"{n} {known[n]}, now {about[n]}" for n in ("model", *SETTLED) if known[n] != about[n]]
    if others:
        sys.exit(f"{path} is of other settings: {'; '.join(others)}. {remedy}")


def settle(out: Path, about: dict[str, Any]) -> None:
    """Keep the settings in the folder of scratch files; stop the study where it holds files of others."""
    path, remedy = out / "settings.json", f"Give another --out, or remove {out}."
    if not path.exists() and (out / TOKENS).exists():
        sys.exit(f"{out} holds files, and nothing says with which settings they were made. {remedy}")
    settings = json.dumps({name: about[name] for name in ("model", *SETTLED)}, indent=1)
    known = json.loads(once(path, lambda part: part.write_text(settings + "\n", "utf-8")).read_text("utf-8"))
    check_same(out, known, about, remedy)


def once(path: Path, create: Callable[[Path], object]) -> Path:
    """Return a file or folder, created now unless a run before has finished it."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        create(part)
        part.replace(path)
    return path


def measured_model(args: argparse.Namespace) -> Path:
    """Return the folder of the model to measure: the one given, or its copy with outlier channels."""
    if not args.outliers:
        return Path(args.model)
    return once(args.out / f"{args.model.name}-outliers", lambda out: write_outliers(args.model, out))


def prepare(args: argparse.Namespace, model: Path) -> Prepared:
    """Return what all programs start from, kept in the folder of the results."""
    tokenizer = data.load_tokenizer(model)
    context = Stream(open_model(model), torch.device("cpu"), weights=False).context
    source = data.Calibration(path=args.calib, sequences=args.sequences, length=args.length, seed=args.seed)
    text = data.calibration_tokens(source, tokenizer, context)
    tokens = once(args.out / TOKENS, lambda out: save_file({"tokens": text.tokens}, out))
    if not args.mixtures and not args.types:
        return Prepared(model, tokens, None, None)
    float_recipe = Recipe(name="f32", mixture={"name": "f32"}, formats=["gguf"])
    folder = once(args.out / "float", lambda out: api.quantize(model, float_recipe, out))
    (gguf,) = folder.glob("*.gguf")
    if args.imatrix == "llmquant":
        imatrix = once(args.out / "imatrix.gguf", lambda out: write_imatrix(model, source, out))
        return Prepared(model, tokens, gguf, imatrix)
    passages = args.out / "passages.txt"
    ids = text.tokens[:, int(text.bos) :].flatten()
    passages.write_text(tokenizer.decode(ids, clean_up_tokenization_spaces=False), "utf-8")
    length = str(args.length)
    command = [str(args.llama_cpp / "llama-imatrix"), "-m", str(gguf), "-f", str(passages), "-c", length]
    command += ["-b", length, "-ub", length, "-t", str(args.threads), "--no-ppl", "--output-format", "gguf", "-o"]
    imatrix = once(args.out / "imatrix.gguf", lambda out: execute([*command, str(out)], args.threads, args.out))
    return Prepared(model, tokens, gguf, imatrix)


def write_imatrix(model: Path, source: data.Calibration, out: Path) -> None:
    """Write llmquant's own imatrix of the calibration sequences."""
    exporter = plugins.load("exporters", "gguf", "format")
    stats = run.square_means(model, source)
    exporter.write_importance(out, run.load_config(model, False), stats, source.label, source.length)


def execute(command: list[str], threads: int, place: Path) -> tuple[float, float]:
    """Run a command in a folder; return its wall time and processor time in seconds, or raise CommandError."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    environment["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))  # fewer than two, and it does not start
    started, before = time.monotonic(), children_seconds()
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise CommandError(said or f"it ended with exit status {done.returncode} and said nothing")
    return time.monotonic() - started, children_seconds() - before


class CommandError(Exception):
    """A program did not write its file; holds the end of what it said."""


def jobs(args: argparse.Namespace, prepared: Prepared) -> Iterator[Job]:
    """Yield what is to be measured, format by format."""
    work_folder = args.out / "work"
    names = [("mixture", name) for name in args.mixtures] + [("pure", name) for name in args.types]
    for kind, name in names:
        yield from their_gguf(args, prepared, kind, name, work_folder)
        base = {"mixture": {"name": name} if kind == "mixture" else {"name": TYPES[name], "pure": True}}
        yield from ours(args, prepared, kind, name, base | {"formats": ["gguf"]}, work_folder)
    for name in args.affine:
        yield from their_affine(args, prepared, name, work_folder)
        bits, group, symmetric = AFFINE[name]
        grid = {"name": "affine", "bits": bits, "group_size": group, "symmetric": symmetric}
        formats = ["compressed_tensors", "gptq_v2"]
        yield from ours(args, prepared, "affine", name, {"grid": grid, "formats": formats}, work_folder)


def ours(
    args: argparse.Namespace, prepared: Prepared, kind: str, name: str, base: dict[str, Any], folder: Path
) -> Iterator[Job]:
    """Yield llmquant's variants of one format; ``base`` is the recipe without the variant."""
    text = {"path": str(args.calib), "sequences": args.sequences, "length": args.length, "seed": args.seed}
    recipe = args.out / "recipes" / f"{kind}-{name}.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(base | {"calibration": text}, sort_keys=False), "utf-8")
    imatrix = "null" if kind == "affine" else str(prepared.imatrix)
    given = {"imatrix": imatrix, "select": args.select, "format": name, "inputs": "" if kind == "affine" else INPUTS}
    for variant in args.ours:
        known, *more = variant.split("+")
        if known == "auto" and kind != "mixture":
            continue
        options = [Template(x).substitute(given) for x in VARIANTS[known]]
        options += [word for change in more for word in ("--set", change)]
        out = folder / f"{kind}-{name}-llmquant-{hashlib.sha256(variant.encode()).hexdigest()[:8]}"
        command = [sys.executable, "-m", "llmquant", "quantize", str(prepared.model), str(recipe), *options]
        command += ["--no-eval", "--out", str(out)]
        yield Job(kind, name, f"llmquant {variant}", commit(), command, out)


def their_gguf(args: argparse.Namespace, prepared: Prepared, kind: str, name: str, folder: Path) -> Iterator[Job]:
    """Yield llama-quantize without and with the imatrix."""
    type_ = (name if kind == "mixture" else TYPES[name]).upper()
    pure = ["--pure"] if kind == "pure" else []
    for program in LLAMA_QUANTIZE:
        more = ["--imatrix", str(prepared.imatrix)] if program == BASELINE else []
        out = folder / f"{kind}-{name}-{program}".replace(" ", "-")
        command = [str(args.llama_cpp / "llama-quantize"), *more, *pure, str(prepared.gguf), str(out / "model.gguf")]
        yield Job(kind, name, program, args.llama_version, [*command, type_, str(args.threads)], out)


def their_affine(args: argparse.Namespace, prepared: Prepared, name: str, folder: Path) -> Iterator[Job]:
    """Yield the programs whose interpreters are given."""
    for package, programs in their_settings(name).items():
        python = getattr(args, package.replace("-", "_"))
        if python is None:
            continue
        path = args.out / f"run-{package}.py"  # not the name of a module
        path.write_text(PEERS[package], "utf-8")
        number = version(python, package)
        for program, settings in programs.items():
            out = folder / f"affine-{name}-{program}".replace(" ", "-")
            inputs = [str(prepared.model), str(prepared.tokens), str(out), args.peer_dtype, json.dumps(settings)]
            yield Job("affine", name, program, number, [python, str(path), *inputs], out)


def their_settings(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return for each package its programs, and for each of them the settings for a format of integer groups."""
    bits, group, symmetric = AFFINE[name]
    plain = {"bits": bits, "group_size": group, "sym": symmetric}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    gptqmodel = {"GPTQModel GPTQ": plain, "GPTQModel GPTQ desc_act": plain | {"desc_act": True}}
    if bits == 4:  # its AWQ packs no other, and an AWQ file has zero points, used or not
        gptqmodel["GPTQModel AWQ"] = plain | {"method": "awq", "sym": False}
    llmcompressor = {
        "llm-compressor GPTQ": {"GPTQModifier": scheme | {"actorder": "static"}},
        "llm-compressor AWQ": {"AWQModifier": {}, "QuantizationModifier": scheme},
    }
    auto_round = {
        "auto-round RTN": plain | {"iters": 0},
        "auto-round light": plain | {"iters": 50, "lr": 5e-3},
        "auto-round": plain | {"iters": 200},
        "auto-round float32": plain | {"iters": 200, "amp": False},
    }
    return {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor, "auto-round": auto_round}


def their_programs() -> list[str]:
    """Return what the programs of others are called."""
    packages = [programs for name in AFFINE for programs in their_settings(name).values()]
    return [*LLAMA_QUANTIZE, *dict.fromkeys(program for programs in packages for program in programs)]


def written(out: Path) -> list[Path]:
    """Return the GGUF files, or else the model folders, that a program wrote; raise CommandError for none."""
    found = sorted(out.rglob("*.gguf")) or [config.parent for config in sorted(out.rglob("config.json"))]
    if not found:
        raise CommandError("it ended well and wrote no model")
    return found


def stored_bytes(path: Path) -> int:
    """Return the size that files are compared by: of a GGUF file the whole, else of all quantized linears.

    Outside the linears the folders differ in what is no quantization: in the type that a program computed in.
    """
    checkpoint = open_model(path)
    if not isinstance(checkpoint, PackedCheckpoint):
        return checkpoint.bytes
    return sum(checkpoint.infos[name].bytes for parts in checkpoint.packed.values() for name in parts.values())


def measure(job: Job, args: argparse.Namespace, windows: Windows, reference: evaluation.Reference) -> dict[str, Any]:
    """Return the row of a job: run, measured, and what it wrote removed."""
    row = {"key": job.key} | asdict(job) | {"error": None}
    del row["out"]  # what is there is removed
    if job.out.exists():
        shutil.rmtree(job.out)
    job.out.parent.mkdir(exist_ok=True)
    if job.program.startswith("llama-quantize"):
        job.out.mkdir()
    place = SOURCE if job.program.startswith("llmquant") else args.out  # GPTQModel leaves a folder `logs` there
    try:
        row["seconds"], row["processor_seconds"] = execute(job.command, args.threads, place)
        path = min(written(job.out), key=stored_bytes)
        row |= measured(path, windows, reference)
    except (CommandError, LlmquantError) as error:
        row["error"] = without_folders(str(error))
    shutil.rmtree(job.out, ignore_errors=True)
    return row


def measured(path: Path, windows: Windows, reference: evaluation.Reference) -> dict[str, Any]:
    """Return sizes and figures of a file, with the means of every window, which errors of differences come from."""
    found: dict[str, Any] = {"compared_bytes": stored_bytes(path)}
    for how, runtime in (("decoded", "torch"), ("as_run", "llama.cpp")):
        if runtime == "llama.cpp" and path.suffix != ".gguf":
            continue
        scores = Scores()
        row = evaluation.evaluate(path, windows, reference, runtime=runtime, scores=scores)
        figures = row.as_dict()
        found |= {"bytes": row.bytes, "container": row.format.split()[0]} if runtime == "torch" else {}
        kept = ("perplexity", "perplexity_error", "kld_mean", "kld_error", "kld_median", "kld_p99", "top1")
        found[how] = {name: figures[name] for name in kept}
        for name, each in (("nll", scores.nll), ("kld", scores.kld)):
            means = each.view(len(windows.tokens), -1).double().mean(1)
            found[how][f"{name}_windows"] = " ".join(f"{mean:.7g}" for mean in means.tolist())
    return found


def llama_version(folder: Path) -> str:
    """Return the version line of llama.cpp's programs."""
    done = subprocess.run([str(folder / "llama-imatrix"), "--version"], capture_output=True, text=True, check=True)
    return next(x for x in (done.stdout + done.stderr).splitlines() if x.startswith("version")).partition(": ")[2]


def _fingerprint(folder: Path, names: list[str]) -> str:
    """Return a hash of the sizes, first and last megabytes of files."""
    digest = hashlib.sha256()
    for name in sorted(names):
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size} ".encode())
        with (folder / name).open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()


def about(args: argparse.Namespace, model: Path, protocol: str) -> dict[str, Any]:
    """Return what holds for all rows."""
    texts = {name: getattr(args, name) for name in ("calib", "select", "text")}
    checkpoint = run.load_float(model)
    files = ["config.json", *sorted({info.file for info in checkpoint.infos.values()})]
    return {
        "model": (args.name or args.model.name) + (", outliers" if args.outliers else ""),
        "files": _fingerprint(model, files),
        "outliers": args.outliers,
        "texts": {n: {"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for n, p in texts.items()},
        **{name: getattr(args, name) for name in ("sequences", "length", "seed", "imatrix", "peer_dtype", "threads")},
        "protocol": protocol,
        "commands": [without_folders(" ".join(sys.argv))],
        "versions": {name: installed(name) for name in ("torch", "transformers", "cyllama")},
    }


def study(args: argparse.Namespace) -> None:
    """Measure one model."""
    check_disjoint({f"--{name}": getattr(args, name) for name in ("calib", "select", "text")})
    torch.set_num_threads(args.threads)
    for folder in (args.out, args.rows.parent):
        folder.mkdir(parents=True, exist_ok=True)
    windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
    settle(args.out, about(args, args.model, windows.label))
    model = measured_model(args)
    log = Log(args.rows, about(args, model, windows.label), args.again)
    prepared = prepare(args, model)
    reference = evaluation.Reference(model)
    if prepared.gguf is not None and log.lacks("float", "float"):
        named = {"key": "float", "kind": "float", "format": "f32", "program": "float", "version": commit()}
        row = measured(prepared.gguf, windows, reference)
        log.add(named | {"command": [], "error": None} | row)
    for job in jobs(args, prepared):
        if job.program in args.skip or not log.lacks(job.key, job.program):
            continue
        row = measure(job, args, windows, reference)
        log.add(row)
        told = f"failed: {row['error']}"
        if row["error"] is None:
            told = f"{row['seconds']:.1f} s, KLD {row['decoded']['kld_mean']:.6f}"
        print(f"{job.key}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = lambda given: Path(given).resolve()  # noqa: E731  (programs run in other folders)
    parser.add_argument("model", type=path, nargs="?")
    parser.add_argument("--calib", type=path, help="text to calibrate on")
    parser.add_argument("--select", type=path, help="text that variants may choose on")
    parser.add_argument("--text", type=path, help="text to measure on")
    parser.add_argument("--llama-cpp", type=path, help="the folder of llama-quantize and llama-imatrix")
    parser.add_argument("--name", help="what reports call the model (default: its folder's name)")
    parser.add_argument("--outliers", action="store_true", help="measure the copy with outlier channels")
    parser.add_argument("--gptqmodel", help="the interpreter of an environment with GPTQModel")
    parser.add_argument("--llmcompressor", help="the interpreter of an environment with llm-compressor")
    parser.add_argument("--auto-round", help="the interpreter of an environment with auto-round")
    parser.add_argument("--mixtures", nargs="*", default=list(MIXTURES))
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=TYPES)
    parser.add_argument("--affine", nargs="*", default=list(AFFINE), choices=AFFINE)
    parser.add_argument("--ours", nargs="*", default=list(VARIANTS), help="NAME or NAME+KEY=VALUE[+KEY=VALUE...]")
    parser.add_argument("--again", nargs="*", default=[], help="programs whose rows are measured anew")
    parser.add_argument("--skip", nargs="*", default=[], help="programs of others that are not run")
    parser.add_argument("--imatrix", choices=("llama.cpp", "llmquant"), default="llama.cpp", help="who makes it")
    parser.add_argument("--peer-dtype", choices=("auto", "float32"), default="float32", help="the peers compute in it")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="chooses the sequences of the calibration text")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=path, help="the JSON file that rows go into")
    parser.add_argument("--combine", type=Path, nargs="+", help="such files of finished runs")
    parser.add_argument("--out", type=path, required=True)
    args = parser.parse_args()
    if args.combine:
        write_report(args.combine, args.out)
        return
    if None in (args.model, args.calib, args.select, args.text, args.rows):
        parser.error("give MODEL, --calib, --select, --text and --rows, or else --combine")
    if args.llama_cpp is None and (args.mixtures or args.types):
        parser.error("give --llama-cpp, or else --mixtures and --types with nothing behind them")
    unknown = [variant for variant in args.ours if variant.split("+")[0] not in VARIANTS]
    if unknown:
        parser.error(f"--ours {unknown[0]}: the variants are {', '.join(VARIANTS)}")
    others = their_programs()
    mine = [f"llmquant {variant}" for variant in args.ours]
    for option, given, names in (("skip", args.skip, others), ("again", args.again, ["float", *others, *mine])):
        unknown = [name for name in given if name not in names]
        if unknown:
            parser.error(f"--{option} {unknown[0]}: the programs are {', '.join(names)}")
    args.llama_version = llama_version(args.llama_cpp) if args.llama_cpp else None
    study(args)


if __name__ == "__main__":
    main()
