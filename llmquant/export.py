"""Write a finished work folder as a model folder in one format, tensor by tensor.

An exporter module packs one linear (``pack``), describes all of them
(``quantization_config``) and decodes one (``unpack``); the folder around them is
written here: shards, config.json, the tokenizer's files byte for byte, the recipe.
One whose format is a file of its own writes that itself (``write``), the tokenizer
included (``check_tokenizer``).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from llmquant import plugins, readback, recipe
from llmquant.checkpoint import (
    COPIED,
    INDEX,
    SHARD_BYTES,
    Checkpoint,
    Digest,
    check_finite,
    check_output,
    shards_bytes,
    write_shards,
)
from llmquant.errors import FormatError, OutputError
from llmquant.files import cannot_write, sync, write_json, write_text
from llmquant.grid import QuantizedTensor
from llmquant.plan import Linear, Plan, placeholder

LOCK = ".lock"
KEPT = (
    "Nothing is left half-written, and finished layers are kept. Make room or choose another --out, and run the same "
    "command again."
)


@runtime_checkable
class Source(Protocol):
    """Where quantized linears come from: a work folder, or the checkpoint itself."""

    def load(self, linear: Linear, rows: int | None = None) -> QuantizedTensor:
        """Return a linear, or the first rows of it."""

    def pieces(
        self, linears: Iterable[Linear], pack: Callable[[QuantizedTensor], Tensor]
    ) -> Generator[Iterator[Tensor], None, None]:
        """Yield each linear as pieces of some rows, in order, packed; take all of one before the next.

        Close it where it is not taken to its end.
        """


@dataclass(frozen=True)
class Written:
    """The size of the weights' files, and the SHA-256 of every file."""

    bytes: int
    hashes: dict[str, str]


def check_tokenizer(formats: Iterable[str], tokenizer: Any, config: Any) -> None:
    """Raise FormatError when a format stores the tokenizer, and cannot store this one.

    config: the model's transformers configuration.
    """
    for name in formats:
        exporter = plugins.load("exporters", name, "format")
        if hasattr(exporter, "check_tokenizer"):
            exporter.check_tokenizer(tokenizer, config)


def file_bytes(plan: Plan, checkpoint: Checkpoint, format_: str, config: Any) -> int:
    """Return the size of the weights' files that ``write`` will make, to the byte; reads no weights.

    Of bitsandbytes with double quantization, the most that they can have.

    config: the model's transformers configuration.
    """
    exporter = plugins.load("exporters", format_, "format")
    if hasattr(exporter, "file_bytes"):
        size: int = exporter.file_bytes(plan, checkpoint, config)
        return size
    return shards_bytes(_sketches(plan, checkpoint, exporter), _shard_bytes(plan))


class _Shapes(Checkpoint):
    """A checkpoint without any numbers (meta tensors)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.infos = checkpoint.infos

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return torch.empty(self.infos[name].shape, dtype=self.infos[name].dtype, device="meta")


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    source: Source,
    format_: str,
    config: Any,
    out: Path,
    progress: Callable[[str, int, int], None],
    verify: bool = True,
) -> Written:
    """Write the folder ``out``; it appears under its name only when it is complete, and reads back as it should.

    config: the model's transformers configuration. verify: read it back (``llmquant.readback``).

    Raises OutputError where that cannot be done, and then leaves nothing of it.
    """
    check_output(out)
    exporter = plugins.load("exporters", format_, "format")

    def tell(done: int, total: int) -> None:
        progress(f"writing {format_}", done, total)

    with _whole(out) as partial:
        told: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if hasattr(exporter, "write"):
            hashes: dict[str, str] = exporter.write(partial, plan, checkpoint, source, config, tell)
            written = sum((partial / name).stat().st_size for name in hashes)
        else:
            hashes = {}
            written = _write_folder(partial, plan, checkpoint, source, exporter, tell, told)
        write_text(partial / "recipe.yaml", recipe.dump(plan.recipe))
        if verify:
            progress("reading back", 0, 1)
            readback.check(partial, plan, checkpoint, source.load, format_, config, told)
        rest = [path for path in sorted(partial.iterdir()) if path.name not in hashes and path.name != LOCK]
        hashes |= {path.name: Digest(path).hexdigest() for path in rest}
    return Written(written, hashes)


def write_all(
    plan: Plan,
    checkpoint: Checkpoint,
    source: Source,
    formats: Sequence[str],
    config: Any,
    out: Path,
    progress: Callable[[str, int, int], None],
    verify: bool = True,
) -> dict[str, tuple[Path, Written]]:
    """Write the folder ``out`` in one format, or with a folder in it for each of several; return folders by format."""
    if len(formats) == 1:
        return {formats[0]: (out, write(plan, checkpoint, source, formats[0], config, out, progress, verify))}
    check_output(out)
    with _whole(out) as partial:
        return {
            name: (out / name, write(plan, checkpoint, source, name, config, partial / name, progress, verify))
            for name in formats
        }


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give an empty folder beside ``out``, which takes its place, on the disk, when the context ends well."""
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.is_dir() and not (partial / LOCK).exists() and any(partial.iterdir()):
            raise OutputError(
                f"{partial}: is not of llmquant, which would write there. Rename it, or give another --out"
            )
        partial.mkdir(parents=True, exist_ok=True)
        lock = FileLock(partial / LOCK)
        lock.acquire(timeout=0)
        try:
            for path in partial.iterdir():
                if path.name != LOCK:  # what a run that was killed has left
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield partial
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
            (out / LOCK).unlink()  # not before: another run would take the folder for one that was left behind
            sync(out.parent)
        except BaseException:  # a full disk, a broken tensor, or Ctrl-C
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.release()
    except Timeout:
        raise OutputError(f"{out}: another run is writing it. Wait for that, or choose another --out") from None
    except (OSError, SafetensorError) as error:
        raise cannot_write(out, error, KEPT) from None


