"""GPTQ files: 2, 3, 4 or 8 bits, groups or whole rows, with or without zero points.

A linear of ``rows`` outputs and ``cols`` inputs becomes (transposed, so input by input)

    qweight  int32 [cols * bits / 32, rows]    codes, packed along the inputs
    qzeros   int32 [groups, rows * bits / 32]  zero points minus 1, packed along the outputs
    scales   float [groups, rows]              float16, or bfloat16 for a bfloat16 model
    g_idx    int32 [cols]                      the group of every input

with the bit order of ``llmquant.words``, and ``weight[row, col] = scale * (code - zero)``
for the group ``g_idx[col]``. The bias stays a tensor of its own. This is version 1
of the format (`checkpoint_format: gptq`); version 2 (``gptq_v2``) stores the zero
points as they are.

Source: AutoGPTQ and GPTQModel, whose file it is (`QuantizeConfig`, `dequantize_weight`);
the checkpoint_format key is AutoGPTQ pull request 640.
Readers: vLLM, SGLang, GPTQModel, transformers with optimum, ExLlamaV2 (4 bits),
AutoGPTQ. GPTQModel refuses an asymmetric file of version 1 that it did not write
itself: give it ``gptq_v2``. vLLM computes q, k and v (gate and up; all experts of
a layer) as one matrix, so they need one setting.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from llmquant import words
from llmquant.errors import CheckpointError, FormatError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.grids.affine import Affine
from llmquant.patterns import matches, patterns
from llmquant.runtime.coded import Coded, affine, by_group

METHOD = "gptq"
CONV1D = True  # readers replace transformers' Conv1D too, and qweight is input by input anyway
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
LARGEST_SCALE = 65504  # of float16, in which GPTQModel and AutoGPTQ keep scales
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Setting: TypeAlias = tuple[int, int, bool]
"""What can differ between linears: (bits, group_size, sym)."""


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a GPTQ file cannot hold this grid or shape."""
    if not isinstance(grid, Affine):
        raise FormatError(
            f"a GPTQ file cannot hold the grid {type(grid).__name__}, only affine. "
            "Use `grid: {name: affine}`, or `formats: [gguf]` for k-quants"
        )
    if grid.bits not in BITS:
        raise FormatError(f"a GPTQ file cannot hold {grid.bits} bits, only 2, 3, 4 or 8. Use bits 4 or 8")
    if grid.per_tensor:
        raise FormatError(
            "a GPTQ file cannot hold one scale for a whole tensor. "
            "Use strategy group or channel, or `formats: [compressed_tensors]`"
        )
    if grid.scale_dtype == torch.float32:
        raise FormatError("a GPTQ file cannot hold float32 scales. Use scale_dtype auto, float16 or bfloat16")
    if rows % 32 or cols % 32:
        raise FormatError(
            f"a GPTQ file cannot hold {rows} rows by {cols} columns, only multiples of 32. "
            "Add the linear to `ignore`, or use `formats: [compressed_tensors]`"
        )


