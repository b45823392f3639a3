"""The command line. Every command is a few lines around a function of ``llmquant.api``."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.table import Table

import llmquant
from llmquant import shipped
from llmquant.errors import LlmquantError, RecipeError
from llmquant.targets import TARGETS
from llmquant.terminal import (
    RANK,
    err,
    escape,
    listen,
    out,
    progress,
    say,
    show,
    show_answers,
    show_figures,
    show_plan,
    show_recommendation,
    show_report,
    signals,
)

if TYPE_CHECKING:
    from llmquant import run
    from llmquant.answers import TaskRow
    from llmquant.evaluation import Row

app = typer.Typer(no_args_is_help=True, add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
BEGIN, QUANTIZE, USE = "Begin", "Quantize", "Measure, run, publish"  # parts of the help
LEFT_FLOAT = 3  # exit code


def _among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what completes a name in a shell."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _formats() -> list[str]:
    from llmquant import plugins

    return plugins.names("exporters")


Model = Annotated[str, typer.Argument(help="A model folder, or a hub id such as org/name.")]
RecipeName = Annotated[
    str,
    typer.Argument(
        help="A shipped recipe's name (`llmquant list recipes`) or a YAML file.", autocompletion=_among(shipped.recipes)
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="The new folder.")]
Changes = Annotated[list[str], typer.Option("--set", help="key.path=value of the recipe; may be repeated.")]
Formats = Annotated[
    list[str], typer.Option("--format", help="Container to write; may be repeated.", autocompletion=_among(_formats))
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Of activations: auto (float32 on the CPU), float32 or bfloat16.")]
Text = Annotated[str | None, typer.Option(help="A text file to measure on, or wikitext2.")]
ProtocolName = Annotated[str, typer.Option("--protocol", help="gptq, llama.cpp, sliding or word.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What quantizing may take at most, of the GPU's memory where that computes, e.g. 8GB (default: what is "
        "free). Less is slower."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(help="Use only so many tokens of the text.", min=2)]
Facts = Annotated[Path | None, typer.Option("--json", help="Write the same facts to a JSON file.")]
Pure = Annotated[bool, typer.Option("--pure", help="The mixture's base type for every matrix of a GGUF file.")]
TensorTypes = Annotated[
    list[str],
    typer.Option("--tensor-type", help="REGEX=TYPE for matrices of a GGUF file by name; may be repeated, first wins."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not read back what was written.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model folder's own Python code run.")]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Shrink open LLMs: quantize from a recipe, compare on perplexity and KL divergence, save for the runtimes."""
    if version:
        out.print(f"llmquant {llmquant.__version__}")
        raise typer.Exit


@app.command(rich_help_panel=BEGIN)
def demo(
    folder: Annotated[Path | None, typer.Option("--out", help="The new folder (default: demo-output).")] = None,
    facts: Facts = None,
) -> None:
    """Quantize the small model that ships with llmquant by several recipes and compare them.

    Example: llmquant demo --out demo
    """
    from llmquant import demo as demonstration

    with progress(again=False) as tell:
        rows, written = demonstration.run(folder, tell, _command())
    show_figures(rows)
    say(f"Written below {written}: packed weights, model cards; report.html shows the comparison")
    _write(facts, {"rows": [row.as_dict() for row in rows]})


