"""Noise figures against their formulas in float64."""

import math

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from llmquant import api, evaluation, noise, recipe, run
from llmquant.errors import DataError
from llmquant.packed import open_model


def both(llama, out, name):
    """Return a linear's float weight and what was written in its place, in float64."""
    return (open_model(folder).read(f"{name}.weight").double().numpy() for folder in (llama, out))


def test_the_report_tells_the_noise_of_the_written_weights(llama, calibrated, tmp_path):
    report = api.quantize(
        llama, "gptq-plain-w4g128", tmp_path / "out", changes=[*calibrated, "formats=[gptq]"], evaluate=False
    )
    assert len(report.linears) == 21
    for name, told in list(report.linears.items())[::5]:
        w, q = both(llama, tmp_path / "out", name)
        assert told["sqnr_weight_db"] == pytest.approx(10 * np.log10((w**2).sum() / ((q - w) ** 2).sum()), abs=0.01)
        assert told["mse"] == pytest.approx(((q - w) ** 2).mean(), rel=1e-4)
        assert told["layer"] == int(name.split(".")[2])
    # the first site reads the float model's own activations: the ratio at its output can be computed from them
    text = run.data.calibration_tokens(
        recipe.load("gptq-plain-w4g128", calibrated).calibration, run.data.load_tokenizer(llama), 256
    )
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    with torch.no_grad():
        model(text.tokens)
    x = seen[0].flatten(0, 1).double().numpy()
    name = "model.layers.0.self_attn.q_proj"
    w, q = both(llama, tmp_path / "out", name)
    ratio = ((x @ w.T) ** 2).sum() / ((x @ (q - w).T) ** 2).sum()
    assert report.linears[name]["sqnr_output_db"] == pytest.approx(10 * np.log10(ratio), abs=0.02)
    # GPTQ trades weight error for output error
    assert report.linears[name]["sqnr_output_db"] > report.linears[name]["sqnr_weight_db"]


