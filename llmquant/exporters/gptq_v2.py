"""GPTQ files, checkpoint_format "gptq_v2": those of ``llmquant.exporters.gptq`` with true zero points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmquant.exporters import gptq
from llmquant.exporters.gptq import check, extra_files, linears, unpack
from llmquant.grid import Grid, QuantizedTensor

__all__ = ["CONV1D", "METHOD", "check", "extra_files", "linears", "pack", "quantization_config", "unpack"]

METHOD = gptq.METHOD
CONV1D = True


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name."""
    return gptq.pack(q, zero_shift=0)


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the quantized linears."""
    return gptq.quantization_config(linears, kept, record, checkpoint_format="gptq_v2")
