"""The work folder: one file a layer, written whole or not at all, so that a run can go on where it died."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmquant import noise
from llmquant.activations import Inputs
from llmquant.checkpoint import Checkpoint, atomic_save, read_json
from llmquant.errors import CheckpointError, OutputError
from llmquant.files import cannot_write, write_json
from llmquant.gradients import LayerInformation
from llmquant.grid import QuantizedTensor, rows_of
from llmquant.memory import Meter
from llmquant.plan import Linear, placeholder
from llmquant.ranks import ALONE, Ranks

NOTE = "work.json"
FLOAT = "float:"  # before the name of a tensor that is not quantized
TOLD = ("error", "mse", "mean_square", "tokens", "bits_per_weight", "seconds")  # of every linear, in numbers
FISHER = "fisher-"  # before the number of a layer of which the outputs' information is kept until it is finished
OUTSIDE = "outside-"  # before the file name of a matrix that belongs to no layer
SCRATCH = "llmquant-scratch"
TRAINING = "training.safetensors"
OURS = re.compile(
    rf"(layer-\d{{5}}|{FISHER}\d{{5}}|{OUTSIDE}.+|training)\.safetensors(\.partial)?|{re.escape(NOTE)}(\.partial)?|lock"
)
PIECE = 1 << 15  # bytes in the middle of a tensor that its model's fingerprint is made of
INPUTS = "inputs."  # before the names of what belongs to a linear's inputs
KEPT = "Finished layers are kept: make room, or get permission, and the same command goes on from there."


class Work:
    """A folder of finished layers. What it was begun for is in ``work.json``; anything else is refused.

    A file holds, for every linear of a layer or for one outside of them, its codes, the stored parameters of
    its grid and of its inputs, and what a report says about it; the float
    tensors of the layer that transforms changed; and the time and memory that all this took.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        restart: bool = False,
        ranks: Ranks = ALONE,
        meter: Meter | None = None,
    ) -> None:
        """Open or create the folder and lock it; raise OutputError when it was begun for something else.

        ranks: that work in it together. The first one has the lock, and alone writes what is to be kept; what it keeps,
        all can read when ``save`` returns. Each has ``scratch`` space of its own.
        meter: of the run that saves parts in it.
        """
        self.folder = folder
        self._ranks = ranks
        self._meter = meter
        ranks.from_first(lambda: self._open(folder, fingerprint, restart))

    def _open(self, folder: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(f"{folder}: another run is using this work folder. Wait for it, or give --work") from None
        except OSError as error:
            raise OutputError(f"{folder}: cannot be used as a work folder: {error.strerror}") from None
        if (folder / NOTE).exists() and not restart:
            check_same(folder, read_note(folder), fingerprint, "give another --work, or begin anew with --restart.")
        else:
            begun = (folder / NOTE).exists()
            known = _ours if begun else lambda path: path.name in ("lock", f"{NOTE}.partial")
            if foreign := sorted(p.name for p in folder.iterdir() if not known(p)):
                raise OutputError(f"{folder}: holds {foreign[0]}, so it is not a work folder. Give another --work")
            try:
                for path in folder.iterdir():
                    if path.name not in ("lock", NOTE, SCRATCH):
                        path.unlink()
            except OSError as error:
                raise cannot_write(folder, error) from None
            write_json(folder / NOTE, fingerprint)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # of ranks that a run before this one had

    def _path(self, part: int | str) -> Path:
        name = f"layer-{part:05}" if isinstance(part, int) else f"{OUTSIDE}{part}"
        return self.folder / f"{name}.safetensors"

    def has(self, part: int | str) -> bool:
        return self._ranks.from_first(self._path(part).exists)

    def begin(self) -> None:
        """Begin the part that is saved next: its time and memory count from here."""
        if self._meter is not None:
            self._meter.begin()

    def save(
        self,
        part: int | str,
        linears: Mapping[str, QuantizedTensor],
        records: Mapping[str, Any],
        floats: Mapping[str, Tensor] | None = None,
        given_up: Mapping[str, str] | None = None,
    ) -> None:
        """Store the linears of a layer, or one outside of them, by module name, and what a report should say of each.

        floats: the tensors that transforms changed and that stay float, by their full names.
        given_up: linears that could not be quantized, and why.
        """
        tensors = {f"{FLOAT}{name}": value.cpu().contiguous() for name, value in (floats or {}).items()}
        for name, q in linears.items():
            tensors |= {f"{name}:{key}": value for key, value in stored(q).items()}
        cost = {} if self._meter is None else {"part": part, **self._meter.part()}
        shown = noise.worst(records)
        records = {
            name: {key: value for key, value in record.items() if key != "histogram" or name in shown}
            for name, record in records.items()
        }
        told = {"records": json.dumps(records), "given_up": json.dumps(given_up or {}), "cost": json.dumps(cost)}
        self._ranks.from_first(lambda: atomic_save(self._path(part), tensors, told, KEPT))

    def replace(self, part: int | str, tensors: Mapping[str, Tensor]) -> None:
        """Put some tensors of a part in the place of those before, or beside them, by their names in its file."""
        path, found = self._path(part), dict(tensors)
        told = {"records": "{}", "cost": json.dumps({"part": part, "seconds": 0.0, "peak_bytes": 0})}
        if path.exists():
            with _opened(path) as file:
                told = file.metadata()
                found = {name: file.get_tensor(name) for name in file.keys()} | found  # noqa: SIM118
        self._ranks.from_first(lambda: atomic_save(path, found, told, KEPT))

    def save_training(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Keep where a training is."""
        kept = {name: value.cpu().contiguous() for name, value in tensors.items()}
        path = self.folder / TRAINING
        self._ranks.from_first(lambda: atomic_save(path, kept, {"told": json.dumps(told)}, KEPT))

    def damaged_training(self, what: str) -> CheckpointError:
        """Return what to raise where it was something else."""
        return _damaged(self.folder / TRAINING, what)

    def training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was kept last; None before there was anything."""
        path = self.folder / TRAINING
        if not self._ranks.from_first(path.exists):
            return None
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, _metadata(path, "told")  # noqa: SIM118

    def given_up(self, part: int | str | None = None) -> dict[str, str]:
        """Return the linears of a part, or of all, that could not be quantized, and why."""
        paths = self._parts() if part is None else [self._path(part)]
        return {name: why for path in paths for name, why in _metadata(path, "given_up", "{}").items()}

    def load(self, linear: Linear, rows: int | None = None) -> QuantizedTensor:
        """Return one linear as it was saved, or the first rows of it.

        Raises CheckpointError where the file holds something else.
        """
        name, grid, path = linear.name, linear.grid, self._path(linear.part)
        assert grid is not None
        with _opened(path) as file:
            keys = [k for k in file.keys() if k.startswith(f"{name}:")]  # noqa: SIM118
            stored = {k.rsplit(":", 1)[1]: file.get_tensor(k) for k in keys}
        wanted = placeholder(linear)
        expected = {**wanted.params, "codes": wanted.codes}
        for key, spans in grid.shared.items():
            expected[key] = expected[key].flatten(0, 1)[::spans]
        expected |= {f"{INPUTS}{key}": value for key, value in (wanted.inputs.params if wanted.inputs else {}).items()}
        for key in expected.keys() | stored.keys():
            found, should = (_described(tensors.get(key)) for tensors in (stored, expected))
            if found != should:
                raise _damaged(path, f"{name}:{key} is {found}, expected {should}")
        codes, levels = stored.pop("codes"), len(grid.table)
        if int(codes.max()) >= levels:
            raise _damaged(path, f"{name} has a code {int(codes.max())}, and its grid {levels} levels")
        params = {k: v for k, v in stored.items() if not k.startswith(INPUTS)}
        shape = len(codes), codes.shape[1] // grid.span
        for key, spans in grid.shared.items():
            params[key] = params[key].repeat_interleave(spans, 0)[: math.prod(shape)].view(*shape, -1)
        scheme = linear.activations
        ranges = {k.removeprefix(INPUTS): v for k, v in stored.items() if k.startswith(INPUTS)}
        q = QuantizedTensor(grid, codes, params, inputs=Inputs(scheme, ranges) if scheme else None)
        return q if rows is None else rows_of(q, 0, rows)

    def _information(self, layer: int) -> Path:
        return self.folder / f"{FISHER}{layer:05}.safetensors"

    def save_information(self, layer: int, known: LayerInformation) -> None:
        """Keep what is known of the outputs of a layer until it is finished."""
        tensors = {f"{name}:{i:05}": part for name, parts in known.linears.items() for i, part in enumerate(parts)}
        tensors = {name: part.cpu() for name, part in tensors.items()} | {"layer": known.layer.cpu()}
        self._ranks.from_first(lambda: atomic_save(self._information(layer), tensors, {}, KEPT))

    def has_information(self, layer: int) -> bool:
        return self._ranks.from_first(self._information(layer).exists)

    def information(self, layer: int, device: torch.device) -> LayerInformation:
        linears: dict[str, tuple[Tensor, ...]] = {}
        with _opened(self._information(layer), str(device)) as file:
            for key in sorted(file.keys()):
                name, colon, _ = key.rpartition(":")
                if colon:
                    linears[name] = (*linears.get(name, ()), file.get_tensor(key))
            return LayerInformation(linears, file.get_tensor("layer"))

    def drop_information(self, layer: int) -> None:
        if self._ranks.first:
            self._information(layer).unlink(missing_ok=True)

    def floats(self, part: int | str) -> list[str]:
        """Return the full names of a part's float tensors that transforms or training changed."""
        if not self.has(part):
            return []
        with _opened(self._path(part)) as file:
            return [name.removeprefix(FLOAT) for name in file.keys() if name.startswith(FLOAT)]  # noqa: SIM118

    def load_float(self, part: int | str, name: str) -> Tensor:
        """Return one of them."""
        with _opened(self._path(part)) as file:
            value: Tensor = file.get_tensor(f"{FLOAT}{name}")
        return value

    def pieces(
        self, linears: Iterable[Linear], pack: Callable[[QuantizedTensor], Tensor]
    ) -> Generator[Iterator[Tensor], None, None]:
        """Yield each linear in one piece, packed."""
        return (iter([pack(self.load(linear))]) for linear in linears)

    def all_records(self) -> dict[str, Any]:
        """Return what was recorded about every linear."""
        return {name: record for path in self._parts() for name, record in _records(path).items()}

    def costs(self) -> list[dict[str, Any]]:
        """Return how long each part took, and the memory that it needed at most."""
        return [_cost(path) for path in self._parts()]

    def _parts(self) -> list[Path]:
        found = sorted(self.folder.glob("*.safetensors"))
        return [path for path in found if not path.name.startswith(FISHER) and path.name != TRAINING]

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a folder for what is too large for the memory and is computed again by a run that goes on."""
        place = self.folder / SCRATCH / str(self._ranks.rank)
        shutil.rmtree(place, ignore_errors=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        if self._ranks.first:
            self._lock.release()

    def remove(self) -> None:
        """Delete what a run has put into the folder, and the folder where it holds nothing else."""
        if not self._ranks.first:
            return
        try:
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
            for path in sorted(filter(_ours, self.folder.iterdir()), key=lambda path: path.name == "lock"):
                if path.name != SCRATCH:
                    path.unlink()  # the lock last, while it is held
            self.close()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be removed: {error.strerror}. The output is complete; this is needed no more."
            ) from None


class Transformed(Checkpoint):
    """A float checkpoint as the transforms and the training of a finished work folder left it."""

    def __init__(self, checkpoint: Checkpoint, log: Work, parts: Iterable[int | str]) -> None:
        vars(self).update(vars(checkpoint))
        self._checkpoint = checkpoint
        self._log = log
        self._part_of = {name: part for part in parts for name in log.floats(part)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor as it is to be stored, or some rows of it."""
        if name not in self._part_of:
            return self._checkpoint.read(name, rows)
        changed = self._log.load_float(self._part_of[name], name)
        return changed[slice(*rows)] if rows else changed


def stored(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return what a file holds of a linear: what spans share is there once."""
    tensors = {"codes": q.codes.cpu().contiguous()}
    for key, value in q.params.items():
        if spans := q.grid.shared.get(key):
            value = value.flatten(0, 1)[::spans]
        tensors[key] = value.cpu().contiguous()
    return tensors | {f"{INPUTS}{key}": v.cpu().clone() for key, v in (q.inputs.params if q.inputs else {}).items()}


def read_note(folder: Path) -> dict[str, Any]:
    """Return what a work folder was begun for."""
    note = read_json(folder / NOTE, "a work folder, made by `llmquant quantize --work`, holds one")
    model, recipe = note.get("model"), note.get("recipe")
    if not isinstance(model, dict) or not isinstance(model.get("folder"), str) or not isinstance(recipe, dict):
        raise _damaged(folder / NOTE, "it does not tell the model's folder and the recipe")
    return note


def fingerprint_of_model(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where a model is, and a hash of its configuration, of its headers and of a piece of every tensor.

    Whole hashes of large models take minutes.
    """
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for name in sorted({info.file for info in checkpoint.infos.values()}):
        with (checkpoint.folder / name).open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(name.encode() + header)
            begin = file.tell()
            tensors = {key: told for key, told in json.loads(header).items() if key != "__metadata__"}
            for start, end in sorted(told["data_offsets"] for told in tensors.values()):
                file.seek(begin + max((start + end - PIECE) // 2, start))
                digest.update(file.read(min(PIECE, end - start)))
    return {"folder": str(checkpoint.folder.absolute()), "hash": digest.hexdigest()}


def _records(path: Path) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = _metadata(path, "records")
    for name, record in found.items():
        if not isinstance(record, dict) or not all(isinstance(record.get(key), int | float) for key in TOLD):
            raise _damaged(path, f"it does not tell the error of {name}")
        if not isinstance(record.get("layer"), int | None):
            raise _damaged(path, f"it does not tell the layer of {name}")
        if "histogram" in record and not noise.is_histogram(record["histogram"]):
            raise _damaged(path, f"it does not tell how the weights of {name} lie among the levels")
    return found


def _cost(path: Path) -> dict[str, Any]:
    found = _metadata(path, "cost")
    numbers = (found.get("seconds"), found.get("peak_bytes"))
    if not isinstance(found.get("part"), int | str) or not all(isinstance(x, int | float) for x in numbers):
        raise _damaged(path, "it does not tell how long it took")
    return found


def _metadata(path: Path, key: str, missing: str = "") -> dict[str, Any]:
    with _opened(path) as file:
        told = (file.metadata() or {}).get(key, missing)
    try:
        found = json.loads(told)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path, f"its {key} cannot be read")
    return found


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """Open a file of the folder; raise CheckpointError where it cannot be read, also while it is."""
    try:
        with safe_open(path, "pt", device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is damaged: {what}. Remove this file and run the same `llmquant quantize` again: what was in it is "
        "computed anew, the rest is taken from the work folder."
    )


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _ours(path: Path) -> bool:
    return path.name == SCRATCH or OURS.fullmatch(path.name) is not None


def check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Raise OutputError where a folder was begun for something else; the first thing that differs is named."""
    found, wanted = _flat(found), _flat(json.loads(json.dumps(wanted)))
    different = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if different:
        key = different[0]
        raise OutputError(
            f"{folder}: was begun with {key} = {found.get(key)!r:.200}, and now it is {wanted.get(key)!r:.200}"
            + (f" ({len(different) - 1} more differ)" if len(different) > 1 else "")
            + f". Undo the change, {remedy}"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