@app.command(rich_help_panel=BEGIN)
def plan(
    model: Model,
    recipe: RecipeName,
    changes: Changes = [],
    formats: Formats = [],
    pure: Pure = False,
    tensor_types: TensorTypes = [],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Write a mixed-precision recipe of at most this size: of the weights' files, headers and float "
            "tensors included; 3.2GB, 900MB, 3GiB, or 4.5bpw: these files in bits over all weights of the model."
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="With --budget: what `llmquant sensitivity` has written.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="With --budget: the new recipe, a .yaml file.")] = None,
    memory: Memory = None,
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Show what would happen to every tensor, and what it would cost. Loads no weights.

    Example: llmquant plan org/model gptq-w4g128 --set calibration.path=text.txt
    """
    from llmquant import api

    changes = _with(changes, formats, pure, tensor_types)
    if budget is None and (sensitivity or file):
        raise RecipeError("--sensitivity, --out: only with --budget, e.g. --budget 4.5bpw")
    if budget is None:
        planned = api.plan(model, recipe, changes=changes, memory=memory, device=device, trust_remote_code=trust)
    elif sensitivity is None or file is None:
        raise RecipeError("--budget: needs --sensitivity FILE (of `llmquant sensitivity`) and --out RECIPE.yaml")
    else:
        filled = api.budget(model, recipe, budget, sensitivity, file, changes=changes, trust_remote_code=trust)
        planned = filled.plan
        say(f"{file}: within {filled.budget:,} bytes; measured divergences add up to {filled.kld:.5f}")
    show_plan(planned)
    _write(facts, planned.as_dict())


@app.command(rich_help_panel=QUANTIZE)
def quantize(
    model: Model,
    recipe: RecipeName,
    folder: OutFolder,
    work: Annotated[Path | None, typer.Option(help="Keep the finished layers here, for `llmquant export`.")] = None,
    formats: Formats = [],
    changes: Changes = [],
    pure: Pure = False,
    tensor_types: TensorTypes = [],
    device: Device = "auto",
    text: Text = None,
    protocol: ProtocolName = "llama.cpp",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure the result.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Choose a type for every tensor such that the weights' files, headers included, have at most this "
            "size: 4.5bpw (in bits, over all weights of the model), 3.2GB, 3GiB."
        ),
    ] = None,
    budget_like: Annotated[
        str | None, typer.Option(help="The same, within the size of this mixture's file, such as q4_k_m.")
    ] = None,
    select: Annotated[
        Path | None,
        typer.Option(
            help="With a budget: the text to choose and to check types on, other than the calibration text (default: "
            "what that has beside the sequences calibrated on)."
        ),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option("--noise", help="Measure how the error grows from layer to layer: both models once more."),
    ] = False,
    split: Annotated[
        str | None, typer.Option("--split-max-size", help="Write numbered files of at most this size, e.g. 5GB.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew in a used work folder.")] = False,
    memory: Memory = None,
    on_error: Annotated[
        str,
        typer.Option(
            help="stop, or skip: a linear that cannot be quantized stays float, with those that read the same "
            "activations; the report names them, and the exit code is 3."
        ),
    ] = "stop",
    no_verify: NoVerify = False,
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Quantize a model and write it, with a report: report.html, README.md and llmquant-report.json.

    The same command after a crash goes on where it stopped.

    Several processes do it together, on one machine or on several with a shared folder for --work, started by
    `torchrun --nproc-per-node 2 -m llmquant quantize ...`.

    Exit codes: 0 done; 2 the input cannot be done, and the message says why; 3 written, but linears that could not be
    quantized were left float (--on-error skip); 130 and 143 stopped by Ctrl-C and SIGTERM. Of all but 0,
    torchrun makes 1.

    Example: llmquant quantize org/model gptq-w4g128 --out out --set calibration.path=text.txt
    """
    from llmquant import api

    if budget and budget_like:
        raise RecipeError("--budget, --budget-like: give one of them")
    if on_error not in ("stop", "skip"):
        raise LlmquantError(f"--on-error {on_error}: there are stop and skip")
    keys = {"max_shard_size": split, "budget": budget or budget_like, "selection.path": select}
    with progress() as tell:
        report = api.quantize(
            model,
            recipe,
            folder,
            changes=[
                *_with(changes, formats, pure, tensor_types),
                *(f"{key}={value}" for key, value in keys.items() if value),
            ],
            work=work,
            device=device,
            text=text,
            protocol=protocol,
            evaluate=not no_eval,
            noise=noise,
            restart=restart,
            memory=memory,
            on_error=cast("run.OnError", on_error),
            verify=not no_verify,
            trust_remote_code=trust,
            command=_command(),
            progress=tell,
        )
    _end(report, facts, not no_eval)


@app.command(rich_help_panel=QUANTIZE)
def train(
    model: Model,
    recipe: RecipeName,
    folder: OutFolder,
    work: Annotated[Path | None, typer.Option(help="Keep the finished layers here, for `llmquant export`.")] = None,
    formats: Formats = [],
    changes: Changes = [],
    steps: Annotated[int | None, typer.Option(help="How many steps (default: the recipe's, or 500).", min=1)] = None,
    device: Device = "auto",
    text: Text = None,
    protocol: ProtocolName = "llama.cpp",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew in a used work folder.")] = False,
    memory: Memory = None,
    no_verify: NoVerify = False,
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Quantize a model, and train it to predict what the float model does: for 2 and 3 bits. Needs memory for both.

    The same command after a crash goes on where it stopped. Without --text, what is measured at the end is text that
    was neither trained on nor used to choose the best step. Exit codes: those of `llmquant quantize`.

    Example: llmquant train org/model gptq-w2g64 --out out --set calibration.path=text.txt
    """
    from llmquant import api

    changes = _with(changes, formats, False, [])
    changes += [] if steps is None else [f"training.steps={steps}"]
    with progress() as tell:
        report = api.train(
            model,
            recipe,
            folder,
            changes=changes,
            work=work,
            device=device,
            text=text,
            protocol=protocol,
            restart=restart,
            memory=memory,
            verify=not no_verify,
            trust_remote_code=trust,
            command=_command(),
            progress=tell,
        )
    _end(report, facts)


@app.command(rich_help_panel=QUANTIZE)
def export(
    work: Annotated[Path, typer.Argument(help="A work folder of `llmquant quantize --work`.")],
    formats: Formats,
    folder: OutFolder,
    no_verify: NoVerify = False,
    facts: Facts = None,
) -> None:
    """Write a finished work folder in another format, without calibrating again.

    Example: llmquant export work --format compressed_tensors --out out
    """
    from llmquant import api

    with progress() as tell:
        report = api.export(work, formats, folder, verify=not no_verify, command=_command(), progress=tell)
    _end(report, facts, evaluated=False)


@app.command(name="eval", rich_help_panel=USE)
def evaluate(
    paths: Annotated[list[str], typer.Argument(help="Model folders, float or packed, or GGUF files.")],
    reference: Annotated[str | None, typer.Option(help="The float model to measure the divergence from.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file, or wikitext2 (the default without --tasks and --items).")
    ] = None,
    protocol: ProtocolName = "llama.cpp",
    max_tokens: MaxTokens = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, with commas between: pip install llmquant[tasks]."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with further tasks (YAML) for --tasks.")
    ] = None,
    items: Annotated[
        list[Path],
        typer.Option(
            help="A .jsonl file of questions, one a line: question or prompt, with choices and answer, or with answer "
            "or answers alone; may be repeated."
        ),
    ] = [],
    limit: Annotated[int | None, typer.Option(help="Use only so many items of every task or file.", min=1)] = None,
    runtime: Annotated[str, typer.Option(help="torch, or llama.cpp to let that run GGUF files.")] = "torch",
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Measure perplexity, and with --reference the KL divergence from the float model; or right and wrong answers.

    With --tasks or --items, --reference tells how many answers change, and whether that may be chance.

    Example: llmquant eval out --reference org/model --text test.txt
    """
    from llmquant import evaluation

    asks = tasks is not None or bool(items)
    if (include or limit) and not asks:
        raise LlmquantError("--include-path, --limit: only with --tasks or --items")
    if asks and runtime != "torch":
        raise LlmquantError(f"--runtime {runtime}: does not answer --tasks and --items. Leave it out.")
    if runtime not in get_args(evaluation.Runtime):
        raise LlmquantError(f"--runtime {runtime}: there are {' and '.join(get_args(evaluation.Runtime))}")
    rows: list[Row] = []
    answered: list[TaskRow] = []
    with progress() as tell:
        if text is not None or not asks:
            windows = evaluation.read_windows(reference or paths[0], text or "wikitext2", protocol, max_tokens)
            base = evaluation.Reference(reference, device, trust) if reference else None
            for path in paths:
                name = "float" if path == reference else None
                runs = cast(evaluation.Runtime, "torch" if name else runtime)
                rows.append(evaluation.evaluate(path, windows, base, name, device, trust, runs, tell))
        if asks:
            from llmquant import tasks as questions

            names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
            answered = questions.measure(
                paths,
                reference,
                tasks=names,
                files=items,
                include_path=include,
                limit=limit,
                device=device,
                trust_remote_code=trust,
                progress=tell,
            )
    if rows:
        show_figures(rows)
    if answered:
        show_answers(answered)
    _write(facts, {"rows": [row.as_dict() for row in rows]} | {"answers": [row.as_dict() for row in answered]})


@app.command(rich_help_panel=USE)
def generate(
    path: Annotated[str, typer.Argument(help="A model folder, float or packed, a GGUF file or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on after.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time. Above: draw tokens.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Let a model go on after a prompt. Its weights stay packed in memory.

    Example: llmquant generate out "The module"
    """
    from llmquant import inference

    with progress(again=False):
        model, tokenizer = inference.load(path, dtype, device, trust), inference.load_tokenizer(path, trust)
    try:
        text = inference.generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            say=lambda piece: out.print(escape(piece), end="", soft_wrap=True, highlight=False),
        )
    except KeyboardInterrupt:
        raise typer.Exit(128 + signals[0]) from None
    finally:
        out.print()
    _write(facts, {"prompt": prompt, "text": text})


@app.command(rich_help_panel=USE)
def bench(
    paths: Annotated[list[str], typer.Argument(help="Model folders, float or packed, or GGUF files.")],
    reference: Annotated[str | None, typer.Option(help="The float model: measured first.")] = None,
    text: Annotated[str | None, typer.Option(help="A text file to measure perplexity and divergence on.")] = None,
    max_tokens: MaxTokens = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    generated: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds in which each model is measured once.", min=1)] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Measure memory and speed of models side by side, each in a process of its own; all are in memory together.

    Figures are medians; ratios are to the first line, above 1 is faster. GGUF files run in llama.cpp, too, if
    `pip install llmquant[gguf-runtime]` was. With --text, perplexity of the decoded weights, and with --reference the
    KL divergence from it.

    Example: llmquant bench out --reference org/model --text test.txt
    """
    from llmquant import bench as benchmark
    from llmquant.report import costs_table

    settings = benchmark.Settings(prompt, generated, rounds, dtype, device, trust)
    with progress(again=False) as tell:
        costs = benchmark.bench(paths, reference, text, max_tokens, settings, tell)
    show(costs_table(costs))
    _write(facts, {"settings": dataclasses.asdict(settings), "rows": [cost.as_dict() for cost in costs]})


@app.command(rich_help_panel=QUANTIZE)
def compare(
    model: Model,
    recipes: Annotated[
        list[str],
        typer.Argument(help="Shipped recipes' names or YAML files.", autocompletion=_among(shipped.recipes)),
    ],
    folder: OutFolder,
    changes: Changes = [],
    device: Device = "auto",
    text: Text = None,
    protocol: ProtocolName = "llama.cpp",
    max_tokens: MaxTokens = None,
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Quantize a model by several recipes and compare them: a table, report.html, report.md and report.json.

    The same command after a crash goes on where it stopped; with one more recipe, it adds that.

    Example: llmquant compare org/model rtn-w4g128 gptq-w4g128 --out out --text test.txt --set calibration.path=text.txt
    """
    from llmquant import api

    with progress() as tell:
        rows = api.compare(
            model,
            recipes,
            folder,
            changes=changes,
            device=device,
            text=text,
            protocol=protocol,
            max_tokens=max_tokens,
            trust_remote_code=trust,
            command=_command(),
            progress=tell,
        )
    show_figures(rows)
    say(f"{folder}: the models, report.html, report.md and report.json")
    _write(facts, {"rows": [row.as_dict() for row in rows]})


@app.command(rich_help_panel=QUANTIZE)
def imatrix(
    model: Model,
    text: Annotated[Path, typer.Option(help="The text to measure on.")],
    file: Annotated[Path, typer.Option("--out", help="The new file.")],
    sequences: Annotated[int, typer.Option(help="How many sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in each.", min=2)] = 512,
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Measure how large the activations are that each column meets: llama.cpp's imatrix, for it and for GGUF recipes.

    Example: llmquant imatrix org/model --text text.txt --out imatrix.gguf
    """
    from llmquant import api

    with progress() as tell:
        api.imatrix(
            model,
            text,
            file,
            sequences=sequences,
            length=length,
            device=device,
            trust_remote_code=trust,
            progress=tell,
        )
    say(f"imatrix: {file}")
    _write(facts, {"imatrix": str(file)})


@app.command(rich_help_panel=QUANTIZE)
def sensitivity(
    model: Model,
    recipe: RecipeName,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the results; the same command goes on there.")],
    text: Annotated[str, typer.Option(help="A text file to measure on, other than the calibration text.")],
    by: Annotated[
        str, typer.Option(help="Quantize each linear, site (linears with one input) or layer alone.")
    ] = "linear",
    grids: Annotated[
        str,
        typer.Option(
            help="Grids to try, with commas between: recipe, names of grids (q4_k), bits for the recipe's grid (3, "
            "w3g64); or budget: those that `plan --budget` usually chooses from."
        ),
    ] = "recipe",
    changes: Changes = [],
    protocol: ProtocolName = "llama.cpp",
    max_tokens: MaxTokens = 8192,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what was measured here before.")] = False,
    device: Device = "auto",
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Quantize each linear (or site, or layer) alone, and measure what it does to the model's predictions.

    Writes sensitivity.json (for `llmquant plan --budget`), report.html and report.md.

    Example: llmquant sensitivity org/model gguf-q4_k_s --grids budget --text dev.txt --out sensitivity
    """
    from llmquant import api
    from llmquant import sensitivity as sensitivities
    from llmquant.report import sensitivity_table

    with progress() as tell:
        found = api.sensitivity(
            model,
            recipe,
            folder,
            text=text,
            by=cast(sensitivities.By, by),
            grids=grids,
            changes=changes,
            protocol=protocol,
            max_tokens=max_tokens,
            device=device,
            restart=restart,
            trust_remote_code=trust,
            command=_command(),
            announce=lambda cost: say(str(cost)),
            progress=tell,
        )
    show(sensitivity_table(found))
    say(f"KLD from the float model, nats a token, each quantized alone. {found.protocol}")
    _write(facts, dataclasses.asdict(found))
    say(f"{folder}: sensitivity.json, report.html and report.md")


@app.command(rich_help_panel=BEGIN)
def recommend(
    model: Model,
    memory: Annotated[
        str,
        typer.Option(
            help="What running it may take, e.g. 8GB: of the GPU's memory where that computes; elsewhere leave some to "
            "the system."
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Where it is to run (default: the best for each of `llmquant list targets`).",
            autocompletion=_among(lambda: TARGETS),
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the run is to hold (default: 4096, or the model's most).", min=1)
    ] = None,
    reports: Annotated[
        list[Path], typer.Option(help="A folder that quantize or compare has written of this model; may be repeated.")
    ] = [],
    trust: Trust = False,
    facts: Facts = None,
) -> None:
    """Say which recipes fit into so much memory where the model is to run, best first, and how. Loads no weights.

    Example: llmquant recommend org/model --memory 8GB --target laptop
    """
    from llmquant import api

    with progress() as tell:
        found = api.recommend(
            model, memory, target=target, context=context, reports=reports, trust_remote_code=trust, progress=tell
        )
    show_recommendation(found, target)
    _write(facts, found.as_dict() | {"targets": {name: TARGETS[name].as_dict() for name in found.rows}})


@app.command(rich_help_panel=USE)
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize or compare has finished.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, such as me/model-gguf.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
    facts: Facts = None,
) -> None:
    """Upload a finished folder with its model card to the Hugging Face hub.

    The token is that of the environment: HF_TOKEN, or what `hf auth login` has kept.

    Example: llmquant push out me/model-gguf --private
    """
    from llmquant import api

    with progress() as tell:
        address = api.push(folder, repo, private=private, progress=tell)
    say(address)
    _write(facts, {"address": address})


@app.command(rich_help_panel=USE)
def inspect(path: Annotated[str, typer.Argument(help="A model folder, or a GGUF file.")], facts: Facts = None) -> None:
    """List the tensors, sizes and settings of a model folder or a GGUF file.

    Example: llmquant inspect out
    """
    from llmquant.packed import describe
    from llmquant.report import inspection_table, size

    found = describe(path)
    show(inspection_table(found))
    architectures = ", ".join(found["architectures"])
    quantized = len(found["quantized_linears"])
    say(f"{architectures}: {len(found['tensors'])} tensors, {size(found['bytes'])}, {quantized} linears quantized")
    for key in ("quantization_config", "metadata"):
        if found.get(key):
            short = {k: f"[{len(v)} items]" if isinstance(v, list) and len(v) > 8 else v for k, v in found[key].items()}
            out.print_json(data=short, ensure_ascii=True)  # a token may be a piece of a character
    _write(facts, found)


@app.command(name="list", rich_help_panel=BEGIN)
def list_(
    kind: Annotated[str, typer.Argument(help="grids, algorithms, transforms, formats, models, recipes or targets.")],
    facts: Facts = None,
) -> None:
    """List what there is of a kind, a line each.

    Example: llmquant list recipes
    """
    from llmquant.catalogue import catalogue

    found = catalogue(kind)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, line in found.items():
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(line))
    out.print(table)
    _write(facts, found)


def main() -> None:
    """Run the command line: what the input caused is one message and exit code 2, never a traceback."""
    listen()
    out.quiet = err.quiet = RANK > 0  # the first one speaks for all, but for errors
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] not in (["quantize"], ["train"]):
            command = " ".join(sys.argv[1:2])
            raise LlmquantError(f"{command}: runs in one process; torchrun is for `llmquant quantize` and `train`")
        app()
    except SystemExit as ended:
        if not signals or ended.code in (0, 128 + signals[0]):
            raise
        err.print("Stopped before anything was done.")
        sys.exit(128 + signals[0])
    except LlmquantError as error:
        err.quiet = False
        who = f"rank {RANK}: " if RANK else ""
        err.print(f"[bold red]{who}error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _with(changes: list[str], formats: list[str], pure: bool = False, tensor_types: list[str] = []) -> list[str]:
    """Return the changes to a recipe that all options ask for."""
    more = [f"formats=[{', '.join(formats)}]"] if formats else []
    if pure:
        more.append("mixture.pure=true")
    if tensor_types:
        pairs = [text.rpartition("=") for text in tensor_types]
        if wrong := next(
            (text for text, (pattern, _, _) in zip(tensor_types, pairs, strict=True) if not pattern), None
        ):
            raise RecipeError(f"--tensor-type {wrong}: write REGEX=TYPE, e.g. --tensor-type 'ffn_down=q6_k'")
        more.append("mixture.overrides=" + json.dumps({pattern: type_ for pattern, _, type_ in pairs}))
    return [*changes, *more]


def _command() -> str:
    """Return what was typed."""
    return shlex.join(["llmquant", *sys.argv[1:]])


def _end(report: run.Report, facts: Path | None, evaluated: bool = True) -> None:
    """Print what a run has done; exit with ``LEFT_FLOAT`` where it left linears float."""
    show_report(report, evaluated)
    if not RANK:
        _write(facts, report.as_dict())
    if report.given_up and not RANK:
        raise typer.Exit(LEFT_FLOAT)


def _write(path: Path | None, facts: Any) -> None:
    if path is None:
        return
    from llmquant.files import write_text

    write_text(path, json.dumps(facts, indent=2, default=str) + "\n")
