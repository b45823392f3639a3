"""Rewrites of the float model that do not change its function, one a file (see ``llmquant.transform``)."""
