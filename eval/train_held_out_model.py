"""Train the model on which the accuracy study is confirmed: one that nothing was developed on.

    python eval/train_held_out_model.py TEXT [TEXT ...] --out DIR --minutes 40

Another family and other text than the demo model's: a Qwen3 with an output matrix of its own and more heads than its
width suggests. A tenth of each text, in pieces of 20,000 characters, is not learned: it goes into
DIR-text/{calib,select,evaluation}.txt for eval/accuracy.py, one piece after the other in turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_demo_model import CONTEXT, LONG_CONTEXT, add_arguments, train, train_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

PIECE = 20_000
SPLITS = ("calib", "select", "calib", "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    add_arguments(parser)
    args = parser.parse_args()

    learned: list[str] = []
    kept: dict[str, list[str]] = {split: [] for split in SPLITS}
    count = 0
    for path in args.texts:
        text = path.read_text("utf-8")
        for number, start in enumerate(range(0, len(text), PIECE)):
            piece = text[start : start + PIECE]
            if number % 10:
                learned.append(piece)
            else:
                kept[SPLITS[count % len(SPLITS)]].append(piece)
                count += 1
    folder = args.out.with_name(f"{args.out.name}-text")
    folder.mkdir(parents=True, exist_ok=True)
    for split, pieces in kept.items():
        (folder / f"{split}.txt").write_text("\n\n".join(pieces), "utf-8")
    tokenizer = train_tokenizer(learned, args.vocabulary)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(learned), generator=generator)
    ids = tokenizer([learned[int(i)] for i in order])["input_ids"]
    tokens = torch.tensor([t for piece in ids for t in piece])
    held_out = torch.tensor(tokenizer("\n\n".join(kept["select"]))["input_ids"])
    held_out = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:64]
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=args.vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=args.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=LONG_CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    train(model, tokenizer, tokens, held_out, args, generator)


if __name__ == "__main__":
    main()
