"""Logits of a GGUF file as llama.cpp itself computes them, through cyllama (``pip install llmquant[gguf-runtime]``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmquant.errors import CheckpointError, LlmquantError


def _load(path: Path) -> tuple[Any, Any]:
    """Return llama.cpp's module and a model."""
    try:
        from cyllama.llama import llama_cpp
    except ImportError:
        raise LlmquantError(
            "--runtime llama.cpp needs cyllama, which is not installed here. Run: pip install 'llmquant[gguf-runtime]'"
        ) from None

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        @property
        def n_vocab(self) -> int:  # cyllama 0.2.18 asks its model for this, which it does not have
            return int(self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    try:
        return llama_cpp, Model(str(path), llama_cpp.LlamaModelParams())
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: llama.cpp does not load it: {str(error).splitlines()[0]}") from None


class CppModel:
    """A GGUF file in llama.cpp on the CPU, with its default settings (16-bit cache, activations rounded to 8 bits)."""

    def __init__(self, path: Path, context: int, exact: bool = False) -> None:
        """Load the file for sequences of up to ``context`` tokens; raise CheckpointError when llama.cpp refuses it.

        exact: keep keys and values in 32 bits, instead of 16 as is the default.
        """
        llama_cpp, self._model = _load(path)
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        if exact:
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
            settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context: Any = llama_cpp.LlamaContext(self._model, settings)
        self._batch: Any = llama_cpp.LlamaBatch(n_tokens=context, embd=0, n_seq_max=1)
        self.vocabulary: int = self._model.n_vocab

    def logits(self, tokens: Int[Tensor, " time"]) -> Float[Tensor, "time vocab"]:
        """Return the logits after every token of one sequence."""
        self._context.kv_cache_clear()
        self._batch.reset()
        for place, token in enumerate(tokens.tolist()):
            self._batch.add(token, place, [0], True)
        self._context.decode(self._batch)
        rows = [np.asarray(self._context.get_logits_ith(i), np.float32) for i in range(len(tokens))]
        return torch.from_numpy(np.stack(rows))

    def greedy(self, tokens: Sequence[int]) -> Iterator[int]:
        """Yield the likeliest next token again and again, the first after ``tokens``; the end token is one like any."""
        self._context.kv_cache_clear()
        place, new = 0, list(tokens)
        while True:
            self._batch.reset()
            for token in new[:-1]:
                self._batch.add(token, place, [0], False)
                place += 1
            self._batch.add(new[-1], place, [0], True)
            place += 1
            self._context.decode(self._batch)
            new = [int(np.argmax(np.asarray(self._context.get_logits_ith(self._batch.n_tokens - 1), np.float32)))]
            yield new[0]

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text: special tokens in it are recognised, and none is added."""
        return list(self._model.get_vocab().tokenize(text, False, True)) if text else []
