"""What decides which rows the studies under eval/ measure, keep and compare, and their figures of comparison."""

import doctest
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).parent.parent / "eval"
ROWS = sorted((EVAL / "results" / "accuracy").glob("*.json"))


@pytest.fixture(scope="module")
def module():
    """Return a function that imports a script of eval/."""
    sys.path.insert(0, str(EVAL))
    yield importlib.import_module
    sys.path.remove(str(EVAL))


@pytest.fixture(scope="module")
def accuracy(module):
    return module("accuracy")


@pytest.fixture(scope="module")
def report(module):
    return module("accuracy_report")


@pytest.fixture(scope="module")
def splits(module):
    return module("splits")


def texts(folder, **given):
    for name, text in given.items():
        (folder / name).write_text(text, "utf-8")
    return {f"--{name}": folder / name for name in given}


def sentence(seed, characters):
    """Return words that no other seed has."""
    words = " ".join(f"{seed}{i:04d}" for i in range(characters))
    return words[:characters]


def row(program="llmquant default", **changes):
    """Return a measured row of two windows."""
    figures = {"perplexity": 18.0, "perplexity_error": 0.1, "kld_mean": 0.02, "kld_error": 0.001}
    figures |= {"kld_median": 0.01, "kld_p99": 0.1, "top1": 0.9, "nll_windows": "2.5 3.5", "kld_windows": "0.01 0.03"}
    found = {"kind": "affine", "format": "w4g128", "program": program, "version": "abc", "command": [], "error": None}
    found |= {"key": f"affine w4g128 {program}", "compared_bytes": 1000, "decoded": figures} | changes
    return found


def failed(**changes):
    found = row(**changes, error="no memory")
    del found["decoded"], found["compared_bytes"]
    return found


def about(**changes):
    names = ("files", "outliers", "texts", "sequences", "length", "seed", "imatrix", "peer_dtype", "protocol")
    return {"model": "demo"} | dict.fromkeys(names, 0) | {"commands": ["first"], "versions": {}, "threads": 1} | changes


def results(report, *files):
    return report.Results([about(rows=rows) for rows in files])


def test_the_examples_of_the_studies_hold(report):
    found = doctest.testmod(report)
    assert found.attempted > 0
    assert not found.failed


def test_texts_that_share_a_passage_stop_a_study(splits, tmp_path):
    shared = sentence("s", 250)
    respaced = shared.replace(" ", "\n\t")
    given = texts(tmp_path, calib=f"a line\n({shared}", text=f"{sentence('t', 300)}\n\n[{respaced}")
    with pytest.raises(SystemExit, match=r"--calib and --text share 1 passages .* 250 .* line 2 of .* line 3 of "):
        splits.check_disjoint(given)


def test_disjoint_texts_do_not_stop_a_study(splits, tmp_path):
    short = sentence("s", splits.RUN - 2)
    splits.check_disjoint(texts(tmp_path, calib="a " + short + " a", select=sentence("t", 300), text="b" + short + "b"))


def test_a_passage_is_shared_from_200_characters_on(splits):
    for characters in (199, 200, 201):
        shared = sentence("s", characters)
        passages = splits.shared_passages("a" * 50 + shared + "a" * 50, "b" * 70 + shared + "b" * 70)
        assert passages == ([splits.Passage(50, 50 + characters, 70)] if characters >= 200 else [])


def test_the_same_file_stops_a_study(splits, tmp_path):
    path = texts(tmp_path, calib="short")["--calib"]
    with pytest.raises(SystemExit, match="the same file"):
        splits.check_disjoint({"--calib": path, "--text": tmp_path / "." / "calib"})


def test_a_text_without_what_it_shares_is_disjoint(splits, tmp_path):
    shared = sentence("s", 250)
    text, other = sentence("t", 300) + shared + sentence("u", 300), shared + sentence("v", 100)
    rest = splits.without(text, splits.shared_passages(text, other))
    assert rest == sentence("t", 300) + sentence("u", 300)
    splits.check_disjoint(texts(tmp_path, text=rest, other=other))


def windows(name, values, **changes):
    changed = row(**changes)
    return changed | {"decoded": changed["decoded"] | {f"{name}_windows": " ".join(map(str, values))}}


def test_the_ratio_of_divergences_and_its_error(report):
    mine, theirs = [0.010, 0.030, 0.020, 0.060], [0.05, 0.08, 0.09, 0.18]
    both = [windows("kld", values) for values in (mine, theirs)]
    ratio, error = results(report, []).ratio(*both, "decoded")
    assert ratio == pytest.approx(0.12 / 0.40)
    # the variance of a ratio of means, of the textbook
    variance = statistics.variance(mine) + 0.3**2 * statistics.variance(theirs)
    variance -= 2 * 0.3 * statistics.covariance(mine, theirs)
    assert error == pytest.approx(math.sqrt(variance / 4) / 0.10)


