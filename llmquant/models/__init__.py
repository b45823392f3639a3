"""Model families, one table a file.

A module has ``ARCHITECTURES``, the names in a model's config.json that it is for,
and ``SPECS``, a ModelSpec for every layout of its layer. To add a family, copy
llama.py; if its layer is Llama's, add its name there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from llmquant import plugins
from llmquant.errors import UnsupportedModel
from llmquant.models.spec import ModelSpec


def spec_for(config: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the model that a config.json describes, or raise UnsupportedModel."""
    families: dict[str, tuple[ModelSpec, ...]] = {}
    for name in plugins.names("models"):
        family = plugins.load("models", name, "models")
        families |= dict.fromkeys(family.ARCHITECTURES, family.SPECS)
    wanted = config.get("architectures") or [""]
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise UnsupportedModel(f"config.json: architectures: {wanted!r:.200} is not a list of names")
    for architecture in wanted:
        for spec in families.get(architecture, ()):
            if all(config.get(key) == value for key, value in spec.when.items()):
                return spec
    nearest = difflib.get_close_matches(wanted[0][:100], families, n=1, cutoff=0)[0]
    raise UnsupportedModel(
        f"config.json: architectures: {wanted[0]!r:.200} is not supported; the nearest name that is: {nearest!r}. "
        f"Supported: {', '.join(sorted(families))}. For a layer like one of theirs add the name to its table in "
        "llmquant/models, for another one a table."
    )
