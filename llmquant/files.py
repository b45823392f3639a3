"""Files that appear under their names only when they are complete and on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from llmquant.errors import OutputError

KEPT = "What was there before is as it was. Make room, or get permission, and run the same command again."


@contextmanager
def replacing(path: Path, kept: str = KEPT) -> Iterator[Path]:
    """Give a path beside ``path``; the file that is written there takes its place when the context ends well.

    Raises OutputError where that cannot be done, and leaves nothing half-written. kept: what remains, and the remedy.
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        try:
            yield beside
            sync(beside)
            beside.replace(path)
            sync(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, kept) from None


def cannot_write(path: Path, error: Exception, kept: str = KEPT) -> OutputError:
    """Return what to raise where the system refused to write."""
    reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
    return OutputError(f"{path}: cannot be written: {reason}. {kept}")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes that want to work in it out of it while the context lasts.

    Raises OutputError where another one does, or where there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{folder}: another run is using this folder. Wait for it, or choose another one") from None
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; raise OutputError."""
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; raise OutputError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Let the system bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
