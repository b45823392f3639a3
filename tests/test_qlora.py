"""Fine-tuning on a written folder, and back to a file: the functions of eval/qlora.py, and the code of the README."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from llmquant import evaluation, packed

ROOT = Path(__file__).parent.parent
RECIPES = ("nf4", "gguf-q8_0")
# peft asks for what transformers will drop, and says that rounding merged weights again changes them
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning"),
]


@pytest.fixture(scope="module")
def found(llama, texts):
    """Return the losses of a random model, which knows nothing of the text, at each stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "eval")
        qlora = importlib.import_module("qlora")
    windows = evaluation.read_windows(llama, texts / "evaluation.txt", max_tokens=4096)
    tokens = qlora.sequences(llama, texts / "calibration.txt", 128)
    return qlora.study(llama, tokens, windows, "nf4", RECIPES, [], steps=40)


def test_what_training_gains_is_kept_when_the_adapter_is_merged_and_the_model_quantized_again(found):
    before, trained = found["float", "nf4"], found["float, adapter beside it", "nf4"]
    gain = before - trained
    assert gain > 0.05 * before
    for recipe in ("", *RECIPES):
        assert found["float", recipe] - found["adapter merged into float", recipe] > 0.9 * gain


def test_an_adapter_in_the_weights_it_was_trained_on_gives_what_was_trained_until_they_are_rounded_again(found):
    decoded = {recipe: found["adapter merged into decoded", recipe] for recipe in ("", *RECIPES)}
    assert decoded[""] == pytest.approx(found["float, adapter beside it", "nf4"], rel=1e-4)
    assert decoded["nf4"] == pytest.approx(found["float, adapter merged by peft", "nf4"], rel=1e-4)
    assert decoded["nf4"] > found["adapter merged into float", "nf4"] + 0.01


def test_the_code_of_the_readme_writes_a_model_that_was_fine_tuned(llama, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(texts / "calibration.txt", "text.txt")
    code = (ROOT / "README.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", code, re.DOTALL) if "peft" in block)
    text = '"calibration.path=text.txt"'
    code = code.replace(text, f'{text}, "calibration.sequences=16", "calibration.length=128"')
    exec(code.replace("org/model", str(llama)), {})
    assert packed.open_model("out-tuned").format == "gguf"
