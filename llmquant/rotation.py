"""A float checkpoint whose residual stream, or values of attention, are rotated: the same function on other numbers.

Multiplied by a randomised Hadamard matrix, outliers are spread over all channels,
so that few scales suffice for weights and activations alike. Everything is folded
into weights: nothing is left to compute when the model runs.

"residual" (R1): the norms' weights go into the linears behind them, and these
read, and the embedding and the linears before them write, a rotated residual
stream; an RMSNorm without weights does not see the difference.
"heads" (R2): within each head, the values are rotated, and the linear behind
attention reads them so.

Sources: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 4;
SpinQuant, Liu et al. 2024, https://arxiv.org/abs/2405.16406, section 3 (without the
rotations that a runtime would have to compute, and without training); the
Hadamard matrices are those of Sylvester and Paley.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from llmquant import calibrate
from llmquant.checkpoint import Checkpoint
from llmquant.errors import RecipeError
from llmquant.stream import Stream

Rotation = Literal["residual", "heads"]


@dataclass(frozen=True)
class Turn:
    """Channels, some at a time, and the orthogonal matrix that they are multiplied by."""

    channels: Int64[Tensor, "times size"]
    matrix: Float64[Tensor, "size size"]

    def of(self, x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Return x with the channels of its last dimension turned."""
        turned = x.clone()
        turned[..., self.channels] = x[..., self.channels] @ self.matrix
        return turned


