"""Run a chat template, which is a model's own code, in a process of its own with little time and memory.

The sandbox of Jinja keeps a template from files and modules; it does not keep it from
running for ever or from filling the memory. The environment is that of transformers
(utils/chat_template_utils.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 10, 1 << 30


def render(
    template: str, conversations: Sequence[Sequence[Mapping[str, str]]], special: Mapping[str, Any]
) -> list[str | None]:
    """Return the text of every conversation, up to where an answer begins.

    None for what the template refuses, and for all where it takes more than ten seconds or a gigabyte.

    special: tokens that it may name, such as bos_token.
    """
    task = {"template": template, "conversations": conversations, "special": special}
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
        )
        texts: list[str | None] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return [None] * len(conversations)
    return texts


def _rendered(task: Mapping[str, Any]) -> list[str | None]:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    texts: list[str | None] = []
    for messages in task["conversations"]:
        try:
            template = environment.from_string(task["template"])
            texts.append(template.render(messages=messages, add_generation_prompt=True, **task["special"]))
        except Exception:  # noqa: BLE001  (whatever its code happens to meet)
            texts.append(None)
    return texts


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on this system: there is the time alone
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


if __name__ == "__main__":
    _limit()
    print(json.dumps(_rendered(json.load(sys.stdin))))
