"""How much memory and disk a run takes at most, foretold from shapes, and where its activations are so that it fits.

A run goes through phases, each with a peak of its own. The factors are bytes of a run in float32 on the CPU. DIRECT,
ROUNDING, PIECES, BACKWARD and PACKING were fitted to whole runs (eval/memory.py), FEEDBACK, FACTORS and FACTORED to
GPTQ alone; the others are counted from the code. What a GPU takes is counted by the same factors and was not measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch

from llmquant import distillation
from llmquant.errors import PlanError
from llmquant.gradients import ROWS
from llmquant.layers import informing
from llmquant.plan import PIECE, Placement, Plan, needs_of, two_sided

RUNTIME = 500_000_000  # Python, torch, transformers and compiled kernels before any model
CALIBRATING = 80_000_000  # more of them
# For each weight of the matrices that are quantized together:
DIRECT = 20  # fitting, codes and errors, where linears are quantized as they are written
ROUNDING = 14  # the same beside a layer
PIECES = 32  # the same of the pieces of a GGUF file, which wait to be written
FEEDBACK = 36  # GPTQ
PACKING = 3
# For each element of the square of a site's columns:
SUMS = 8  # a Hessian while it is summed
HESSIAN = 4
FACTORS = 28  # a Hessian; GPTQ's factors of it, and what they are computed in
FACTORED = 16  # the same while rows are rounded
EXPERT = 2  # Hessians of all tokens beside those of an expert's own
CORRECTION = 20  # what a mismatch needs beside the Hessian
MARGIN = 0.8  # of the room, that a faster placement may fill: a peak has been a sixth higher than foretold
TRAINED = 28  # places and gradients, AdamW's moments, weights and codes, while a model is trained
# For each token and column, of what a layer computes in a batch:
FORWARD = 2.5
BACKWARD = 25
TRAINING = 8
LOGITS = 24  # for each token and word, of two models' predictions and what is computed of them


@dataclass(frozen=True)
class Text:
    """How many tokens a rank has: of all sequences, of one, of a batch, of the float model's chain, with gradients.

    ranks: how many there are. lessons: of all text that a training reads.
    """

    tokens: int = 0
    length: int = 0
    batch: int = 0
    aimed: int = 0
    gradients: int = 0
    ranks: int = 1
    lessons: int = 0


@dataclass(frozen=True)
class Computing:
    """What a model's layers are computed with.

    hidden, vocabulary: of the model. element: bytes of each weight and activation of a layer. gpu: on one, while files
    are written by the host.
    """

    hidden: int
    vocabulary: int
    element: int = 4
    gpu: bool = False


def placed(plan: Plan, computing: Computing, text: Text, exporters: Mapping[str, ModuleType], room: int) -> Plan:
    """Return the plan with the fastest placement of activations that ``room`` bytes easily suffice for, and its peaks.

    With the slowest where none does.
    """
    writing = _writing(plan, exporters)
    for placement in get_args(Placement):
        peaks = _peaks(plan, computing, text, writing, placement)
        if max(peaks.values()) <= MARGIN * room:
            break
    host = RUNTIME + CALIBRATING + writing if computing.gpu else 0
    scratch = _scratch(plan, computing, text, placement)
    return replace(plan, placement=placement, peaks=peaks, host_bytes=host, scratch_bytes=scratch)


def check_fits(plan: Plan, room: int) -> None:
    """Raise PlanError when a run would need more memory."""
    phase, peak = max(plan.peaks.items(), key=lambda item: item[1])
    if peak <= room:
        return
    costly = [key for key in ("mismatch_correction", "transforms", "learned_rounding") if getattr(plan.recipe, key)]
    remedy = {
        "start": "The embedding and the output matrix alone take that",
        "gradients": "Leave out `algorithm.two_sided` and `learned_rounding`",
        "layers": f"Leave out `{'` or `'.join(costly)}`" if costly else "Take an algorithm that needs no Hessian",
        "training": "Train layer by layer: --set training.scope=layers",
        "writing": "Give it fewer threads (OMP_NUM_THREADS)",
    }[phase]
    raise PlanError(
        f"this run needs about {peak / 1e9:.2f} GB of memory (phase: {phase}), and there are {room / 1e9:.2f} GB. "
        f"{remedy}; or use another machine, or say --memory if you know that there is more."
    )


def check_disk(plan: Plan, out: Path, work: Path | None) -> None:
    """Raise PlanError when the files of a run would not fit beside what is on the disk.

    out: the new folder. work: the work folder, where the run has one. What a run before this one has left counts as
    there: it is used, or makes room.
    """
    try:
        _check_disk(plan, out, work)
    except PermissionError:  # of which whoever writes there tells more
        return


def _check_disk(plan: Plan, out: Path, work: Path | None) -> None:
    wanted = [("the files", out, sum(plan.sizes.values()), out.with_name(f"{out.name}.partial"))]
    if work is not None:
        wanted.append(("the work folder", work, plan.work_bytes + plan.scratch_bytes, work))
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for what, path, count, left in wanted:
        count = max(count - sum(found.stat().st_size for found in left.rglob("*") if found.is_file()), 0)
        disks.setdefault(_existing(path).stat().st_dev, []).append((what, path, count))
    for of_disk in disks.values():
        path = of_disk[0][1]
        free = shutil.disk_usage(_existing(path)).free
        if sum(count for *_, count in of_disk) > free:
            parts = " and ".join(f"{count / 1e9:.3f} GB for {what}" for what, _, count in of_disk)
            raise PlanError(
                f"{path}: this run needs {parts}, and {free / 1e9:.3f} GB of the disk are free. Make room, or put "
                "--out or --work elsewhere."
            )


def _existing(path: Path) -> Path:
    """Return the first folder above a path, or the path, that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _scratch(plan: Plan, computing: Computing, text: Text, placement: Placement) -> int:
    """Return the most bytes that the work folder holds of what is needed on the way only."""
    recipe, hidden = plan.recipe, computing.hidden
    batches = 0
    if placement == "files":
        along = recipe.mismatch_correction or recipe.tunes_layers
        read = text.gradients * (plan.layers + 1) if plan.needs == "fisher" else 0
        batches = computing.element * hidden * (text.tokens + along * text.aimed + read) * text.ranks
    information = 0
    if plan.needs == "fisher":
        information = plan.layers * hidden**2
        for index in range(plan.layers) if two_sided(plan.linears) else ():
            for name in informing(plan, index):
                linears = plan.named(index, [name])
                rows = linears[0].rows if linears else hidden  # what adds up the experts' outputs is no linear
                information += rows * min(rows, ROWS)
    kept = 0
    if recipe.trains_model:  # places, AdamW's moments, and what was best; what the teacher's last layer gives
        kept = 12 * sum(x.weights for x in plan.quantized.values()) + plan.work_bytes
        kept += computing.element * hidden * text.lessons
    return max(batches + 4 * information, kept)


