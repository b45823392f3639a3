"""bitsandbytes 4-bit files (NF4, FP4), as transformers saves them: QLoRA's base models.

A linear of ``rows`` outputs and ``cols`` inputs, n = rows * cols weights in blocks of ``blocksize``, becomes

    weight                   uint8   [n / 2, 1]        codes row by row, the first of two in the high bits
    weight.quant_map         float32 [16]              the level of every code
    weight.absmax            float32 [blocks]          or, with double quantization, uint8 codes of nested_quant_map
    weight.nested_absmax     float32 [blocks / 256]
    weight.nested_quant_map  float32 [256]
    weight.quant_state.bitsandbytes__nf4   (or __fp4)  uint8: a JSON text with quant_type, blocksize, dtype and shape,
                                                       and for the nested absmax blocksize, dtype and offset

and ``weight = quant_map[code] * absmax``, rounded to dtype, where a nested absmax is
``nested_quant_map[code] * nested_absmax + nested_offset``. A file may keep the codes' bytes in another dtype
(`bnb_4bit_quant_storage`). The JSON text's length depends on the offset's digits, which only the weights tell: sizes
that are known beforehand count the most that it can have, so that a file may be some bytes a linear smaller.

Source: bitsandbytes 0.50, `QuantState` in functional.py and backends/default/ops.py; transformers 5.23,
`BitsAndBytesConfig`. Readers: transformers, peft, vLLM.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import blockwise
from llmquant.blockwise import Blockwise
from llmquant.errors import CheckpointError, FormatError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.runtime.coded import Coded, without_offset

METHOD = "bitsandbytes"
CONV1D = True  # readers put a linear module in its place
STATE = "weight.quant_state.bitsandbytes__"
PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
LONGEST_OFFSET = 6.4000000747910235e-06  # no positive float32 has more characters


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a bitsandbytes file cannot hold this grid; any shape will do."""
    if not isinstance(grid, Blockwise):
        raise FormatError(
            f"a bitsandbytes file cannot hold the grid {type(grid).__name__}, only nf4 and fp4. "
            "Use `grid: {name: nf4}`"
        )
    if grid.dtype not in DTYPES.values():
        raise FormatError(f"a bitsandbytes file cannot hold {grid.dtype}. Use a model in {', '.join(DTYPES)}")


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name."""
    grid = q.grid
    assert isinstance(grid, Blockwise)
    device = q.codes.device
    numbers = torch.tensor(grid.type.numbers, dtype=torch.uint8, device=device)
    codes = numbers.index_select(0, q.codes.flatten().int())
    quant_map = torch.empty(16)
    quant_map[list(grid.type.numbers)] = grid.table
    absmax = q.params["absmax"].flatten()
    state = {
        "quant_type": grid.type.name,
        "blocksize": grid.span,
        "dtype": str(grid.dtype).removeprefix("torch."),
        "shape": list(q.codes.shape),
    }
    tensors = {
        "weight": ((codes[::2] << 4) | codes[1::2])[:, None],
        "weight.absmax": absmax.contiguous(),
        "weight.quant_map": quant_map,
    }
    if grid.blocks is not None:
        offset = q.params["nested_offset"].flatten()[0]
        state |= {
            "nested_blocksize": blockwise.NESTED,
            "nested_dtype": "float32",
            "nested_offset": LONGEST_OFFSET if offset.is_meta else offset.item(),
        }
        tensors["weight.nested_absmax"] = q.params["nested_absmax"].flatten()[:: blockwise.NESTED].contiguous()
        tensors["weight.nested_quant_map"] = blockwise.DYNAMIC.clone()
    text = json.dumps(state).encode()
    tensors[f"{STATE}{grid.type.name}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json: the commonest settings; every linear's own are in its tensors.

    linears: the grid of every quantized linear, one at least.
    kept: the linears that stay float.
    """
    common = Counter(linears.values()).most_common(1)[0][0]
    assert isinstance(common, Blockwise)
    return {
        "quant_method": METHOD,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(common.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": common.type.name,
        "bnb_4bit_use_double_quant": common.blocks is not None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_threshold": 6.0,
    }


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside config.json: none."""
    return {}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the quantized linears among a folder's tensors: module name -> {suffix: tensor name}.

    Raises CheckpointError for 8-bit files.
    """
    if not config.get("load_in_4bit"):
        raise CheckpointError("load_in_4bit is false: llmquant reads 4-bit bitsandbytes files only")
    names = set(names)
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        module, state, type_ = name.partition(f".{STATE}")
        if state:
            parts = (*PARTS, f"{STATE}{type_}")
            found[module] = {suffix: f"{module}.{suffix}" for suffix in parts if f"{module}.{suffix}" in names}
    return dict(found)


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of the linear ``name``, rounded to the dtype that its state names.

    Raises CheckpointError for a missing or ill-shaped tensor.
    """
    codes, table, absmax, state = _read(tensors)
    weight = table.index_select(0, codes.int()) * absmax.repeat_interleave(state["blocksize"])[: len(codes)]
    return weight.to(DTYPES[state["dtype"]]).float().view(state["shape"])


def coded(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """Return the weight as it is stored, but for a nested absmax, which is decoded; raise CheckpointError.

    Its values are not rounded to the dtype that the state names: a part of 2^-9 for bfloat16.
    """
    codes, table, absmax, state = _read(tensors)
    rows, cols = state["shape"]
    group = math.gcd(cols, state["blocksize"])  # blocks may go on in the next row
    scale = absmax.repeat_interleave(state["blocksize"] // group)[: rows * cols // group].view(rows, -1)
    return Coded(codes.view(rows, cols), table, {"scale": scale.contiguous()}, without_offset)


def _read(
    tensors: Mapping[str, Tensor],
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " levels"], Float[Tensor, " blocks"], dict[str, Any]]:
    """Return codes, the level of each, the absmax of every block, and what the state says."""
    state = _state_of(tensors)
    n = math.prod(state["shape"])
    blocks = math.ceil(n / state["blocksize"])
    nested = "nested_absmax" in state or "nested_offset" in state
    packed = _part(tensors, "weight", math.ceil(n / 2), bytes_=True)
    absmax = _part(tensors, "weight.absmax", blocks)
    if nested:
        every = state["nested_blocksize"]
        scale = _part(tensors, "weight.nested_absmax", math.ceil(blocks / every)).repeat_interleave(every)[:blocks]
        if absmax.dtype != torch.uint8:
            raise CheckpointError(f"weight.absmax is {absmax.dtype}, expected uint8 beside a nested absmax")
        absmax = _part(tensors, "weight.nested_quant_map", 256)[absmax.long()] * scale
        absmax += torch.tensor(float(state["nested_offset"]))
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]
    return codes, _part(tensors, "weight.quant_map", 16), absmax.float(), state


def _state_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the JSON text among the tensors says, checked."""
    (text,) = (tensor for suffix, tensor in tensors.items() if suffix.startswith(STATE))
    try:
        state: dict[str, Any] = json.loads(bytes(text.tolist()))
        shape = state["shape"]
        fine = state["dtype"] in DTYPES and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
        sizes = [state[key] for key in ("blocksize", "nested_blocksize") if key in state]
        fine = fine and "blocksize" in state and all(isinstance(n, int) and n > 0 for n in sizes)
        if "nested_offset" in state:
            fine = fine and "nested_blocksize" in state and isinstance(state["nested_offset"], float)
    except (ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise CheckpointError(
            f"{STATE}... is {bytes(text.tolist())!r}, expected JSON with dtype, blocksize and shape [rows, cols]"
        )
    return state


def _part(tensors: Mapping[str, Tensor], suffix: str, size: int, bytes_: bool = False) -> Tensor:
    """Return a tensor as one row, or the bytes of it."""
    if suffix not in tensors:
        raise CheckpointError(f"{suffix} is missing, found only {', '.join(sorted(tensors))}")
    flat = tensors[suffix].flatten()
    if bytes_:
        flat = flat.view(torch.uint8)
    if len(flat) != size:
        raise CheckpointError(f"{suffix} has {len(flat)} values, expected {size}")
    return flat
