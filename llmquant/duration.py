"""About how long a run takes, foretold from shapes and from how fast this machine multiplies matrices.

Everything is counted in the multiply-adds of products of float matrices; what is no product, in as many as take as
long. The factors were fitted to runs of one thread on models of 512 and 1024 columns (``eval/duration.py`` compares);
with other processors, and with GPUs, the estimate is a rougher one. Algorithms and transforms tell their own part, by a
function ``multiply_adds``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llmquant import mismatch, plugins
from llmquant.footprint import Text
from llmquant.plan import Linear, Plan

PASS = 1.35  # what a layer computes, and sums of x xᵀ, beside their products alone
ROUNDING = 900  # a weight, by algorithms that do not tell
WRITING = 300  # a weight: to read it, pack it and write it
STARTING = 4.0  # seconds until a process has imported everything
SIZE, TRIES = 1024, 5  # of the products that are timed


def speed(device: torch.device) -> float:
    """Return how many multiply-adds of a matrix product a device computes in a second."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = torch.ones(2, SIZE, SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU, too
        best = min(best, time.perf_counter() - started)
    return SIZE**3 / best


def seconds(plan: Plan, hidden: int, vocabulary: int, text: Text, speed: float) -> dict[str, float]:
    """Return about how long each phase of a run takes. speed: as ``speed`` gives it."""
    found = {"starting": STARTING}
    if plan.needs == "fisher":
        weights = sum(x.weights for x in plan.linears if x.layer is not None)
        outputs = sum(x.rows for x in plan.linears if x.layer is not None)
        fisher = 3 * weights + 512 * outputs + 5 * vocabulary * hidden  # forth and back, of what is computed on the way
        found["gradients"] = PASS * text.gradients * fisher / speed
    if plan.needs != "nothing":
        found["layers"] = sum(_layer(plan, index, text) for index in range(plan.layers)) / speed
        found["output matrix and embedding"] = sum(_rounded([x], False) for x in plan.of_layer(None)) / speed
    if plan.recipe.training is not None and plan.recipe.trains_model:
        steps = plan.recipe.training.steps * max(plan.recipe.training.tokens, text.length) / text.ranks
        weights = sum(x.weights for x in plan.linears)
        passes = 3 * steps + text.lessons / text.ranks  # forth, back by inputs and by weights; the teacher's once
        found["training"] = PASS * passes * weights / speed
    rounding = sum(_rounded([x], False) for x in plan.linears) if plan.needs == "nothing" else 0.0
    found["writing"] = (rounding + WRITING * plan.weights) / speed
    return found


def _layer(plan: Plan, index: int, text: Text) -> float:
    recipe = plan.recipe
    linears = plan.of_layer(index)
    weights = sum(x.weights for x in linears)
    sites = [found for site in plan.spec.sites_of(index) if (found := plan.of_layer(index, site))]
    squares = sum(x[0].cols ** 2 for x in sites) / 2 if plan.needs in ("hessian", "fisher") else 0.0
    passes = 1.0
    if plan.placement != "waiting" and recipe.true_sequential:  # as far as each site, and once to the end
        passes += len(sites) / 2
    some = min(text.aimed, text.tokens)
    count = passes * PASS * text.tokens * (weights + squares / passes)
    if recipe.mismatch_correction or recipe.tunes_layers:
        count += passes * PASS * some * (weights + 2 * squares / passes)
    if recipe.folds:
        count += PASS * some * (weights + squares)
        for name, config in recipe.folds:
            transform = plugins.load("transforms", name, "transforms")
            if hasattr(transform, "multiply_adds"):
                count += sum(transform.multiply_adds(x.rows, x.cols, config) for x in linears if x.grid)
    return count + sum(_rounded(of_site, recipe.mismatch_correction) for of_site in sites)


def _rounded(linears: Sequence[Linear], corrected: bool) -> float:
    """Return what rounding takes of linears that read the same activations."""
    count = 0.0
    for choice, grid in dict.fromkeys((x.choice, x.grid) for x in linears):
        if choice is None or grid is None:
            continue
        rows, cols = sum(x.rows for x in linears if (x.choice, x.grid) == (choice, grid)), linears[0].cols
        algorithm = plugins.load("algorithms", choice.algorithm, "algorithm")
        if hasattr(algorithm, "multiply_adds"):
            count += algorithm.multiply_adds(rows, cols, choice.algorithm_config)
        else:
            count += ROUNDING * rows * cols
        count += mismatch.multiply_adds(rows, cols) if corrected else 0.0
    return count
