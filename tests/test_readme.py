"""What the README says is true."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from llmquant import cli, plugins
from llmquant.recipe import Recipe

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_commands_run(llama, calibrated, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(texts / "calibration.txt", "text.txt")
    Path("test.txt").write_text((texts / "evaluation.txt").read_text("utf-8")[:16000], "utf-8")
    Path("items.jsonl").write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}\n', "utf-8")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("llmquant ")]
    commands = [command for command in commands if not command.endswith("\\")]  # in test_example_plugin.py
    assert len(commands) >= 7
    small = [c for c in calibrated if "path" not in c]  # the models of the tests are narrower than a group of 128
    for command in commands:
        words = shlex.split(command.replace("org/model", str(llama)))
        if words[1] in ("plan", "quantize", "compare", "train"):
            mixture = "gguf" in command or "_k_" in command
            words += [x for c in small if not (mixture and "grid" in c) for x in ("--set", c)]
        if words[1] == "train":
            words += ["--steps", "4"]
        if words[1] == "bench":
            words += ["--rounds", "1"]
        if words[1] == "imatrix":
            words += ["--sequences", "16", "--length", "128"]
        if words[1] == "sensitivity":
            words += ["--by", "layer", "--max-tokens", "512"]
        if "gguf-auto" in words:  # in its own way in test_allocation.py
            words += ["--set", "algorithm={name: rtn}", "--set", "transforms=[]", "--set", "mismatch_correction=false"]
        # a tokenizer weighs more beside a small model
        words = ["7bpw" if word == "4.5bpw" else word for word in words]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, command


def test_the_recipe_is_valid():
    (recipe,) = blocks("yaml")
    plugins.validate(Recipe, {"name": "readme"} | yaml.safe_load(recipe), "")


def test_the_python_runs(llama, calibrated, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(texts / "calibration.txt", "text.txt")
    shutil.copy(texts / "evaluation.txt", "test.txt")
    (code,) = (block for block in blocks("python") if block.startswith("import llmquant\n"))
    small = [c for c in calibrated if "path" not in c]
    code = code.replace('"calibration.path=text.txt"', f'"calibration.path=text.txt", *{small!r}')
    names = {}
    exec(code.replace("org/model", str(llama)), names)
    assert names["row"].kld_mean > 0
    assert len(names["rows"]) == 3
