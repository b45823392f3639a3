"""A comparison that was stopped goes on, and is not mixed with another one."""

import json

import pytest

from llmquant import api
from llmquant.errors import LlmquantError, OutputError

RECIPES = ["rtn-w4g128", "gptq-plain-w4g128"]


def hashes(folder):
    """Return by recipe and format what must be the same every time: the hashes of all files but card and page."""
    found = {}
    for path in folder.glob("*/llmquant-report.json"):
        found[path.parent.name] = json.loads(path.read_text())["hashes"]
        for of_format in found[path.parent.name].values():
            del of_format["README.md"], of_format["report.html"]  # which tell how long it took
    assert set(found) == set(RECIPES)
    return found


@pytest.fixture
def stopped(llama, calibrated, tmp_path):
    """Return a comparison that was stopped while its second recipe was at work."""

    def stop(what, done, total):
        if what == "quantizing layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compare(llama, RECIPES, tmp_path / "both", changes=calibrated, progress=stop)
    assert (tmp_path / "both" / "gptq-plain-w4g128.work" / "layer-00000.safetensors").exists()
    return tmp_path / "both"


def test_a_comparison_goes_on_where_it_was_stopped(stopped, llama, calibrated, tmp_path):
    weights = stopped / "rtn-w4g128" / "model.safetensors"
    finished = weights.stat().st_mtime_ns
    rows = api.compare(llama, RECIPES, stopped, changes=calibrated)
    assert weights.stat().st_mtime_ns == finished
    once = api.compare(llama, RECIPES, tmp_path / "once", changes=calibrated)
    assert [(row.recipe, row.kld_mean, row.protocol) for row in rows] == [
        (row.recipe, row.kld_mean, row.protocol) for row in once
    ]
    ours, theirs = hashes(stopped), hashes(tmp_path / "once")
    assert ours == theirs
    assert sorted(p.name for p in stopped.iterdir()) == sorted(p.name for p in (tmp_path / "once").iterdir())


def test_a_finished_comparison_is_measured_again_and_takes_more_recipes(llama, calibrated, texts, tmp_path):
    out = tmp_path / "out"
    first = api.compare(llama, ["rtn-w4g128"], out, changes=calibrated, text=texts / "calibration.txt", max_tokens=512)
    weights = out / "rtn-w4g128" / "model.safetensors"
    finished = weights.stat().st_mtime_ns
    rows = api.compare(llama, RECIPES, out, changes=calibrated, text=texts / "evaluation.txt", max_tokens=1024)
    assert weights.stat().st_mtime_ns == finished
    assert [row.recipe for row in rows] == ["float", *RECIPES]
    assert rows[1].protocol != first[1].protocol
    assert rows[1].seconds == first[1].seconds  # of quantizing


def test_another_comparison_is_refused_in_its_folder(stopped, llama, calibrated, texts, tmp_path):
    def refused(what, model=llama, changes=calibrated):
        with pytest.raises(OutputError, match=f"both: was begun with {what}.*choose another --out"):
            api.compare(model, RECIPES, stopped, changes=changes)

    refused(
        r"recipes\.gptq-plain-w4g128\.recipe\.grid\.bits = 4, and now it is 3", changes=[*calibrated, "grid.bits=3"]
    )
    calibration = texts / "calibration.txt"
    text = calibration.read_text()
    try:
        calibration.write_text(text + " ")
        refused(r"recipes\.gptq-plain-w4g128\.files\.")
    finally:
        calibration.write_text(text)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    refused(r"model\.folder", model=folder)


def test_a_comparison_does_not_write_into_the_folder_of_something_else(llama, calibrated, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        api.compare(llama, RECIPES, tmp_path / "out", changes=calibrated)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "told"),
    [("imatrix=/dev/zero", "/dev/zero"), ("calibration.path=/nowhere.txt", "/nowhere.txt: cannot be read")],
)
def test_a_file_that_cannot_be_read_is_named(change, told, llama, calibrated, texts, tmp_path):
    changes = [*(calibrated[-1:] if "imatrix" in change else calibrated), change]
    name = "rtn-w4g128" if "imatrix" in change else "gptq-plain-w4g128"
    with pytest.raises(LlmquantError, match=told):
        api.compare(llama, [name], tmp_path / "out", text=texts / "evaluation.txt", changes=changes)
