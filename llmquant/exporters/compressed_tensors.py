"""compressed-tensors files, format "pack-quantized": read by vLLM and by transformers with compressed-tensors.

A linear [rows, cols] of b bits becomes

    weight_packed      int32 [rows, ceil(cols * b / 32)]     codes, packed along the columns
    weight_scale       [rows, groups], or [1] for a whole tensor
    weight_zero_point  int32 [ceil(rows * b / 32), groups]   only where it is not symmetric
    weight_shape       int64 [2]

Words are dense little-endian bit streams of unsigned codes; the library takes
2^(b-1) off both codes and zero points, which changes no weight. vLLM's kernels
take 4 and 8 bits; 3 bits needs a library that packs densely (0.16 and later).
Source: compressed_tensors/compressors/pack_quantized.
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

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
BITS = (2, 3, 4, 8)


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a pack-quantized file cannot hold weights [rows, cols] on ``grid``."""
    if not isinstance(grid, Affine) or grid.bits not in BITS:
        raise FormatError(f"a compressed-tensors file cannot hold {grid}. It holds affine grids of 2, 3, 4 or 8 bits")
    if grid.per_tensor and not grid.symmetric:
        raise FormatError("compressed-tensors has no packed zero point for strategy tensor. Set grid.symmetric to true")


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name."""
    assert isinstance(q.grid, Affine)
    scale = q.params["scale"].flatten(1)
    tensors = {
        "weight_packed": bits.pack(q.codes.T, q.grid.bits).T.contiguous(),
        "weight_scale": scale[0].contiguous() if q.grid.per_tensor else scale.contiguous(),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64, device=q.codes.device),
    }
    if not q.grid.symmetric:
        tensors["weight_zero_point"] = bits.pack(q.params["zero"].flatten(1), q.grid.bits)
    return tensors


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the quantized linears: one group a setting, the commonest for class Linear.

    ``kept`` lists the linears left float. Readers prefer a name to a class.
    """
    settings = {name: _setting(grid) for name, grid in linears.items()}
    common = Counter(map(_frozen, settings.values())).most_common()
    groups = {}
    for i, (setting, _) in enumerate(common):
        names = [name for name, own in settings.items() if _frozen(own) == setting]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if i == 0 else names,
            "weights": dict(setting) | {"dynamic": False, "type": "int"},
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": FORMAT,
        "config_groups": groups,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return no files: readers of this format need config.json alone."""
    return {}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return every quantized linear's tensors: module name -> {suffix: full name}."""
    found: dict[str, dict[str, str]] = {}
    for full in names:
        module, _, suffix = full.rpartition(".")
        if suffix in SUFFIXES:
            found.setdefault(module, {})[suffix] = full
    return {module: tensors for module, tensors in found.items() if "weight_packed" in tensors}


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return a linear's float32 weights; reads every strategy, and columns out of order."""
    missing = {"weight_packed", "weight_scale", "weight_shape"} - tensors.keys()
    if missing:
        raise CheckpointError(f"has no {', '.join(sorted(missing))}")
    width = _bits_of(config, name)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"].float()
    rows, cols = (int(n) for n in tensors["weight_shape"])
    scale = scale.expand(rows, 1) if scale.numel() == 1 else scale
    groups = scale.shape[-1]
    if packed.shape != (rows, -(-cols * width // 32)) or scale.shape != (rows, groups) or cols % groups:
        raise CheckpointError(
            f"weight_packed {list(packed.shape)}, weight_scale {list(scale.shape)} and weight_shape [{rows}, {cols}] "
            f"do not fit together at {width} bits"
        )
    zero = torch.tensor(2.0 ** (width - 1)).expand(rows, groups)
    if "weight_zero_point" in tensors:
        zero = bits.unpack(tensors["weight_zero_point"], width, rows).float()
    group_of = torch.arange(cols) // (cols // groups)
    if "weight_g_idx" in tensors and int(tensors["weight_g_idx"].min()) >= 0:
        group_of = tensors["weight_g_idx"].long()
    codes = bits.unpack(packed.T.contiguous(), width, cols).T.float()
    return (codes - zero[:, group_of]) * scale[:, group_of]


def _bits_of(config: Mapping[str, Any], name: str) -> int:
    def rank(target: str) -> int:
        """A name decides before an expression, an expression before a class."""
        if target == name or name.endswith(f".{target}"):
            return 3
        if target.startswith("re:"):
            return 2 if re.match(target[3:], name) else 0
        return 1 if target == "Linear" else 0

    groups: list[dict[str, Any]] = list((config.get("config_groups") or {}).values())
    ranks = [max(map(rank, group.get("targets", [])), default=0) for group in groups]
    if not any(ranks):
        raise CheckpointError("no config group of quantization_config is for it")
    group = groups[ranks.index(max(ranks))]
    weights = group.get("weights") or {}
    if group.get("format") not in (None, FORMAT) or weights.get("type") != "int" or weights.get("num_bits") not in BITS:
        raise CheckpointError(
            f"format {group.get('format')!r} with {weights.get('num_bits')!r} bits of type {weights.get('type')!r} is "
            f"not read here; {FORMAT} with {BITS} bits of type int is"
        )
    return int(weights["num_bits"])


def _setting(grid: Grid) -> dict[str, Any]:
    assert isinstance(grid, Affine)
    setting: dict[str, Any] = {
        "num_bits": grid.bits,
        "symmetric": grid.symmetric,
        "strategy": grid.config.strategy,
    }
    return setting | ({"group_size": grid.group} if grid.config.strategy == "group" else {})


def _frozen(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(setting.items())
