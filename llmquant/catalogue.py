"""What there is of each kind, with a line about each: the first of its own documentation."""

from __future__ import annotations

import yaml

from llmquant import plugins, shipped
from llmquant.errors import RecipeError
from llmquant.targets import TARGETS

KINDS: dict[str, plugins.Kind] = {
    "grids": "grids",
    "algorithms": "algorithms",
    "transforms": "transforms",
    "formats": "exporters",
    "models": "models",
}


def catalogue(kind: str) -> dict[str, str]:
    """Return name -> one line, for "grids", "algorithms", "transforms", "formats", "models", "recipes" or "targets"."""
    if kind == "recipes":
        return {n: yaml.safe_load(p.read_text("utf-8")).get("description", "") for n, p in shipped.recipes().items()}
    if kind == "targets":
        return {name: f"{target.runtime} on {target.about}" for name, target in TARGETS.items()}
    if kind not in KINDS:
        raise RecipeError(f"list {kind}: there is no such kind.{plugins.hint(kind, [*KINDS, 'recipes', 'targets'])}")
    modules = {name: plugins.load(KINDS[kind], name, kind) for name in plugins.names(KINDS[kind])}
    if kind == "models":
        return {name: ", ".join(module.ARCHITECTURES) for name, module in modules.items()}
    return {name: (module.__doc__ or "").strip().splitlines()[0] for name, module in modules.items()}
