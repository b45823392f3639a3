"""The documentation that every CPython carries, as text to calibrate and evaluate on.

Topics come from ``pydoc_data``, docstrings from the source files of the standard
library (parsed, never imported) and from the modules compiled into the
interpreter. A document's split is a hash of its name, so that it stays in the
same split from one Python version to the next, wherever this runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmquant.errors import DataError

Split = Literal["training", "calibration", "evaluation"]

_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def split(name: str) -> Split:
    """Return the split of a document: a fifth to evaluate, a fifth to calibrate, the rest to train on.

    >>> split("json.dumps") == split("json.dumps")
    True
    """
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return "evaluation" if bucket < 2 else "calibration" if bucket < 4 else "training"


def documents() -> dict[str, str]:
    """Return every document by its name: the longest where a name has several, none that occurs under two names.

    Raises DataError on a Python that was installed without its documentation.
    """
    found: dict[str, str] = {}
    for name, text in _all():
        text = inspect.cleandoc(text).strip()
        if len(text) > max(40, len(found.get(name, ""))):
            found[name] = text
    times = Counter(found.values())
    found = {name: text for name, text in sorted(found.items()) if times[text] == 1}
    if len(found) < 1000:
        raise DataError(
            f"{sysconfig.get_path('stdlib')}: only {len(found)} documented names in the standard library of "
            "this Python. Some Linux distributions ship it in a package of its own; install that, or give your own "
            "text to `llmquant compare`."
        )
    return found


def text(wanted: Split) -> str:
    """Return the documents of one split, each under its name, joined by blank lines."""
    return "\n\n".join(f"{name}\n\n{doc}" for name, doc in documents().items() if split(name) == wanted)


def _all() -> Iterator[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    yield from ((f"topic {name}", doc) for name, doc in topics.items())
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED & set(parts):
            yield from _of_source(path, ".".join(p for p in parts if p != "__init__"))
    for module in sorted(sys.builtin_module_names):
        yield from _of_module(module)


def _of_source(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # a template or a broken file among the library's
    yield from _of_node(tree, _public(module))


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *_NAMED)):
        doc = ast.get_docstring(node)
        if doc:
            yield name, doc
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, _NAMED) else name
        if not isinstance(child, ast.expr):
            yield from _of_node(child, inner)


def _of_module(module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of modules that a later Python leaves out
        found = vars(importlib.import_module(module))
    for name, value in sorted(found.items()):
        if isinstance(value, str | int | float):
            continue  # its docstring is that of its type
        yield f"{_public(module)}.{name}", _doc(value)
        if isinstance(value, type):
            for inner, member in sorted(vars(value).items()):
                yield f"{_public(module)}.{name}.{inner}", _doc(member)


def _doc(value: object) -> str:
    doc = getattr(value, "__doc__", None)
    return doc if isinstance(doc, str) else ""


def _public(module: str) -> str:
    """Drop the marks of an implementation module: ``_pydatetime`` documents ``datetime``."""
    return module.removeprefix("_").removeprefix("py") if module.startswith("_py") else module.removeprefix("_")
