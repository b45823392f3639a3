"""Number formats, one a file: see ``llmquant.grid.Grid``."""
