"""File formats, one a file: see ``llmquant.export``."""