def pack(q: QuantizedTensor, zero_shift: int = 1) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name.

    zero_shift: what is subtracted from the zero points, 1 in version 1.

    Raises FormatError when a scale does not fit float16 or a zero point is below ``zero_shift``.
    """
    assert isinstance(q.grid, Affine)
    bits = q.grid.bits
    scale, zero = q.params["scale"].flatten(1), q.params["zero"].flatten(1)
    if not scale.is_meta:
        _check_values(scale, zero, zero_shift)
    return {
        # some rows at a time stay in the cache while they are transposed
        "qweight": torch.cat([words.pack(rows, bits).T for rows in torch.split(q.codes, 128)], dim=1),
        "qzeros": words.pack((zero - zero_shift).T, bits),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(q.codes.shape[1], dtype=torch.int32, device=q.codes.device) // q.grid.group,
    }


def _check_values(scale: Tensor, zero: Tensor, zero_shift: int) -> None:
    good = scale.abs() <= LARGEST_SCALE  # False for NaN too
    if not good.all():
        raise FormatError(
            f"{int((~good).sum())} of {good.numel()} scales are not finite or above {LARGEST_SCALE}, "
            "the end of float16. Look for broken weights, or leave the linear float with `ignore`"
        )
    if (zero < zero_shift).any():
        raise FormatError(
            f"{int((zero < zero_shift).sum())} of {zero.numel()} zero points are 0, which would wrap around in "
            "version 1 of the GPTQ format. Use `formats: [gptq_v2]`"
        )


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    The commonest setting is at the top; `dynamic` has the other ones, and `-:` for kept linears. The output
    matrix needs no entry there: readers keep it float unless `lm_head` is true.

    linears: the grid of every quantized linear, one at least.
    kept: the linears that stay float.
    record: told to the reader only; `version` (of llmquant) and `dampening_frac` have a place of their own.
    """
    settings = {name: _setting(grid) for name, grid in linears.items()}
    common = Counter(settings.values()).most_common(1)[0][0]
    version = record.get("version")
    config: dict[str, Any] = {
        "quant_method": METHOD,
        **_named(common),
        "desc_act": False,  # groups stay contiguous whatever order the algorithm took
        "lm_head": any(_is_head(name) for name in linears),
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmquant:{version}" if version else "llmquant"], "llmquant": dict(record)},
    }
    damping = record.get("dampening_frac")
    if damping is not None and 0 < damping < 1:  # readers refuse other values
        config["damp_percent"] = damping
    dynamic = _dynamic(settings, [name for name in kept if not _is_head(name)], common)
    return {**config, "dynamic": dynamic} if dynamic else config


def _setting(grid: Grid) -> Setting:
    assert isinstance(grid, Affine)
    return grid.bits, -1 if grid.config.strategy == "channel" else grid.group, grid.symmetric


def _named(setting: Setting) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), setting, strict=True))


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def _dynamic(settings: Mapping[str, Setting], kept: Sequence[str], common: Setting) -> dict[str, dict[str, Any]]:
    """Return the overrides by pattern. They name the matrices that vLLM fuses too: it asks for no others."""
    every = _with_fused({**settings, **dict.fromkeys(kept)})
    dynamic: dict[str, dict[str, Any]] = {}
    for setting in dict.fromkeys(every.values()):
        if setting == common:
            continue
        names = [name for name, its in every.items() if its == setting]
        others = [name for name, its in every.items() if its != setting]
        for pattern in patterns(names, others):
            dynamic[f"-:{pattern}" if setting is None else f"+:{pattern}"] = {} if setting is None else _named(setting)
    return dynamic


def _with_fused(settings: Mapping[str, Setting | None]) -> dict[str, Setting | None]:
    parts: defaultdict[str, set[Setting | None]] = defaultdict(set)
    for name, setting in settings.items():
        parent, _, last = name.rpartition(".")
        for fused, lasts in FUSED.items():
            if last in lasts:
                parts[f"{parent}.{fused}"].add(setting)
        if experts := re.match(r"(.*\.experts)\.\d+\.", name):
            parts[experts[1]].add(setting)
    return {**settings, **{name: found.pop() for name, found in parts.items() if len(found) == 1}}


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside config.json: GPTQModel and AutoGPTQ look for this one first."""
    return {"quantize_config.json": dict(config)}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the packed linears among a folder's tensors: module name -> {suffix: tensor name}."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix in ("qweight", "qzeros", "scales", "g_idx"):
            found[module][suffix] = name
    return {module: parts for module, parts in found.items() if "qweight" in parts or "qzeros" in parts}


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of the linear ``name``; versions 1 and 2, any order of groups.

    Raises CheckpointError for a missing or ill-shaped tensor and for a setting that llmquant does not read.
    """
    codes, _, scale, zero, group = _read(tensors, config, name)
    weight = codes.float()
    weight -= zero.float().index_select(1, group)
    weight *= scale.float().index_select(1, group)
    return weight


