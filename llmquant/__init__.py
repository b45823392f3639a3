"""Shrink open LLMs: calibrated weight quantization, compared honestly, saved in the formats that runtimes read."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("llmquant")
_INTERFACE = {
    **dict.fromkeys(["compare", "evaluate", "quantize", "train"], "llmquant.api"),
    **dict.fromkeys(["generate", "load", "load_tokenizer"], "llmquant.inference"),
}
__all__ = ["compare", "evaluate", "generate", "load", "load_tokenizer", "quantize", "train"]


def __getattr__(name: str) -> Any:
    # the interface imports torch and transformers; `llmquant --help` should not
    if name in _INTERFACE:
        return getattr(import_module(_INTERFACE[name]), name)
    raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
