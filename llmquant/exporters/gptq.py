"""GPTQ files, checkpoint_format "gptq": read by GPTQModel, AutoGPTQ, vLLM, SGLang, ExLlama and transformers.

A linear [rows, cols] of b bits becomes

    qweight  int32 [cols * b / 32, rows]     codes, packed along the columns
    qzeros   int32 [groups, rows * b / 32]   zero points minus one, packed along the rows
    scales   float16 [groups, rows]
    g_idx    int32 [cols]                    group of each column, here always column // group

Words are dense little-endian bit streams (3 bits: 32 codes in 3 words). Stored
zero points are one less than the true ones; checkpoint_format "gptq_v2"
(``llmquant.exporters.gptq_v2``) stores the true ones.
Source: AutoGPTQ and GPTQModel, qlinear/qlinear_torch ``pack``; GPTQModel README on formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import bits
from llmquant.errors import CheckpointError, FormatError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.grids.affine import Affine

METHOD = "gptq"
CHECKPOINT_FORMAT = "gptq"
ZERO_SHIFT = 1
CONV1D = True
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a GPTQ file cannot hold weights [rows, cols] on ``grid``."""
    if not isinstance(grid, Affine) or grid.bits not in BITS or grid.per_tensor:
        raise FormatError(
            f"a GPTQ file cannot hold {grid}. It holds affine grids of 2, 3, 4 or 8 bits with strategy group or channel"
        )
    if rows % 32 or cols % 32:
        raise FormatError(
            f"a GPTQ file packs rows and columns by 32, and this weight is [{rows}, {cols}]. Keep it float by a rule, "
            "or write compressed_tensors"
        )


def pack(q: QuantizedTensor, zero_shift: int = ZERO_SHIFT) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name.

    Raises FormatError when a scale has no exact float16 value.
    """
    assert isinstance(q.grid, Affine)
    scale, zero = (q.params[name].flatten(1).T.contiguous() for name in ("scale", "zero"))
    scales = scale.to(torch.float16)
    if not scale.is_meta and not torch.equal(scales.to(scale.dtype), scale):
        raise FormatError(
            f"a scale of {float(scale.float().abs().max()):g} or smaller has no exact float16 value, which GPTQ files "
            "need. Set grid.scale_dtype to float16"
        )
    cols = q.codes.shape[1]
    return {
        "qweight": bits.pack(q.codes.T, q.grid.bits),
        "qzeros": bits.pack((zero - zero_shift).T.contiguous(), q.grid.bits).T.contiguous(),
        "scales": scales,
        "g_idx": torch.arange(cols, dtype=torch.int32, device=q.codes.device) // q.grid.group,
    }


def quantization_config(
    linears: Mapping[str, Grid],
    kept: Sequence[str],
    record: Mapping[str, Any],
    checkpoint_format: str = CHECKPOINT_FORMAT,
) -> dict[str, Any]:
    """Return what config.json says of the quantized linears; ``dynamic`` holds what departs from the commonest setting.

    ``kept`` lists the linears left float, ``record`` the settings of the algorithm.
    """
    settings = {name: _setting(grid) for name, grid in linears.items()}
    common = Counter(map(_frozen, settings.values())).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": setting for name, setting in settings.items() if _frozen(setting) != common
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in kept if name != "lm_head"}
    damp = record.get("dampening_frac", 0.01)
    return {
        "quant_method": METHOD,
        **dict(common),
        "desc_act": False,
        "lm_head": "lm_head" in linears,
        "dynamic": dynamic,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": damp,
        "static_groups": bool(record.get("static_groups") or record.get("actorder")),
        "true_sequential": bool(record.get("true_sequential")),
        "meta": {"quantizer": ["llmquant"]},
    }


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files that readers of this format look for beside config.json."""
    return {"quantize_config.json": dict(config)}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return every quantized linear's tensors: module name -> {suffix: full name}."""
    found: dict[str, dict[str, str]] = {}
    for full in names:
        module, _, suffix = full.rpartition(".")
        if suffix in SUFFIXES:
            found.setdefault(module, {})[suffix] = full
    return {module: tensors for module, tensors in found.items() if "qweight" in tensors}


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return a linear's float32 weights; reads both zero point conventions and any column order."""
    width = _bits_of(config, name)
    missing = {"qweight", "qzeros", "scales"} - tensors.keys()
    if missing:
        raise CheckpointError(f"has no {', '.join(sorted(missing))}")
    qweight, qzeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
    groups, rows = scales.shape
    cols = qweight.shape[0] * 32 // width
    if qweight.shape[1] != rows or qzeros.shape != (groups, -(-rows * width // 32)) or cols % groups:
        raise CheckpointError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} do not fit "
            f"together at {width} bits"
        )
    group_of = tensors.get("g_idx", torch.arange(cols) // (cols // groups)).long()
    if group_of.shape != (cols,) or int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise CheckpointError(
            f"g_idx {list(group_of.shape)} does not name a group of {groups} for each of {cols} columns"
        )
    v2 = (config.get("checkpoint_format") or config.get("format")) == "gptq_v2"
    zeros = bits.unpack(qzeros.T.contiguous(), width, rows).T.float() + (0 if v2 else 1)
    codes = bits.unpack(qweight, width, cols).float()
    return ((codes - zeros[group_of]) * scales.float()[group_of]).T


def _bits_of(config: Mapping[str, Any], name: str) -> int:
    width = config.get("bits", config.get("w_bit"))
    for pattern, change in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            width = change.get("bits", width)
            break
    if width not in BITS:
        raise CheckpointError(f"quantization_config asks for {width!r} bits; this reader knows {BITS}")
    return int(width)


def _setting(grid: Grid) -> dict[str, Any]:
    assert isinstance(grid, Affine)
    group = -1 if grid.config.strategy == "channel" else grid.group
    return {"bits": grid.bits, "group_size": group, "sym": grid.symmetric}


def _frozen(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(setting.items())
