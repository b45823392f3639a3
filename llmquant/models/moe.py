"""Experts as linears of their own, under the names that checkpoints give them.

transformers keeps the weights of all experts of a layer in two parameters, gate and
up together [experts, 2 inner, hidden] and down [experts, hidden, inner], as files
did not and do not. ``unfused`` puts ``Experts`` in their place, which computes the
same from one linear each, so that for all the rest an expert's matrices are linears
like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmquant.errors import UnsupportedModel
from llmquant.models.spec import Fold, ModelSpec, Site

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), each a linear without bias."""

    def __init__(
        self,
        gate: Float[Tensor, "inner hidden"],
        up: Float[Tensor, "inner hidden"],
        down: Float[Tensor, "hidden inner"],
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act = act

    # no shapes in the signatures of what ``calibrate.stepwise`` pauses

    def inner(self, x: Tensor) -> Tensor:
        """Return what the last linear reads, [tokens, inner], for x [tokens, hidden]."""
        product: Tensor = self.act(self.gate_proj(x)) * self.up_proj(x)
        return product

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.inner(x))
        return out


class Experts(nn.ModuleList):
    """Computes the experts of a layer one after the other, those without a token too: whoever watches sees them all."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return [tokens, hidden] for x of that shape.

        chosen: the numbers of the experts that a token is routed to, [tokens, some]. weights: of what these give.
        """
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, (expert(x[token]) * weights[token, place, None]).to(out.dtype))
        return out


def stored_experts(names: Iterable[str]) -> int:
    """Return how many experts a checkpoint's tensors tell of by their names; 0 where these tell of none."""
    return len({found[1] for name in names if (found := re.search(r"\.experts\.(\d+)\.", name))})


def reads_inner(site: Site) -> bool:
    """Whether a site is that of an expert's last linear."""
    return bool(site.expert) and site.linears == (f"{site.expert}.{DOWN}",)


def any_expert(site: Site) -> str:
    """Return the name of an expert's module with a star for its number."""
    return f"{site.expert.rpartition('.')[0]}.*"


def before(layer: nn.Module, site: Site) -> Callable[[Tensor], Tensor]:
    """Return what makes what a site of an expert reads of what the expert reads."""
    if not reads_inner(site):
        return lambda x: x
    expert = layer.get_submodule(site.expert)
    assert isinstance(expert, Expert)
    return expert.inner


def unfused(model: nn.Module, spec: ModelSpec) -> ModelSpec:
    """Give a model's experts linears of their own; return the spec with the sites of every layer.

    The new weights are views of the old ones, which may be on the meta device. Raises UnsupportedModel for experts
    that compute something else.
    """
    if spec.experts is None:
        return spec
    layers = model.get_submodule(spec.layers)
    parent, _, name = spec.experts.module.rpartition(".")
    counts = []
    for index, layer in enumerate(layers.children()):
        fused: nn.Module | None = getattr(layer.get_submodule(parent), name, None)
        experts = Experts() if fused is None else _unfused(fused, f"{spec.layers}.{index}.{spec.experts.module}")
        if fused is not None:
            setattr(layer.get_submodule(parent), name, experts)
        counts.append(len(experts))
    sites = {count: _sites(spec, count) for count in set(counts)}
    return replace(spec, of_layers=tuple(sites[count] for count in counts))


def _unfused(fused: nn.Module, where: str) -> Experts:
    parameters = {name: tuple(value.shape) for name, value in fused.named_parameters()}
    both, down = parameters.get("gate_up_proj", ()), parameters.get("down_proj", ())
    if parameters.keys() != {"gate_up_proj", "down_proj"} or both != (down[0], 2 * down[2], down[1]):
        raise UnsupportedModel(
            f"{where}: its parameters are {parameters}, and only gate_up_proj [experts, 2 inner, hidden] and down_proj "
            "[experts, hidden, inner] can be taken apart. Use the version of transformers that llmquant was tested with"
        )
    gates, ups = fused.get_parameter("gate_up_proj").chunk(2, dim=1)
    downs = fused.get_parameter("down_proj")
    act = fused.get_submodule("act_fn")
    return Experts(Expert(*of_expert, act) for of_expert in zip(gates, ups, downs, strict=True))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def _sites(spec: ModelSpec, experts: int) -> tuple[Site, ...]:
    """Return the sites of a layer with so many experts."""
    assert spec.experts is not None
    if not experts:
        return spec.experts.dense
    modules = [f"{spec.experts.module}.{number}" for number in range(experts)]
    reading = (*spec.experts.routers, *(f"{module}.{name}" for module in modules for name in (GATE, UP)))
    common = [replace(site, others=reading) if site.name == spec.experts.site else site for site in spec.sites]
    of_experts = (
        site
        for module in modules
        for site in (
            Site(f"{module}.in", (f"{module}.{GATE}", f"{module}.{UP}"), expert=module),
            Site(f"{module}.out", (f"{module}.{DOWN}",), Fold(f"{module}.{UP}", "rows"), expert=module),
        )
    )
    return (*common, *of_experts)
