"""What a model family looks like to the quantizer: a table, no code.

Names of modules and attributes are dotted paths. Those of sites and folds start
in a decoder layer, those of a ModelSpec in the whole causal language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Fold:
    """The module that absorbs 1/s when the columns of a site are scaled by s > 0.

    kind: how the module's outputs become the site's columns.
        "norm": an RMSNorm or LayerNorm; one output a column.
        "norm_plus_one": a norm that stores w and applies 1 + w (Gemma).
        "rows": a linear; its last rows are the columns, one each (the up half
            of a fused gate and up, or all of an up).
        "v": a linear that computes the values of attention. Query heads that
            share a key-value head also share the rows of its values.
        "qkv": the same, fused: all queries, then all keys, then all values.
        "qkv_per_head": fused by key-value head: its queries, its key, its value.
    head_dim: the attribute that holds the size of a head, for the last three kinds.
    relu: an activation between the module and the site. The scale passes if it is
        a ReLU, as s * relu(x) = relu(s * x); any other makes the site unfoldable.
    """

    module: str
    kind: Literal["norm", "norm_plus_one", "rows", "v", "qkv", "qkv_per_head"] = "norm"
    head_dim: str = ""
    relu: str = ""


@dataclass(frozen=True)
class Site:
    """The linears of a layer that read the same activations; they share one Hessian.

    fold: None when nothing can absorb a scale: the activations also go elsewhere,
        or come through a function that no scale passes.
    """

    name: str
    linears: tuple[str, ...]
    fold: Fold | None = None


@dataclass(frozen=True)
class ModelSpec:
    """
    layers: the ModuleList of decoder layers; its first step is the model without head.
    head: the linear that computes the logits.
    embed: the embedding of the tokens.
    sites: all linears of a layer, in the order in which it computes them.
    conv1d: weights are stored [cols, rows], as transformers' Conv1D does.
    renamed: modules with another name in files: pairs of a prefix there and here.
    layer_returns_tuple: a layer returns (x, ...), not x.
    when: values in the model's config that choose this spec. The first spec of a
        family whose values all match is taken, and a key that a config leaves out
        matches nothing; so the default layout comes last and asks for nothing.
    """

    layers: str
    head: str
    embed: str
    sites: tuple[Site, ...]
    conv1d: bool = False
    layer_returns_tuple: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
