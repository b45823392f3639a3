"""The Modelfile says what the model's own chat template does, or nothing."""

import re

import pytest

from llmquant import api
from llmquant.demo import MODEL
from llmquant.exporters.gguf import chat, ollama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
IN_FIRST_TURN = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}"
    "{% for message in talk %}<turn>{{ message['role'] }}\n{% if loop.first %}{{ first }}{% endif %}"
    "{{ message['content'] | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
).replace("<turn>{{ message['role'] }}", "<turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}")
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "first turn": IN_FIRST_TURN, "no system": NO_SYSTEM}
TALKS = [
    [("user", "Hello\nyou")],
    [("system", "Short."), ("user", "Why?")],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3")],
]


def go(template, system, messages):
    """Execute the part of Go's template language that is used here."""
    pieces = re.split(r"({{.*?}})", template)

    def run(at, facts, active):
        out = ""
        while at < len(pieces):
            piece = pieces[at]
            command = piece[2:-2].strip() if piece.startswith("{{") else None
            if command is None:
                out += piece if active else ""
            elif command == "end" or command.startswith("else"):
                return out, at
            elif command.startswith("range"):
                for message in messages or [None]:
                    text, end = run(at + 1, message, active and message is not None)
                    out += text
                at = end
            elif command.startswith("if"):
                taken, condition = False, command[2:].strip()
                while True:
                    truth = bool(condition == "true" or (condition == ".System" and system))
                    if told := re.fullmatch(r'eq \.Role "(\w+)"', condition):
                        truth = facts is not None and facts[0] == told[1]
                    text, at = run(at + 1, facts, active and truth and not taken)
                    out += text
                    taken |= truth
                    command = pieces[at][2:-2].strip()
                    if command == "end":
                        break
                    condition = command.removeprefix("else").strip().removeprefix("if").strip() or "true"
            elif active:
                out += {".System": system, ".Content": facts and facts[1]}[command]
            at += 1
        return out, at

    return run(0, None, True)[0]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_gives_the_text_of_the_models_own(name, bos, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    text = ollama.modelfile("a.gguf", tokenizer, 8192, bos, {1}, {})
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    for talk in TALKS:
        if name == "no system" and talk[0][0] == "system":
            continue
        messages = [{"role": role, "content": content} for role, content in talk]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        system = "".join(content for role, content in talk if role == "system")
        assert go(template, system, talk) == wanted.removeprefix("<s>" if bos else "")


@pytest.mark.parametrize(
    "template",
    [
        CHATML + "{{ strftime_now('%d') }}",  # tells the day
        CHATML + "{% if messages | length > 4 %}long{% endif %}",
        "{{ '{{' }}" + CHATML,
        "{{ raise_exception('never') }}",
        "{% for",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 9999999999 %}" + CHATML,
    ],
)
def test_what_cannot_be_told_is_left_out(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr(chat, "SECONDS", 2)
    text = ollama.modelfile("a.gguf", tokenizer, 8192, True, {1}, {})
    assert "TEMPLATE" not in text
    assert "cannot be told" in text


def test_a_gguf_file_has_a_modelfile_beside_it_and_shards_have_none(tmp_path, read_json):
    api.quantize(MODEL, "gguf-q8_0", tmp_path / "one", evaluate=False)
    (file,) = (tmp_path / "one").glob("*.gguf")
    lines = (tmp_path / "one" / "Modelfile").read_text("utf-8").splitlines()
    assert lines[0] == f"FROM ./{file.name}"
    context = read_json(MODEL / "config.json")["max_position_embeddings"]
    assert f"PARAMETER num_ctx {min(context, 4096)}" in lines
    assert 'PARAMETER stop "</s>"' in lines or any(line.startswith("PARAMETER stop") for line in lines)
    report = read_json(tmp_path / "one" / "llmquant-report.json")
    assert report["bytes"]["gguf"] == file.stat().st_size
    assert "Modelfile" in report["hashes"]["gguf"]
    api.quantize(MODEL, "gguf-q8_0", tmp_path / "many", changes=["max_shard_size=2MB"], evaluate=False)
    assert not (tmp_path / "many" / "Modelfile").exists()
