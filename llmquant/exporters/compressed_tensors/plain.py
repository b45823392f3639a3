"""Formats int-quantized and float-quantized: a byte a weight, and what the inputs are rounded to.

A linear of ``rows`` outputs and ``cols`` inputs becomes

    weight             int8 or float8_e4m3fn [rows, cols]  codes; int8 codes count from the middle one
    weight_scale       float [rows, 1]                     [1] for strategy tensor; read: [rows, groups], too
    weight_zero_point  int8, as weight_scale               read only, of asymmetric linears
    input_scale        float32 [1]                         only where the inputs' range is static
    input_zero_point   int8 [1]                            only where it is asymmetric, too

with ``weight = scale * (code - zero)`` and inputs read as ``llmquant.activations`` says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llmquant.activations import Inputs
from llmquant.errors import CheckpointError
from llmquant.exporters.compressed_tensors.settings import Setting, expect, expect_all
from llmquant.grid import QuantizedTensor
from llmquant.runtime.coded import Coded, affine
from llmquant.runtime.linear import QuantizedLinear

DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}
INPUTS = {"scale": "input_scale", "zero": "input_zero_point"}


def pack(q: QuantizedTensor, setting: Setting) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name."""
    scale = q.params["scale"].flatten(1)
    levels = q.grid.table.to(q.codes.device)
    if setting.kind == "int":
        levels = levels - 2 ** (setting.bits - 1)
    tensors = {
        "weight": levels.to(DTYPES[setting.kind])[q.codes.long()],
        "weight_scale": (scale[0] if q.grid.per_tensor else scale).contiguous(),
    }
    given = {} if q.inputs is None else q.inputs.params
    return tensors | {name: given[key] for key, name in INPUTS.items() if key in given}


def unpack(tensors: Mapping[str, Tensor], setting: Setting) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of a linear; raise CheckpointError for a missing or ill-shaped tensor."""
    codes, scale, zero = _read(tensors, setting)
    value = codes.float().view(len(codes), scale.shape[1], -1)
    if zero is not None:
        value -= zero.float()[..., None]
    value *= scale.float()[..., None]
    return value.flatten(1)


def coded(tensors: Mapping[str, Tensor], setting: Setting) -> Coded:
    """Return the weight as it is stored; raise CheckpointError as ``unpack`` does."""
    codes, scale, zero = _read(tensors, setting)
    every = torch.arange(256, dtype=torch.uint8)
    table, bytes_ = every.view(codes.dtype).float(), codes.view(torch.uint8)
    if codes.dtype == torch.int8:  # in ascending order the levels are one apart
        table, bytes_ = every.float() - 128, bytes_ ^ 128
    zero = torch.zeros(1, scale.shape[1], dtype=torch.int8) if zero is None else zero
    rows = len(codes)
    return Coded(bytes_, table, {"scale": scale.expand(rows, -1), "zero": zero.expand(rows, -1)}, affine)


def _read(
    tensors: Mapping[str, Tensor], setting: Setting
) -> tuple[Shaped[Tensor, "rows cols"], Float[Tensor, "_rows groups"], Shaped[Tensor, "_rows groups"] | None]:
    """Return codes, scales and zero points, each of one row where all have the same."""
    codes, scale = _codes_and_scale(tensors, setting)
    groups = scale.shape[1] if scale.ndim == 2 else 1
    zero = None
    if not setting.symmetric:
        expect_all(tensors, ["weight_zero_point"])
        zero = tensors["weight_zero_point"]
        shape = list(scale.shape)
        expect(list(zero.shape) == shape, "weight_zero_point", f"{zero.dtype} {list(zero.shape)}", f"int8 {shape}")
        zero = zero.view(-1, groups)
    return codes, scale.view(-1, groups), zero


def operator(tensors: Mapping[str, Tensor], setting: Setting) -> QuantizedLinear:
    """Return the linear as a runtime computes it, inputs rounded; raise CheckpointError for what none computes."""
    scheme = setting.inputs
    assert scheme is not None
    fine = (
        setting.symmetric
        and setting.strategy in ("channel", "tensor")
        and (scheme.type == "fp8") == (setting.kind == "float")
    )
    found = f"{setting.kind}, strategy {setting.strategy}, symmetric {setting.symmetric}"
    expect(fine, "weights", found, f"{scheme.type}, as the inputs, symmetric, with one scale a row or for all")
    codes, scale = _codes_and_scale(tensors, setting)
    names = {} if scheme.dynamic else INPUTS if not scheme.symmetric else {"scale": INPUTS["scale"]}
    expect_all(tensors, names.values())
    params = {key: tensors[name].flatten() for key, name in names.items()}
    for key, value in params.items():
        expect(len(value) == 1, names[key], list(value.shape), "one number")
    return QuantizedLinear(codes, scale, Inputs(scheme, {k: v.float() for k, v in params.items()}))


def _codes_and_scale(tensors: Mapping[str, Tensor], setting: Setting) -> tuple[Tensor, Tensor]:
    expect_all(tensors, ["weight", "weight_scale"])
    codes, scale = tensors["weight"], tensors["weight_scale"]
    fine = codes.dtype == DTYPES[setting.kind] and codes.ndim == 2
    expect(fine, "weight", f"{codes.dtype} {list(codes.shape)}", f"{DTYPES[setting.kind]} [rows, cols]")
    rows, cols = codes.shape
    if setting.group_size and cols % setting.group_size:
        raise CheckpointError(f"group_size is {setting.group_size}, expected a divisor of {cols} columns")
    shape = [1] if setting.strategy == "tensor" else [rows, cols // (setting.group_size or cols)]
    fine = scale.is_floating_point() and (list(scale.shape) or [1]) == shape
    expect(fine, "weight_scale", f"{scale.dtype} {list(scale.shape)}", f"a float {shape}")
    return codes, scale