def test_the_ratio_by_hand(report):
    # mine - theirs: -1, 0, 1; their standard deviation 1, over the mean 2 of theirs and the root of 3 windows
    both = [windows("kld", values) for values in ([1, 2, 3], [2, 2, 2])]
    assert results(report, []).ratio(*both, "decoded") == pytest.approx((1, 1 / 2 / 3**0.5))


def test_the_difference_of_perplexities_and_its_error(report):
    mine, theirs = [2.9, 3.1, 2.7, 3.3], [3.0, 3.2, 2.6, 3.6]
    difference, error = results(report, []).perplexity_difference(
        windows("nll", mine), windows("nll", theirs), "decoded"
    )
    a, b = math.exp(3.0), math.exp(3.1)
    assert difference == pytest.approx(a - b)
    variance = a**2 * statistics.variance(mine) + b**2 * statistics.variance(theirs)
    assert error == pytest.approx(math.sqrt((variance - 2 * a * b * statistics.covariance(mine, theirs)) / 4))


def test_a_file_compared_with_itself_is_alike_for_certain(report):
    assert results(report, []).ratio(row(), row(), "decoded") == (1, 0)
    assert results(report, []).perplexity_difference(row(), row(), "decoded") == (0, 0)


@pytest.mark.parametrize(("size", "compared"), [(999, True), (1000, True), (1001, False)])
def test_a_larger_file_is_not_compared(report, size, compared):
    mine, theirs = row(compared_bytes=size), row("auto-round")
    assert report.too_large(mine, theirs) is not compared
    found = results(report, [mine, theirs] if compared else [theirs, mine])
    assert bool(report.ratios(found, "affine", "w4g128", "llmquant default", None, "decoded")) is compared
    assert (report.larger_than(found, mine) is None) is compared
    assert bool(report.cells(found, mine, "decoded")[-3]) is compared


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_row_that_failed_hides_no_measured_one(report, order):
    files = [[failed()], [row()]]
    found = results(report, *(files[i] for i in order))
    assert found.rows == [row()]
    assert not found.failed
    assert results(report, [failed()], [failed()]).failed == [failed()]


def test_one_row_in_two_files_has_one_result(report):
    assert len(results(report, [row(seconds=1.0)], [row(seconds=2.0, version="def")]).rows) == 1
    for changes in ({"compared_bytes": 999}, {"decoded": row()["decoded"] | {"kld_mean": 0.021}}):
        with pytest.raises(SystemExit, match=r"demo: two files hold affine w4g128 llmquant default, .* abc .* def"):
            results(report, [row()], [row(version="def", **changes)])


@pytest.mark.skipif(not ROWS, reason="a distribution without the results")
def test_the_rows_of_the_repository_make_a_report(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda studies, path: None)
    report.write_report(ROWS, tmp_path / "report.md")
    told = (tmp_path / "report.md").read_text("utf-8")
    for path in ROWS:
        assert f"\n## {json.loads(path.read_text('utf-8'))['model']}\n" in told
    assert "peers computing in float32 (auto-round by its own default, `amp`, in bfloat16" in told


@pytest.fixture
def log(accuracy, tmp_path):
    """Return a function that opens the file of rows as a command does."""
    return lambda again=(), **changes: accuracy.Log(tmp_path / "rows.json", about(**changes), list(again))


def test_rows_are_kept_for_the_next_command(log, read_json, tmp_path):
    first = log()
    assert first.lacks("affine w4g128 auto-round", "auto-round")
    first.add(row("auto-round"))
    first.add(failed(program="GPTQModel GPTQ"))
    second = log(commands=["second"])
    assert second.rows == first.rows
    assert not second.lacks("affine w4g128 auto-round", "auto-round")
    assert not second.lacks("affine w4g128 GPTQModel GPTQ", "GPTQModel GPTQ")
    assert second.lacks("affine w3g128 auto-round", "auto-round")
    assert read_json(tmp_path / "rows.json")["commands"] == ["first", "second"]


@pytest.mark.parametrize("name", ["model", "texts", "seed"])
def test_rows_of_other_settings_are_refused(log, name):
    log().add(row())
    with pytest.raises(SystemExit, match=rf"rows.json is of other settings: {name} \S+, now 7. Give another --rows"):
        log(**{name: 7})


def test_again_replaces_only_what_is_measured(log):
    first, theirs = log(), row("auto-round")
    first.add(row())
    first.add(theirs)
    first.add(row(key="affine w3g128 llmquant default"))
    again = log(["llmquant default"])
    assert log().rows == first.rows  # nothing is gone before it is measured
    assert again.lacks(row()["key"], "llmquant default")
    assert not again.lacks(theirs["key"], "auto-round")
    again.add(row(version="new"))
    assert [(r["key"], r["version"]) for r in log().rows.values()] == [
        ("affine w4g128 llmquant default", "new"),
        ("affine w4g128 auto-round", "abc"),
        ("affine w3g128 llmquant default", "abc"),
    ]


