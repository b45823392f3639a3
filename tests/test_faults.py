"""Runs that are killed, stopped, out of room or cannot round a linear: the short form of eval/faults.py."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from llmquant import api, calibrate, cli, export, files, layers, plugins, recipe, run
from llmquant.checkpoint import Digest
from llmquant.errors import CalibrationError, CheckpointError, OutputError, PlanError
from llmquant.packed import open_model
from llmquant.work import Work, fingerprint_of_model
from tests.test_cli import ENVIRONMENT, command, llmquant  # noqa: F401  (command is a fixture)
from tests.test_run import files as weights

RTN = ("rtn-w4g128", ["grid.group_size=32"])


@pytest.fixture
def overflowing(llama, tmp_path):
    """The small Llama, with a weight whose scale float16 cannot hold."""
    model = tmp_path / "overflowing"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = 9e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(llama, calibrated, tmp_path):
    changes = [x for change in calibrated for x in ("--set", change)]
    arguments = ["quantize", str(llama), "gptq-plain-w4g128", *changes, "--no-eval", "--out", str(tmp_path / "out")]
    begun = subprocess.Popen([sys.executable, "-m", "llmquant", *arguments], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    first = tmp_path / "out.work" / "layer-00000.safetensors"
    while not first.exists() and begun.poll() is None:
        time.sleep(0.01)
    begun.kill()
    begun.wait()
    assert first.exists()
    assert not (tmp_path / "out").exists()
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert report.resumed_layers
    run.quantize(llama, chosen, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code", "turned"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
)
def test_a_signal_stops_a_run_that_says_how_to_go_on(
    number,
    code,
    turned,
    llama,
    calibrated,
    tmp_path,
    command,  # noqa: F811
    monkeypatch,
):
    save = Work.save

    def then_stop(self, part, *args, **options):
        save(self, part, *args, **options)
        if part == 1:
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                if turned:
                    raise ValueError("what a compiled library makes of it") from None
                raise

    monkeypatch.setattr(Work, "save", then_stop)
    changes = [x for change in calibrated for x in ("--set", change)]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        found, _, err = command(
            "quantize", llama, "gptq-plain-w4g128", *changes, "--no-eval", "--out", tmp_path / "out"
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert found == code
    assert "Finished layers are kept; the same command goes on from layer 1." in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.work"]
    monkeypatch.undo()
    report, _ = run.quantize(llama, recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "out")
    assert report.resumed_layers == 2


@pytest.mark.parametrize(
    ("name", "limit"),
    [*(("gptq-plain-w4g128", n) for n in (0, 300, 20_000, 60_000, 120_000)), *(("gguf-q4_0", n) for n in (0, 60_000))],
)
def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on(name, limit, llama, calibrated, tmp_path):
    changes = calibrated if name == "gptq-plain-w4g128" else []
    chosen = recipe.load(name, changes)
    run.quantize(llama, chosen, tmp_path / "before")
    before = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written: File too large.*same command"):
            run.quantize(llama, chosen, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in tmp_path.iterdir()} <= {"before", "out.work"}
    assert not list(tmp_path.rglob("*.partial"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()} == before
    run.quantize(llama, chosen, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"facts\.json: cannot be written: No space left on device\. What was"):
            files.write_json(path, {"a": 2})

    def interrupted():
        with files.replacing(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("facts.json", '{\n  "a": 1\n}\n')]


def test_two_runs_that_write_one_folder_do_not_meet(llama, tmp_path):
    chosen = recipe.load(*RTN)

    def second(what, done, total):
        if (what, done) == ("writing compressed_tensors", 3):
            with pytest.raises(OutputError, match="another run is writing it"):
                run.quantize(llama, chosen, tmp_path / "out")

    run.quantize(llama, chosen, tmp_path / "out", progress=second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_report_holds_the_hash_of_every_other_file(llama, tmp_path, read_json):
    api.quantize(llama, *RTN[:1], tmp_path / "out", changes=RTN[1], evaluate=False)
    (hashes,) = read_json(tmp_path / "out" / "llmquant-report.json")["hashes"].values()
    found = {p.name: Digest(p).hexdigest() for p in (tmp_path / "out").iterdir() if p.name != "llmquant-report.json"}
    assert hashes == found


CONTAINERS = {
    "gptq": ("gptq", ["grid.group_size=32"]),
    "awq": ("awq", ["grid.group_size=32", "grid.symmetric=false"]),
    "compressed_tensors": ("compressed_tensors", ["grid.group_size=32"]),
    "bitsandbytes": ("bitsandbytes", ["grid={name: nf4}"]),
    "gguf": ("gguf", ["grid={name: q4_0}"]),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_folder_with_a_wrong_code_does_not_get_its_name(container, llama, tmp_path, monkeypatch):
    format_, changes = CONTAINERS[container]
    chosen = recipe.load("rtn-w4g128", [*changes, f"formats=[{format_}]"])
    exporter = plugins.load("exporters", format_, "")
    pack = exporter.pack

    def wrong(q, *args):
        packed = pack(q, *args)
        codes = packed[next(key for key in ("qweight", "weight_packed", "weight", "") if key in packed)]
        if not codes.is_meta:
            codes.view(torch.uint8).view(-1)[7] ^= 1
        return packed

    monkeypatch.setattr(exporter, "pack", wrong)
    with pytest.raises(OutputError, match=r"does not read back: .* decodes to \d+ other values"):
        run.quantize(llama, chosen, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    run.quantize(llama, chosen, tmp_path / "out", verify=False)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_linear_that_cannot_be_quantized_stops_the_run_or_stays_float(container, llama, tmp_path, monkeypatch):
    """Those that read the same activations stay float with it, in every container."""
    format_, changes = CONTAINERS[container]
    chosen = recipe.load("rtn-w4g128", [*changes, f"formats=[{format_}]"])
    algorithm = plugins.load("algorithms", "rtn", "")
    quantize = algorithm.quantize
    broken = load_file(llama / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]

    def refuse(w, *args):
        if w.shape == broken.shape and torch.equal(w, broken):
            raise CalibrationError("its Hessian is not positive definite.")
        return quantize(w, *args)

    monkeypatch.setattr(algorithm, "quantize", refuse)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.1\.self_attn\.k_proj\.weight: its Hessian"):
        run.quantize(llama, chosen, tmp_path / "out")
    report, _ = run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work", on_error="skip")
    names = {f"model.layers.1.self_attn.{x}_proj" for x in "qkv"}
    assert report.given_up.keys() == names
    assert all(any(name in note and "left float" in note for note in report.notes) for name in names)
    found, judge = open_model(tmp_path / "out"), open_model(llama)
    for name, info in judge.infos.items():
        if info.shape == (64, 64) or "k_proj" in name:
            exact = name.removesuffix(".weight") in names
            assert torch.equal(found.read(name), judge.read(name)) == exact, name
    with pytest.raises(CalibrationError, match="earlier run with --on-error skip left 1 linears float"):
        run.quantize(llama, chosen, tmp_path / "again", tmp_path / "work")
    run.quantize(llama, chosen, tmp_path / "again", tmp_path / "work", on_error="skip")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    api.export(tmp_path / "work", [format_], tmp_path / "exported")
    assert weights(tmp_path / "exported") == weights(tmp_path / "out")


def test_a_skipped_run_that_died_ends_with_the_same_bytes_and_exit_code_3(
    overflowing,
    calibrated,
    tmp_path,
    command,  # noqa: F811
):
    changes = [*calibrated, "grid.scale_dtype=float16", "transforms=[{name: awq, clip: false}]"]
    chosen = recipe.load("gptq-plain-w4g128", changes)
    report, _ = run.quantize(overflowing, chosen, tmp_path / "whole", on_error="skip")
    assert {"model.layers.1.self_attn.k_proj"} <= report.given_up.keys()

    def die(what, done, total):
        if (what, done) == ("quantizing layers", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(overflowing, chosen, tmp_path / "out", progress=die, on_error="skip")
    options = [x for change in changes for x in ("--set", change)]
    arguments = ("quantize", overflowing, "gptq-plain-w4g128", *options, "--no-eval", "--out", tmp_path / "out")
    code, out, _ = command(*arguments, "--on-error", "skip")
    assert code == 3
    assert "left float" in out
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    code, _, err = command(*arguments)
    assert code == 2
    assert "it has values that are not finite" in err.replace("\n", " ")


def test_activations_that_are_not_finite_are_named_by_the_linear_that_reads_them(llama, calibrated, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for out, changes in (("a", calibrated), ("b", [*calibrated, "algorithm={name: rtn, calibrated: true}"])):
        with pytest.raises(
            CalibrationError, match=r"^model\.layers\.1\.self_attn\.q_proj.*: what it reads from the calibration text"
        ):
            run.quantize(model, recipe.load("gptq-plain-w4g128", changes), tmp_path / out)


@pytest.mark.parametrize("damage", ["cut", "shape", "codes", "records", "missing"])
def test_a_damaged_work_file_is_named_and_removing_it_mends_the_run(damage, llama, calibrated, tmp_path):
    chosen, work = recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "work"
    run.quantize(llama, chosen, tmp_path / "whole", work)
    path, name = work / "layer-00001.safetensors", "model.layers.1.mlp.up_proj"
    whole = path.read_bytes()
    tensors = load_file(path)
    told = {"records": "{}" if damage != "records" else '{"x": {}}', "given_up": "{}"}
    match damage:
        case "shape":
            tensors[f"{name}:scale"] = tensors[f"{name}:scale"][:-1].clone()
        case "codes":
            tensors[f"{name}:codes"][0, 0] = 16
        case "missing":
            del tensors[f"{name}:codes"]
    save_file(tensors, path, metadata=told)
    if damage == "cut":
        path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors: is damaged: .*Remove this file and run"):
        run.quantize(llama, chosen, tmp_path / "out", work)
    path.unlink()
    run.quantize(llama, chosen, tmp_path / "out", work)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_the_folders_of_several_formats_appear_together(llama, calibrated, tmp_path):
    chosen = recipe.load("gptq-plain-w4g128", [*calibrated, "formats=[gptq, compressed_tensors]"])
    run.quantize(llama, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what, done) == ("writing compressed_tensors", 2):
            assert (tmp_path / "out.partial" / "gptq" / "model.safetensors").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.work", "whole"]
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert report.outputs == {name: str(tmp_path / "out" / name) for name in ("gptq", "compressed_tensors")}
    for name in report.outputs:
        assert weights(tmp_path / "out" / name) == weights(tmp_path / "whole" / name)


def test_a_run_that_is_stopped_while_it_is_measured_leaves_a_whole_folder(llama, calibrated, tmp_path, read_json):
    def die(what, done, total):
        if what == "scoring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=calibrated, progress=die)
    report = read_json(tmp_path / "out" / "llmquant-report.json")
    assert report["evaluation"] == []
    assert report["hashes"]["gptq"]["README.md"] == Digest(tmp_path / "out" / "README.md").hexdigest()


def test_a_finished_run_leaves_what_it_has_not_put_into_the_work_folder(llama, calibrated, tmp_path, monkeypatch):
    save = Work.save

    def beside(self, *args, **options):
        save(self, *args, **options)
        (self.folder / "mine.txt").write_text("not a run's")

    monkeypatch.setattr(Work, "save", beside)
    run.quantize(llama, recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out.work").iterdir()] == ["mine.txt"]


def test_a_second_run_cannot_take_the_folder_of_one_that_is_about_to_end(llama, tmp_path, monkeypatch):
    chosen = recipe.load(*RTN)
    sync, refused = export.sync, []

    def meanwhile(path):
        if path.name == "out.partial":
            with pytest.raises(OutputError, match="another run is writing it"):
                run.quantize(llama, chosen, tmp_path / "out")
            refused.append(path)
        sync(path)

    monkeypatch.setattr(export, "sync", meanwhile)
    run.quantize(llama, chosen, tmp_path / "out")
    assert refused
    assert open_model(tmp_path / "out").bytes
    assert not list(tmp_path.glob("out/.lock"))


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_not_of_llmquant_is_never_removed(restart, llama, tmp_path):
    chosen = recipe.load(*RTN)
    for name in ("work/scratch/thesis.txt", "work/layer-notes.txt", "out.partial/download.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(OutputError, match=r"is not a work folder|is not of llmquant"):
            run.quantize(llama, chosen, tmp_path / "out", work_folder=tmp_path / "work", restart=restart)
        assert path.read_text() == "mine"
        shutil.rmtree(path.parent)
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
    run.quantize(llama, chosen, tmp_path / "out", work_folder=tmp_path / "work")
    (tmp_path / "work" / "layer-notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds layer-notes\.txt"):
        run.quantize(llama, chosen, tmp_path / "new", work_folder=tmp_path / "work", restart=True)
    assert (tmp_path / "work" / "layer-00000.safetensors").exists()


def test_a_change_anywhere_in_the_model_is_another_model(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    before = fingerprint_of_model(run.load_float(model))
    assert before["hash"] == fingerprint_of_model(run.load_float(llama))["hash"]
    tensors = load_file(llama / "model.safetensors")
    for name in tensors:
        save_file(tensors | {name: 2 * tensors[name]}, model / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint_of_model(run.load_float(model)) != before, name


def test_a_work_folder_is_not_exported_with_another_model(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    run.quantize(model, recipe.load(*RTN), tmp_path / "out", work_folder=tmp_path / "work")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 7
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=r"work: was begun with model\.hash"):
        api.export(tmp_path / "work", ["compressed_tensors"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["out", "out/work", "."])
def test_a_work_folder_in_the_output_is_refused_before_any_work(name, llama, tmp_path):
    with pytest.raises(OutputError, match="a work folder is neither in the output folder"):
        run.quantize(llama, recipe.load(*RTN), tmp_path / "out", work_folder=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_error_that_someone_keeps_does_not_keep_the_work_folder(overflowing, tmp_path):
    chosen = recipe.load("rtn-w4g128", ["grid.group_size=32", "grid.scale_dtype=float16"])
    kept = []
    for _ in range(2):
        with pytest.raises(CalibrationError) as raised:
            run.quantize(overflowing, chosen, tmp_path / "out", work_folder=tmp_path / "work")
        kept.append(raised)


def test_a_run_of_which_all_layers_are_finished_computes_none_again(llama, calibrated, tmp_path, monkeypatch):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)

    def broken(*args, **options):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_all", broken)
        with pytest.raises(OutputError, match="the disk is full"):
            run.quantize(llama, chosen, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "run_layer", broken)
        patch.setattr(calibrate, "start", broken)
        report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert report.resumed_layers == 3
    run.quantize(llama, chosen, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_layer_after_the_last_missing_one_is_not_computed(llama, calibrated, tmp_path, monkeypatch):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    run.quantize(llama, chosen, tmp_path / "out", work_folder=tmp_path / "work")
    (tmp_path / "work" / "layer-00001.safetensors").unlink()
    passed, finished = [], layers._pass_finished
    monkeypatch.setattr(layers, "_pass_finished", lambda *args: passed.append(args[3]) or finished(*args))
    run.quantize(llama, chosen, tmp_path / "again", work_folder=tmp_path / "work")
    assert passed == [0]
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_what_a_run_before_has_left_counts_as_room(llama, tmp_path, monkeypatch):
    chosen = recipe.load(*RTN)
    plan = run.make_plan(llama, chosen)
    needed = sum(plan.sizes.values())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlanError, match="of the disk are free"):
        run.quantize(llama, chosen, tmp_path / "out")
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / ".lock").touch()
    (left / "part-0").write_bytes(bytes(needed // 2 + 1))
    run.quantize(llama, chosen, tmp_path / "out")
    assert not left.exists()


def test_only_one_at_a_time_works_in_a_folder(tmp_path):
    with files.held(tmp_path / "here"), pytest.raises(OutputError, match="another run is using this folder"):
        files.held(tmp_path / "here").__enter__()
    with files.held(tmp_path / "here"):
        pass


def test_a_signal_before_anything_began_ends_with_its_own_code(monkeypatch, capsys):
    stopped = typer.Typer()

    @stopped.command()
    def importing() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(sys, "argv", ["llmquant"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 143
    assert "Stopped before anything was done." in capsys.readouterr().err
