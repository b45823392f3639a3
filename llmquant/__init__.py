"""Shrink open LLMs: calibrated weight quantization, compared honestly, saved in the formats that runtimes read."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("llmquant")
__all__ = ["compare", "evaluate", "quantize", "train"]


def __getattr__(name: str) -> Any:
    # the interface imports torch and transformers; `llmquant --help` should not
    if name in __all__:
        return getattr(import_module("llmquant.api"), name)
    raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
