"""Shrink open LLMs: calibrated weight quantization, compared honestly, saved in the formats that runtimes read."""

from importlib.metadata import version

__version__ = version("llmquant")
