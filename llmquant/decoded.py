"""A whole transformers model with the decoded weights of any folder or file that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmquant import data
from llmquant.checkpoint import Checkpoint
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.packed import open_model
from llmquant.run import device_of
from llmquant.stream import Stream


def load(path: str | Path, device: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the model of a path, all of it in memory, and its tokenizer.

    Its weights are float; linears whose activations have 8 bits, too, are computed in integers.
    """
    checkpoint = open_model(path)
    tokenizer = tokenizer_of(checkpoint, trust_remote_code)
    return Stream(checkpoint, device_of(device), trust_remote_code, weights=False).load_all(), tokenizer


def tokenizer_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder or GGUF file, or raise CheckpointError or FormatError."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.tokenizer()
    return data.load_tokenizer(checkpoint.folder, trust_remote_code)
