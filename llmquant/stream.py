"""A transformers model of which one decoder layer is in memory at a time."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmquant import calibrate, memory
from llmquant.checkpoint import Checkpoint, by_library, check_finite, check_followed
from llmquant.errors import CalibrationError, CheckpointError
from llmquant.files import cannot_write
from llmquant.models import moe, spec_for
from llmquant.models.spec import ModelSpec
from llmquant.ranks import ALONE, Ranks
from llmquant.runtime.coded import CodedLinear, Int4Linear
from llmquant.runtime.linear import QuantizedLinear

MOST_BUFFERS = 4 << 30  # bytes of tables (rotary, masks) that a model computes for itself
BATCH_TOKENS = 4096
"""Tokens that pass through a layer together: enough to keep matrix products busy, few enough to stay in cache."""


def model_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers configuration of a folder, or raise CheckpointError."""
    check_followed(folder)
    with by_library(folder / "config.json", "transformers does not accept it"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def context_of(config: Any) -> int:
    """Return the most tokens that a sequence of a model may have."""
    text = config.get_text_config()
    known = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "seq_length"))
    return next((int(n) for n in known if n), 2048)


def _check_sizes(checkpoint: Checkpoint, spec: ModelSpec, config: Any) -> None:
    """Raise CheckpointError for a configuration with numbers that cannot be those of these tensors.

    That comes before anything is built of it, so that no number in it costs time or memory that the files do not.
    """
    text, prefix = config.get_text_config(), f"{spec.layers}."
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = getattr(text, key, None)
        if isinstance(value, int | float) and not 1 <= value < 2**31:
            raise CheckpointError(f"{checkpoint.path}: its configuration has {key} {value:.5g}")
    _check_rope(getattr(text, "rope_parameters", None) or {}, f"{checkpoint.path}: its configuration: rope_parameters")
    layers = {rest.partition(".")[0] for n in checkpoint.infos if (rest := n.removeprefix(prefix)) != n}
    layers = {number for number in layers if number.isdecimal()}
    wanted = [("num_hidden_layers", getattr(text, "num_hidden_layers", len(layers)), len(layers), "decoder layers")]
    if embedding := checkpoint.infos.get(f"{spec.embed}.weight"):
        wanted.append(("vocab_size", text.vocab_size, embedding.shape[0] if embedding.shape else 0, "embeddings"))
    experts = moe.stored_experts(checkpoint.infos)
    for key in ("num_experts", "num_local_experts"):
        wanted.append((key, getattr(text, key, experts), experts, "experts"))
    for key, value, count, what in wanted:
        if count and value != count:
            raise CheckpointError(
                f"{checkpoint.path}: config.json has {key} {value!r:.100}, but there are {count} {what}"
            )


