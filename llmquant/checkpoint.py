"""Model folders: tensors by name out of safetensors files, and new ones written.

Only headers are read until a tensor is asked for. Weights come from safetensors
alone: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmquant.errors import CheckpointError, LlmquantError, OutputError
from llmquant.files import replacing, write_json
from llmquant.models.spec import ModelSpec
from llmquant.runtime.coded import Coded

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
METADATA = {"format": "pt"}
SHARD_BYTES = 5_000_000_000
MOST_JSON = 1 << 28  # bytes; the largest tokenizers have a tenth of that
COPIED = {".json", ".model", ".txt", ".jinja"}
"""Endings of the files beside the weights that are copied (tokenizer, generation settings, vocabulary)."""
FOLLOWED = ("configuration_files", "fast_tokenizer_files", "vocab_file", "merges_file", "tokenizer_file", "spm_file")
"""Keys by which transformers finds further files."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    key: its name in the file, or in one that is written of it. stack: the tensor of the file that holds it where that
    is one for all experts of a layer, which of them it is, and its first row there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    key: str
    stack: tuple[str, int, int] | None = None

    @property
    def stored(self) -> str:
        """The name of the tensor that the file has."""
        return self.stack[0] if self.stack else self.key

    def of_expert(self, name: str, expert: int, first: int, last: int) -> TensorInfo:
        """Return some rows of one expert as a tensor of its own; this one is [experts, rows, columns]."""
        return TensorInfo((last - first, self.shape[2]), self.dtype, self.file, name, (self.key, expert, first))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """A model folder. ``infos`` lists every tensor; ``read`` returns one.

    path: the folder, or the one file that holds everything.
    model_config: the transformers configuration, where it is not in config.json.
    """

    model_config: Any = None

    def __init__(self, folder: Path) -> None:
        """Read config.json and all safetensors headers; raise CheckpointError for what is missing or broken."""
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: there is no such folder. Give a model folder or a hub id like `org/name`."
            )
        self.folder = self.path = folder
        self.config: dict[str, Any] = read_json(folder / "config.json", "a model folder holds one")
        self.infos: dict[str, TensorInfo] = {}
        for file in self._files():
            for name, info in _header(folder / file).items():
                self.infos[name] = info

    def _files(self) -> list[str]:
        if (self.folder / INDEX).exists():
            index = read_json(self.folder / INDEX, "it lists the shards")
            shards = index.get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(f, str) for f in shards.values()):
                raise CheckpointError(f"{self.folder / INDEX}: has no `weight_map` from tensor names to files")
            files = sorted(set(shards.values()))
            for file in files:
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise CheckpointError(f"{self.folder / INDEX}: {file!r} is not the name of a shard in this folder")
                if not (self.folder / file).is_file():
                    count = sum(f == file for f in shards.values())
                    raise CheckpointError(
                        f"{self.folder / file}: missing, although {INDEX} says that it holds {count} tensors. "
                        "Download the model again."
                    )
            return files
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: holds {pickles[0]} but no {SINGLE}. A pickle can run code when it is loaded, so it is "
                "not read here. If you trust it, convert it: "
                'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
                f"m, new = {str(self.folder)!r}, {f'{self.folder}-safetensors'!r}; "
                'M.from_pretrained(m).save_pretrained(new); T.from_pretrained(m).save_pretrained(new)"'
            )
        raise CheckpointError(f"{self.folder}: has neither {SINGLE} nor {INDEX}; there are no weights in it")

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    @property
    def format(self) -> str:
        """How the weights are stored: a dtype, or the name of an exporter."""
        return str(next(iter(self.infos.values())).dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Size of the weights' files."""
        return sum((self.folder / file).stat().st_size for file in {info.file for info in self.infos.values()})

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor as it is stored, or some rows of it."""
        if name not in self.infos:
            raise CheckpointError(f"{self.folder}: has no tensor {name}")
        info = self.infos[name]
        file, key = info.file, info.stored
        try:
            # opened anew each time: an open file stays mapped, and what was read of it counts as this process's memory
            with safe_open(self.folder / file, "pt") as opened:
                if info.stack:
                    _, expert, row = info.stack
                    first, last, _ = slice(*(rows or (None,))).indices(info.shape[0])
                    stacked: Tensor = opened.get_slice(key)[expert : expert + 1, row + first : row + last]
                    return stacked[0]
                tensor: Tensor = opened.get_slice(key)[slice(*rows)] if rows else opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read: {error}") from None
        return tensor

    def operator(self, name: str, device: torch.device) -> nn.Module | None:
        """Return the module that computes the linear ``name`` as a runtime does; None where its weight says it all."""
        return None

    def coded(self, name: str) -> Coded | None:
        """Return the weight of a linear or embedding as it is stored; None where it is not quantized."""
        return None

    def align(self, spec: ModelSpec) -> None:
        """Name the tensors as the modules of the model.

        Files may leave out the first part ("h.0." of "transformer.h.0.") or have
        older names for some modules (``spec.renamed``). Experts that a file keeps in one tensor get one each.
        """
        for old, new in spec.renamed:
            part = re.compile(rf"(?:^|(?<=\.)){re.escape(old)}")
            self.infos = {part.sub(new, name): info for name, info in self.infos.items()}
        if spec.experts is not None:
            self.infos = {new: part for name, info in self.infos.items() for new, part in _experts(name, info)}
        if any(name.startswith(f"{spec.layers}.0.") for name in self.infos):
            return
        parts = spec.layers.split(".")
        for cut in range(1, len(parts)):
            if any(name.startswith(".".join([*parts[cut:], "0."])) for name in self.infos):
                prefix = ".".join([*parts[:cut], ""])
                heads = (f"{spec.head}.", prefix)
                self.infos = {n if n.startswith(heads) else prefix + n: i for n, i in self.infos.items()}


def _experts(name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Yield a tensor, or, if it holds a matrix of all experts of a layer, that of each, gate and up apart."""
    module, _, last = name.rpartition(".")
    if len(info.shape) != 3 or last not in ("gate_up_proj", "down_proj"):
        yield name, info
        return
    if not info.numel:  # a header may name any number of experts that have no bytes
        raise CheckpointError(f"{name}: has the shape {list(info.shape)}, so there is nothing in it")
    parts = [last] if last == "down_proj" else ["gate_proj", "up_proj"]
    rows = info.shape[1] // len(parts)
    for expert in range(info.shape[0]):
        for i, part in enumerate(parts):
            new = f"{module}.{expert}.{part}.weight"
            yield new, info.of_expert(new, expert, i * rows, (i + 1) * rows)


class Digest:
    """The SHA-256 of a file that may still be growing: what is there is hashed while more is computed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._done = 0

    def catch_up(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._done)
            while piece := file.read(1 << 20):
                self._hash.update(piece)
                self._done += len(piece)

    def hexdigest(self) -> str:
        self.catch_up()
        return self._hash.hexdigest()


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise CheckpointError when a tensor holds NaN or infinite values."""
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):  # which torch cannot add up
        tensor = tensor.float()
    if not math.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():  # a sum is quick
        raise CheckpointError(
            f"{where} has {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite. The file is damaged, "
            "or training diverged; nothing useful can be made of it."
        )


