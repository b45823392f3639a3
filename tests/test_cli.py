"""The command line: what a user types, and what bad input is answered."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmquant import cli

ENVIRONMENT = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}


def llmquant(capsys, monkeypatch, *arguments):
    """Run the command line in this process; return exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(cli.out, "width", 200)
    return lambda *arguments: llmquant(capsys, monkeypatch, *arguments)


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the small Llama that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def no_config(model):
    (model / "config.json").unlink()


def no_weights(model):
    (model / "model.safetensors").unlink()


def unsupported(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))


def truncated(model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def shard_missing(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_outside(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def nan(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def tensor_missing(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def config_is_not_json(model):
    (model / "config.json").write_text("{")


DAMAGED = {
    no_config: "config.json: missing",
    no_weights: "there are no weights in it",
    unsupported: "'MambaForCausalLM' is not supported",
    truncated: "model.safetensors: is not a whole safetensors file",
    shard_missing: "model-00001-of-00002.safetensors: missing",
    shard_outside: "is not the name of a shard in this folder",
    nan: "model.layers.1.mlp.up_proj.weight has 1 values that are NaN",
    tensor_missing: "model.layers.1.mlp.up_proj.weight: the checkpoint has no such tensor",
    pickled: "A pickle can run code",
    config_is_not_json: "config.json: is not JSON",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda f: f.__name__)
def test_a_damaged_model_is_one_clear_message(damage, copy, command, tmp_path):
    damage(copy)
    code, out, err = command("quantize", copy, "rtn-w4g128", "--out", tmp_path / "out", "--set", "grid.group_size=32")
    assert code == 2
    assert DAMAGED[damage] in err.replace("\n", "")
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


BAD = {
    "mistyped recipe": (["gtpq-w4g128"], "no recipe is called 'gtpq-w4g128'. Did you mean 'gptq-w4g128'?"),
    "mistyped key": (["gptq-plain-w4g128", "--set", "grid.bit=3"], "grid.bit: unknown key. Did you mean 'bits'?"),
    "mistyped key above": (["gptq-plain-w4g128", "--set", "algoritm.name=rtn"], "Did you mean 'algorithm'?"),
    "wrong value": (["gptq-plain-w4g128", "--set", "grid.bits=9"], "bits is 9, not 2 to 8"),
    "wrong type": (["gptq-plain-w4g128", "--set", "grid.bits=four"], "grid.bits"),
    "no equals sign": (["gptq-plain-w4g128", "--set", "grid.bits"], "has no `=`"),
    "does not divide": (
        ["rtn-w4g128", "--set", "grid.group_size=48"],
        "64 columns are not a multiple of group_size 48",
    ),
    "unknown format": (["rtn-w4g128", "--format", "gguff"], "no exporter is called 'gguff'"),
    "format cannot hold": (
        ["rtn-w4g128", "--format", "gptq", "--set", "grid.bits=5", "--set", "grid.group_size=32"],
        "a GPTQ file cannot hold",
    ),
    "missing text": (["gptq-plain-w4g128", "--set", "calibration.path=nowhere.txt"], "nowhere.txt: cannot be read"),
    "unknown device": (["rtn-w4g128", "--set", "grid.group_size=32", "--device", "cuda"], "no CUDA device"),
}


@pytest.mark.parametrize("case", [c for c in BAD if c != "unknown device" or not torch.cuda.is_available()])
def test_a_bad_request_is_one_clear_message(case, llama, command, tmp_path):
    arguments, message = BAD[case]
    extra = [] if "group" in str(arguments) else ["--set", "grid.group_size=32"]
    code, out, err = command("quantize", llama, *arguments, *extra, "--out", tmp_path / "out")
    assert code == 2
    assert message in err.replace("\n", "")
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("too short", "sequences of 128; 16 are asked for"),
        (b"\xff\xfe\x00 not utf-8", "is not UTF-8 text (byte 0)"),
    ],
    ids=["empty", "short", "binary"],
)
def test_useless_text_is_one_clear_message(content, message, llama, calibrated, command, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = [x for change in [*calibrated, f"calibration.path={path}"] for x in ("--set", change)]
    code, _, err = command("quantize", llama, "gptq-plain-w4g128", "--out", tmp_path / "out", *changes)
    assert code == 2
    assert message in err.replace("\n", "")
    assert not list(tmp_path.glob("out*"))


def test_an_output_folder_in_use_or_unwritable_is_refused_and_untouched(llama, command, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious").write_text("data")
    arguments = ("quantize", llama, "rtn-w4g128", "--set", "grid.group_size=32", "--no-eval", "--out")
    code, _, err = command(*arguments, used)
    assert code == 2
    assert "exists and is not an empty folder" in err.replace("\n", "")
    assert [p.name for p in used.iterdir()] == ["precious"]
    code, _, err = command(*arguments, used / "precious" / "out")
    assert code == 2
    assert "cannot be" in err.replace("\n", "")


def test_the_commands_work_together(llama, calibrated, texts, command, tmp_path):
    changes = [x for change in calibrated for x in ("--set", change)]
    facts = tmp_path / "facts.json"
    code, out, err = command("plan", llama, "gptq-plain-w4g128", *changes, "--json", facts)
    assert (code, err) == (0, "")
    assert json.loads(facts.read_text())["bits_per_weight"] == 4.5
    code, out, _ = command("quantize", llama, "gptq-plain-w4g128", "--out", tmp_path / "out", *changes, "--no-eval")
    assert code == 0
    code, out, _ = command("inspect", tmp_path / "out")
    assert "21 linears quantized" in out
    text = ("--text", texts / "evaluation.txt", "--max-tokens", "1024", "--protocol", "sliding")
    code, out, _ = command("eval", llama, tmp_path / "out", "--reference", llama, *text, "--json", facts)
    rows = json.loads(facts.read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["float", "out"]
    assert rows[0]["kld_mean"] == 0.0 < rows[1]["kld_mean"]
    assert "sliding: evaluation.txt, context 256" in out
    code, out, _ = command(
        "compare", llama, "rtn-w4g128", "gptq-plain-w4g128", "--out", tmp_path / "both", *changes, *text
    )
    assert code == 0
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    keys = {"recipe", "format", "path", "bytes", "bpw", "protocol", "perplexity", "kld_mean", "kld_p99", "top1"}
    assert keys | {"seconds", "peak_rss_bytes"} <= report["rows"][0].keys()
    assert [row["recipe"] for row in report["rows"]] == ["float", "rtn-w4g128", "gptq-plain-w4g128"]
    assert "gptq-plain-w4g128" in (tmp_path / "both" / "report.md").read_text()


@pytest.mark.parametrize("kind", ["grids", "algorithms", "transforms", "formats", "models", "recipes", "targets"])
def test_everything_is_listed_with_a_line_about_it(kind, command, tmp_path):
    code, _, err = command("list", kind, "--json", tmp_path / "facts.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "facts.json").read_text())
    assert all(found.values())
    assert found or kind == "transforms"


def test_every_command_has_help_with_an_example():
    made = ("demo", "plan", "quantize", "export", "compare", "imatrix", "recommend", "push")
    for name in (*made, "eval", "sensitivity", "inspect", "list"):
        result = CliRunner().invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0
        assert f"Example: llmquant {name}" in result.output


def test_a_user_error_from_the_installed_program_is_no_traceback(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llmquant",
            "quantize",
            str(tmp_path / "none"),
            "rtn-w4g128",
            "--out",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("llmquant quantize model gptq-q4", {"gptq-q4_k_m"}),
        ("llmquant compare model rtn-w4g128 nf", {"nf4"}),
        ("llmquant export work --format comp", {"compressed_tensors"}),
        ("llmquant recommend model --target raspb", {"raspberry-pi-5"}),
        ("llmquant qua", {"quantize"}),
    ],
)
def test_a_shell_completes_commands_recipes_formats_and_targets(typed, wanted):
    asked = {"_LLMQUANT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'llmquant'; from llmquant.cli import main; main()"],
        env=ENVIRONMENT | asked, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert set(done.stdout.split()) == wanted, done.stderr


def test_what_a_shell_asks_while_the_user_types_imports_nothing_slow():
    check = "import sys, llmquant.cli; sys.exit({'torch', 'transformers', 'pydantic'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, timeout=60, check=False).returncode == 0
