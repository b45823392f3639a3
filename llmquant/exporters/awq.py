"""AWQ files, version "gemm": 4 bits with zero points, groups or whole rows.

A linear of ``rows`` outputs and ``cols`` inputs becomes (transposed, so input by input)

    qweight  int32 [cols, rows / 8]    codes, 8 outputs in a word
    qzeros   int32 [groups, rows / 8]  zero points, packed the same way
    scales   float16 [groups, rows]

and ``weight[row, col] = scale * (code - zero)``. A word holds the outputs 8k to
8k + 7; from its lowest four bits upwards it holds 8k + 0, 2, 4, 6, 1, 3, 5, 7.
The bias stays a tensor of its own.

Source: AutoAWQ, `WQLinear_GEMM.from_linear` and `AwqConfig`; vLLM, `AWQConfig`.
Readers: vLLM, SGLang, transformers with GPTQModel, AutoAWQ. All linears of a file
have one setting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from llmquant import words
from llmquant.errors import CheckpointError, FormatError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.grids.affine import Affine
from llmquant.runtime.coded import Coded, affine

METHOD = "awq"
BITS = 4
LANES = 8  # codes in a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each lane, lowest bits first


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when an AWQ file cannot hold this grid or shape."""
    if not isinstance(grid, Affine):
        raise FormatError(
            f"an AWQ file cannot hold the grid {type(grid).__name__}, only affine. "
            "Use `grid: {name: affine}`, or `formats: [gguf]` for k-quants"
        )
    if grid.bits != BITS:
        raise FormatError(
            f"an AWQ file cannot hold {grid.bits} bits, only 4. Use bits 4, or `formats: [compressed_tensors]`"
        )
    if grid.per_tensor:
        raise FormatError(
            "an AWQ file cannot hold one scale for a whole tensor. "
            "Use strategy group or channel, or `formats: [compressed_tensors]`"
        )
    if grid.scale_dtype != torch.float16:
        raise FormatError(f"an AWQ file cannot hold {grid.scale_dtype} scales. Use `grid: {{scale_dtype: float16}}`")
    if rows % LANES:
        raise FormatError(
            f"an AWQ file cannot hold {rows} rows, only multiples of 8. "
            "Add the linear to `ignore`, or use `formats: [compressed_tensors]`"
        )


def check_together(linears: Mapping[str, Grid | None]) -> None:
    """Raise FormatError when one AWQ file cannot hold all of these linears; None stands for one that stays float."""
    settings = {_group_size(grid) for grid in linears.values() if grid}
    if len(settings) > 1:
        raise FormatError(
            f"an AWQ file has one setting for all linears, not group sizes {', '.join(map(str, sorted(settings)))}. "
            "Use `fallback: keep` and no rules that change the grid, or `formats: [compressed_tensors]`"
        )
    for name, grid in linears.items():
        if grid and name.rpartition(".")[2] == "lm_head":
            raise FormatError(f"{name}: readers of AWQ files keep the output matrix float. Add it to `ignore`")


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name; raise FormatError for scales not finite."""
    scale, zero = q.params["scale"].flatten(1), q.params["zero"].flatten(1)
    if not scale.is_meta and not (finite := torch.isfinite(scale)).all():
        raise FormatError(
            f"{int((~finite).sum())} of {finite.numel()} scales are not finite in float16. "
            "Look for broken weights, or leave the linear float with `ignore`"
        )
    return {"qweight": _pack(q.codes), "qzeros": _pack(zero), "scales": scale.T.contiguous()}


def _pack(codes: UInt8[Tensor, "rows n"]) -> Int32[Tensor, "n rows_by_8"]:
    lanes = codes.view(-1, LANES, codes.shape[1])[:, ORDER].flatten(0, 1)
    return words.pack(lanes.T.contiguous(), BITS)


def _unpack(packed: Int32[Tensor, "n rows_by_8"], rows: int) -> UInt8[Tensor, "rows n"]:
    lanes = words.unpack(packed, BITS, rows).T.view(-1, LANES, len(packed))
    return torch.empty_like(lanes).index_copy_(1, torch.tensor(ORDER), lanes).flatten(0, 1)


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    linears: the grid of every quantized linear, one at least; all have one setting.
    kept: the linears that stay float. record: not told.
    """
    return {
        "quant_method": METHOD,
        "version": "gemm",
        "bits": BITS,
        "group_size": _group_size(next(iter(linears.values()))),
        "zero_point": True,
        "modules_to_not_convert": list(kept),
    }


def _group_size(grid: Grid) -> int:
    assert isinstance(grid, Affine)
    return -1 if grid.config.strategy == "channel" else grid.group


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside config.json: AutoAWQ's own, with its names of the same settings."""
    return {
        "quant_config.json": {
            "zero_point": config["zero_point"],
            "q_group_size": config["group_size"],
            "w_bit": config["bits"],
            "version": "GEMM",
            "modules_to_not_convert": config["modules_to_not_convert"],
        }
    }


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the packed linears among a folder's tensors: module name -> {suffix: tensor name}."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix in ("qweight", "qzeros", "scales"):
            found[module][suffix] = name
    return {module: parts for module, parts in found.items() if "qweight" in parts}


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of the linear ``name``.

    Raises CheckpointError for a missing or ill-shaped tensor and for a setting that llmquant does not read.
    """
    codes, scale, zero = _read(tensors, config)
    weight = codes.float().view(*scale.shape, -1)
    weight -= zero.float()[..., None]
    weight *= scale.float()[..., None]
    return weight.view(codes.shape)


def coded(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """Return the weight as it is stored; raise CheckpointError as ``unpack`` does."""
    codes, scale, zero = _read(tensors, config)
    return Coded(codes, torch.arange(2.0**BITS), {"scale": scale.contiguous(), "zero": zero}, affine)


def _read(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[UInt8[Tensor, "rows cols"], Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """Return codes, scales and zero points."""
    bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    _expect(bits == BITS, "bits", bits, "4")
    _expect(version == "gemm", "version", version, "gemm")
    _expect(config.get("zero_point", True) is True, "zero_point", config.get("zero_point"), "true")
    fine = isinstance(group_size, int) and (group_size == -1 or group_size > 0)
    _expect(fine, "group_size", group_size, "-1 or more than 0")
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in tensors:
            raise CheckpointError(f"{suffix} is missing, found only {', '.join(sorted(tensors)) or 'nothing'}")
    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    fine = qweight.dtype == torch.int32 and qweight.ndim == 2
    _expect(fine, "qweight", f"{qweight.dtype} {list(qweight.shape)}", "int32 with 2 dimensions")
    cols, rows = qweight.shape[0], qweight.shape[1] * LANES
    group = cols if group_size == -1 else group_size
    _expect(cols % group == 0, "qweight", f"{cols} inputs", f"a multiple of the group_size {group}")
    shape = [cols // group, rows // LANES]
    fine = qzeros.dtype == torch.int32 and list(qzeros.shape) == shape
    _expect(fine, "qzeros", f"{qzeros.dtype} {list(qzeros.shape)}", f"int32 {shape}")
    shape = [cols // group, rows]
    fine = scales.is_floating_point() and list(scales.shape) == shape
    _expect(fine, "scales", f"{scales.dtype} {list(scales.shape)}", f"a float {shape}")
    return _unpack(qweight, rows), scales.T, _unpack(qzeros, rows)


def _expect(fine: bool, what: str, found: object, expected: str) -> None:
    if not fine:
        raise CheckpointError(f"{what} is {found}, expected {expected}")
