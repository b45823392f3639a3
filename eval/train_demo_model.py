"""Train the model that `llmquant demo` quantizes: a small Llama on software documentation.

    python eval/train_demo_model.py --out DIR --minutes 120 --corpus FOLDER --package torch --package numpy

It learns the training split of the running Python's documentation
(`llmquant.demo.text`), the ``.txt`` files below every ``--corpus`` folder (the
shipped model: Python's HTML documentation, Debian package ``python3.11-doc``,
PSF licence) and the docstrings of every ``--package`` (BSD and Apache-2.0
packages). A paragraph that shares twelve words in a row with the evaluation or
calibration split is left out.

Matrices are trained by Muon, the rest by AdamW. Speed is set by the clock: the
learning rate follows the share of the minutes that has passed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmquant.demo import text

SHINGLE = 12
CONTEXT, LONG_CONTEXT = 512, 1024
BATCH_TOKENS = 8192
PEAK = {"muon": 0.02, "adamw": 0.003}


def docstrings(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if {"test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        docs = [
            f"{getattr(node, 'name', path.stem)}\n\n{doc}"
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and (doc := ast.get_docstring(node))
            and len(doc) > 80
        ]
        if docs:
            yield "\n\n".join(docs)


def shingles(paragraph: str) -> Iterator[tuple[str, ...]]:
    words = paragraph.lower().split()
    return zip(*(words[i:] for i in range(SHINGLE)), strict=False)


def corpus(folders: list[Path], packages: list[str]) -> list[str]:
    """Return every training document, without what the held-out splits contain."""
    held_out = set(shingles(text.text("evaluation"))) | set(shingles(text.text("calibration")))
    found = [f"{n}\n\n{d}" for n, d in text.documents().items() if text.split(n) == "training"] * 3
    for folder in folders:
        found += [p.read_text(errors="ignore") for p in sorted(folder.rglob("*.txt"))]
    for package in packages:
        found += docstrings(package)
    kept, seen, dropped = [], set[int](), 0
    for document in found:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            mark = hash(paragraph)
            if held_out.intersection(shingles(paragraph)) or (len(paragraph) > 200 and mark in seen):
                dropped += 1
                continue
            paragraphs.append(paragraph)
        seen.update(hash(p) for p in paragraphs)
        if document := "\n\n".join(paragraphs).strip():
            kept.append(document)
    print(f"{len(kept)} documents, {sum(map(len, kept)) / 1e6:.1f} million characters, {dropped} paragraphs left out")
    return kept


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer; <s> goes before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=LONG_CONTEXT
    )


def orthogonalize(gradient: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix by five Newton-Schulz steps (Jordan 2024, Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if gradient.shape[0] <= gradient.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for 2-D weights (float32: this trains on CPUs without bfloat16 units)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def rate(progress: float) -> float:
    """Warm up for 2 %, hold, then fall to zero over the last half."""
    return min(1.0, progress / 0.02, (1 - progress) / 0.5)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    held_out: Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Train a model on a row of tokens for ``args.minutes`` and save it, now and then and at last.

    held_out: sequences to measure the loss on.
    """
    print(f"{len(tokens) / 1e6:.2f} million training tokens, {held_out.numel()} held out")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = {
        "muon": Muon(matrices, PEAK["muon"]),
        "adamw": torch.optim.AdamW(rest, PEAK["adamw"], betas=(0.9, 0.95), weight_decay=0.01),
    }
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    forward = torch.compile(model) if args.compile else model

    def save(log: dict[str, float]) -> None:
        model.to(torch.bfloat16).save_pretrained(args.out)
        model.to(torch.float32)
        tokenizer.save_pretrained(args.out)
        (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")

    def loss_on(batch: Tensor) -> Tensor:
        logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate() -> float:
        with torch.no_grad():
            return sum(float(loss_on(b)) * len(b) for b in held_out.split(args.micro_batch)) / len(held_out)

    start, step, used, saved = time.monotonic(), 0, 0, 0.0
    while (progress := (time.monotonic() - start) / 60 / args.minutes) < 1:
        context = CONTEXT if progress < 0.85 else LONG_CONTEXT
        rows = args.micro_batch * CONTEXT // context
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = PEAK[name] * rate(progress)
        total = 0.0
        micro = BATCH_TOKENS // (rows * context)
        for _ in range(micro):
            at = torch.randint(len(tokens) - context - 1, (rows,), generator=generator)
            loss = loss_on(torch.stack([tokens[i : i + context + 1] for i in at.tolist()])) / micro
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        step, used = step + 1, used + BATCH_TOKENS
        if step % 10 == 0:
            speed = used / (time.monotonic() - start)
            print(f"step {step}  {progress:.1%}  loss {total:.3f}  {speed:.0f} tokens/s", flush=True)
        if progress - saved > 0.1:
            saved, loss_now = progress, evaluate()
            print(f"held out: loss {loss_now:.3f}, perplexity {math.exp(loss_now):.2f}", flush=True)
            save({"tokens": used, "held_out_loss": loss_now})
    loss_now = evaluate()
    print(f"held out: loss {loss_now:.3f}, perplexity {math.exp(loss_now):.2f}, {used / 1e6:.1f} million tokens")
    save({"tokens": used, "held_out_loss": round(loss_now, 4), "minutes": args.minutes, "steps": step})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``train`` reads."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of 512 tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--corpus", type=Path, action="append", default=[])
    parser.add_argument("--package", action="append", default=[])
    args = parser.parse_args()

    documents = corpus(args.corpus, args.package)
    tokenizer = train_tokenizer(documents, args.vocabulary)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(documents), generator=generator)
    ids = tokenizer([documents[int(i)] for i in order])["input_ids"]
    tokens = torch.tensor([t for document in ids for t in document])
    held_out = torch.tensor(tokenizer(text.text("evaluation"))["input_ids"])
    held_out = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::4]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LONG_CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    train(model, tokenizer, tokens, held_out, args, generator)


if __name__ == "__main__":
    main()
