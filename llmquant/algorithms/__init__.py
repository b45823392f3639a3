"""Rounding algorithms, one a file.

A module has a frozen dataclass ``Config``, ``needs(config)`` (which statistics it
reads) and ``quantize(w, stats, grid, config) -> QuantizedTensor``. It may have ``quick(config)`` and
``column_costs(stats, config)`` for searches (``llmquant.transform``), and ``multiply_adds(rows, cols, config)`` for the
time that it takes (``llmquant.duration``).
"""