def locate(model: str | Path) -> Path:
    """Return the local folder of a model, downloading a hub id's safetensors, configuration, tokenizer and card."""
    path = Path(model)
    try:
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{str(path)[:200]}: cannot be opened: {error.strerror}") from None
    if exists or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        return path
    try:
        return Path(
            snapshot_download(
                str(model), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{model}: there is no such folder, and as a hub id it cannot be downloaded: {first}"
        ) from None


@contextmanager
def by_library(path: Path, what: str) -> Iterator[None]:
    """While active, whatever a library raises over the contents of a file becomes one CheckpointError.

    what: that cannot be done. There is no narrower class to catch: tokenizers raises bare Exceptions, and transformers
    what its code happens to meet in a configuration.
    """
    try:
        yield
    except LlmquantError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code=True" in reason:
            reason = "it needs Python code that it brings along. If you trust that: --trust-remote-code"
        reason = reason[:300] or type(error).__name__
        raise CheckpointError(f"{path}: {what}: {reason}") from error


def check_followed(folder: Path) -> None:
    """Raise CheckpointError when a configuration names a file of the tokenizer or model outside of the folder.

    Or when one that would be copied is a link to such a file, other than those by which the hub's cache keeps a model.
    """
    here = folder.resolve()
    inside = [here, *([here.parents[1] / "blobs"] if here.parent.name == "snapshots" else [])]
    for path in folder.iterdir():
        if path.suffix in COPIED and path.is_symlink():
            leads = path.resolve()
            if not any(leads.is_relative_to(place) for place in inside):
                raise CheckpointError(
                    f"{path}: is a link out of the model's folder, to {leads}, and would be copied into the output. "
                    "Put the file itself here if it belongs to the model."
                )
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name, "it is there")
        for key in FOLLOWED:
            value = config.get(key)
            for file in value if isinstance(value, list) else [value]:
                # an author's own path is harmless where it does not exist
                if isinstance(file, str) and Path(file).name != file and os.path.lexists(folder / file[:4096]):
                    raise CheckpointError(
                        f"{folder / name}: {key} is {file!r}, which is not a file of this folder. Remove the key, or "
                        "copy the file here and name it alone."
                    )


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Return a JSON object from a file, or raise CheckpointError."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a file")
        if path.stat().st_size > MOST_JSON:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, more than the {MOST_JSON} that are read")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {why}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, "pt") as file:
            infos = {}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                piece = file.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{path}: {name} has dtype {piece.get_dtype()}, which cannot be read here")
                infos[name] = TensorInfo(tuple(piece.get_shape()), DTYPES[piece.get_dtype()], path.name, name)
            return infos
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is not a whole safetensors file ({error}). It may have been cut short; download it again."
        ) from None


