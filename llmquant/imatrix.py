"""llama.cpp's imatrix files: how large the activations are that every column of a matrix meets.

Two forms, both little-endian, read from their definition (tools/imatrix in
llama.cpp 0.5.0). The newer is a GGUF file: under every matrix's name
``.in_sum2`` (x² of each input column, summed over tokens) and ``.counts`` (the
tokens), float32, a row for every expert. The older (.dat) is

    int32 entries, then each: int32 length, name, int32 chunks n, int32 columns, float32 mean x² · n of each column
    int32 chunks, int32 length, name of the text        (both missing in the oldest files)

and knows neither the experts of a matrix nor the tokens of a chunk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.stats import Stats

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
DAT_CHUNK = 512  # tokens of a chunk where the file does not say: what llama.cpp takes unless told otherwise
MOST_TOKENS = 2**53


@dataclass(frozen=True)
class Entry:
    """What one matrix, or each of a stack of experts, has seen.

    sums: x² of every column, summed over tokens.
    counts: tokens.
    """

    sums: Float[Tensor, "matrices cols"]
    counts: Int[Tensor, " matrices"]

    @staticmethod
    def of(stats: Stats) -> Entry:
        """Return the statistics of a site as the entry of one of its matrices."""
        return Entry((stats.square_mean.double() * stats.tokens).float()[None], torch.tensor([stats.tokens]))


@dataclass(frozen=True)
class Imatrix:
    """An entry for every GGUF tensor name, and where they come from: texts, and chunks of so many tokens."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def square_mean(self, name: str, cols: int, matrices: int = 1) -> Float[Tensor, "matrices cols"] | None:
        """Return the mean of x² over tokens, or None for a tensor without an entry.

        An expert that saw no token gets ones, as in llama-quantize. Raises
        CheckpointError if the entry is not of this size.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.numel() != matrices * cols:
            raise CheckpointError(
                f"imatrix: {name} has {entry.sums.numel()} columns, but the model's has {matrices} x {cols}. "
                "The imatrix belongs to another model"
            )
        counts = entry.counts[:, None]
        return torch.where(counts > 0, entry.sums / counts, torch.ones(())).reshape(matrices, cols)


def read(path: Path) -> Imatrix:
    """Return an imatrix of either form, or raise CheckpointError. Takes no more memory than the file has bytes."""
    try:
        with path.open("rb") as file:
            source = _Source(path, file)
            imatrix = _read_gguf(source) if source.starts_with(b"GGUF") else _read_dat(source)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for name, entry in imatrix.entries.items():
        if not bool((entry.sums.isfinite() & (entry.sums >= 0)).all()):
            raise source.broken(f"{name} has sums of squares that are negative or not finite")
    return imatrix


def write(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF form, byte for byte as llama-imatrix does; the file appears when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(partial, arch="")  # an imatrix has none
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(imatrix.datasets) or [""])  # the writer has no empty arrays
    writer.add_uint32(CHUNK_COUNT, imatrix.chunk_count)
    writer.add_uint32(CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        sums, counts = entry.sums.float(), entry.counts.float()[:, None]
        stacked = len(counts) > 1  # llama.cpp leaves out dimensions of one
        writer.add_tensor(name + SUMS, (sums if stacked else sums[0]).cpu().contiguous().numpy())
        writer.add_tensor(name + COUNTS, (counts if stacked else counts[0]).cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


class _Source:
    """A file read piece by piece; no piece is larger than what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: is not an imatrix, or damaged: {what}")

    @property
    def position(self) -> int:
        return self._file.tell()

    @property
    def left(self) -> int:
        return self._size - self.position

    def starts_with(self, magic: bytes) -> bool:
        found = self._file.read(len(magic))
        self._file.seek(0)
        return found == magic

    def seek(self, position: int) -> None:
        """Go to a place in the file; what lies behind its end has nothing left."""
        self._file.seek(min(position, self._size))

    def take(self, count: int, what: str) -> bytes:
        if not 0 <= count <= self.left:
            raise self.broken(f"{what} takes {count} bytes at offset {self.position}, where {self.left} are left")
        return self._file.read(count)

    def number(self, code: str, what: str) -> Any:
        """Return one number; ``code`` is struct's."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def text(self, code: str, what: str) -> str:
        """Return a string behind its length."""
        data = self.take(self.number(code, f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not text") from None

    def floats(self, count: int, what: str) -> Float[Tensor, " count"]:
        return torch.frombuffer(bytearray(self.take(4 * count, what)), dtype=torch.float32)


def _read_dat(source: _Source) -> Imatrix:
    entries: dict[str, Entry] = {}
    chunk_count = 0
    for index in range(_positive(source, "the number of entries")):
        name = source.text("i", f"the name of entry {index}")
        chunks = source.number("i", f"the number of chunks of {name!r}")
        if chunks < 0 or name in entries:
            raise source.broken(f"{name!r} has {chunks} chunks" if chunks < 0 else f"{name!r} occurs twice")
        values = source.floats(_positive(source, f"the number of columns of {name!r}"), f"{name!r}")
        entries[name] = Entry(values[None] * DAT_CHUNK, torch.tensor([chunks * DAT_CHUNK]))
        chunk_count = max(chunk_count, chunks)
    datasets: tuple[str, ...] = ()
    if source.left:
        chunk_count = source.number("i", "the number of chunks")
        datasets = (source.text("i", "the name of the text"),)
    if source.left or chunk_count < 0:
        raise source.broken(f"{chunk_count} chunks, and {source.left} bytes behind the end")
    return Imatrix(entries, datasets, chunk_count, DAT_CHUNK)


def _positive(source: _Source, what: str) -> int:
    number = int(source.number("i", what))
    if number < 1:
        raise source.broken(f"{what} is {number}")
    return number


def _read_gguf(source: _Source) -> Imatrix:
    source.take(4, "the magic")
    version = source.number("I", "the version")
    if version not in (2, 3):
        raise source.broken(f"version {version} of GGUF is not 2 or 3")
    tensor_count = source.number("Q", "the number of tensors")
    metadata: dict[str, Any] = {}
    for _ in range(source.number("Q", "the number of keys")):
        key = source.text("Q", "a key")
        if key in metadata:
            raise source.broken(f"the key {key!r} occurs twice")
        metadata[key] = _value(source, source.number("I", f"the type of {key!r}"), key)
    if metadata.get("general.type") != "imatrix":
        raise source.broken(f"general.type is {metadata.get('general.type')!r}")
    datasets = metadata.get(DATASETS)
    if not isinstance(datasets, tuple):
        raise source.broken(f"{DATASETS} is {datasets!r}")
    chunks: dict[str, int] = {}
    for key in (CHUNK_COUNT, CHUNK_SIZE):
        number = metadata.get(key)
        if not isinstance(number, int) or number < 0:
            raise source.broken(f"{key} is {number!r}")
        chunks[key] = number
    tensors = _tensors(source, tensor_count, metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    entries: dict[str, Entry] = {}
    for name in sorted({key.removesuffix(SUMS).removesuffix(COUNTS) for key in tensors}):
        sums, counts = tensors.get(name + SUMS), tensors.get(name + COUNTS)
        if sums is None or counts is None:
            raise source.broken(f"{name!r} has no {SUMS if sums is None else COUNTS}")
        if len(sums) % len(counts):
            raise source.broken(f"{name!r} has {len(sums)} sums for {len(counts)} counts")
        if not bool(((counts >= 0) & (counts <= MOST_TOKENS)).all()):
            raise source.broken(f"{name!r} has counts that are negative or not finite")
        entries[name] = Entry(sums.reshape(len(counts), -1), counts.round().long())
    if not entries:
        raise source.broken("it has no entries")
    return Imatrix(entries, datasets, chunks[CHUNK_COUNT], chunks[CHUNK_SIZE])


def _tensors(source: _Source, tensor_count: int, alignment: Any) -> dict[str, Float[Tensor, " numel"]]:
    """Return all tensors flat. The source stands at their descriptions."""
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise source.broken(f"general.alignment is {alignment!r}")
    places: dict[str, tuple[int, int]] = {}
    for _ in range(tensor_count):
        name = source.text("Q", "the name of a tensor")
        if name in places:
            raise source.broken(f"the tensor {name!r} occurs twice")
        dimensions = source.number("I", f"the number of dimensions of {name!r}")
        if dimensions > 4:
            raise source.broken(f"{name!r} has {dimensions} dimensions")
        numel = 1
        for _ in range(dimensions):
            numel *= source.number("Q", f"the shape of {name!r}")
        if not numel:
            raise source.broken(f"{name!r} is empty")
        type_ = source.number("I", f"the type of {name!r}")
        if type_ != gguf.GGMLQuantizationType.F32:
            raise source.broken(f"{name!r} is of type {type_}, not float32")
        places[name] = (source.number("Q", f"the offset of {name!r}"), numel)
    start = -(-source.position // alignment) * alignment
    if (total := sum(4 * numel for _, numel in places.values())) > source.left:
        raise source.broken(f"its tensors take {total} bytes, where {source.left} are left")
    found: dict[str, Float[Tensor, " numel"]] = {}
    for name, (offset, numel) in places.items():
        source.seek(start + offset)
        found[name] = source.floats(numel, f"{name!r}")
    return found


CODES = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def _value(source: _Source, type_: int, key: str) -> Any:
    """Return a value of GGUF's metadata; of an array a tuple of its strings, or None for one of numbers."""
    if type_ in CODES:
        return source.number(CODES[type_], f"{key!r}")
    if type_ == STRING:
        return source.text("Q", f"{key!r}")
    if type_ != ARRAY:
        raise source.broken(f"{key!r} is of the unknown type {type_}")
    item, count = source.number("I", f"the type of {key!r}"), source.number("Q", f"the length of {key!r}")
    if item == STRING:
        return tuple(source.text("Q", f"{key!r}") for _ in range(count))
    if item not in CODES:
        raise source.broken(f"{key!r} is an array of the unknown type {item}")
    source.take(count * struct.calcsize(CODES[item]), f"{key!r}")
    return None
