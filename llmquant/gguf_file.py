"""Read a GGUF file: metadata, tensor table and raw bytes, whoever wrote it.

Layout, little-endian:

    "GGUF"  uint32 version (2 or 3)  uint64 tensors  uint64 key-values
    key-values: string key, uint32 type, value
                (a string is a uint64 length and bytes; an array a uint32 type, a uint64 length and items)
    tensors:    string name, uint32 dimensions, uint64 each (columns first), uint32 type, uint64 offset
    padding to ``general.alignment`` (32), then the tensors' bytes at their offsets

Source: ggml's docs/gguf.md. A header may claim anything, so every count and
length is held against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llmquant import plugins
from llmquant.errors import CheckpointError
from llmquant.grid import BlockGrid, decode, per_column
from llmquant.runtime.coded import PIECE, Coded

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
MOST_ITEMS = 1 << 24  # of an array; the largest vocabularies have 2^18
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: shape [..., rows, columns], type in lower case, where its bytes begin and how many."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    start: int
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.bytes // math.prod(self.shape[:-1])

    def read(self, rows: tuple[int, int] | None = None) -> UInt8[Tensor, "rows row_bytes"]:
        """Return the stored bytes of all rows (of all matrices), or of some."""
        count = self.bytes // max(self.row_bytes, 1)
        first, last = rows or (0, count)
        with self.path.open("rb") as file:
            file.seek(self.start + first * self.row_bytes)
            raw = np.fromfile(file, np.uint8, (last - first) * self.row_bytes)
        if len(raw) != (last - first) * self.row_bytes:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read whole; the file changed or was cut")
        return torch.from_numpy(raw).view(last - first, self.row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """A file, or all shards of one: ``metadata`` by key (arrays as lists), ``tensors`` by name in file order."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Size of the file or shards."""
        return sum(path.stat().st_size for path in {t.path for t in self.tensors.values()} | {self.path})


