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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmquant import gguf_file
from llmquant.errors import CheckpointError
from llmquant.files import replacing
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
    def of(*stats: Stats) -> Entry:
        """Return the statistics of a site as the entry of one of its matrices; those of all experts for a stack."""
        sums = [known.square_mean.double().cpu() * known.tokens for known in stats]
        return Entry(torch.stack(sums).float(), torch.tensor([known.tokens for known in stats]))


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
    """Return an imatrix of either form, or raise CheckpointError. Allocates nothing that the file does not hold."""
    try:
        with path.open("rb") as file:
            older = file.read(4) != b"GGUF"
            file.seek(0)
            imatrix = _read_dat(_Dat(path, file)) if older else _read_gguf(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    for name, entry in imatrix.entries.items():
        if not bool((entry.sums.isfinite() & (entry.sums >= 0)).all()):
            raise _broken(path, f"{name!r} has sums of squares that are negative or not finite")
    return imatrix


def write(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF form, byte for byte as llama-imatrix does; the file appears when it is whole."""
    with replacing(path) as beside:
        _write(beside, imatrix)


def _write(path: Path, imatrix: Imatrix) -> None:
    writer = gguf.GGUFWriter(path, arch="")  # an imatrix has none
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


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is not an imatrix, or damaged: {what}")


def _read_gguf(path: Path) -> Imatrix:
    file = gguf_file.read(path)
    metadata = file.metadata
    if metadata.get("general.type") != "imatrix":
        raise _broken(path, f"general.type is {metadata.get('general.type')!r}")
    datasets = metadata.get(DATASETS)
    if not isinstance(datasets, list) or not all(isinstance(dataset, str) for dataset in datasets):
        raise _broken(path, f"{DATASETS} is {datasets!r}")
    chunks: dict[str, int] = {}
    for key in (CHUNK_COUNT, CHUNK_SIZE):
        number = metadata.get(key)
        if not isinstance(number, int) or not 0 <= number < 2**31:
            raise _broken(path, f"{key} is {number!r}")
        chunks[key] = number
    entries: dict[str, Entry] = {}
    for name in sorted({key.removesuffix(SUMS).removesuffix(COUNTS) for key in file.tensors}):
        sums, counts = _floats(file, name + SUMS), _floats(file, name + COUNTS)
        if len(sums) % len(counts):
            raise _broken(path, f"{name!r} has {len(sums)} sums for {len(counts)} counts")
        if not bool(((counts >= 0) & (counts <= MOST_TOKENS)).all()):
            raise _broken(path, f"{name!r} has counts that are negative or not finite")
        entries[name] = Entry(sums.reshape(len(counts), -1), counts.round().long())
    if not entries:
        raise _broken(path, "it has no entries")
    # a file name may be no UTF-8
    texts = tuple(dataset.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for dataset in datasets)
    return Imatrix(entries, texts, chunks[CHUNK_COUNT], chunks[CHUNK_SIZE])


def _floats(file: gguf_file.GgufFile, name: str) -> Float[Tensor, " numel"]:
    if name not in file.tensors or file.tensors[name].type != "f32":
        raise _broken(file.path, f"it has no tensor {name} of type f32")
    return file.tensors[name].read().view(torch.float32).flatten()


class _Dat:
    """A file of the older form, taken piece by piece; no piece is larger than what is left of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    @property
    def left(self) -> int:
        return self._size - self._file.tell()

    def take(self, count: int, what: str) -> bytes:
        if not 0 <= count <= self.left:
            raise _broken(self.path, f"{what} takes {count} bytes, where {self.left} are left")
        return self._file.read(count)

    def number(self, what: str, least: int) -> int:
        number = int.from_bytes(self.take(4, what), "little", signed=True)
        if number < least:
            raise _broken(self.path, f"{what} is {number}")
        return number

    def text(self, what: str) -> str:
        return self.take(self.number(f"the length of {what}", 0), what).decode("utf-8", "replace")

    def floats(self, count: int, what: str) -> Float[Tensor, " count"]:
        return torch.frombuffer(bytearray(self.take(4 * count, what)), dtype=torch.float32)


def _read_dat(file: _Dat) -> Imatrix:
    entries: dict[str, Entry] = {}
    chunk_count = 0
    for index in range(file.number("the number of entries", 1)):
        name = file.text(f"the name of entry {index}")
        if name in entries:
            raise _broken(file.path, f"{name!r} occurs twice")
        chunks = file.number(f"the number of chunks of {name!r}", 0)
        means = file.floats(file.number(f"the number of columns of {name!r}", 1), f"{name!r}")  # times chunks
        entries[name] = Entry(means[None] * DAT_CHUNK, torch.tensor([chunks * DAT_CHUNK]))
        chunk_count = max(chunk_count, chunks)
    datasets: tuple[str, ...] = ()
    if file.left:
        chunk_count = file.number("the number of chunks", 0)
        datasets = (file.text("the name of the text"),)
    if file.left:
        raise _broken(file.path, f"{file.left} bytes behind the end")
    return Imatrix(entries, datasets, chunk_count, DAT_CHUNK)
