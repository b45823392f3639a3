"""What the GGUF tensor types have in common: stateless grids, one byte layout each, cut along the columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from llmquant.errors import ShapeError
from llmquant.grid import Params

LEAST_WEIGHT = 1e-8  # of a column, as a share of the largest in its span: keeps groups without activations solvable
CHUNK = 2**20  # weights searched at once


@dataclass(frozen=True, repr=False)
class Block:
    """Base of a block grid (see ``llmquant.grid.BlockGrid``), whose sizes are the same for every weight.

    It is its own ``Config`` too: there is nothing to set, and all instances of a class are equal, so that weights of
    one type may be quantized together.

    fallback: what llama.cpp takes for columns that are not whole blocks; None for float16.
    """

    name: ClassVar[str]
    span: ClassVar[int]
    group: ClassVar[int]
    block_bytes: ClassVar[int]
    fallback: ClassVar[type[Block] | None] = None
    per_tensor: ClassVar[bool] = False

    @property
    def shared(self) -> Mapping[str, int]:
        return {}

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.span

    def __repr__(self) -> str:
        return self.name

    def bind(self, rows: int, cols: int, dtype: torch.dtype) -> Block:
        """Return the grid; ShapeError unless whole blocks fit into a row."""
        if cols % self.span:
            raise ShapeError(
                f"{cols} columns are not a multiple of {self.span}, which {self.name} needs. Give it another grid by "
                "a rule, or set `fallback: substitute` (the type that llama.cpp would take) or `keep`"
            )
        return self

    def substitute(self) -> tuple[str, Block] | None:
        """Return the fallback and its name."""
        return None if self.fallback is None else (self.fallback.name, self.fallback())


def favour_large(w: torch.Tensor, importance: torch.Tensor, base: float) -> torch.Tensor:
    """Return importances [n, span], times the root of (weight² + base * the span's mean square).

    The least squares of few levels draws all weights towards zero, which errs in one direction. That large weights
    count for more (as in ggml-quants.c) keeps them in place: less divergence, with and without error feedback.
    """
    square = w.square()
    return square.add_(base * square.mean(1, keepdim=True)).clamp_(max=1e18).sqrt_().mul_(importance)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """Round to float16, the largest finite value where that would overflow."""
    top = torch.finfo(torch.float16).max
    return x.clamp(-top, top).to(torch.float16)


def half_above(x: torch.Tensor) -> torch.Tensor:
    """Round away from zero to float16: a tiny factor does not become 0, and the largest integer is enough."""
    nearest = to_half(x)
    short = nearest.to(x.dtype).abs() < x.abs().clamp(max=torch.finfo(torch.float16).max)
    return torch.where(short, (nearest.view(torch.int16) + 1).view(torch.float16), nearest)


def half_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return float16 values [n, k] as bytes [n, 2k]."""
    return x.contiguous().view(torch.uint8)


def halves(raw: torch.Tensor) -> torch.Tensor:
    """Return bytes [n, 2k] as float16 values [n, k]."""
    return raw.contiguous().view(torch.float16)


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return bytes [..., k / 2] of the low 4 bits of codes [..., k]: the first half of them low, the second high."""
    low, high = _words(codes & 15).chunk(2, dim=-1)
    return (low | (high << 4)).view(torch.uint8)


def split_nibbles(raw: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit codes of bytes: the inverse of ``join_nibbles``."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def join_bits(parts: torch.Tensor, width: int) -> torch.Tensor:
    """Return bytes [..., k] of codes [..., 8 / width, k] of ``width`` bits, the first lowest; k is even."""
    words = _words(parts)
    joined = words[..., 0, :].clone()
    for i in range(1, 8 // width):
        joined |= words[..., i, :] << (width * i)
    return joined.view(torch.uint8)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """View small codes as an even number of words, shifted together as long as each code stays in its byte."""
    word = next(
        t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if codes.shape[-1] % (2 * t.itemsize) == 0
    )
    return codes.contiguous().view(word)


def split_bits(raw: torch.Tensor, width: int) -> torch.Tensor:
    """Return the codes [..., 8 / width, k] of bytes [..., k]: the inverse of ``join_bits``."""
    return torch.stack([(raw >> place) & (2**width - 1) for place in range(0, 8, width)], dim=-2)


def in_units(value: torch.Tensor, tops: Iterable[int], low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (unit, integers) with value [n, k] nearest to unit * integer.

    unit: float16 [n, 1]. Integers are in low ... high. tops: integers that the value of largest magnitude may become.
    """
    divisors = torch.tensor(list(tops), device=value.device)
    rows = max(CHUNK // (len(divisors) * value.shape[1]), 1)
    parts = [_in_units(part, divisors, low, high) for part in torch.split(value, rows)]
    unit, whole = (torch.cat(found) for found in zip(*parts, strict=True))
    return unit, whole


def _in_units(value: torch.Tensor, tops: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    units = to_half(_largest(value) / tops)
    unit, value = units.to(value.dtype)[..., None], value[:, None]
    whole = torch.where(unit == 0, 0.0, value / unit).round().clamp(low, high)
    best = (unit * whole - value).square().sum(2).argmin(1, keepdim=True)
    return units.gather(1, best), whole.gather(1, best[..., None].expand(-1, 1, value.shape[-1])).squeeze(1)


def in_near_units(value: torch.Tensor, whole: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (unit, integers) like ``in_units``, in the unit at which given integers [n, k] are nearest to the values.

    It changes no more than the values, so that they change few integers; ``in_units`` may find another unit, and
    with it all others.
    """
    whole = whole.to(value.dtype)
    size = whole.square().sum(1, keepdim=True)
    fitted = (value * whole).sum(1, keepdim=True) / size
    unit = to_half(torch.where(size > 0, fitted, _largest(value) / high))
    step = unit.to(value.dtype)
    return unit, torch.where(step == 0, 0.0, value / step).round().clamp(low, high)


def _largest(value: torch.Tensor) -> torch.Tensor:
    """Return the value of largest magnitude in every row, [n, 1]."""
    return value.gather(1, value.abs().argmax(1, keepdim=True))


def in_chunks(
    fit: Callable[[torch.Tensor, torch.Tensor], Params],
    w: Float[torch.Tensor, "n size"],
    importance: Float[torch.Tensor, "n size"],
    reach: float,
) -> Params:
    """Fit a bounded number of rows at once, with importances as shares of the largest in the row.

    reach: larger weights are cut to this.
    """
    rows = max(CHUNK // w.shape[1], 1)
    parts = []
    for x, weight in zip(torch.split(w, rows), torch.split(importance, rows), strict=True):
        largest = weight.amax(1, keepdim=True)
        share = (weight / torch.where(largest > 0, largest, 1.0)).clamp_(min=LEAST_WEIGHT)
        far = max(x.aminmax(), key=abs).abs() > reach
        parts.append(fit(x.clamp(-reach, reach) if far else x, share.to(x.dtype)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
