"""Find a plugin by name: the algorithm ``gptq`` is the module ``llmquant.algorithms.gptq``.

There is no registry to edit. Plugins of other packages come through packaging
entry points (group ``llmquant.algorithms``, the name, the module), so a recipe
can name what is installed but cannot import a module of its own choice.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from llmquant.errors import RecipeError

Kind = Literal["algorithms", "exporters", "grids", "models", "transforms"]


def names(kind: Kind) -> list[str]:
    """Return every plugin of one kind, in alphabetical order."""
    return sorted(_modules(kind))


def load(kind: Kind, name: str, where: str) -> ModuleType:
    """Import a plugin module. ``where`` is the place in the recipe, for the message."""
    modules = _modules(kind)
    if name not in modules:
        raise RecipeError(f"{where}: no {kind[:-1]} is called {name!r}.{hint(name, modules)}")
    return importlib.import_module(modules[name])


@cache
def _modules(kind: Kind) -> dict[str, str]:
    """Return the module of every plugin of one kind: those of other packages, then our own."""
    package = importlib.import_module(f"llmquant.{kind}")
    own = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("spec", "moe")]
    others = {entry.name: entry.value for entry in entry_points(group=f"llmquant.{kind}")}
    return others | {name: f"llmquant.{kind}.{name}" for name in own}


def configure(kind: Kind, values: dict[str, Any], where: str) -> tuple[str, Any]:
    """Return a plugin's name and its ``Config`` made from the other values; every key and type must fit."""
    name = values.get("name")
    if not isinstance(name, str):
        raise RecipeError(f"{where}: needs a `name`, one of {', '.join(names(kind))}.")
    module = load(kind, name, f"{where}.name")
    rest = {key: value for key, value in values.items() if key != "name"}
    return name, validate(with_config(ConfigDict(extra="forbid"))(module.Config), rest, where)


def validate(cls: Any, values: Any, where: str) -> Any:
    """Return a pydantic model or dataclass made from plain values, or raise RecipeError with the place of the fault."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join([where, *map(str, fault["loc"])]) if fault["loc"] else where
        place = place.removeprefix(".")
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = f"unknown key.{hint(str(fault['loc'][-1]), _keys(cls, fault['loc'][:-1]))}"
        elif fault["type"] == "value_error":
            message = fault["msg"].removeprefix("Value error, ")
        else:
            message = f"{fault['msg']} (got {fault['input']!r:.200})"
        raise RecipeError(f"{place}: {message}") from None


def hint(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' or, when nothing is near, ' Known: …'."""
    known, word = sorted(known), word[:100]
    close = difflib.get_close_matches(word, known, n=1) or [k for k in known if k.startswith(word)][:1]
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def _keys(cls: Any, path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are allowed at ``path`` inside a model or dataclass."""
    schema = TypeAdapter(cls).json_schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                return resolve(definitions[option["$ref"].rsplit("/", 1)[-1]])
            if "properties" in option or "items" in option:
                return dict(option)
        return node

    node = resolve(schema)
    for step in path:
        node = resolve(node["items"] if isinstance(step, int) else node.get("properties", {}).get(step, {}))
    return list(node.get("properties", {}))