def _peaks(plan: Plan, computing: Computing, text: Text, writing: int, placement: Placement) -> dict[str, int]:
    """Return the peak of every phase, of the memory that layers are computed in."""
    hidden, element = computing.hidden, computing.element
    if plan.needs == "nothing":
        writes = {"writing": (0 if computing.gpu else RUNTIME) + writing}
        return writes | _training(plan, computing, text)
    recipe = plan.recipe
    outside = element * _outside(plan)
    layer = element * max(sum(x.weights for x in plan.of_layer(i)) for i in range(plan.layers))
    along = recipe.mismatch_correction or recipe.tunes_layers
    held = 0 if placement == "files" else element * hidden * (text.tokens + along * text.aimed)
    sites = _sites(plan)
    cols = [site.cols for site in sites]
    width = 4 * hidden + 3 * max(cols)  # what a layer computes of a token
    forward = int(FORWARD * text.batch * width * element / 4)
    hessian = plan.needs in ("hessian", "fisher")
    # all of the layer's Hessians at a time where a fold is searched, or where the sites do not wait for each other
    squares = sum(site.cols**2 for site in sites if not site.expert) if hessian else 0
    # all tokens wait where experts begin
    waiting = element * hidden * text.tokens * any(site.expert for site in sites)
    if placement == "waiting" and recipe.true_sequential:
        # the residual stream, what attention computes of it, or what the last linears read
        waiting = (
            element * max(6 * hidden, 2 * hidden + max(cols)) * (text.tokens + recipe.mismatch_correction * text.aimed)
        )
    rounding, searching = [], []
    for site in sites:
        square, of_expert = site.cols**2, HESSIAN * EXPERT * site.expert * hessian
        working = HESSIAN * square * hessian + ROUNDING * site.weights
        if site.factorised:
            working = max(FACTORS * square, FACTORED * square + FEEDBACK * site.weights)
        rounding.append(working + (of_expert + CORRECTION * recipe.mismatch_correction) * square)
        searching.append(FACTORS * square if site.factorised else 0)
    summing = SUMS * (squares if recipe.folds or not recipe.true_sequential else hessian * max(cols) ** 2)
    together = 0 if recipe.true_sequential else HESSIAN * squares
    busy = [forward + summing, together + max(rounding)]
    if recipe.folds:
        busy.append(HESSIAN * squares + max(searching))
    layers = layer * (2 if along else 1) + held + waiting + max(busy)
    base = 0 if computing.gpu else RUNTIME + CALIBRATING
    found = {
        "start": base + outside + held + forward,
        "layers": base + layers + outside * recipe.tunes_layers,
    }
    if not computing.gpu:
        found["writing"] = base + writing
    if plan.needs == "fisher":
        read = 0 if placement == "files" else element * hidden * text.gradients * (plan.layers + 1)
        graph = max(BACKWARD * text.batch * width * element // 4, 6 * 4 * text.length * computing.vocabulary)
        found["gradients"] = base + outside + layer + held + read + graph
    return found | _training(plan, computing, text)


def _outside(plan: Plan) -> int:
    """Return how many weights are outside the layers."""
    kept = sum(info.numel for name, info in plan.kept.items() if not name.startswith(plan.spec.layers))
    return kept + sum(x.weights for x in plan.of_layer(None))


def _training(plan: Plan, computing: Computing, text: Text) -> dict[str, int]:
    """Return the peak of training all layers together: a model, its graph, and the teacher's output matrix."""
    settings = plan.recipe.training
    if settings is None or not plan.recipe.trains_model:
        return {}
    of_layer = plan.of_layer(0)
    width = 4 * computing.hidden + 3 * max((x.cols for x in of_layer), default=0)
    length = text.length or 1
    at_once = min(distillation.together(computing.vocabulary, length) * length, max(settings.tokens, length))
    graph = at_once * (TRAINING * plan.layers * width + LOGITS * computing.vocabulary)
    trained = plan.weights if settings.float_rate else sum(x.weights for x in plan.quantized.values())
    weights = 2 * computing.element * _outside(plan) + TRAINED * trained
    return {"training": (0 if computing.gpu else RUNTIME + CALIBRATING) + weights + graph}


def _writing(plan: Plan, exporters: Mapping[str, ModuleType]) -> int:
    """Return what writing the files takes, and quantizing where that is done as they are written."""
    largest = max((x.weights for x in plan.quantized.values()), default=0)
    # a GGUF file is written piece by piece, others by the tensor
    folder = not all(hasattr(exporter, "write") for exporter in exporters.values())
    floats = [x.weights * x.dtype.itemsize for x in plan.linears if x.grid is None]
    kept = max([*floats, *(info.bytes for info in plan.kept.values())], default=0)
    if plan.needs != "nothing":
        return max(PACKING * largest, kept)
    if len(exporters) > 1:
        layers = [sum(x.weights for x in plan.of_layer(i)) for i in range(plan.layers)]
        return max(DIRECT * largest + int(plan.work_bytes * max(layers) / sum(layers)), kept)
    if folder:
        return max(DIRECT * largest, kept)
    return torch.get_num_threads() * PIECES * min(largest, PIECE)


@dataclass
class _Site:
    """Linears that read the same activations, of all layers; one stands for those of all experts.

    weights: the most that are rounded together. factorised: some of them by an algorithm that factorises the Hessian.
    """

    cols: int
    expert: bool
    weights: int = 0
    factorised: bool = False


def _sites(plan: Plan) -> list[_Site]:
    found: dict[tuple[str, int], _Site] = {}
    for index in range(plan.layers):
        for site in plan.spec.sites_of(index):
            linears = plan.of_layer(index, site)
            if linears:
                key = "" if site.expert else site.name, linears[0].cols
                one = found.setdefault(key, _Site(linears[0].cols, bool(site.expert)))
                one.weights = max(one.weights, sum(x.weights for x in linears))
                one.factorised |= any(x.choice and needs_of(x.choice) in ("hessian", "fisher") for x in linears)
    return list(found.values())
