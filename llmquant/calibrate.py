"""Run a model one decoder layer at a time, watch what its linears read, and fold scales into its weights.

The model is transformers' causal language model in eval mode. It decides itself
what every layer gets (masks, rotary tables, sliding windows) and what becomes of
the last layer's output; asking it is safer than doing the same here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmquant import activations
from llmquant.activations import Inputs
from llmquant.models.spec import ModelSpec, Site

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments and keyword arguments that a decoder layer gets after x."""

Steps = Generator[tuple[Any, ...], None, None]
"""A layer's computation in steps: (site, what it is about to read), and at last (None, the output)."""


def start(
    model: nn.Module, spec: ModelSpec, tokens: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, "batch time hidden"], list[Call]]:
    """Return the first layer's input and the call of every layer.

    Computes no layer and no head; their weights may be on the meta device. The
    calls do not depend on the tokens: they serve every batch of the same shape.
    """
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        inputs.append(x)
        calls.append((args, kwargs))
        return (x,) if spec.layer_returns_tuple else x

    with _layers_replaced(model, spec, record):
        model.get_submodule(spec.layers.partition(".")[0])(input_ids=tokens, use_cache=False)
    return inputs[0], calls


def run_layer(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """Return the output [batch, time, hidden] of a decoder layer for x of that shape."""
    # no shapes in the signature: they are checked by a stack of calls, and ``stepwise`` pauses these in any order
    args, kwargs = call
    out = layer(x, *args, **kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def finish(
    model: nn.Module, spec: ModelSpec, tokens: Int[Tensor, "batch time"], x: Float[Tensor, "batch time hidden"]
) -> Float[Tensor, "batch time vocab"]:
    """Return the logits of the whole model if its last layer's output is x. Computes no layer."""

    def answer(*_args: Any, **_kwargs: Any) -> Tensor | tuple[Tensor]:
        return (x,) if spec.layer_returns_tuple else x

    with _layers_replaced(model, spec, answer):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@contextmanager
def _layers_replaced(model: nn.Module, spec: ModelSpec, forward: Callable[..., Any]) -> Iterator[None]:
    """Let every decoder layer compute ``forward`` instead."""
    path, _, name = spec.layers.rpartition(".")
    parent, layers = model.get_submodule(path), model.get_submodule(spec.layers)
    # shallow copies, because some models read attributes of a layer before they call it
    standins = nn.ModuleList(copy.copy(layer) for layer in layers.children())
    for standin in standins:
        vars(standin)["forward"] = forward
    setattr(parent, name, standins)
    try:
        yield
    finally:
        setattr(parent, name, layers)


@contextmanager
def watch(layer: nn.Module, sites: Sequence[Site], see: Callable[..., None]) -> Iterator[None]:
    """While active, call ``see(site, x)`` once per site and forward; x [tokens, cols] is what its linears read.

    Where experts begin (``experts_of``), ``see(site, x, chosen, weights)``: what ``moe.Experts`` is given.
    """

    def hook(site: Site, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(site, inputs[0].reshape(-1, inputs[0].shape[-1]), *inputs[1:])

    with ExitStack() as hooks:
        for site in sites:
            first = layer.get_submodule(site.readers[0])
            hooks.enter_context(first.register_forward_pre_hook(partial(hook, site)))
        yield


@contextmanager
def stepwise(layer: nn.Module, sites: Sequence[Site]) -> Iterator[Callable[[Tensor, Call], Steps]]:
    """While active, let a layer be computed in steps that stop before each site's linears.

    Gives ``begin(x, call)``, whose steps may be taken in turns with those of other
    inputs: what is done to a site's weights while all have stopped there holds for
    all. Closing the steps early saves the rest of the computation.
    """

    def begin(x: Tensor, call: Call) -> Steps:
        forward = greenlet(lambda: (None, run_layer(layer, x, call)))  # its own stack, so that a hook can pause it
        try:
            while not forward.dead:
                yield forward.switch()
        finally:
            if not forward.dead:
                forward.throw()

    with watch(layer, sites, lambda *seen: getcurrent().parent.switch(seen)):
        yield begin


def experts_of(spec: ModelSpec, index: int) -> Site | None:
    """Return a site without linears where a layer's experts begin; None where it has none."""
    if spec.experts is None or not any(site.expert for site in spec.sites_of(index)):
        return None
    return Site(spec.experts.module, (), others=(spec.experts.module,))


@contextmanager
def rounded(layer: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Inputs]) -> Iterator[None]:
    """While active, the linears named in ``inputs`` read activations that were rounded.

    Entries may come later: whoever watches a linear already sees what it reads before the rounding.
    """

    def hook(name: str, _linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (activations.rounded(inputs[name], args[0]), *args[1:]) if name in inputs else None

    with ExitStack() as hooks:
        for name in (name for site in sites for name in site.linears):
            hooks.enter_context(layer.get_submodule(name).register_forward_pre_hook(partial(hook, name)))
        yield


def weight_of(module: nn.Module) -> Float[Tensor, "rows ..."]:
    """Return the weight of a linear or norm with its outputs first: of a Conv1D a transposed view, else itself."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def foldable(layer: nn.Module, site: Site) -> bool:
    """Whether another module of the layer can absorb a scale of the site's columns."""
    fold = site.fold
    if fold is None or (fold.relu and not isinstance(layer.get_submodule(fold.relu), nn.ReLU)):
        return False
    return getattr(layer.get_submodule(fold.module), "weight", None) is not None


def producer_rows(layer: nn.Module, site: Site) -> Int[Tensor, " cols"]:
    """Return which output of the fold's module feeds each column of the site.

    Columns that are fed by the same output (heads that share a key-value head)
    must get the same scale.
    """
    fold = site.fold
    if fold is None or not foldable(layer, site):
        raise ValueError(f"site {site.name}: no module of this layer can absorb a scale")
    cols = weight_of(layer.get_submodule(site.readers[0])).shape[1]
    weight = weight_of(layer.get_submodule(fold.module))
    rows = torch.arange(weight.shape[0], device=None if weight.is_meta else weight.device)
    if fold.kind in ("norm", "norm_plus_one", "rows"):
        return rows[-cols:]
    head_dim = attrgetter(fold.head_dim)(layer)
    heads = rows.view(-1, head_dim)
    query_heads = cols // head_dim
    kv_heads = len(heads) if fold.kind == "v" else (len(heads) - query_heads) // 2
    values = heads.view(kv_heads, -1, head_dim)[:, -1] if fold.kind == "qkv_per_head" else heads[-kv_heads:]
    return values.repeat_interleave(query_heads // kv_heads, dim=0).flatten()


@torch.no_grad()
def storable_scales(
    layer: nn.Module, site: Site, scales: Float[Tensor, " cols"], dtype: torch.dtype
) -> Float[Tensor, " cols"]:
    """Return the scales near ``scales`` whose fold leaves the weights of a norm numbers of ``dtype``.

    So storing the norm rounds nothing: the columns of the site make up for it. Nothing could make up for a weight
    stored as 0 or infinity, so that column's scale is 1.
    """
    rows = producer_rows(layer, site)
    assert site.fold is not None
    if not site.fold.kind.startswith("norm"):
        return scales
    one = 1.0 if site.fold.kind == "norm_plus_one" else 0.0
    weight = weight_of(layer.get_submodule(site.fold.module))[rows].double() + one
    stored = (weight / scales - one).to(dtype).double() + one
    exact = (weight / stored).to(scales.dtype)
    return torch.where(weight == 0, scales, torch.where(torch.isfinite(exact) & (exact > 0), exact, 1))


def score_linears(spec: ModelSpec) -> frozenset[str]:
    """Return the linears whose outputs are multiplied with each other in attention: queries and keys.

    They share a site and a module with the linear of the values. A linear that
    computes the values too counts as one of them.
    """
    found: set[str] = set()
    for fold in (site.fold for site in spec.every_site):
        if fold is None or fold.kind not in ("v", "qkv", "qkv_per_head"):
            continue
        attention = fold.module.rpartition(".")[0]
        for site in spec.every_site:
            if fold.module in site.linears:
                found |= {name for name in site.linears if name.rpartition(".")[0] == attention}
        found -= {fold.module} if fold.kind == "v" else set()
    return frozenset(found)


@torch.no_grad()
def fold_scales(layer: nn.Module, site: Site, scales: Float[Tensor, " cols"]) -> Float[Tensor, " rows"]:
    """Multiply the columns of all that reads a site by ``scales`` > 0, and what feeds them by 1/scales.

    Returns what each output of the module that feeds them was divided by. The layer computes the same function
    afterwards. Columns that share a producer row must share their scale.
    """
    rows = producer_rows(layer, site)
    assert site.fold is not None
    producer = layer.get_submodule(site.fold.module)
    weight = weight_of(producer)
    divisor = scales.new_ones(weight.shape[0]).index_copy_(0, rows, scales)
    if not torch.equal(divisor[rows], scales):
        raise ValueError(f"site {site.name}: columns that share a row of {site.fold.module} differ in their scale")
    if site.fold.kind == "norm_plus_one":
        # 1 + w in the weight's own dtype would lose the low bits of a small w
        weight.copy_((1 + weight.double()) / divisor - 1)
    else:
        weight.div_(divisor.view(-1, *[1] * (weight.ndim - 1)))
    if getattr(producer, "bias", None) is not None:
        producer.get_parameter("bias").div_(divisor)
    for name in site.readers:
        weight_of(layer.get_submodule(name)).mul_(scales)
    return divisor