class Rotated(Checkpoint):
    """A float checkpoint with its rotations folded in; what they change is read in float32.

    A tied output matrix becomes a tensor of its own where the residual stream is rotated.
    """

    def __init__(self, stream: Stream, rotations: Collection[Rotation], untie: bool) -> None:
        """Raise RecipeError where the function of this model would not stay the same.

        stream: of the checkpoint, whose weights need not be loaded. untie: whether the recipe allows to untie.
        """
        vars(self).update(vars(stream.checkpoint))
        self._checkpoint = stream.checkpoint
        self._spec = stream.spec
        self._gains: dict[str, str] = {}  # weight of a linear -> that of the norm whose weight it takes over
        self._inputs: dict[str, Turn] = {}
        self._outputs: dict[str, Turn] = {}
        self._ones: frozenset[str] = frozenset()  # the norms that lost their weights
        self._sources: dict[str, str] = {}  # where a tensor is read that has another name in the checkpoint
        self._last: tuple[str, Tensor] | None = None  # a tensor that is read by rows
        if "heads" in rotations:
            self._turn_heads(stream)
        if "residual" in rotations:
            self._turn_residual(stream, untie)

    def _turn_heads(self, stream: Stream) -> None:
        if not any(s.fold and s.fold.head_dim for s in stream.spec.every_site):
            raise RecipeError("rotations: this model has no values of attention that could be rotated")
        for index, layer in enumerate(stream.decoder_layers):
            for site in (s for s in stream.spec.sites_of(index) if s.fold and s.fold.head_dim):
                assert site.fold is not None
                size = attrgetter(site.fold.head_dim)(layer)
                rows = calibrate.producer_rows(layer, site)
                matrix = orthogonal(size, seed=1 + index)
                values = Turn(torch.unique(rows.view(-1, size), dim=0), matrix)
                self._outputs[f"{stream.spec.layers}.{index}.{site.fold.module}"] = values
                read = Turn(torch.arange(len(rows)).view(-1, size), matrix)
                self._inputs |= {f"{stream.spec.layers}.{index}.{name}": read for name in site.linears}

    def _turn_residual(self, stream: Stream, untie: bool) -> None:
        spec, hidden = stream.spec, stream.hidden_size
        if stream.tied and not untie:
            raise RecipeError(
                f"rotations: {spec.head} takes over the weight of the last norm, so it can no longer be tied to "
                f"{spec.embed}. Set `tied_embeddings: untie`, or leave out `residual`."
            )
        final = [n for n in self.infos if not n.startswith((f"{spec.layers}.", f"{spec.embed}.", f"{spec.head}."))]
        norms = {f"{spec.head}": final[0].removesuffix(".weight")} if len(final) == 1 else {}
        writers = [spec.embed]
        for index in range(stream.layers):
            behind: set[str] = set()
            for site in spec.sites_of(index):
                if site.fold is not None and site.fold.kind == "norm":
                    readers = [f"{spec.layers}.{index}.{name}" for name in site.readers]
                    norms |= dict.fromkeys(readers, f"{spec.layers}.{index}.{site.fold.module}")
                    behind |= {*readers}
            names = [f"{spec.layers}.{index}.{name}" for site in spec.sites_of(index) for name in site.linears]
            writers += [name for name in names if name not in behind]
        known = {*norms, *norms.values(), *writers}
        for name, info in self.infos.items():
            module = name.rpartition(".")[0]
            if (module not in known and hidden in info.shape) or (
                name == f"{module}.bias" and module in norms.values()
            ):
                raise _not_rms(name)
        for norm in norms.values():
            if isinstance(stream.model.get_submodule(norm), nn.LayerNorm):
                raise _not_rms(f"{norm}.weight")
        if spec.head not in norms:
            raise _not_rms(spec.head)
        turn = Turn(torch.arange(hidden)[None], orthogonal(hidden, seed=0))
        self._gains = {f"{name}.weight": f"{norm}.weight" for name, norm in norms.items()}
        self._inputs |= dict.fromkeys([*norms, spec.embed], turn)
        self._outputs |= dict.fromkeys(writers[1:], turn)
        self._ones = frozenset(self._gains.values())
        if stream.tied:
            self._sources = {f"{spec.head}.weight": f"{spec.embed}.weight"}
            embedding = self.infos[f"{spec.embed}.weight"]
            self.infos = self.infos | {f"{spec.head}.weight": replace(embedding, key=f"{spec.head}.weight")}
            self.config = self.config | {"tie_word_embeddings": False}
        self.model_config = copy.deepcopy(stream.config)
        self.model_config.get_text_config().tie_word_embeddings = False

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, or some rows of it."""
        module = name.rpartition(".")[0]
        if name in self._ones:
            return torch.ones_like(self._checkpoint.read(name, rows))
        if module not in self._outputs and (module not in self._inputs or name.endswith(".bias")):
            return self._checkpoint.read(name, rows)
        conv1d = self._spec.conv1d and name.startswith(f"{self._spec.layers}.")
        if rows is None or not (module in self._outputs or conv1d):
            return self._changed(name, rows, conv1d)
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self._changed(name, None, conv1d))
        return last[1][slice(*rows)]

    def _changed(self, name: str, rows: tuple[int, int] | None, conv1d: bool) -> Tensor:
        module = name.rpartition(".")[0]
        w = self._checkpoint.read(self._sources.get(name, name), rows).double()
        w = w.T if conv1d and w.ndim == 2 else w
        if name in self._gains:
            w = w * self._checkpoint.read(self._gains[name]).double()
        if module in self._inputs and w.ndim == 2:
            w = self._inputs[module].of(w)
        if module in self._outputs:
            w = self._outputs[module].of(w.mT).mT if w.ndim == 2 else self._outputs[module].of(w)
        return (w.T if conv1d and w.ndim == 2 else w).float().contiguous()


def _not_rms(name: str) -> RecipeError:
    return RecipeError(
        f"rotations: the residual stream of this model cannot be rotated, because of {name}: only models whose every "
        "norm is an RMSNorm in front of linears, and that add nothing else to the residual stream, compute the same "
        "afterwards. Leave out `residual`."
    )


def orthogonal(size: int, seed: int) -> Float64[Tensor, "size size"]:
    """Return a Hadamard matrix whose rows have random signs, of length 1; where none is known, a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    known = hadamard(size)
    if known is None:
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        turned: Tensor = q * r.diagonal().sign()  # without the signs, it would not be uniform
        return turned
    signs: Tensor = torch.randint(2, (size, 1), generator=generator).double() * 2 - 1
    return known * signs / math.sqrt(size)


def hadamard(size: int) -> Float64[Tensor, "size size"] | None:
    """Return a matrix of ones and minus ones with orthogonal rows: Paley's first or second, doubled by Sylvester's.

    None where no prime gives one: of multiples of 4, 52 is the first.
    """
    core = size
    while True:
        found = _paley(core)
        if found is not None:
            break
        if core % 2:
            return None
        core //= 2
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    return found


def _paley(size: int) -> Float64[Tensor, "size size"] | None:
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    first = size % 4 == 0 and _prime(size - 1)
    if not first and not (size % 4 == 0 and size % 8 == 4 and _prime(size // 2 - 1)):
        return None
    q = size - 1 if first else size // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
    around = torch.arange(q)
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = character[(around[:, None] - around) % q]
    if first:  # q = 3 mod 4: the core is skew but for its border
        core[1:, 0] = -1
        return core + torch.eye(size, dtype=torch.float64)
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def _prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))
