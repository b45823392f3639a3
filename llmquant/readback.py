"""Read back what was written, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant import plugins
from llmquant.checkpoint import Checkpoint, check_finite
from llmquant.errors import LlmquantError, OutputError
from llmquant.grid import QuantizedTensor, dequantize
from llmquant.packed import PackedCheckpoint
from llmquant.plan import PIECE, Linear, Plan

SAMPLE = 3  # linears of which the first rows are decoded
Load = Callable[[Linear, int], QuantizedTensor]
NEAR = 2**-7  # relative; some readers round what they decode to 16 bits

Decoded = Callable[[str, int], Tensor | None]
"""(name of a weight, rows) -> its first rows, decoded; None where a file has them in another order."""
Told = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor by its name in the files."""


def check(
    folder: Path,
    plan: Plan,
    checkpoint: Checkpoint,
    load: Load,
    format_: str,
    config: Any,
    told: Told,
) -> None:
    """Raise OutputError unless a written folder holds what was to be written.

    Every tensor has its name, type, shape and place in a file of the right size; all floats are finite; the weights of
    ``SAMPLE`` linears decode to what was quantized.

    load: returns the first rows of a linear as they were quantized. told: of a folder that no exporter writes itself.
    """
    exporter = plugins.load("exporters", format_, "format")
    try:
        if hasattr(exporter, "read_back"):
            decoded: Decoded = exporter.read_back(folder, plan, checkpoint, config)
        else:
            decoded = _folder(folder, told, plan.spec.conv1d)
        inside = [x for x in plan.quantized.values() if x.layer is not None] or list(plan.quantized.values())
        step = max(len(inside) // SAMPLE, 1)
        for start in range(0, len(inside), step):
            for linear in inside[start : start + step]:
                rows = linear.rows if linear.grid and linear.grid.shared else max(PIECE // linear.cols, 1)
                found = decoded(linear.weight_name, min(rows, linear.rows))
                if found is not None:
                    _compare(linear, found, dequantize(load(linear, len(found))).cpu())
                    break
    except LlmquantError as error:
        raise OutputError(
            f"{folder}: what was written does not read back: {error} Either the disk is failing, or this is a fault of "
            "llmquant. The finished layers are kept; the same command writes again, with --no-verify unchecked."
        ) from None


def _folder(folder: Path, told: Told, transposed: bool) -> Decoded:
    """Check the tensors of a model folder, and return what decodes one."""
    written = Checkpoint(folder)
    for name in written.infos.keys() | told.keys():
        info = written.infos.get(name)
        found = None if info is None else (info.dtype, info.shape)
        if found != told.get(name):
            raise OutputError(f"{name} is {found}, and {told.get(name)} was written.")
        if info is not None and info.dtype.is_floating_point:
            check_finite(written.read(name), name)
    settings = written.config["quantization_config"]
    exporter = next(
        e
        for e in (plugins.load("exporters", n, "quantization_config") for n in plugins.names("exporters"))
        if settings["quant_method"] == e.METHOD
    )
    packed = PackedCheckpoint(folder, exporter, settings)

    def decoded(name: str, rows: int) -> Tensor:
        return packed.read(name).T[:rows] if transposed else packed.read(name, (0, rows))

    return decoded


def _compare(linear: Linear, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise OutputError(f"{linear.weight_name} decodes to {list(found.shape)}, and was {list(expected.shape)}.")
    wrong = (found - expected).abs() > NEAR * expected.abs() + 1e-6 * expected.abs().max()
    if wrong.any():
        raise OutputError(f"{linear.weight_name} decodes to {int(wrong.sum())} other values of {wrong.numel()}.")
