"""Format pack-quantized: 2, 3, 4 or 8 bits; groups, rows or whole tensors; activations stay float.

A linear of ``rows`` outputs and ``cols`` inputs becomes

    weight_packed      int32 [rows, cols * bits / 32]    codes, packed along the inputs
    weight_scale       float [rows, groups]              [rows, 1] for strategy channel, [1] for tensor
    weight_zero_point  int32 [rows * bits / 32, groups]  packed along the outputs; only if asymmetric
                       int8  [1]                         strategy tensor: minus 2^(bits-1), not packed
    weight_shape       int64 [2]                         rows, cols

with the bit order of ``llmquant.words`` (the last word of a line is padded), and
``weight = scale * (code - zero)``, zero being 2^(bits-1) in a symmetric linear. The
library counts codes and zero points from -2^(bits-1) and adds that when it packs,
so the stored bits are ours as they are. `actorder: group` of older writers adds

    weight_g_idx       int32 [cols]                      the group of every input; -1: in order
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from llmquant import words
from llmquant.exporters.compressed_tensors.settings import Setting, expect, expect_all
from llmquant.grid import QuantizedTensor
from llmquant.grids.affine import Affine
from llmquant.runtime.coded import Coded, affine, by_group


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear of integer groups, keyed by the end of their name."""
    assert isinstance(q.grid, Affine)
    bits = q.grid.bits
    scale, zero = q.params["scale"].flatten(1), q.params["zero"].flatten(1)
    tensors = {
        "weight_packed": words.pack(q.codes, bits),
        "weight_scale": scale[0] if q.grid.per_tensor else scale,
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if not q.grid.symmetric and q.grid.per_tensor:
        tensors["weight_zero_point"] = (zero[0].int() - 2 ** (bits - 1)).to(torch.int8)
    elif not q.grid.symmetric:
        tensors["weight_zero_point"] = words.pack(zero.T, bits).T
    return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], setting: Setting, actorder: object) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of a linear; 2 to 8 bits, any order of groups.

    Raises CheckpointError for a missing or ill-shaped tensor.
    """
    codes, scale, zero, group = _read(tensors, setting, actorder)
    weight = codes.float()
    if setting.symmetric:
        weight -= 2 ** (setting.bits - 1)
    else:
        weight -= zero.float().index_select(1, group)
    weight *= scale.float().index_select(1, group)
    return weight


def coded(tensors: Mapping[str, Tensor], setting: Setting, actorder: object) -> Coded:
    """Return the weight as it is stored; raise CheckpointError as ``unpack`` does, and for groups of several sizes."""
    codes, scale, zero, group = _read(tensors, setting, actorder)
    order = by_group(group, scale.shape[1])
    params = {"scale": scale.expand(len(codes), -1), "zero": zero.expand(len(codes), -1)}
    return Coded(codes if order is None else codes[:, order], torch.arange(2.0**setting.bits), params, affine, order)


def _read(
    tensors: Mapping[str, Tensor], setting: Setting, actorder: object
) -> tuple[
    UInt8[Tensor, "rows cols"], Float[Tensor, "_rows groups"], Shaped[Tensor, "_rows2 groups"], Int64[Tensor, " cols"]
]:
    """Return codes, scales and zero points (of one row where all have the same), and the group of every column."""
    bits, symmetric, strategy, group_size = setting.bits, setting.symmetric, setting.strategy, setting.group_size
    needed = ["weight_packed", "weight_scale", "weight_shape"]
    needed += [] if symmetric else ["weight_zero_point"]
    needed += ["weight_g_idx"] if actorder == "group" else []
    expect_all(tensors, needed)
    scale, packed, size = tensors["weight_scale"], tensors["weight_packed"], tensors["weight_shape"].tolist()
    expect(len(size) == 2, "weight_shape", size, "[rows, cols]")
    rows, cols = size
    groups = math.ceil(cols / group_size) if group_size else 1
    shape = [1] if strategy == "tensor" else [rows, groups]
    fine = scale.is_floating_point() and (list(scale.shape) or [1]) == shape
    expect(fine, "weight_scale", f"{scale.dtype} {list(scale.shape)}", f"a float {shape}")
    packed_shape = [rows, math.ceil(cols * bits / 32)]
    fine = packed.dtype == torch.int32 and list(packed.shape) == packed_shape
    why = f"for {bits} bits (older versions padded every word of 3, 5, 6 or 7 bits; llmquant does not read those)"
    expect(fine, "weight_packed", f"{packed.dtype} {list(packed.shape)}", f"int32 {packed_shape} {why}")
    group = _groups_of_columns(tensors.get("weight_g_idx"), cols, group_size, groups)
    if symmetric:
        zero = torch.full((1, groups), 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero = _zeros(tensors["weight_zero_point"], bits, shape).view(-1, groups)
    return words.unpack(packed, bits, cols), scale.view(-1, groups), zero, group


def _groups_of_columns(g_idx: Tensor | None, cols: int, group_size: int | None, groups: int) -> Tensor:
    if g_idx is None or group_size is None or bool((g_idx == -1).all()):
        return torch.arange(cols) // (group_size or cols)
    fine = len(g_idx) == cols and bool(((g_idx >= 0) & (g_idx < groups)).all())
    found = f"{len(g_idx)} numbers from {int(g_idx.min())} to {int(g_idx.max())}"
    expect(fine, "weight_g_idx", found, f"{cols} from 0 to {groups - 1}")
    return g_idx.long()


def _zeros(zero: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Return zero points of ``shape``, counted from 0."""
    if zero.dtype == torch.int8 and (list(zero.shape) or [1]) == shape:
        return zero.int().add(2 ** (bits - 1))
    expected = [math.ceil(shape[0] * bits / 32), *shape[1:]]
    fine = len(shape) == 2 and zero.dtype == torch.int32 and list(zero.shape) == expected
    wanted = f"int32 {expected} or int8 {list(shape)}" if len(shape) == 2 else f"int8 {list(shape)}"
    expect(fine, "weight_zero_point", f"{zero.dtype} {list(zero.shape)}", wanted)
    return words.unpack(zero.T, bits, shape[0]).T.contiguous()
