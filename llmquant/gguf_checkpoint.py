"""A GGUF file that reads like a model folder: tensors by their names in transformers, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant import gguf_file
from llmquant.checkpoint import Checkpoint, TensorInfo, by_library
from llmquant.errors import CheckpointError, FormatError
from llmquant.exporters.gguf import families, vocabulary
from llmquant.gguf_file import GgufTensor
from llmquant.models import moe, spec_for
from llmquant.runtime.coded import Coded


class GgufCheckpoint(Checkpoint):
    """The model of a GGUF file, or of its shards: ``read`` decodes a tensor to float32."""

    def __init__(self, path: Path) -> None:
        """Read the header and make a configuration of its metadata; raise CheckpointError or FormatError."""
        self.file = gguf_file.read(path)
        self.path, self.folder = path, path.parent
        stored = self.file.tensors
        extra = {n: gguf_file.to_float(t)[0] for n, t in stored.items() if n.startswith("rope_")}
        try:
            with by_library(path, "transformers has no configuration for its metadata"):
                config = families.configuration(self.file.metadata, extra, stored)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        self.model_config = config
        with by_library(path, "transformers cannot build the model of its metadata"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.config = {**config.to_dict(), "architectures": [type(model).__name__]}
        spec = moe.unfused(model, spec_for(self.config))
        self._turned = f"{spec.layers}." if spec.conv1d else None
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        infos = {name: TensorInfo(shape, torch.float32, path.name, name) for name, shape in shapes.items()}
        if config.get_text_config().tie_word_embeddings:
            shapes.pop(f"{spec.head}.weight", None)
        layout = families.layout(config, shapes)
        self._entries = {source: entry for entry in layout.entries for source in entry.sources}
        for entry in layout.entries:
            if entry.name not in self.file.tensors:
                raise CheckpointError(f"{path}: has no tensor {entry.name}, which this architecture needs")
        self.infos = {name: infos[name] for name in self._entries}

    @property
    def format(self) -> str:
        return "gguf"

    @property
    def bytes(self) -> int:
        return self.file.bytes

    @property
    def weights(self) -> int:
        """Number of weights in all matrices and vectors."""
        return sum(tensor.numel for tensor in self.file.tensors.values())

    def tokenizer(self) -> Any:
        """Return the tokenizer that the file holds, or raise FormatError."""
        try:
            with by_library(self.path, "no tokenizer can be made of its metadata"):
                return vocabulary.tokenizer(self.file.metadata)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}. Give the model folder it was made from by --reference") from None

    def coded(self, name: str) -> Coded | None:
        """Return the weight of a linear or embedding as it is stored, its rows in the order of transformers."""
        entry = self._entries.get(f"{name}.weight")
        if entry is None or (stored := self.file.tensors[entry.name]).type in gguf_file.FLOATS:
            return None
        shape = self.infos[f"{name}.weight"].shape
        rows, cols = shape[::-1] if self._turned and name.startswith(self._turned) else shape
        if stored.shape not in ((rows, cols), (len(entry.stack), rows, cols)):
            raise self._misfit(entry, stored, (rows, cols))
        first = entry.stack.index(f"{name}.weight") * rows if entry.stack else 0
        return gguf_file.coded(stored, (first, first + rows), entry.rows)

    def _misfit(self, entry: families.Entry, stored: GgufTensor, wanted: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {entry.name} is {list(stored.shape)}, but its metadata asks for {list(wanted)}"
        )

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return one tensor, decoded to float32, or some rows of it."""
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        entry = self._entries[name]
        stored = self.file.tensors[entry.name]
        wanted = self.infos[name].shape
        if entry.stack and stored.shape == (len(entry.stack), *wanted):
            first = entry.stack.index(name) * wanted[0]
            values = gguf_file.to_float(stored, (first, first + wanted[0]))
        else:
            values = gguf_file.to_float(stored).view(stored.shape)
        if entry.rows is not None and len(values) == len(entry.rows):
            values = torch.empty_like(values).index_copy_(0, entry.rows, values)
        if entry.plus_one:
            values = values - 1
        if self._turned and name.startswith(self._turned) and values.ndim == 2:
            values = values.T
        if values.shape != wanted:
            raise self._misfit(entry, stored, wanted)
        return values[slice(*rows)] if rows else values
