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
    others: linears that read the same activations, or those of some tokens, and are no part of the site: routers, which
        stay float, and the linears of experts. A fold scales their columns, too.
    expert: the module of the expert that its linears belong to; it reads the tokens that are routed to it.
    """

    name: str
    linears: tuple[str, ...]
    fold: Fold | None = None
    others: tuple[str, ...] = ()
    expert: str = ""

    @property
    def readers(self) -> tuple[str, ...]:
        """All modules that read the site's activations."""
        return (*self.linears, *self.others)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which each token passes some: down(act(gate(x)) * up(x)), added up with weights.

    module: holds them by number, each with linears of the names in ``llmquant.models.moe``.
    site: the name of the site that all tokens pass on their way to the routers and the experts.
    routers: matrices that read the same and stay float: a small error would send tokens elsewhere.
    dense: the sites of a layer without experts, in models that have some.
    """

    module: str
    site: str
    routers: tuple[str, ...]
    dense: tuple[Site, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """
    layers: the ModuleList of decoder layers; its first step is the model without head.
    head: the linear that computes the logits.
    embed: the embedding of the tokens.
    sites: all linears of a layer, in the order in which it computes them; the experts come after these.
    experts: where a layer has some.
    of_layers: the sites of each layer, experts included, where layers have some: what ``moe.unfused`` finds out.
    conv1d: weights are stored [cols, rows], as transformers' Conv1D does.
    renamed: modules with another name in files: pairs of a part of the name there and here, from a dot to a dot.
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
    experts: Experts | None = None
    of_layers: tuple[tuple[Site, ...], ...] = ()

    def sites_of(self, layer: int) -> tuple[Site, ...]:
        """Return the sites of a layer."""
        return self.of_layers[layer] if self.of_layers else self.sites

    @property
    def every_site(self) -> tuple[Site, ...]:
        """The sites that any layer has."""
        kinds = {id(sites): sites for sites in self.of_layers or (self.sites,)}  # layers of a kind share one tuple
        return tuple({site.name: site for sites in kinds.values() for site in sites}.values())
