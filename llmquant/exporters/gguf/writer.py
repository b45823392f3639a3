"""Write a GGUF file, or numbered shards, without a whole tensor in memory (the container is the gguf package's)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    Keys,
)
from torch import Tensor

from llmquant.checkpoint import Digest
from llmquant.errors import FormatError
from llmquant.files import cannot_write

LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its name, shape [..., rows, columns] and type in lower case."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type.upper()]]
        return math.prod(self.shape) // int(per_block) * int(block_bytes)


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Stored],
    data: Iterator[Iterable[Tensor]],
    split_bytes: int = 0,
) -> dict[Path, str]:
    """Write ``path``, or shards beside it named after it, and return the SHA-256 of each.

    metadata: with "general.architecture". data: the bytes of every tensor in turn (uint8), some rows at a time, in the
        order of ``tensors``.
    split_bytes: the most bytes of tensors in one shard; 0 for one file.
    """
    writer = _begun(path, metadata, tensors, split_bytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests = {file: Digest(file) for file in sorted(path.parent.glob(f"{path.stem}*.gguf"))}
        for tensor, pieces in zip(tensors, data, strict=True):
            writer.write_tensor_data(_Streamed(tensor, pieces))
            for digest in digests.values():
                digest.catch_up()
    finally:
        writer.close()
    return {file: digest.hexdigest() for file, digest in digests.items()}


def file_bytes(metadata: Mapping[str, Any], tensors: Sequence[Stored], split_bytes: int = 0) -> int:
    """Return the size of what ``write`` writes, all shards together."""
    try:
        with tempfile.TemporaryDirectory() as folder:  # the package's writer knows only files
            writer = _begun(Path(folder) / "header.gguf", metadata, tensors, split_bytes)
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            finally:
                writer.close()
            headers = [path.stat().st_size for path in Path(folder).iterdir()]
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()), error) from None
    return sum(_padded(size) for size in headers) + sum(_padded(tensor.bytes) for tensor in tensors)


def _padded(size: int) -> int:
    return int(GGUFWriter.ggml_pad(size, GGUF_DEFAULT_ALIGNMENT))


def _begun(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Stored], split_bytes: int) -> GGUFWriter:
    """Return the package's writer, told everything but the data."""
    writer = GGUFWriter(path, metadata[Keys.General.ARCHITECTURE], split_max_size=split_bytes)
    for key, value in metadata.items():
        if key != Keys.General.ARCHITECTURE:  # the writer has put it in already
            _add(writer, key, value)
    for tensor in tensors:
        type_ = GGMLQuantizationType[tensor.type.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.void), tensor.bytes, type_)
    return writer


@dataclass(frozen=True)
class _Streamed:
    """What the package's writer asks of an array, for one that is never in memory as a whole."""

    tensor: Stored
    pieces: Iterable[Tensor]

    @property
    def nbytes(self) -> int:
        return self.tensor.bytes

    def tofile(self, file: BinaryIO) -> None:
        written = 0
        for piece in self.pieces:
            written += file.write(piece.numpy().data)
        if written != self.tensor.bytes:
            raise FormatError(f"{self.tensor.name}: {written} bytes instead of {self.tensor.bytes}")


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key-value, in the value type that llama.cpp asks for."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        if not 0 <= value < 2**32:
            raise FormatError(f"{key} is {value}, which has no place in the 32 bits of a GGUF file")
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        if abs(value) > LARGEST_FLOAT:
            raise FormatError(f"{key} is {value}, which has no place in the 32 bits of a GGUF file")
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, GGUFValueType.STRING)
    elif value:
        writer.add_array(key, value)