def write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    sketches: Iterator[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write tensors as safetensors files, with one tensor in memory; return the size of the files in bytes.

    One file when everything fits in a shard, else numbered shards and an index.

    sketches: the same tensors on the meta device, of which those with one-byte elements may be longer.
    """
    shards = list(_cut(sketches, shard_bytes))
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = 0
    for name, sketched in zip(names, shards, strict=True):
        with _Shard(folder / name, sketched) as shard:
            for key, tensor in islice(tensors, len(sketched)):
                shard.add(key, tensor)
                total += tensor.nbytes
    assert next(tensors, None) is None
    if len(shards) > 1:
        index = {tensor: name for name, sketched in zip(names, shards, strict=True) for tensor in sketched}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return sum((folder / name).stat().st_size for name in names)


def shards_bytes(sketches: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Return the size of the files that ``write_shards`` makes of these tensors."""
    return sum(
        _data_begins(sketched) + sum(tensor.nbytes for tensor in sketched.values())
        for sketched in _cut(sketches, shard_bytes)
    )


def _cut(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one shard after the other."""
    pending: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            yield pending
            pending, size = {}, 0
        pending[name] = tensor
        size += tensor.nbytes
    yield pending


class _Shard:
    """A safetensors file that is written as its tensors come.

    Eight bytes, a JSON header filled up with spaces, the tensors, without gaps (safetensors 0.5, README). Tensors with
    elements of several bytes have their places, the largest elements first, so that all are aligned; those of one byte
    follow as they come.
    """

    def __init__(self, path: Path, sketched: Mapping[str, Tensor]) -> None:
        self._header: dict[str, Any] = {"__metadata__": METADATA}
        self._begin = _data_begins(sketched)
        wide = [name for name, tensor in sketched.items() if tensor.itemsize > 1]
        wide.sort(key=lambda name: -sketched[name].itemsize)
        ends = itertools.accumulate((sketched[name].nbytes for name in wide), initial=0)
        self._places = dict(zip(wide, ends, strict=False))
        self._end = sum(sketched[name].nbytes for name in wide)
        self._file = path.open("wb")

    def __enter__(self) -> _Shard:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        at = self._places.get(name, self._end)
        if tensor.itemsize == 1:
            self._end += tensor.nbytes
        self._header[name] = _entry(tensor, at)
        self._file.seek(self._begin + at)
        # of a single element, any stride is contiguous to torch, but not to `view`
        flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __exit__(self, *raised: object) -> None:
        with self._file as file:
            if raised[0] is None:
                file.seek(0)
                length = self._begin - 8
                file.write(length.to_bytes(8, "little") + _json(self._header).ljust(length))


def _data_begins(sketched: Mapping[str, Tensor]) -> int:
    """Return where the first tensor is in a file: behind a header that has room for any place of each."""
    total = sum(tensor.nbytes for tensor in sketched.values())
    header = {"__metadata__": METADATA} | {name: _entry(tensor, total) for name, tensor in sketched.items()}
    length = 8 + len(_json(header))
    return length + -length % 8


def _entry(tensor: Tensor, at: int) -> dict[str, Any]:
    """Return what a header tells of a tensor."""
    dtype = next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype)
    return {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def atomic_save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], kept: str) -> None:
    """Write one safetensors file, whole or not at all; raise OutputError. kept: what remains, and the remedy."""
    with replacing(path, kept) as beside:
        save_file(tensors, beside, metadata=metadata)


def check_output(folder: Path) -> None:
    """Raise OutputError unless ``folder`` is free to be written."""
    if folder.name in ("", ".."):
        raise OutputError(f"{folder}: give a new folder a name of its own, e.g. --out {folder / 'quantized'}")
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        parent = next(p for p in folder.absolute().parents if p.exists())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    if taken:
        raise OutputError(f"{folder}: exists and is not an empty folder. Choose another --out, or remove it first.")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot be written: no permission in {parent}")
