"""``llmquant demo``: the main job on a small trained model that ships with the package.

The model (``model/``, made by eval/train_demo_model.py) knows software
documentation. Calibration and evaluation text are the running Python's own
documentation, split so that the model never saw what it is evaluated on.
"""

from __future__ import annotations

from pathlib import Path

from llmquant import api, recipe
from llmquant.checkpoint import check_output
from llmquant.demo import text
from llmquant.evaluation import Row
from llmquant.progress import Progress, silent

MODEL = Path(__file__).parent / "model"
RECIPES = {
    "rtn-w4g128": ["gptq", "compressed_tensors"],
    "gptq-w4g128": ["gptq", "compressed_tensors"],
    "gptq-w3g128": ["gptq", "compressed_tensors"],
    "gptq-q4_k_m": ["gguf"],
}
"""The recipes that are compared, and the formats that each is written in."""
EVALUATION_TOKENS = 40 * 512


def run(out: Path | None = None, progress: Progress = silent, command: str = "") -> tuple[list[Row], Path]:
    """Quantize the demo model by ``RECIPES``; return the comparison and the folder that was written.

    out: by default demo-output, or demo-output-2 and so on where that exists. command: as for ``api.quantize``.
    """
    if out is None:
        names = (Path(f"demo-output-{i}" if i > 1 else "demo-output") for i in range(1, 1000))
        out = next(name for name in names if not name.exists())
    check_output(out)
    progress("reading Python's documentation", 0, 1)
    texts = out.with_name(out.name + ".text")
    texts.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = texts / "calibration.txt", texts / "evaluation.txt"
    calibration.write_text(text.text("calibration"), "utf-8")
    evaluation.write_text(text.text("evaluation"), "utf-8")
    changes = [
        f"calibration.path={calibration}",
        "calibration.sequences=64",
        "calibration.length=512",
    ]
    recipes = [recipe.load(name, [*changes, f"formats=[{', '.join(formats)}]"]) for name, formats in RECIPES.items()]
    rows = api.compare(
        MODEL, recipes, out, text=evaluation, max_tokens=EVALUATION_TOKENS, command=command, progress=progress
    )
    texts.rename(out / "text")
    return rows, out
