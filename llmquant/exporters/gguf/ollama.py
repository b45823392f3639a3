"""The Modelfile that lets Ollama run a GGUF file: `ollama create NAME -f Modelfile`.

Ollama does not run the chat template of a file: it looks for a known one that is
nearly the same, and without such passes prompts on bare (template/template.go). So
the model's own is told in Ollama's terms where that says the same of conversations
without tools. Format: ollama/docs/modelfile.mdx.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmquant.exporters.gguf import chat
from llmquant.exporters.gguf.general import SAMPLING

CONTEXT = 4096  # tokens; more would take memory that the user may not have
Message = dict[str, str]
TURNS = ("user", "assistant", "user", "assistant", "user")


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the texts of a conversation.

    system: before and behind the system message, or None where there is no such role. default: in its place.
    user, assistant: before and behind their messages. answer: behind all, where the answer begins.
    """

    system: tuple[str, str] | None
    default: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation."""
        first, *rest = messages
        if first["role"] == "system" and self.system:
            text = first["content"].join(self.system)
        else:
            text, rest = self.default, list(messages)
        around = {"user": self.user, "assistant": self.assistant}
        return text + "".join(one["content"].join(around[one["role"]]) for one in rest) + self.answer

    def template(self) -> str:
        """Return it as a Go template over .System and .Messages."""
        begin = self.default
        if self.system:
            before, behind = self.system
            begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{self.default}{{{{ end }}}}"
        user, assistant = "{{ .Content }}".join(self.user), "{{ .Content }}".join(self.assistant)
        return (
            f'{begin}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{self.answer}'
        )


def modelfile(
    file: str, tokenizer: Any, context: int, adds_bos: bool, ends: Collection[int], settings: Mapping[str, Any]
) -> str:
    """Return the text of a Modelfile.

    file: the name of the GGUF file beside it. context: the most tokens that the model takes. adds_bos: the program puts
    the BOS token before every text. ends: ids that end an answer. settings: how to sample, by GGUF's keys.
    """
    lines = [f"FROM ./{file}"]
    found = turns(tokenizer, tokenizer.bos_token if adds_bos else None) if tokenizer.chat_template else None
    if found:
        lines += [
            "# The model's chat template, without tools. If Ollama knows one with tools, take this out to get that.",
            f'TEMPLATE """{found.template()}"""',
        ]
    elif tokenizer.chat_template:
        lines.append(
            "# The model's chat template cannot be told here. Ollama may know it: see `ollama show --template`."
        )
    stops = [text for number in sorted(ends) if (text := tokenizer.convert_ids_to_tokens(number))]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops if '"' not in text]
    lines.append(f"PARAMETER num_ctx {min(context, CONTEXT)}")
    lines += [f"PARAMETER {name} {settings[key]:g}" for name, key in SAMPLING.items() if key in settings]
    return "\n".join([*lines, ""])


def turns(tokenizer: Any, bos: str | None) -> Turns | None:
    """Return what the chat template of a tokenizer does, or None where it does more than ``Turns`` can tell.

    bos: what the program itself puts before every text.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" in template:  # several, or one that tells the day
        return None
    plain = [[{"role": role, "content": f"({role} {i})"} for i, role in enumerate(TURNS[:n])] for n in (1, 3, 5)]
    system = [{"role": "system", "content": "(system)"}]
    conversations = [*plain, *([*system, *messages] for messages in plain)]
    texts = chat.render(template, conversations, tokenizer.special_tokens_map)
    texts = [text and text.removeprefix(bos or "") for text in texts]
    _, talk, _, told, *_ = texts
    if talk is None:
        return None
    start, after_user, between, end = _around(talk, "(user 0)", "(assistant 1)", "(user 2)")
    before_system, after_system, _ = _around(told, "(system)", "(user 0)") if told else ("", start, "")
    user = _begins(start[::-1], between[::-1], after_system[::-1])[::-1]
    behind = _begins(after_user, end)
    found = Turns(
        (before_system, after_system[: len(after_system) - len(user)]) if told else None,
        start[: len(start) - len(user)],
        (user, behind),
        (after_user[len(behind) :], between[: len(between) - len(user)]),
        end[len(behind) :],
    )
    literal = "".join([*(found.system or ()), found.default, *found.user, *found.assistant, found.answer])
    if any(mark in literal for mark in ("{{", "}}", '"""')):
        return None
    asked = zip(conversations, texts, strict=True)
    same = all(found.render(messages) == text for messages, text in asked if told or messages[0]["role"] != "system")
    return found if same else None


def _around(text: str, *marks: str) -> list[str]:
    """Return what is before, between and behind marks that stand in a text in this order; "" from a missing one on."""
    parts = []
    for mark in marks:
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _begins(*texts: str) -> str:
    """Return what all texts begin with."""
    same = (len(set(letters)) == 1 for letters in zip(*texts, strict=False))
    return texts[0][: sum(takewhile(bool, same))]
