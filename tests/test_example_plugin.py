"""The README's example of a plugin, installed as a package of its own: other processes have it, this one does not."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf

from llmquant import api, grid, plugins
from llmquant.stats import Stats
from tests.conftest import VOCABULARY

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "tests" / "example_plugin"
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return a function that runs a module where the example is installed, and returns what it prints."""
    target, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    path = os.pathsep.join([str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words, cwd=elsewhere):
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    alone = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run("pip", "install", *alone, "--target", target, EXAMPLE)
    return run


@pytest.fixture
def example(monkeypatch):
    """Return the two modules, imported from their folder."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from llmquant_example import quantease, tq2_0

    return tq2_0, quantease


def test_the_readme_shows_the_format_and_the_entry_points_as_they_are():
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", README, re.DOTALL)
    assert (EXAMPLE / "llmquant_example" / "tq2_0.py").read_text("utf-8") in blocks
    (shown,) = (block for block in blocks if "entry-points" in block)
    assert (EXAMPLE / "pyproject.toml").read_text("utf-8").endswith(shown)


@pytest.mark.parametrize(("kind", "name"), [("grids", "tq2_0"), ("algorithms", "quantease")])
def test_only_where_it_is_installed_it_is_listed(kind, name, python):
    assert re.search(rf"^{name} ", python("llmquant", "list", kind), re.MULTILINE)
    assert name not in plugins.names(kind)


def test_it_keeps_the_agreements_that_our_own_plugins_keep(python):
    chosen = "tq2_0 or quantease or every_config or every_plugin"
    quick = ("-o", "addopts=", "-p", "no:cacheprovider")  # shapes of our own are checked elsewhere
    said = python("pytest", ROOT / "tests" / "test_plugins.py", "-v", *quick, "-k", chosen)
    passed = re.findall(r"::(\w+)\[(.*)\] PASSED", said)
    assert {(test, name) for test, name in passed if "every_grid" in test} == {
        ("test_every_grid_keeps_the_agreement", "tq2_0"),
        ("test_every_grid_gives_finite_scales_for_every_group_and_comes_near_the_weights", "tq2_0"),
        ("test_every_grid_stores_scales_of_its_own_as_they_are", "tq2_0"),
    }
    assert {name for test, name in passed if "every_algorithm" in test} == {"quantease"}
    assert {name for test, name in passed if "every_config" in test} == {"grids", "algorithms"}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_bytes_decode_to_the_same_floats_in_gguf(example):
    bound = example[0].Config().bind(24, 512, torch.float32)
    w = normal(24, 512)
    params = grid.fit_all(bound, w, torch.ones(512))
    q = grid.QuantizedTensor(bound, grid.encode_all(bound, w, params), params)
    of_spans = {name: value.flatten(0, 1) for name, value in params.items()}
    blocks = bound.to_bytes(q.codes.view(-1, 256), of_spans)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.TQ2_0)
    assert torch.equal(torch.from_numpy(theirs).view(24, 512), grid.dequantize(q))
    codes, again = bound.from_bytes(blocks)
    assert torch.equal(codes.view(24, 512), q.codes)
    assert torch.equal(again["d"], of_spans["d"])


def test_no_other_scale_has_less_error(example):
    w, importance = normal(16, 256), normal(16, 256, seed=1).square()

    def error(d):
        return (importance * (w - d * torch.where(w.abs() > d / 2, w.sign(), 0)).square()).sum(1)

    bound = example[0].Config().bind(16, 256, torch.float32)
    least = error(bound.fit(w, importance)["d"].float())
    others = torch.stack([error(d) for d in torch.linspace(0, 4, 4001)])
    assert (least <= (1 + 1e-6) * others.amin(0)).all()


def test_ternary_weights_are_kept_as_they_are(example):
    bound = example[0].Config().bind(8, 256, torch.float32)
    w = 0.0625 * normal(8, 256).sign() * (normal(8, 256, seed=1) > 0)
    params = grid.fit_all(bound, w, normal(256, seed=2).square())
    assert torch.equal(grid.dequantize(grid.QuantizedTensor(bound, grid.encode_all(bound, w, params), params)), w)


def test_every_sweep_lowers_the_error_of_the_outputs(example):
    w, x = normal(24, 256), normal(600, 256, seed=1)
    x[:, ::7] *= 5
    x[:, 3] = 0  # never seen
    hessian = x.T @ x / 600
    stats = Stats(hessian, hessian.diagonal(), x.abs().mean(0), 600)
    bound = example[0].Config().bind(24, 256, w.dtype)
    errors, codes = [], []
    for sweeps in range(4):
        q = example[1].quantize(w, stats, bound, example[1].Config(sweeps))
        errors.append(((grid.dequantize(q) - w) @ x.T).square().sum(1))
        codes.append(q.codes[:, 3])
    for before, after in itertools.pairwise(errors):
        assert (after <= (1 + 1e-5) * before).all()
        assert after.sum() < before.sum()
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert all(torch.equal(code, codes[0]) for code in codes)


def test_the_command_of_the_readme_writes_a_file_that_is_read_without_the_plugin(
    python, save_model, texts, tmp_path, read_json
):
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    model = save_model(tmp_path / "model", config)
    shutil.copy(texts / "calibration.txt", tmp_path / "text.txt")
    text = tmp_path / "test.txt"
    text.write_text((texts / "evaluation.txt").read_text("utf-8")[:8000], "utf-8")
    (command,) = re.findall(r"^(llmquant .*\\\n.*tq2_0.*)$", README, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", "").replace("org/model", str(model)))
    small = ("--set", "calibration.sequences=16", "--set", "calibration.length=128", "--text", text)
    python(*words, *small, cwd=tmp_path)
    out = tmp_path / words[words.index("--out") + 1]
    _, row = read_json(out / "llmquant-report.json")["evaluation"]
    here = api.evaluate(out, reference=model, text=text)  # TQ2_0 decoded by the gguf package
    assert row["kld_mean"] > 0
    assert here.kld_mean == pytest.approx(row["kld_mean"], rel=1e-5)
    tensors = gguf.GGUFReader(next(out.glob("*.gguf"))).tensors
    assert {t.tensor_type.name for t in tensors if "ffn" in t.name and "norm" not in t.name} == {"TQ2_0"}
