"""compressed-tensors files: integers of 2 to 8 bits or FP8, with or without quantized activations.

The format follows from the linear: pack-quantized (``packed``) for integers whose
inputs stay float, int-quantized and float-quantized (``plain``) for the rest.

Source: compressed_tensors 0.20, compressors/ and quantization/.
Readers: vLLM and SGLang (packed: strategies group and channel), transformers with compressed-tensors (all).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.activations import ActivationScheme
from llmquant.errors import FormatError
from llmquant.exporters.compressed_tensors import packed, plain, settings
from llmquant.exporters.compressed_tensors.settings import METHOD
from llmquant.grid import Grid, QuantizedTensor
from llmquant.grids.affine import Affine
from llmquant.grids.fp8 import Fp8
from llmquant.runtime.coded import Coded
from llmquant.runtime.linear import QuantizedLinear

__all__ = [
    "METHOD",
    "check",
    "check_inputs",
    "coded",
    "extra_files",
    "linears",
    "operator",
    "pack",
    "quantization_config",
    "unpack",
]

BITS = (2, 3, 4, 8)  # vLLM's kernels take 4 and 8; 3 needs a library that packs densely (since May 2026)
SUFFIXES = {
    "weight_packed", "weight_shape", "weight_g_idx", "weight", "weight_scale", "weight_zero_point",
    "input_scale", "input_zero_point",
}  # fmt: skip


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a compressed-tensors file cannot hold this grid; any shape will do."""
    if isinstance(grid, Fp8):
        return
    if not isinstance(grid, Affine):
        raise FormatError(
            f"a compressed-tensors file cannot hold the grid {type(grid).__name__}, only affine and fp8. "
            "Use `grid: {name: affine}`, or `formats: [gguf]` for k-quants"
        )
    if grid.bits not in BITS:
        raise FormatError(f"a compressed-tensors file cannot hold {grid.bits} bits, only 2, 3, 4 or 8. Use 4 or 8")


def check_inputs(grid: Grid, inputs: ActivationScheme) -> None:
    """Raise FormatError when no runtime multiplies weights on this grid with inputs rounded so."""
    if isinstance(grid, Fp8):
        if inputs.type != "fp8":
            raise FormatError("weights are fp8 but activations int8. Set `activations: {type: fp8}`")
        return
    assert isinstance(grid, Affine)
    strategy = grid.config.strategy
    if inputs.type != "int8":
        raise FormatError("weights are integers but activations fp8. Set `activations: {type: int8}`, or grid fp8")
    if grid.bits != 8 or not grid.symmetric or strategy == "group":
        raise FormatError(
            f"weights have {grid.bits} bits, strategy {strategy}, symmetric {grid.symmetric}: with int8 activations, "
            "integer products need `grid: {name: affine, bits: 8, strategy: channel, symmetric: true}`"
        )


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name; raise FormatError for scales not finite."""
    scale = q.params["scale"]
    if not scale.is_meta and not (finite := torch.isfinite(scale)).all():
        raise FormatError(
            f"{int((~finite).sum())} of {finite.numel()} scales are not finite in {scale.dtype}. "
            "Look for broken weights, use scale_dtype bfloat16, or leave the linear float with `ignore`"
        )
    setting = settings.setting(q.grid, None if q.inputs is None else q.inputs.scheme)
    return packed.pack(q) if setting.format == settings.PACKED else plain.pack(q, setting)


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, with one config group for each setting.

    linears: the grid of every quantized linear, one at least.
    kept: the linears that stay float.
    record: `inputs` is what linears round their inputs to, by name; `actorder` is told to the reader and changes
        nothing in the file.
    """
    inputs: Mapping[str, ActivationScheme] = record.get("inputs", {})
    found = {name: settings.setting(grid, inputs.get(name)) for name, grid in linears.items()}
    return settings.write(found, kept, bool(record.get("actorder")))


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside config.json: none."""
    return {}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the quantized linears among a folder's tensors: module name -> {suffix: tensor name}."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            found[module][suffix] = name
    return {module: parts for module, parts in found.items() if parts.keys() & {"weight_packed", "weight_scale"}}


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of the linear ``name``.

    Raises CheckpointError for a missing or ill-shaped tensor and for a setting that llmquant does not read.
    """
    setting, format_, actorder = settings.read(config, name)
    if format_ == settings.PACKED:
        return packed.unpack(tensors, setting, actorder)
    return plain.unpack(tensors, setting)


def coded(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """Return the weight as it is stored; raise CheckpointError as ``unpack`` does."""
    setting, format_, actorder = settings.read(config, name)
    if format_ == settings.PACKED:
        return packed.coded(tensors, setting, actorder)
    return plain.coded(tensors, setting)


def operator(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> QuantizedLinear | None:
    """Return the linear ``name`` as a runtime computes it, or None where its inputs stay float."""
    setting, _, _ = settings.read(config, name)
    return None if setting.inputs is None else plain.operator(tensors, setting)