def coded(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """Return the weight as it is stored; raise CheckpointError as ``unpack`` does, and for groups of several sizes."""
    codes, bits, scale, zero, group = _read(tensors, config, name)
    order = by_group(group, scale.shape[1])
    if order is not None:
        codes = codes[:, order]
    return Coded(
        codes, torch.arange(2.0**bits), {"scale": scale.contiguous(), "zero": zero.contiguous()}, affine, order
    )


def _read(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> tuple[
    UInt8[Tensor, "rows cols"],
    int,
    Float[Tensor, "rows groups"],
    UInt8[Tensor, "rows groups"],
    Int64[Tensor, " cols"],
]:
    """Return codes, their bits, scales, zero points and the group of every column."""
    setting = _setting_of(config, name)
    bits = setting["bits"]
    for suffix in ("qweight", "qzeros", "scales", *(["g_idx"] if setting.get("desc_act") else [])):
        if suffix not in tensors:
            raise CheckpointError(f"{suffix} is missing, found only {', '.join(sorted(tensors)) or 'nothing'}")
    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    rows = qweight.shape[-1]
    cols = len(tensors["g_idx"]) if "g_idx" in tensors else qweight.shape[0] * 32 // bits
    group_size = cols if setting["group_size"] == -1 else setting["group_size"]
    groups = math.ceil(cols / group_size)
    why = f"for {bits} bits and group_size {setting['group_size']}"
    for suffix, shape in (
        ("qweight", [math.ceil(cols * bits / 32), rows]),
        ("qzeros", [groups, math.ceil(rows * bits / 32)]),
    ):
        tensor = tensors[suffix]
        fine = tensor.dtype == torch.int32 and list(tensor.shape) == shape
        _expect(fine, suffix, f"{tensor.dtype} {list(tensor.shape)}", f"int32 {shape} {why}")
    fine = scales.is_floating_point() and list(scales.shape) == [groups, rows]
    _expect(fine, "scales", f"{scales.dtype} {list(scales.shape)}", f"a float {[groups, rows]} {why}")
    group = tensors.get("g_idx", torch.arange(cols) // group_size).long()
    fine = bool(((group >= 0) & (group < groups)).all())
    _expect(fine, "g_idx", f"{int(group.min())} to {int(group.max())}", f"0 to {groups - 1} {why}")
    return words.unpack(qweight.T, bits, cols), bits, scales.T, _zeros(qzeros, bits, rows, setting["version"]).T, group


def _zeros(qzeros: Tensor, bits: int, rows: int, version: int) -> Tensor:
    if version == 2:
        return words.unpack(qzeros, bits, rows)
    if bits == 3:
        return (words.unpack(qzeros, bits, rows) + 1) & 7
    # A true zero point of 0 wrapped around when GPTQModel subtracted 1 from all fields of a word at once, and
    # borrowed from its neighbour. Adding to the whole word gives both back.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return words.unpack((qzeros.long() + ones).to(torch.int32), bits, rows)


def _setting_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings that hold for one linear, `dynamic` overrides included, and the ``version``."""
    setting = {"group_size": -1, **config}
    dynamic = config.get("dynamic") or {}
    fine = isinstance(dynamic, Mapping) and all(isinstance(override, Mapping) for override in dynamic.values())
    _expect(fine, "dynamic", dynamic, "settings by pattern")
    for pattern, override in dynamic.items():
        try:
            fits = matches(re.sub(r"^[+-]:", "", pattern), name, "match")
        except ValueError as error:
            raise CheckpointError(f"dynamic: {pattern!r:.200} {error}") from None
        if fits and pattern.startswith("-:"):
            raise CheckpointError(f"dynamic has {pattern!r}, so expected a float weight, but found packed tensors")
        if fits:
            setting.update(override)
            break
    format_ = config.get("checkpoint_format") or config.get("format") or "gptq"
    _expect(isinstance(format_, str) and format_ in VERSIONS, "checkpoint_format", format_, "gptq or gptq_v2")
    _expect(not config.get("is_marlin_format"), "is_marlin_format", True, "false")
    pack_dtype = config.get("pack_dtype", "int32")
    _expect(pack_dtype == "int32", "pack_dtype", pack_dtype, "int32")
    bits, group_size = setting.get("bits"), setting["group_size"]
    _expect(bits in BITS, "bits", bits, "2, 3, 4 or 8")
    fine = isinstance(group_size, int) and (group_size == -1 or group_size > 0)
    _expect(fine, "group_size", group_size, "-1 or more than 0")
    return {**setting, "version": VERSIONS[format_]}


def _expect(fine: bool, what: str, found: object, expected: str) -> None:
    if not fine:
        raise CheckpointError(f"{what} is {found}, expected {expected}")
