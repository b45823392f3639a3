"""Rounding algorithms, one a file.

A module has a frozen dataclass ``Config``, ``needs(config)`` (which statistics it
reads) and ``quantize(w, stats, grid, config) -> QuantizedTensor``.
"""
