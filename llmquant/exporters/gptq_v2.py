"""GPTQ files of version 2 (`checkpoint_format: gptq_v2`): zero points are stored as they are.

Tensors, bits and config are those of ``gptq``, which also reads this version; only
``qzeros`` holds the zero point itself, not minus 1.

Source: AutoGPTQ pull request 640; GPTQModel, `FORMAT.GPTQ_V2`.
Readers: GPTQModel, transformers with optimum and GPTQModel, SGLang, vLLM since its
pull request 26092 (October 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmquant.exporters import gptq
from llmquant.exporters.gptq import CONV1D, METHOD, check, coded, extra_files, linears, unpack
from llmquant.grid import Grid, QuantizedTensor

__all__ = ["CONV1D", "METHOD", "check", "coded", "extra_files", "linears", "pack", "quantization_config", "unpack"]


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name."""
    return gptq.pack(q, zero_shift=0)


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; as in ``gptq``, with this version's name."""
    config = gptq.quantization_config(linears, kept, record)
    return {**config, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}
