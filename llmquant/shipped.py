"""Which recipes come with the package. Imports nothing that is slow: a shell asks while the user types."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name: inside an installed package, or beside a checked-out one."""
    folder = next(p for p in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if p.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
