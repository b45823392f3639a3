"""Which llmquant a study measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]


def commit() -> str:
    """Return the commit of the checkout that this file is in, marked where files differ from it."""
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