def test_a_measured_row_stays_where_it_fails_again(log):
    log().add(failed())
    log().add(row())
    log(["llmquant default"]).add(failed())
    assert log().rows == {row()["key"]: row()}


def test_scratch_files_of_other_settings_are_refused(accuracy, tmp_path):
    accuracy.settle(tmp_path, about())
    accuracy.settle(tmp_path, about(commands=["second"], threads=2))
    with pytest.raises(SystemExit, match=r"other settings: sequences 0, now 8; seed 0, now 1. Give another --out"):
        accuracy.settle(tmp_path, about(seed=1, sequences=8))


def test_scratch_files_of_unknown_settings_are_refused(accuracy, tmp_path):
    (tmp_path / accuracy.TOKENS).touch()
    with pytest.raises(SystemExit, match="nothing says with which settings"):
        accuracy.settle(tmp_path, about())


@pytest.mark.parametrize("option", ["--again", "--skip"])
def test_a_program_that_no_one_knows_is_refused(accuracy, monkeypatch, capsys, option):
    files = [x for name in ("calib", "select", "text", "rows", "out", "llama-cpp") for x in (f"--{name}", "x")]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "model", *files, option, "auto-round", "gptqmodel"])
    with pytest.raises(SystemExit):
        accuracy.main()
    said = capsys.readouterr().err
    assert f"{option} gptqmodel: the programs are " in said
    assert "GPTQModel AWQ, " in said
    assert ("llmquant default" in said) is (option == "--again")


def test_auto_round_in_float32_is_a_program_of_its_own(accuracy):
    programs = accuracy.their_settings("w4g128")["auto-round"]
    assert programs["auto-round float32"] == programs["auto-round"] | {"amp": False}
    assert all("amp" not in settings for name, settings in programs.items() if name != "auto-round float32")


def ablation_rows(*found):
    figures = {"error": None, "seconds": 1.0}
    return {(m, "options", base, o): figures | {"windows": [k]} for m, base, o, k in found}


def test_means_over_models_tell_how_many_there_are(module):
    rows = ablation_rows(
        ("a", "q2_k", "gptq", 1.0),
        ("a", "q2_k", "gptq + awq", 0.5),
        ("b", "q2_k", "gptq", 1.0),
        ("b", "q2_k", "gptq + awq", 2.0),
        ("a", "w4g128", "gptq", 1.0),
        ("a", "w4g128", "gptq + awq", 0.5),
    )
    mean_line = module("ablation").mean_line
    assert mean_line(rows, ["a", "b"], "gptq + awq") == [
        "gptq + awq",
        "gptq",
        *("1.000", "", "", "", "0.500", "1.00", "1 to 2"),
    ]
    assert mean_line(rows, ["a"], "gptq + awq")[-1] == "1"
    assert mean_line(rows, ["a", "b"], "gptq + magr") == ["gptq + magr", "gptq", *[""] * 6, "0"]


def test_a_rotation_that_tied_embeddings_allow_has_a_row(module):
    ablation = module("ablation")
    changes = dict(ablation.option_rows(ablation.OPTIONS))["default + rotations: heads"]
    chosen = ablation.load(ablation.BASES["q4_k_m"], changes, {"path": "text.txt"})
    assert list(chosen.rotations) == ["heads"]


def test_rows_of_the_floor_stand_under_their_settings(module, tmp_path):
    floor, path = module("runtime_floor"), tmp_path / "floor.json"
    settings = {"mixture": "q5_k_m", "sequences": 64}
    assert floor.earlier(path, "demo", settings) == {"models": {}, "rows": []}
    known = {"models": {}, "rows": []}
    for model, mixture, kld in (("demo", "q5_k_m", 0.1), ("other", "q4_k_m", 0.2)):
        more = {"length": 256, "protocol": "p", "commit": "abc", "command": f"floor.py {model} --mixture {mixture}"}
        known["models"][model] = settings | {"mixture": mixture} | more
        known["rows"].append({"model": model, "scales": "none", "decoded": kld, "as_run": 3 * kld})
    path.write_text(json.dumps(known), "utf-8")
    assert floor.earlier(path, "demo", settings) == floor.earlier(path, "third", settings) == known
    with pytest.raises(SystemExit, match=r"has demo with other settings: mixture q5_k_m, now q4_k_m. Give another"):
        floor.earlier(path, "demo", settings | {"mixture": "q4_k_m"})
    first, second = floor.report(known).split("\n## ")[1:]
    assert first.startswith("demo, Q5_K_M\n")
    assert "    floor.py demo --mixture q5_k_m\n" in first
    assert "| none | 0.100000 | 0.300000 | 0.200000 |" in first
    assert second.startswith("other, Q4_K_M\n")
    assert "| none | 0.200000 | 0.600000 | 0.400000 |" in second
