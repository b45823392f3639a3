"""A mixed-precision recipe whose files have no more than a given size, from measured sensitivities.

Each unit gets one of the grids that it was measured on, such that the sum of the
divergences is least (they add up as long as they are small) and the files, headers
and all tensors that stay float included, are within the budget.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from llmquant import knapsack, plugins, run
from llmquant import plan as planning
from llmquant.errors import RecipeError
from llmquant.patterns import patterns
from llmquant.plan import Plan
from llmquant.recipe import Recipe
from llmquant.sensitivity import OWN, Sensitivity, check_weights_only, grid_rule, uniform, units_of, with_rules

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate(("k", "M", "G", "T"), 1)},
    **{f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
}


@dataclass(frozen=True)
class Budgeted:
    """The recipe, what it makes, and what it is expected to cost.

    choices: unit -> grid. kld: the sum of the units' measured divergences, nats a token.
    """

    recipe: Recipe
    plan: Plan
    budget: int
    choices: Mapping[str, str]
    kld: float


def to_bytes(budget: str, weights: int) -> int:
    """Return a budget such as "4.5bpw" (of the whole files, over all weights of the model), "3.2GB" or "3GiB" in bytes.

    >>> to_bytes("4.5bpw", 1000), to_bytes("3.2MB", 0), to_bytes("1 GiB", 0)
    (562, 3200000, 1073741824)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) *(\w+)", budget.strip())
    if found is None or found[2] not in {*UNITS, "bpw"}:
        raise RecipeError(
            f"--budget {budget}: is neither bits per weight such as 4.5bpw nor a size such as 3.2GB, 3GiB"
        )
    count = Decimal(found[1])  # 0.3 * 10 in binary is a byte short
    return int(count * weights / 8) if found[2] == "bpw" else int(count * UNITS[found[2]])


def fill(
    model: str | Path, recipe: Recipe, found: Sensitivity, budget: str, name: str, trust: bool = False
) -> Budgeted:
    """Return the recipe that spends a budget best; raise RecipeError, with the possible range, for one that none meets.

    found: of this model and recipe. name: of the new recipe.
    """
    if len(recipe.formats) != 1:
        raise RecipeError(f"formats: a budget is for one container, and the recipe has {len(recipe.formats)}")
    (format_,) = recipe.formats
    stream = run.open_stream(model, recipe, trust_remote_code=trust)
    own = run.plan_for(stream, recipe)
    check_weights_only(own)
    units = units_of(own, found.by)
    costs = found.costs()
    grids = found.grids
    missing = [(u.name, g) for u in units for g in grids if g not in costs.get(u.name, {})]
    if missing or len(units) != len(costs):
        raise RecipeError(
            f"--sensitivity: knows {len(costs)} units of {found.model}, and this model and recipe have {len(units)}"
            + (f"; {missing[0][0]} was not measured on {missing[0][1]}" if missing else "")
            + ". Run `llmquant sensitivity` with this model and recipe to its end."
        )
    _check_same(found, run.fingerprint(stream.checkpoint, own, None, None))
    exporter = plugins.load("exporters", format_, "formats")
    plans = {grid: run.with_files(run.plan_for(stream, uniform(recipe, units, grid)), stream) for grid in grids}
    sizes = {
        grid: {name: planning.packed_bytes(x, exporter) for name, x in plan.quantized.items()}
        for grid, plan in plans.items()
    }
    # headers, padding and what stays float; it differs by some bytes from one choice to another
    fixed = min(plan.files[format_] - sum(sizes[g][n] for u in units for n in u.linears) for g, plan in plans.items())
    options: list[list[tuple[int, float]]] = []
    labels: list[list[str]] = []
    for unit in units:
        of = {grid: sum(sizes[grid][name] for name in unit.linears) for grid in grids}
        labels.append(sorted(grids, key=lambda grid: (of[grid], costs[unit.name][grid])))
        options.append([(of[grid], costs[unit.name][grid]) for grid in labels[-1]])

    def planned(chosen: Sequence[int]) -> tuple[Recipe, Plan, dict[str, str]]:
        choices = {u.name: names[i] for u, names, i in zip(units, labels, chosen, strict=True)}
        by_linear = {linear: choices[u.name] for u in units for linear in u.linears}
        made = with_rules(recipe, _rules(own, recipe, by_linear), name)
        return made, run.with_files(run.plan_for(stream, made), stream), choices

    limit = to_bytes(budget, own.weights)
    smallest, largest = (planned([end] * len(units))[1] for end in (0, len(grids) - 1))
    least, most = smallest.files[format_], largest.files[format_]
    if not least <= limit <= most:
        raise RecipeError(
            f"--budget {budget}: is {limit:,} bytes, but with {', '.join(grids)} the {format_} files have {least:,} to "
            f"{most:,} bytes: {8 * least / own.weights:.4f} to {8 * most / own.weights:.4f}bpw, "
            f"{least / 1e6:.3f} to {most / 1e6:.3f}MB"
        )
    spent = limit
    while True:
        chosen = knapsack.choose(options, spent - fixed)
        chosen = [0] * len(units) if chosen is None else chosen
        made, plan, choices = planned(chosen)
        excess = plan.files[format_] - limit
        if excess <= 0:
            kld = sum(option[i][1] for option, i in zip(options, chosen, strict=True))
            return Budgeted(made, plan, limit, choices, kld)
        spent -= excess


def _check_same(found: Sensitivity, now: Mapping[str, Any]) -> None:
    """Raise RecipeError when the divergences are those of another model, or of what another recipe does to it."""
    before = found.fingerprint
    if before["model"]["hash"] != now["model"]["hash"]:
        raise RecipeError(f"--sensitivity: was measured on other weights, those of {before['model']['folder']}")
    keys = ["algorithm", "grid", "transforms"]
    if OWN in found.grids:
        keys += ["mixture", "rules"]
    if before.get("tokens") is not None:
        keys.append("calibration")
    different = [key for key in keys if before["recipe"].get(key) != now["recipe"].get(key)]
    if before.get("imatrix") != now["imatrix"]:  # their contents: the files may have moved
        different.append("imatrix")
    if different:
        key = different[0]
        was, is_ = (of["recipe"].get(key) for of in (before, now))
        raise RecipeError(
            f"--sensitivity: was measured with {key} = {was}, and this recipe has {is_}"
            + (", in which other numbers are" if was == is_ else "")
            + ". Measure again, in another folder."
        )


def _rules(plan: Plan, recipe: Recipe, by_linear: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return rules that give every linear its grid, those of a kind by one pattern."""
    rules = []
    for label in sorted(set(by_linear.values()) - {OWN}):
        names = [name for name, its in by_linear.items() if its == label]
        others = [x.name for x in plan.linears if by_linear.get(x.name) != label]
        rules.append({"match": [f"re:{p}" for p in patterns(names, others)], "grid": grid_rule(label, recipe)})
    return rules