def test_uniform_noise_predicts_rounding_where_nothing_is_clipped(llama, tmp_path):
    changes = ["grid.group_size=32", "grid.symmetric=false", "grid.scale_dtype=float32"]
    report = api.quantize(llama, "rtn-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    assert all(told["sqnr_output_db"] is None for told in report.linears.values())
    assert all(told["mse"] == pytest.approx(told["mse_uniform"], rel=0.1) for told in report.linears.values())
    name, told = next(iter(report.linears.items()))
    scale = open_model(tmp_path / "out").read(f"{name}.weight_scale").double()
    assert told["mse_uniform"] == pytest.approx(float(scale.square().mean() / 12), rel=1e-5)


def test_the_histogram_counts_the_weights_and_codes_of_the_written_file(llama, tmp_path):
    changes = ["grid.group_size=32", "grid.scale_dtype=float32"]
    report = api.quantize(llama, "rtn-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    worst = sorted(report.linears, key=lambda name: -report.linears[name]["error"])[:4]
    assert list(report.histograms) == worst
    for name, told in report.histograms.items():
        w, q = both(llama, tmp_path / "out", name)
        scale = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight_scale"].double().numpy().repeat(32, 1)
        assert told["levels"] == list(range(16))
        x = np.clip(w / scale + 8, told["low"], told["high"])  # the offset of a symmetric grid is -8 scale
        counts, edges = np.histogram(x, len(told["weights"]), (told["low"], told["high"]))
        assert np.abs(counts - told["weights"]).sum() <= 4  # on an edge
        assert np.abs(edges + (edges[1] - edges[0]) / 2 - 7).min() < 1e-4  # a level is in the middle of its bin
        codes, counts = np.unique(np.round(q / scale).astype(int) + 8, return_counts=True)
        assert [told["codes"][code] for code in codes] == counts.tolist()


def test_a_histogram_looks_at_some_rows_of_a_large_matrix_and_leaves_out_groups_of_zeros():
    from llmquant.grid import QuantizedTensor, encode_all, fit_all
    from llmquant.grids.q4_0 import Config

    w = torch.randn(600, 256, generator=torch.Generator().manual_seed(0))
    w[:, :32] = 0
    grid = Config().bind(600, 256, torch.float32)
    params = fit_all(grid, w, torch.ones(256))
    told = noise.on_levels(QuantizedTensor(grid, encode_all(grid, w, params), params), w)
    rows = noise.SAMPLE // 256
    assert sum(told["codes"]) == rows * 256
    assert sum(told["weights"]) == rows * (256 - 32)


HISTOGRAM = {"levels": [0.0, 1.0], "low": -1.0, "high": 2.0, "weights": [1, 2, 3], "codes": [1, 2]}
NO_HISTOGRAMS = [
    {"levels": [0.0]},
    {"levels": [1.0, 1.0]},
    {"levels": [0.0, 5.0]},
    {"high": math.inf},
    {"low": None},
    {"weights": [1, -2, 3]},
    {"weights": "123"},
    {"weights": []},
    {"codes": [1, 2, 3]},
    {"codes": [1, [2]]},
    {"more": 1},
]


@pytest.mark.parametrize("change", NO_HISTOGRAMS, ids=str)
def test_what_a_damaged_file_tells_is_not_taken_for_a_histogram(change):
    assert noise.is_histogram(HISTOGRAM)
    assert not noise.is_histogram(HISTOGRAM | change)


def test_pieces_of_a_matrix_add_up(llama, tmp_path, monkeypatch):
    reports = []
    for piece in (1 << 20, 1000):
        monkeypatch.setattr(run.planning, "PIECE", piece)
        report, _ = run.quantize(llama, recipe.load("gguf-q4_k_s"), tmp_path / str(piece))
        reports.append(report)
    for name, told in reports[0].linears.items():
        for key in ("sqnr_weight_db", "mse", "mean_square"):
            assert reports[1].linears[name][key] == pytest.approx(told[key], rel=1e-3)
    assert reports[0].histograms == reports[1].histograms


def test_uneven_levels_have_no_uniform_prediction():
    from llmquant.grid import QuantizedTensor, encode_all, fit_all
    from llmquant.grids.iq4_nl import Config

    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    grid = Config().bind(4, 64, torch.float32)
    params = fit_all(grid, w, torch.ones(64))
    q = QuantizedTensor(grid, encode_all(grid, w, params), params)
    told = noise.of_weights(q, float((w * 0.1).square().mean()), float(w.square().mean()))
    assert told["mse_uniform"] is None
    assert noise.in_decibels({**told, "error": 0.0, "tokens": 3})["sqnr_output_db"] is None
    assert math.isclose(noise.in_decibels({**told, "error": 0.0, "tokens": 3})["sqnr_weight_db"], 20, abs_tol=0.01)


def test_the_residual_error_is_that_of_transformers_own_hidden_states(llama, texts, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text((texts / "evaluation.txt").read_text("utf-8")[:2000], "utf-8")
    report = api.quantize(
        llama,
        "rtn-w4g128",
        tmp_path / "out",
        changes=["grid.group_size=32"],
        text=text,
        protocol="sliding",
        noise=True,
    )
    windows = evaluation.read_windows(llama, text, "sliding")
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    states = []
    checkpoint = open_model(tmp_path / "out")
    with torch.no_grad():
        for quantized in (False, True):
            for name in checkpoint.packed if quantized else ():
                model.get_parameter(f"{name}.weight").copy_(checkpoint.read(f"{name}.weight"))
            inputs = []
            hook = model.model.norm.register_forward_pre_hook(lambda module, x, kept=inputs: kept.append(x[0]))
            hidden = model(windows.tokens, output_hidden_states=True).hidden_states
            hook.remove()
            states.append([*hidden[1:-1], inputs[0]])  # the last of them is after the final norm
    expected = [float((b - a).double().norm() / a.double().norm()) for a, b in zip(*states, strict=True)]
    assert report.residual_errors["compressed_tensors"] == pytest.approx(expected, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"{expected[-1]:.2%}" in card
    assert "| layer | linears |" in card


def test_noise_without_text_is_refused(llama, tmp_path):
    with pytest.raises(DataError, match="there is no text"):
        api.quantize(llama, "rtn-w4g128", tmp_path / "out", noise=True)
