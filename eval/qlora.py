"""What does an adapter trained on quantized weights (QLoRA) gain, and what is left when the model is quantized again?

    python eval/qlora.py MODEL --train FILE --text FILE --out results.md

The model is quantized by --base, and transformers loads that with bitsandbytes; peft trains an adapter on it, on
--train. The adapter is merged into the weights that it was trained on, decoded; or into those of the float model; or,
as peft does with a 4-bit model, into the decoded ones, which it rounds again at once. The two float results are
quantized by --recipes, calibrated on --train, and so is the model as it was before. Each is measured on --text.

Source: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_report import without_folders
from checkout import commit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from splits import check_disjoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmquant import api, evaluation
from llmquant.protocols import Windows
from llmquant.report import markdown

COLUMNS = ("weights", "quantized by", "loss", "perplexity")


def load(folder: str | Path) -> Any:
    """Return transformers' model of a folder, float or packed; what is not packed in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sequences(folder: str | Path, text: Path, length: int) -> Tensor:
    """Return the tokens of a text [sequences, length]."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def train(folder: str | Path, tokens: Tensor, steps: int, batch: int = 4, rank: int = 16, rate: float = 1e-3) -> Any:
    """Return peft's model: the packed one of a folder, which stays as it is, and an adapter on all its linears.

    rate: of AdamW at the first step; it falls to 0 along a line.
    """
    torch.manual_seed(0)  # of the adapter's first values
    base = prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        some = tokens[torch.randint(len(tokens), (batch,), generator=generator)]
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def merge(float_model: Any, adapter: Path, like: Path, out: Path) -> None:
    """Write a float folder of a model with an adapter's changes in its weights, in the dtype of the folder ``like``."""
    merged = PeftModel.from_pretrained(float_model, adapter).merge_and_unload()
    merged.to(AutoConfig.from_pretrained(like).dtype)
    merged.save_pretrained(out, save_original_format=False)  # transformers 5.23 cannot convert back what was packed
    AutoTokenizer.from_pretrained(like).save_pretrained(out)


@torch.no_grad()
def loss(model: Any, windows: Windows) -> float:
    """Return the mean loss over the scored tokens, in nats, as ``llmquant.evaluate`` measures it of a folder."""
    total = 0.0
    for tokens, scored in zip(windows.tokens, windows.scored, strict=True):
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        total += float(cross_entropy(logits[scored].float(), tokens[1:][scored], reduction="sum"))
    return total / int(windows.scored.sum())


def study(
    model: Path, tokens: Tensor, windows: Windows, base: str, recipes: Sequence[str], changes: list[str], steps: int
) -> dict[tuple[str, str], float]:
    """Return the loss at each stage, by what the weights are and the recipe that quantized them.

    tokens: to train on. changes: of the recipes.
    """
    found: dict[tuple[str, str], float] = {}

    def measured(weights: str, recipe: str, folder: Path) -> None:
        found[weights, recipe] = math.log(evaluation.evaluate(folder, windows).perplexity)
        print(f"{weights}, {recipe or 'not quantized'}: {found[weights, recipe]:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as work:

        def quantized(weights: str, folder: Path, recipe: str) -> Path:
            out = Path(work) / f"{folder.name}-{recipe}"
            api.quantize(folder, recipe, out, changes=changes, evaluate=False)
            measured(weights, recipe, out)
            return out

        measured("float", "", model)
        folders = {recipe: quantized("float", model, recipe) for recipe in dict.fromkeys([base, *recipes])}
        adapted = train(folders[base], tokens, steps)
        adapter = Path(work) / "adapter"
        adapted.save_pretrained(adapter)
        # both while they train: else bitsandbytes may put its bytes in another order
        found["float, adapter beside it", base] = loss(adapted, windows)
        found["float, adapter merged by peft", base] = loss(adapted.merge_and_unload().train(), windows)
        for into in ("decoded", "float"):
            out = Path(work) / f"merged-{into}"
            merge(load(folders[base]).dequantize() if into == "decoded" else load(model), adapter, model, out)
            weights = f"adapter merged into {into}"
            measured(weights, "", out)
            for recipe in recipes:
                quantized(weights, out, recipe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="text to train and to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--base", default="nf4", help="recipe of what is trained on, a bitsandbytes folder")
    parser.add_argument("--recipes", nargs="+", default=["nf4", "gptq-nf4", "gguf-q4_k_m", "gptq-q4_k_m"])
    parser.add_argument("--steps", type=int, default=200, help="of 4 sequences")
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_disjoint({"--train": args.train, "--text": args.text})
    tokens = sequences(args.model, args.train, args.length)
    windows = evaluation.read_windows(args.model, args.text, "llama.cpp", args.max_tokens)
    changes = [f"calibration={{path: {args.train}, sequences: {args.sequences}, length: {args.length}}}"]
    found = study(args.model, tokens, windows, args.base, args.recipes, changes, args.steps)
    lines = [
        "# Fine-tuning on quantized weights",
        "",
        f"Commit {commit()}; {args.model.absolute().name}; {args.steps} steps of 4 sequences of {args.length} tokens "
        f"of {args.train.name}, an adapter of rank 16 on all linears; recipes that calibrate read {args.sequences}. "
        f"Loss in nats a token. Protocol: {windows.label}.",
        "",
        f"    {without_folders(' '.join(sys.argv))}",
        "",
        markdown(COLUMNS, [[*stage, f"{value:.4f}", f"{math.exp(value):.3f}"] for stage, value in found.items()]),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()