def _check_rope(settings: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for settings of rotary embeddings that are not numbers, which transformers takes as is."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _check_rope(value, f"{where}.{key}")
        elif not (key.endswith("type") and isinstance(value, str)) and value is not None:
            several = isinstance(value, list) and key.endswith(("_factor", "_section"))
            numbers = value if several else [value]
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise CheckpointError(f"{where}.{key}: {value!r:.100} is not a number")


class Stream:
    """The layers of a checkpoint, run one after the other over batches of equal sequences.

    Everything outside the decoder layers stays loaded; a layer is loaded by
    ``layer(i)`` and dropped when its context ends. Computes in float32 on the
    CPU (its 16-bit arithmetic is slow) and in the model's dtype elsewhere.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        trust_remote_code: bool = False,
        weights: bool = True,
        memory_limit: int | None = None,
        ranks: Ranks = ALONE,
        dtype: torch.dtype | None = None,
        operator: Callable[[str, nn.Module], nn.Module | None] | None = None,
    ) -> None:
        """Load the weights outside the layers; with ``weights`` False only when ``load`` is called.

        memory_limit: bytes that the process may have; None: all that are free. ranks: among which batches are dealt.
        dtype: to compute in, where that is not said above.
        operator: from a module's name and the module to what takes its place; None: it computes from a float weight.
        """
        config = copy.deepcopy(checkpoint.model_config) or model_config(checkpoint.folder, trust_remote_code)
        self.checkpoint = checkpoint
        self.config = config
        self._family = spec_for(checkpoint.config)
        self.device = device
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else (config.dtype or torch.float32))
        self._operator = operator or (lambda name, module: checkpoint.operator(name, device))
        config.quantization_config = None  # what is packed is decoded by the checkpoint, not by transformers
        _check_sizes(checkpoint, self._family, config)
        self.tied = bool(config.get_text_config().tie_word_embeddings)
        self._trust_remote_code = trust_remote_code
        self._memory_limit = memory_limit
        self.ranks = ranks
        if weights:
            self.load()

    @cached_property
    def _built(self) -> tuple[Any, ModelSpec, int]:
        """The model, built when it is first asked for: what only moves tensors does without."""
        with by_library(self.checkpoint.path, "transformers cannot build the model that its configuration describes"):
            with torch.device("meta"):  # where numbers out of all proportion cost nothing
                sketch = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self._trust_remote_code)
            if (size := sum(b.nbytes for b in sketch.buffers())) > MOST_BUFFERS:
                raise CheckpointError(f"{self.checkpoint.path}: its configuration asks for tables of {size:,} bytes")
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self._trust_remote_code)
        model.eval().requires_grad_(False)
        again = f"{self._family.head}.weight" if self.tied else None
        weights = sum(p.numel() for n, p in model.named_parameters() if n != again)
        return model, moe.unfused(model, self._family), weights

    @property
    def spec(self) -> ModelSpec:
        """What the model looks like; with experts, the model itself tells which layers have how many."""
        return self._family if self._family.experts is None else self._built[1]

    @property
    def model(self) -> Any:
        """The transformers model; the weights of its layers are on the meta device."""
        return self._built[0]

    @property
    def weights(self) -> int:
        """Number of weights in the whole model; a tied matrix counts once."""
        return self._built[2]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers; one that is not loaded has its weights on the meta device."""
        layers: nn.ModuleList = self.model.get_submodule(self.spec.layers)
        return layers

    def load(self) -> None:
        """Load everything outside the decoder layers."""
        again = {f"{self.spec.head}.weight"} if self.tied else set()
        self._put(self.model, "", [n for n in self._outside if n not in again])
        self._tie()
        for name, buffer in list(self.model.named_buffers()):  # such as rotary tables
            set_module_tensor_to_device(self.model, name, self.device, value=buffer)

    def drop(self) -> None:
        """Drop everything outside the decoder layers, until ``load`` is called again."""
        for name in self._outside:
            set_module_tensor_to_device(self.model, name, "meta")
        self._tie()

    def load_all(self, but: Collection[str] = ()) -> Any:
        """Load everything, for good, but some parameters of the layers; return the model."""
        self.load()
        for index, layer in enumerate(self.decoder_layers):
            prefix = f"{self.spec.layers}.{index}."
            self._put(layer, prefix, [name for name, _ in layer.named_parameters() if prefix + name not in but])
        return self.model

    def _tie(self) -> None:
        if not self.tied:
            return
        head = self.model.get_submodule(self.spec.head)
        operator = self._operator(self.spec.head, head)
        if operator is None:
            head.weight = self.model.get_submodule(self.spec.embed).weight
        else:
            _replace(self.model, self.spec.head, operator)
            self.model.config.get_text_config().tie_word_embeddings = False  # of parameters, which transformers may tie

    @property
    def _outside(self) -> list[str]:
        return [n for n, _ in self.model.named_parameters() if not n.startswith(f"{self.spec.layers}.")]

    @property
    def room_bytes(self) -> int:
        """Memory that the process may have."""
        return memory.room_bytes(self.device) if self._memory_limit is None else self._memory_limit

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def other_linears(self) -> list[str]:
        """The linear modules outside the decoder layers."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{self.spec.layers}.")
        ]

    @property
    def foldable(self) -> frozenset[str]:
        """The sites whose scales another module of every layer can absorb."""
        found = {site.name: True for site in self.spec.every_site}
        for index, layer in enumerate(self.decoder_layers):
            for site in self.spec.sites_of(index):
                found[site.name] &= calibrate.foldable(layer, site)
        return frozenset(name for name, absorbs in found.items() if absorbs)

    @property
    def layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have."""
        return context_of(self.config)

    def _materialise(self, root: nn.Module, prefix: str, name: str) -> None:
        full = prefix + name
        if full not in self.checkpoint:
            raise CheckpointError(f"{self.checkpoint.folder}: has no tensor {full}, which this architecture needs")
        value = self.checkpoint.read(full)
        wanted = root.get_parameter(name).shape
        if value.shape != wanted:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {full} is {list(value.shape)}, but config.json asks for {list(wanted)}"
            )
        check_finite(value, f"{self.checkpoint.folder}: {full}")
        set_module_tensor_to_device(root, name, self.device, value=value.to(self.dtype), dtype=self.dtype)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load a decoder layer for the duration of the context; its linears compute as a runtime does."""
        layer = self.decoder_layers[index]
        prefix = f"{self.spec.layers}.{index}."
        names = [name for name, _ in layer.named_parameters()]
        replaced = self._put(layer, prefix, names)
        try:
            yield layer
        finally:
            for name, module in replaced.items():
                _replace(layer, name, module)
            for name in names:
                set_module_tensor_to_device(layer, name, "meta")

    def _put(self, root: nn.Module, prefix: str, names: Sequence[str]) -> dict[str, nn.Module]:
        """Load these parameters, or operators in the place of their modules; return the modules that were replaced."""
        weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        replaced = {}
        for name in names:
            if name.removesuffix(".weight") not in weights:
                self._materialise(root, prefix, name)
        for name in weights:
            operator = self._operator(prefix + name, root.get_submodule(name))
            if operator is None:
                self._materialise(root, prefix, f"{name}.weight")
            else:
                replaced[name] = _replace(root, name, operator)
        return replaced

    def batches(self, sequences: int, length: int) -> list[slice]:
        """Return the sequences that pass through a layer together, batch by batch; of all ranks.

        The r-th of n ranks computes the batches r, r + n, r + 2n, ... Where there are fewer batches than ranks they are
        made smaller, which changes the rounding of sums. Raises CalibrationError where there are fewer sequences.
        """
        size = min(max(BATCH_TOKENS // length, 1), sequences // self.ranks.size or 1)
        if sequences < self.ranks.size:
            raise CalibrationError(
                f"calibration: {sequences} sequences cannot be split over {self.ranks.size} processes. Start fewer, or "
                "calibrate on more (--set calibration.sequences=...)"
            )
        return [slice(start, min(start + size, sequences)) for start in range(0, sequences, size)]

    def own_batches(self, sequences: int, length: int) -> list[slice]:
        """Return those of this rank."""
        return self.batches(sequences, length)[self.ranks.rank :: self.ranks.size]

    @torch.no_grad()
    def start(
        self, tokens: Int[Tensor, "sequences time"], folder: Path | None = None, enough: int = sys.maxsize
    ) -> Activations:
        """Return what the first layer reads for these sequences; raise CheckpointError for an unknown token.

        folder: as for ``Activations``. enough: only as many of the first batches as have so many tokens.
        """
        if tokens.numel() and int(tokens.max()) >= len(self.embedding_weight()):
            raise CheckpointError(
                f"{self.checkpoint.path}: the tokenizer gives the token id {int(tokens.max())}, but the model has "
                f"{len(self.embedding_weight())} embeddings. They belong to different models."
            )
        calls: dict[int, list[calibrate.Call]] = {}
        counts = [tokens[batch].numel() for batch in self.batches(*tokens.shape)]
        activations = Activations(calls, _first(counts, enough, self.ranks), folder, self.ranks)
        for i, batch in zip(range(len(activations)), self.own_batches(*tokens.shape), strict=False):
            part = tokens[batch]
            activations[i], calls[len(part)] = calibrate.start(self.model, self.spec, part.to(self.device))
        return activations

    def caller(self, activations: Activations, index: int) -> Callable[[Tensor], calibrate.Call]:
        """Return what gives a layer's other arguments for any number of sequences like these."""
        calls = dict(activations.calls)

        def call(x: Tensor) -> calibrate.Call:
            if len(x) not in calls:
                tokens = torch.zeros(x.shape[:2], dtype=torch.int64, device=self.device)
                calls[len(x)] = calibrate.start(self.model, self.spec, tokens)[1]
            return calls[len(x)][index]

        return call

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, activations: Activations, keep: bool = True) -> None:
        """Send all batches through a layer; ``keep`` puts its outputs in the place of its inputs."""
        for i, x in enumerate(activations):
            out = calibrate.run_layer(layer, x, activations.call(x, index))
            if keep:
                activations[i] = out

    @torch.no_grad()
    def passed(self, layer: nn.Module, index: int, activations: Activations, folder: Path | None = None) -> Activations:
        """Return what a layer gives for all batches; its inputs stay as they are. folder: as for ``Activations``."""
        found = activations.empty(folder)
        for i, x in enumerate(activations):
            found[i] = calibrate.run_layer(layer, x, activations.call(x, index))
        return found

    @torch.no_grad()
    def finish(
        self, tokens: Int[Tensor, "sequences time"], x: Float[Tensor, "sequences time hidden"]
    ) -> Float[Tensor, "sequences time vocab"]:
        """Return the logits that follow from the last layer's output."""
        logits: Tensor = calibrate.finish(self.model, self.spec, tokens.to(self.device), x)
        return logits

    def head_weight(self) -> Float[Tensor, "vocab hidden"]:
        weight: Tensor = self.model.get_submodule(self.spec.head).weight
        return weight.detach()

    def embedding_weight(self) -> Float[Tensor, "vocab hidden"]:
        weight: Tensor = self.model.get_submodule(self.spec.embed).weight
        return weight.detach()

    def set_embedding(self, weight: Float[Tensor, "vocab hidden"], also_head: bool) -> None:
        """Replace the embedding's weight; ``also_head``: that of a tied output matrix too."""
        parameter = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        self.model.get_submodule(self.spec.embed).weight = parameter
        if self.tied and also_head:
            self.model.get_submodule(self.spec.head).weight = parameter

    @torch.no_grad()
    def before_head(
        self, tokens: Int[Tensor, "sequences time"], x: Float[Tensor, "sequences time hidden"]
    ) -> Float[Tensor, "sequences time hidden"]:
        """Return what the output matrix reads; the logits are not computed."""
        seen: list[Tensor] = []
        head = _replace(self.model, self.spec.head, _Catch(seen))
        try:
            self.finish(tokens, x)
        finally:
            _replace(self.model, self.spec.head, head)
        return seen[0]

    def hidden(
        self, tokens: Int[Tensor, "sequences time"], progress: Callable[[], None] | None = None
    ) -> list[Float[Tensor, "1 time hidden"]]:
        """Return the last layer's output of every sequence, computed a layer at a time."""
        activations = self.start(tokens)
        for index in range(self.layers):
            with self.layer(index) as layer:
                self.run(layer, index, activations)
            if progress:
                progress()
        return [row[None] for batch in activations for row in batch]