def _write_folder(
    folder: Path,
    plan: Plan,
    checkpoint: Checkpoint,
    source: Source,
    exporter: ModuleType,
    tell: Callable[[int, int], None],
    told: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> int:
    """Write a model folder like the float one, and return the size of its weights.

    told: gets the dtype and shape of every tensor.
    """
    if not plan.quantized:
        raise FormatError("no linear is left to quantize, and a packed folder needs one. Change the recipe's grid")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _tensors(plan, checkpoint, lambda linear: exporter.pack(source.load(linear)), tell):
            told[name] = tensor.dtype, tuple(tensor.shape)
            yield name, tensor

    written = write_shards(folder, tensors(), _sketches(plan, checkpoint, exporter), _shard_bytes(plan))
    config = dict(checkpoint.config)
    grids = {name: linear.grid for name, linear in plan.quantized.items()}
    named = (*grids, *plan.floats) if plan.spec.renamed else ()
    stored = {name: key for name in named if (key := _stored(checkpoint, name)) != name}
    # readers name a linear as their own module does, or as the file does
    grids |= {stored[name]: grid for name, grid in grids.items() if name in stored}
    kept = [*plan.floats, *(stored[name] for name in plan.floats if name in stored)]
    settings = exporter.quantization_config(grids, kept, _settings(plan))
    config["quantization_config"] = settings
    if plan.untie:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
    for name, content in exporter.extra_files(settings).items():
        write_json(folder / name, content)
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in COPIED and path.name not in (INDEX, "config.json") and path.is_file():
            shutil.copyfile(path, folder / path.name)
    return written


def _stored(checkpoint: Checkpoint, linear: str) -> str:
    """Return the name of a linear in the checkpoint's files."""
    info = checkpoint.infos.get(f"{linear}.weight")
    return linear if info is None else info.key.removesuffix(".weight")


def _shard_bytes(plan: Plan) -> int:
    asked = plan.recipe.shard_bytes
    return SHARD_BYTES if asked is None else asked or sys.maxsize


def _tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    packed: Callable[[Linear], dict[str, Tensor]],
    advance: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the new folder, in the order of the old one. packed: gives those of a linear."""
    names = [x.weight_name for x in plan.linears] + list(plan.kept)
    names.sort(key=lambda n: (checkpoint.infos[n].file, n) if n in checkpoint.infos else ("~", n))
    linears = {x.weight_name: x for x in plan.linears}
    for i, name in enumerate(names):
        advance(i, len(names))
        linear = linears.get(name)
        key = checkpoint.infos[name].key if name in checkpoint else name
        if linear is None or linear.grid is None:
            stored_as = f"{plan.spec.embed}.weight" if name not in checkpoint else name
            tensor = checkpoint.read(stored_as).to(checkpoint.infos[stored_as].dtype)
            if not tensor.is_meta:
                check_finite(tensor, f"{checkpoint.folder}: {stored_as}")
            yield key, tensor.clone() if name not in checkpoint else tensor
            continue
        try:
            parts = packed(linear)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        yield from ((f"{key.removesuffix('.weight')}.{suffix}", tensor) for suffix, tensor in parts.items())
    advance(len(names), len(names))


def _sketches(plan: Plan, checkpoint: Checkpoint, exporter: ModuleType) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the new folder on the meta device; reads no weights."""
    known: dict[Hashable, dict[str, Tensor]] = {}  # to pack without numbers is slow, and most linears are alike

    def packed(linear: Linear) -> dict[str, Tensor]:
        key = linear.grid, linear.activations, linear.rows, linear.cols
        if key not in known:
            known[key] = exporter.pack(placeholder(linear))
        return known[key]

    return _tensors(plan, _Shapes(checkpoint), packed, lambda done, total: None)


def _settings(plan: Plan) -> dict[str, object]:
    """Return the settings of the recipe's algorithm, for the formats that tell them, and of the linears' inputs."""
    choice = plan.recipe.choices[-1]
    assert choice is not None
    settings = {"algorithm": choice.algorithm, **vars(choice.algorithm_config)}
    inputs = {name: linear.activations for name, linear in plan.quantized.items() if linear.activations}
    told = {"inputs": inputs} if inputs else {}
    return settings | {"true_sequential": plan.recipe.true_sequential} | told
