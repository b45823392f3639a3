"""Who may know whom: what keeps the formats, algorithms and model families apart, read from the imports."""

import ast
import re
from pathlib import Path

import pytest

import llmquant

ROOT = Path(llmquant.__file__).parent
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
PURE = re.compile(
    r"(grid|activations|runtime(\.\w+)?|blockwise|ranges|stats|transform|words|patterns|metrics|answers|targets|protocols|plan)|(grids|algorithms|transforms|exporters)\.(?!gguf).*"
)
OUTSIDE = {"os", "pathlib", "json", "safetensors", "transformers", "datasets", "accelerate", "logging", "shutil"}
FAMILY = re.compile(
    r"(?<![a-z0-9])((llama|qwen|gemma|mistral|mixtral|falcon|gpt_?neox|gpt2)(?!\.cpp|-perplexity|-cli)"
    r"|(bloom|phi|opt)[0-9]?(?![a-z0-9]))"
)


def imports(path):
    """Return the dotted names of everything that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def below(names, package):
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def words(path):
    """Return every identifier and every string of a file but its docstrings, in lower case."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(text := getattr(node, name, None), str):
                yield text.lower()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value.lower()


@pytest.mark.parametrize("module", [m for m in MODULES if PURE.fullmatch(m)])
def test_a_pure_module_touches_no_file_and_no_other_library(module):
    found = imports(MODULES[module])
    if module == "exporters.bitsandbytes":  # one of its tensors is a JSON text
        found -= {"json"}
    assert not {name for name in found if name.split(".")[0] in OUTSIDE}
    files = {f"llmquant.{m}" for m in ("checkpoint", "work", "data", "run", "stream", "packed", "report", "cli", "api")}
    if module == "plan":  # the description of a tensor, no more
        found -= {"llmquant.checkpoint", "llmquant.checkpoint.TensorInfo"}
    assert not found & files


@pytest.mark.parametrize("module", [m for m in MODULES if PURE.fullmatch(m)])
def test_a_pure_module_never_prints(module):
    calls = [n.func for n in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id in ("print", "open", "input")]


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("algorithms", ["grids", "transforms", "exporters", "models"]),
        ("grids", ["algorithms", "transforms", "exporters", "models"]),
        ("transforms", ["grids", "exporters", "models"]),
        ("exporters", ["algorithms", "transforms"]),
        ("models", ["grids", "algorithms", "transforms", "exporters"]),
    ],
)
def test_no_room_knows_what_another_is_for(room, others):
    for module, path in MODULES.items():
        if module.startswith(f"{room}."):
            for other in others:
                assert not below(imports(path), f"llmquant.{other}"), module


@pytest.mark.parametrize(
    "module",
    [
        m
        for m in MODULES
        if m.split(".")[0] not in ("models", "demo", "cpp_runtime") and not m.startswith("exporters.gguf.")
    ],
)
def test_no_model_family_is_named_outside_its_table(module):
    assert not {word for word in words(MODULES[module]) if FAMILY.search(word)}


def test_the_reader_of_words_sees_names_and_strings_but_no_docstrings(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        '"""A doc."""\nimport a.b as c\ndef f(x: int) -> None:\n    """More."""\n    y.z = "S T"\n', "utf-8"
    )
    assert {"c", "f", "x", "y", "z", "s t"} <= set(words(path))
    assert not {"a doc.", "more."} & set(words(path))
    assert imports(path) == {"a.b"}
