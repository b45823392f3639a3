"""How long a run takes, as its plan foretells it; eval/duration.py holds that against runs."""

import pytest
import torch

from llmquant import api, duration, recipe, run

SPEED = 1e9


def foretold(model, name, changes=None):
    stream = run.open_stream(model, recipe.load(name, changes))
    plan = run.plan_for(stream, recipe.load(name, changes))
    return duration.seconds(plan, stream.hidden_size, stream.vocabulary, run.text_of(stream, plan), SPEED)


def test_what_is_not_done_takes_no_time(llama, calibrated):
    assert foretold(llama, "gguf-q8_0").keys() == {"starting", "writing"}
    plain = foretold(llama, "gptq-plain-w4g128", calibrated)
    assert plain.keys() == {"starting", "layers", "output matrix and embedding", "writing"}
    assert plain["output matrix and embedding"] == 0  # both stay float
    assert "gradients" in foretold(llama, "gptq-plain-w4g128", [*calibrated, "algorithm.two_sided=true"])


@pytest.mark.parametrize(
    "change",
    [
        "calibration.sequences=32",
        "algorithm.sweeps=3",
        "algorithm.two_sided=true",
        "mismatch_correction=true",
        "transforms=[{name: awq}]",
    ],
)
def test_each_option_adds_what_it_takes(change, llama, calibrated):
    assert (
        foretold(llama, "gptq-plain-w4g128", [*calibrated, change])["layers"]
        > 1.05 * (foretold(llama, "gptq-plain-w4g128", calibrated)["layers"])
    )


def test_products_of_a_layer_are_counted(llama, calibrated):
    tokens, weights = 16 * 128, 3 * 64 * 128 + 64 * (64 + 32 + 32 + 64)
    squares = (64**2 * 3 + 128**2) / 2
    changes = [*calibrated, "algorithm={name: rtn, calibrated: true}"]
    told = foretold(llama, "gptq-plain-w4g128", changes)["layers"]
    rounding = duration.ROUNDING * weights
    assert told == pytest.approx(3 * (duration.PASS * tokens * weights + rounding) / SPEED)
    changes = [*calibrated, "transforms=[{name: magr}]", "algorithm={name: rtn}"]
    assert foretold(llama, "gptq-plain-w4g128", changes)["layers"] == pytest.approx(
        3 * (duration.PASS * tokens * (weights + squares) + rounding) / SPEED
    )


def test_a_plan_tells_it_for_this_machine(llama):
    plan = api.plan(llama, "gguf-q8_0")
    assert sum(plan.seconds.values()) > duration.STARTING
    assert duration.speed(torch.device("cpu")) > 1e8
