"""Models to generate with, their weights in memory as their file packs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, TextStreamer
from transformers.pytorch_utils import Conv1D

from llmquant.checkpoint import Checkpoint, by_library, check_finite
from llmquant.errors import CheckpointError, DataError, LlmquantError
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.models import spec_for
from llmquant.packed import open_model, tokenizer_of
from llmquant.run import device_of
from llmquant.runtime.coded import Coded, CodedEmbedding, Int4Linear, linear
from llmquant.runtime.linear import QuantizedLinear
from llmquant.stream import Stream, context_of

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(path: str | Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> Any:
    """Return the transformers model of a folder, GGUF file or hub id, to be called or to generate.

    Quantized linears compute from what the file stores (``llmquant.runtime.coded``), those with 8-bit activations in
    integers. So does an embedding that is quantized (GGUF): it decodes the rows it is asked for. What a file keeps
    float is float, in ``dtype``. Weights are put in place one by one: beside them, one matrix is in memory.

    dtype: of activations: "float32", "bfloat16" (faster for codes of 4 bits or fewer on the CPU, and 2^-8 less exact)
        or "auto": float32 on the CPU, the model's own elsewhere.

    >>> model, tokenizer = load("out"), load_tokenizer("out")  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise LlmquantError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    checkpoint, chosen = open_model(path), device_of(device)
    replacements = _Replacements(checkpoint, chosen)
    stream = Stream(
        checkpoint, chosen, trust_remote_code, weights=False, dtype=DTYPES[dtype], operator=replacements.find
    )
    replacements.dtype, replacements.tied = stream.dtype, stream.tied
    model = stream.load_all()
    if (checkpoint.folder / "generation_config.json").is_file() and not isinstance(checkpoint, GgufCheckpoint):
        with by_library(checkpoint.folder / "generation_config.json", "transformers does not accept it"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


class _Replacements:
    """Finds what computes in the place of a module with a quantized weight. dtype, tied: of the model."""

    dtype = torch.float32
    tied = False

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._spec = spec_for(checkpoint.config)
        self._embedding: Coded | None = None

    def find(self, name: str, module: nn.Module) -> nn.Module | None:
        integers = self._checkpoint.operator(name, self._device)
        if integers is not None:
            return integers
        scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
        if not (scaled or type(module) is nn.Embedding or isinstance(module, nn.Linear | Conv1D)):
            return None
        weight = self._embedding if self.tied and name == self._spec.head else self._coded(name)
        if weight is None:
            return None
        shape = tuple(module.get_parameter("weight").shape)
        if (weight.rows, weight.cols) != (shape[::-1] if isinstance(module, Conv1D) else shape):
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} has {weight.rows} rows of {weight.cols} columns, but the model's "
                f"configuration asks for a weight {list(shape)}"
            )
        if not isinstance(module, nn.Embedding):
            return linear(weight, self.dtype)
        if name == self._spec.embed:
            self._embedding = weight
        return CodedEmbedding(weight, self.dtype, float(getattr(module, "embed_scale", 1.0)))

    def _coded(self, name: str) -> Coded | None:
        weight = self._checkpoint.coded(name)
        if weight is None:
            return None
        for value in weight.buffers():
            if value.is_floating_point() and value is not weight.table:
                check_finite(value, f"{self._checkpoint.path}: {name}: what is stored beside its codes")
        return weight.to(self._device)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder, GGUF file or hub id, or raise CheckpointError or FormatError."""
    return tokenizer_of(open_model(path), trust_remote_code)


def weight_bytes(model: nn.Module) -> int:
    """Return the memory that a model's weights take, each counted once."""
    ours = [m for m in model.modules() if isinstance(m, Coded | Int4Linear | QuantizedLinear)]
    tensors = [*model.parameters(), *(buffer for module in ours for buffer in module.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(m.kernel_bytes for m in ours if isinstance(m, QuantizedLinear))


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Return how a model goes on after a prompt, up to its end token, or the end of its context.

    temperature: 0 takes the likeliest token each time; above, tokens are drawn, the same ones for the same seed.
    say: told the text as it comes, in pieces of whole words.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    count, context = ids.shape[1], context_of(model.config)
    if not count:
        raise DataError("prompt: is empty, and this tokenizer begins no text with a token of its own. Give some text")
    if count >= context:
        raise DataError(f"prompt: has {count} tokens, and the model takes {context} at most. Give a shorter one")
    known = model.generation_config
    pad = known.pad_token_id if known.pad_token_id is not None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - count),
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=known.eos_token_id,
        pad_token_id=pad if pad is not None else 0,  # which fills nothing: there is one sequence
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=_Teller(tokenizer, say)
        )
    text: str = tokenizer.decode(found[0, count:], skip_special_tokens=True)
    return text


class _Teller(TextStreamer):  # type: ignore[misc]
    """Tells a function what comes after the prompt."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._say(text)