def read(path: Path) -> GgufFile:
    """Return the header of a GGUF file, with that of the other shards if it is the first of several.

    Raises CheckpointError for whatever does not fit.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    shard = SHARD.search(path.name)
    if shard is None or int(shard[2]) != count:
        raise CheckpointError(f"{path}: is one of {count} shards, but not named ...-00001-of-{count:05}.gguf")
    if int(shard[1]) != 1:
        raise CheckpointError(
            f"{path}: is shard {int(shard[1])} of {count}. Give the first, ...-00001-of-{count:05}.gguf"
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        other = path.with_name(path.name.replace(shard[0], f"-{number:05}-of-{count:05}.gguf"))
        if not other.is_file():
            raise CheckpointError(f"{other}: missing, although {path.name} says that there are {count} shards")
        for name, tensor in _read_one(other).tensors.items():
            if name in tensors:
                raise CheckpointError(f"{other}: holds {name}, which another shard holds too")
            tensors[name] = tensor
    return GgufFile(path, first.metadata, tensors)


def to_float(tensor: GgufTensor, rows: tuple[int, int] | None = None) -> Float[Tensor, "rows cols"]:
    """Return the float32 values of a tensor's rows (of all its matrices), or of some."""
    raw = tensor.read(rows)
    if tensor.type in FLOATS:
        return raw.view(FLOATS[tensor.type]).float()
    grid = _block_grid(tensor)
    if grid is not None:
        codes, params = grid.from_bytes(raw.view(-1, grid.block_bytes))
        params = {key: value[:, None] for key, value in params.items()}
        return decode(grid, codes, *per_column(grid, params)).view(len(raw), -1)
    try:
        values = dequantize(raw.numpy(), GGMLQuantizationType[tensor.type.upper()])
    except NotImplementedError:
        raise CheckpointError(f"{tensor.path}: {tensor.name} has type {tensor.type}, which cannot be decoded") from None
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def coded(tensor: GgufTensor, rows: tuple[int, int], order: Int[Tensor, " rows"] | None = None) -> Coded:
    """Return some rows of a quantized tensor (of all its matrices) as they are stored.

    order: which row of the result each of them is; None: the same. Raises CheckpointError for a type without a grid.
    """
    grid = _block_grid(tensor)
    if grid is None:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} has type {tensor.type}, which llmquant computes decoded only: "
            "`llmquant eval`. llama.cpp runs it"
        )
    pieces = []
    step = max(PIECE // tensor.shape[-1], 1)
    for start in range(*rows, step):
        raw = tensor.read((start, min(start + step, rows[1])))
        codes, params = grid.from_bytes(raw.view(-1, grid.block_bytes))
        pieces.append({"": codes.view(len(raw), -1)} | {k: v.view(len(raw), -1, v.shape[1]) for k, v in params.items()})
    parts = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if order is not None:
        parts = {name: torch.empty_like(value).index_copy_(0, order, value) for name, value in parts.items()}
    return Coded(parts.pop(""), grid.table, parts, partial(_levels, grid))


def _levels(grid: BlockGrid, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    scale, offset = grid.levels(dict(params))
    return scale.flatten(1), offset.flatten(1)


def _block_grid(tensor: GgufTensor) -> BlockGrid | None:
    """Return the grid of a tensor's type, if there is one."""
    if tensor.type not in plugins.names("grids"):
        return None
    config = plugins.load("grids", tensor.type, tensor.name).Config()
    grid = config.bind(math.prod(tensor.shape[:-1]), tensor.shape[-1], torch.float32)
    return grid if isinstance(grid, BlockGrid) else None


class _Header:
    """Takes values one after the other out of a file's bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        self.at = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: is not a sound GGUF file: at byte {self.at}, {what}. Download it again.")

    def take(self, count: int, what: str) -> bytes:
        left = len(self.bytes) - self.at
        if count > left:
            raise self.fail(f"{what} takes {count} bytes, but only {left} are left")
        piece = self.bytes[self.at : self.at + count].tobytes()
        self.at += count
        return piece

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if what == "an item":  # a token may be a piece of a character
                return raw.decode("utf-8", errors="surrogateescape")
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, type_: int, key: str) -> Any:
        if type_ in SCALARS:
            return self.number(SCALARS[type_], key)
        if type_ == STRING:
            return self.string(key)
        if type_ != ARRAY:
            raise self.fail(f"{key} has value type {type_}, which does not exist")
        item, count = self.number("I", key), self.number("Q", key)
        least = struct.calcsize(f"<{SCALARS[item]}") if item in SCALARS else 8
        if item not in SCALARS and item != STRING:
            raise self.fail(f"{key} is an array of value type {item}, which is not read")
        if count > MOST_ITEMS or count * least > len(self.bytes) - self.at:
            raise self.fail(f"{key} has {count} items, more than the rest of the file or sense can hold")
        if item == STRING:
            return [self.string("an item") for _ in range(count)]
        return list(struct.unpack(f"<{count}{SCALARS[item]}", self.take(count * least, key)))


def _read_one(path: Path) -> GgufFile:
    header = _Header(path)
    if header.take(4, "the magic") != b"GGUF":
        raise CheckpointError(f"{path}: is not a GGUF file: it does not begin with GGUF")
    version = header.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise CheckpointError(
            f"{path}: has GGUF version {version}, and only 2 and 3 are read"
            + ("; it is a big-endian file, for other machines" if swapped in (2, 3) else "")
        )
    tensors, pairs = header.number("Q", "the number of tensors"), header.number("Q", "the number of keys")
    for count, least, what in ((tensors, 32, "tensors"), (pairs, 13, "keys")):
        if count * least > len(header.bytes):
            raise header.fail(f"the header claims {count} {what}, which the file cannot hold")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = header.string("a key")
        if key in metadata:
            raise header.fail(f"the key {key} comes twice")
        metadata[key] = header.value(header.number("I", key), key)
    entries = [_entry(header) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.fail(f"general.alignment is {alignment!r}, not a power of two")
    base = -(-header.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    end = 0
    for name, shape, type_, offset in entries:
        per_block, block_bytes = GGML_QUANT_SIZES[type_]
        count = math.prod(shape)
        size = count // per_block * block_bytes
        if name in found:
            raise header.fail(f"the tensor {name} comes twice")
        if shape[-1] % per_block:
            raise header.fail(f"{name} has {shape[-1]} columns, not a multiple of the {per_block} of {type_.name}")
        if offset % alignment or base + offset + size > len(header.bytes):
            raise header.fail(
                f"{name} lies at {base + offset} and takes {size} bytes, but the file has {len(header.bytes)} "
                f"(and offsets are multiples of {alignment})"
            )
        if offset < end:
            raise header.fail(f"{name} begins inside the tensor before it")
        end = offset + size
        found[name] = GgufTensor(name, shape, type_.name.lower(), path, base + offset, size)
    return GgufFile(path, metadata, found)


def _entry(header: _Header) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = header.string("a tensor's name")
    dimensions = header.number("I", name)
    if not 1 <= dimensions <= 4:
        raise header.fail(f"{name} has {dimensions} dimensions, not 1 to 4")
    shape = tuple(header.number("Q", name) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise header.fail(f"{name} has shape {list(shape)}: it is empty")
    number = header.number("I", name)
    try:
        type_ = GGMLQuantizationType(number)
    except ValueError:
        raise header.fail(f"{name} has tensor type {number}, which is not known") from None
    return name, shape, type_, header.number("Q", name)
