"""Questions of one's own: read from a file, asked, and scored.

A line of the file is a JSON object. Every one has a `prompt`, or a `question` that is
put as "Question: ...\\nAnswer:". With `choices`, a list, the answer is the choice that
the model finds likeliest to follow (log-likelihood of its tokens, as `acc` of
lm-evaluation-harness), and `answer` is its number, counted from 0, or its text. Without,
the model writes on, greedily, to the end of the line, and `answer`, or one of `answers`,
is what it should write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmquant import data
from llmquant.answers import Answers, exact_match, f1
from llmquant.errors import DataError
from llmquant.progress import Progress, silent
from llmquant.stream import context_of

NEW_TOKENS = 64  # of a written answer, at most


@dataclass(frozen=True)
class Item:
    """A question. choices: what to choose among; empty where the answer is written. answers: those that are right."""

    prompt: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]


def read(path: Path) -> list[Item]:
    """Return the items of a file, or raise DataError with the line that is wrong."""
    rows = data.json_rows(path, data.read_text(path), lines=True)
    return [_item(row, f"{path}: item {number}") for number, row in enumerate(rows, 1)]


def _item(row: dict[str, Any], where: str) -> Item:
    prompt, question = row.get("prompt"), row.get("question")
    if not isinstance(asked := prompt or question, str) or not asked.strip() or (prompt and question):
        raise DataError(f"{where}: needs a `prompt` or a `question`, one of them, and a text that is not empty")
    if unknown := row.keys() - {"prompt", "question", "choices", "answer", "answers", "id"}:
        raise DataError(f"{where}: {sorted(unknown)[0]!r} is no key of an item. {HINT}")
    text = prompt or f"Question: {question}\nAnswer:"
    choices: Any = row.get("choices", [])
    answer: Any = row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(one, str) and one for one in choices) or len(choices) == 1:
        raise DataError(f"{where}: `choices` is not a list of two texts or more")
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: two of its choices are the same")
    if choices:
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            answer = choices[answer]
        if answer not in choices:
            last = len(choices) - 1
            raise DataError(
                f"{where}: `answer` is {answer!r:.100}, neither the number of a choice, 0 to {last}, nor its text"
            )
        return Item(text, tuple(choices), (answer,))
    answers = row.get("answers", [answer])
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise DataError(f"{where}: needs an `answer`, or a list of `answers`, of texts. {HINT}")
    return Item(text, (), tuple(answers))


HINT = (
    'Write e.g. {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1} or {"prompt": "The capital of France is", '
    '"answers": ["Paris"]}'
)


class Asked:
    """A causal language model of transformers that is asked, one item after the other."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = context_of(model.config)
        ends = model.config.get_text_config().eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def choose(self, prompt: str, choices: Sequence[str]) -> int:
        """Return which choice has the largest log-likelihood behind a prompt."""
        before = self._ids(prompt.rstrip())
        space = prompt[len(prompt.rstrip()) :] or " "
        whole = [self._ids(prompt.rstrip() + space + choice) for choice in choices]
        # a choice that joins with the prompt's last token begins where that does
        starts = [max(min(len(before), len(ids) - 1), 1) for ids in whole]
        cuts = [max(len(ids) - self.context, 0) for ids in whole]
        kept = [torch.tensor(ids[cut:]) for ids, cut in zip(whole, cuts, strict=True)]
        tokens = pad_sequence(kept, batch_first=True).to(self._device)
        logits = self.model(tokens, attention_mask=_mask(kept).to(self._device), use_cache=False).logits
        sums = []
        for row, ids, start, cut in zip(logits, kept, starts, cuts, strict=True):
            first = max(start - cut, 1)
            targets = ids[first:].to(row.device)
            log_p = row[first - 1 : len(ids) - 1].float().log_softmax(-1)
            sums.append(float(log_p.gather(1, targets[:, None]).sum(dtype=torch.float64)))
        return max(range(len(sums)), key=sums.__getitem__)

    @torch.no_grad()
    def write(self, prompt: str) -> str:
        """Return what the model finds likeliest, token by token, to the end of the line or of the text."""
        step = torch.tensor([self._ids(prompt.rstrip())[-max(self.context - NEW_TOKENS, 1) :]], device=self._device)
        written: list[int] = []
        cache = None
        while len(written) < NEW_TOKENS:
            out = self.model(step, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            written.append(token)
            if token in self.ends or "\n" in self.tokenizer.decode(written):
                break
            step = torch.tensor([[token]], device=self._device)
        text: str = self.tokenizer.decode(written, skip_special_tokens=True)
        return text.partition("\n")[0].strip()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids


def _mask(sequences: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)


def ask(asked: Asked, items: Sequence[Item], name: str, progress: Progress = silent) -> list[Answers]:
    """Return the answers to the items with choices, and to those without. name: of the file, for reports."""
    pairs = []
    for i, item in enumerate(items):
        progress("asking", i, len(items))
        if item.choices:
            pairs.append((item, item.choices[asked.choose(item.prompt, item.choices)]))
        else:
            pairs.append((item, asked.write(item.prompt)))
    progress("asking", len(items), len(items))
    found = []
    if chosen := [pair for pair in pairs if pair[0].choices]:
        accuracy = [float(answer in item.answers) for item, answer in chosen]
        found.append(Answers(name, {"accuracy": accuracy}, [answer for _, answer in chosen], {}))
    if written := [pair for pair in pairs if not pair[0].choices]:
        scores = {
            "exact match": [exact_match(answer, item.answers) for item, answer in written],
            "F1": [f1(answer, item.answers) for item, answer in written],
        }
        found.append(Answers(name, scores, [answer for _, answer in written], {}))
    return found
