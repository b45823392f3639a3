"""Open any model folder: float, or packed by us or by another program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import data, gguf_file, plugins
from llmquant.checkpoint import Checkpoint, locate
from llmquant.errors import CheckpointError, LlmquantError
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.models import spec_for
from llmquant.runtime.coded import Coded


class PackedCheckpoint(Checkpoint):
    """A folder of packed weights that reads like a float one: ``read`` decodes what was quantized."""

    def __init__(self, folder: Path, exporter: ModuleType, settings: dict[str, Any]) -> None:
        super().__init__(folder)
        spec = spec_for(self.config)
        self.align(spec)
        self.settings = settings
        self._exporter = exporter
        try:
            self.packed: dict[str, dict[str, str]] = exporter.linears(self.infos, settings)
        except LlmquantError as error:
            raise type(error)(f"{folder}: {error}") from None
        self._conv1d = spec.conv1d

    @property
    def format(self) -> str:
        return self._exporter.__name__.rpartition(".")[2]

    def __contains__(self, name: str) -> bool:
        return name in self.infos or name.removesuffix(".weight") in self.packed

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, decoded to float32 if it is packed, or some rows of it."""
        linear = name.removesuffix(".weight")
        if linear == name or linear not in self.packed:
            return super().read(name, rows)
        weight: Tensor = self._decoded(linear, self._exporter.unpack)
        weight = weight.T if self._conv1d else weight
        return weight[slice(*rows)] if rows else weight

    def operator(self, name: str, device: torch.device) -> nn.Module | None:
        if name not in self.packed or not hasattr(self._exporter, "operator"):
            return None
        module: nn.Module | None = self._decoded(name, self._exporter.operator, device)
        return module

    def coded(self, name: str) -> Coded | None:
        if name not in self.packed:
            return None
        if not hasattr(self._exporter, "coded"):
            raise CheckpointError(
                f"{self.folder}: its format {self.format} can be read decoded only: its exporter has no `coded`"
            )
        weight: Coded = self._decoded(name, self._exporter.coded)
        return weight

    def _decoded(
        self,
        linear: str,
        decode: Callable[[Mapping[str, Tensor], dict[str, Any], str], Any],
        device: torch.device | None = None,
    ) -> Any:
        """Return what a function of the exporter makes of a linear's tensors; each is read when it is asked for."""
        try:
            return decode(_Parts(super().read, self.packed[linear], device), self.settings, linear)
        except LlmquantError as error:
            raise type(error)(f"{self.folder}: {linear}: {error}") from None


class _Parts(Mapping[str, Tensor]):
    """The tensors of a linear by the end of their name, read when they are asked for."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, str], device: torch.device | None) -> None:
        self._read = read
        self._names = names
        self._device = device

    def __getitem__(self, suffix: str) -> Tensor:
        return self._read(self._names[suffix]).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def gguf_path(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for (of shards the first), or None for a folder of another kind."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    shards = ((file, gguf_file.SHARD.search(file.name)) for file in sorted(path.glob("*.gguf")))
    files = [file for file, shard in shards if shard is None or int(shard[1]) == 1]
    if len(files) > 1:
        raise CheckpointError(f"{path}: holds {len(files)} GGUF files. Give one of them, e.g. {files[0]}")
    return files[0] if files else None


def open_model(model: str | Path) -> Checkpoint:
    """Return the checkpoint of a folder, GGUF file or hub id; raise CheckpointError for a format that none reads.

    A folder that holds a GGUF file and no config.json stands for that file.
    """
    path = locate(model)
    file = gguf_path(path)
    if file is not None:
        return GgufCheckpoint(file)
    checkpoint = Checkpoint(path)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        checkpoint.align(spec_for(checkpoint.config))
        return checkpoint
    if not isinstance(settings, dict):
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: quantization_config is not an object")
    method = settings.get("quant_method")
    for name in plugins.names("exporters"):
        exporter = plugins.load("exporters", name, "quantization_config")
        if method == exporter.METHOD:
            return PackedCheckpoint(checkpoint.folder, exporter, settings)
    raise CheckpointError(
        f"{checkpoint.folder / 'config.json'}: quant_method {method!r} is not one that llmquant reads"
    )


def tokenizer_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder or GGUF file, or raise CheckpointError or FormatError."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.tokenizer()
    return data.load_tokenizer(checkpoint.folder, trust_remote_code)


def describe(model: str | Path) -> dict[str, Any]:
    """Return tensors, sizes and settings of any folder or file that can be read; a GGUF file of any architecture."""
    path = gguf_path(locate(model))
    if path is not None:
        file = gguf_file.read(path)
        return {
            "architectures": [str(file.metadata.get("general.architecture", "unknown"))],
            "bytes": file.bytes,
            "quantized_linears": sorted(n for n, t in file.tensors.items() if t.type not in gguf_file.FLOATS),
            "metadata": file.metadata,
            "tensors": {
                name: {"dtype": t.type, "shape": t.shape, "bytes": t.bytes, "file": t.path.name}
                for name, t in file.tensors.items()
            },
        }
    checkpoint = open_model(model)
    return {
        "architectures": checkpoint.config.get("architectures", []),
        "bytes": sum(info.bytes for info in checkpoint.infos.values()),
        "quantized_linears": sorted(checkpoint.packed) if isinstance(checkpoint, PackedCheckpoint) else [],
        "quantization_config": checkpoint.settings if isinstance(checkpoint, PackedCheckpoint) else {},
        "tensors": {
            name: {"dtype": str(i.dtype).removeprefix("torch."), "shape": i.shape, "bytes": i.bytes, "file": i.file}
            for name, i in checkpoint.infos.items()
        },
    }