def _replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another, whose bias it takes over, and return that."""
    parent, _, name = path.rpartition(".")
    old = root.get_submodule(path)
    if isinstance(module, QuantizedLinear | CodedLinear | Int4Linear):
        module.bias = getattr(old, "bias", None)
    setattr(root.get_submodule(parent), name, module)
    return old


class Activations:
    """What one layer reads: this rank's batches of sequences, and the other arguments the model gives each layer.

    calls: by the number of sequences in a batch, one entry a layer. counts: the tokens of each batch, of all ranks.
    folder: where each batch is kept in a file, so that it takes no memory while no one uses it; None: in memory.
    """

    def __init__(
        self,
        calls: dict[int, list[calibrate.Call]],
        counts: Sequence[int],
        folder: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.calls = calls
        self._counts = counts
        self._folder = folder
        self._ranks = ranks
        self._batches: dict[int, Tensor | tuple[Path, torch.device]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(range(self._ranks.rank, len(self._counts), self._ranks.size))

    def __iter__(self) -> Iterator[Float[Tensor, "_sequences time hidden"]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, batch: int) -> Float[Tensor, "_sequences time hidden"]:
        held = self._batches[batch]
        if isinstance(held, Tensor):
            return held
        path, device = held
        with safe_open(path, "pt", str(device)) as file:
            value: Tensor = file.get_tensor("x")
        return value

    def __setitem__(self, batch: int, x: Float[Tensor, "sequences time hidden"]) -> None:
        """Replace a batch; raise OutputError when its file cannot be written."""
        if self._folder is None:
            self._batches[batch] = x
            return
        path = batch_file(self._folder, batch)
        self._batches[batch] = path, x.device
        beside = path.with_suffix(".partial")  # whoever still reads the old file can go on
        try:
            save_file({"x": x.contiguous()}, beside)
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from None

    @property
    def tokens(self) -> int:
        """How many there are, of all ranks."""
        return sum(self._counts)

    def empty(self, folder: Path | None = None) -> Activations:
        """Return a place for as many batches of the same sequences."""
        return Activations(self.calls, self._counts, folder, self._ranks)

    def copy(self) -> Activations:
        """Return the same batches; one that is replaced in the copy is not replaced here, and is kept in memory."""
        found = self.empty()
        found._batches = dict(self._batches)
        return found

    def first(self, tokens: int) -> Activations:
        """Return a copy of as many of the first batches as have so many tokens, of all ranks; one of each at least."""
        found = self.copy()
        found._counts = _first(self._counts, tokens, self._ranks)
        return found

    def call(self, x: Float[Tensor, "sequences time hidden"], index: int) -> calibrate.Call:
        """Return the other arguments of a layer for a batch of this size."""
        return self.calls[len(x)][index]


def batch_file(folder: Path, batch: int) -> Path:
    """Return where a batch of activations is kept, its tensor called x."""
    return folder / f"{batch:05}.safetensors"


def _first(counts: Sequence[int], tokens: int, ranks: Ranks) -> list[int]:
    """Return the first of some numbers that add up to so many tokens, and one for each rank at least."""
    return [n for i, n in enumerate(counts) if i < ranks.size or sum(counts[:i]) < tokens]


class _Catch(nn.Module):
    """Stands in for the output matrix: keeps what it reads, and gives it on."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x
