"""Named ways to cut a text into windows and to say which of its tokens are scored.

A perplexity without its protocol means nothing: the same model has 5.5 or 6.2 on
the same text. So every figure carries the label made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llmquant.errors import DataError, RecipeError


@dataclass(frozen=True)
class Protocol:
    """How a text is evaluated.

    context: tokens in a window, at most the model's own.
    stride: new tokens in each window; less than the context makes windows overlap.
    bos: put the tokenizer's beginning-of-text token in front of every window, if it adds one to texts.
    scored: "new" tokens (those that no window scored before), or the second "half" of each window.
    whole: the last, incomplete window is scored too: it begins earlier, so that it is full.
    words: share the log-likelihood among whitespace-separated words instead of tokens.
    source: where the protocol is defined.
    """

    name: str
    context: int
    stride: int
    bos: bool
    scored: str
    whole: bool
    words: bool
    source: str


PROTOCOLS = (
    Protocol("gptq", 2048, 2048, False, "new", False, False, "Frantar et al. 2022: windows side by side, no BOS"),
    Protocol("llama.cpp", 512, 512, True, "half", False, False, "llama-perplexity: second half of each window"),
    Protocol("sliding", 2048, 1024, False, "new", True, False, "transformers' guide to perplexity, strided"),
    Protocol("word", 2048, 2047, True, "new", True, True, "lm-evaluation-harness, word_perplexity"),
)


@dataclass(frozen=True)
class Windows:
    """A text cut by a protocol.

    tokens: [windows, context].
    scored: [windows, context - 1]; entry t says whether the prediction of token t + 1 counts.
    units: what the log-likelihood is shared among, if not the scored tokens.
    """

    tokens: Int[Tensor, "windows context"]
    scored: Bool[Tensor, "windows predictions"]
    label: str
    units: float | None = None


def named(name: str) -> Protocol:
    """Return a protocol by name."""
    for protocol in PROTOCOLS:
        if protocol.name == name:
            return protocol
    raise RecipeError(f"--protocol {name}: there is no such protocol. Known: {', '.join(p.name for p in PROTOCOLS)}.")


def windows(
    protocol: Protocol, ids: Sequence[int], bos: int | None, text: str, context: int, words: int = 0
) -> Windows:
    """Cut a text's tokens (without special tokens) into windows.

    bos: the token that the tokenizer puts before a text, or None.
    text: its name, for the label. context: the most tokens the model takes.
    words: how many there are in the text.

    Raises DataError when there is not one full window.
    """
    size = min(protocol.context, context)
    stride = size if protocol.stride >= protocol.context else max(size * protocol.stride // protocol.context, 1)
    protocol = replace(protocol, context=size, stride=stride)
    bos = bos if protocol.bos else None
    stream = torch.tensor([bos, *ids] if bos is not None else ids, dtype=torch.int64)
    if len(stream) < size:
        raise DataError(
            f"{text}: has {len(stream)} tokens, and protocol {protocol.name} needs windows of {size}. "
            "Give a longer text."
        )
    # the first predicted token of each window: the one after those that the window before has scored
    starts = list(range(0, len(stream) - size + 1, stride))
    if protocol.whole and starts[-1] + size < len(stream):
        starts.append(len(stream) - size)
    tokens = torch.stack([stream[s : s + size] for s in starts])
    position = torch.tensor(starts)[:, None] + torch.arange(1, size)
    if protocol.scored == "half":
        scored = (torch.arange(1, size) > size // 2).expand(len(starts), -1)
        if bos is not None:
            tokens[:, 0] = bos
    else:
        end_before = torch.tensor([0, *(s + size for s in starts[:-1])])[:, None]
        scored = position >= end_before
        if not protocol.whole:
            scored = torch.ones_like(scored)
    label = ", ".join(
        [
            f"{protocol.name}: {text}",
            f"context {size}",
            f"stride {stride}" if stride < size else "no overlap",
            "BOS" if bos is not None else "no BOS",
            *(["second half of each window"] if protocol.scored == "half" else []),
            *([f"per word of {words}"] if protocol.words else []),
            f"{len(starts)} windows",
            f"{int(scored.sum())} tokens scored",
        ]
    )
    return Windows(tokens, scored, label, float(words) if protocol.words else None)
