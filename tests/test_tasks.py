"""Questions of one's own, and lm-evaluation-harness on the same ones."""

import json

import pytest

from llmquant import api, inference, items, tasks
from llmquant.errors import DataError, LlmquantError
from tests.test_cli import command as command

WORDS = ["value", "list of names", "file", "string", "the first", "module x", "returns", "object is", "None", "type"]
LETTERS = "bcdfghjklm"  # of which each is a token or two, so that no choice wins by being short
CHOICES = [
    {"prompt": f"This {word} is", "choices": [LETTERS[i], LETTERS[i - 3], LETTERS[i - 6]], "answer": i % 3}
    for i, word in enumerate(WORDS)
]
WRITTEN = [{"question": f"What is a {word}?", "answers": ["a thing", word]} for word in WORDS[:3]]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{text}"
{rest}
metadata: {{version: 1}}
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]"""
WRITE = """\
output_type: generate_until
doc_to_target: "{{answers[1]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 64, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]"""


@pytest.fixture(scope="module")
def models(llama, tmp_path_factory):
    """The float model, a packed folder and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("models")
    few = ["grid.bits=2", "grid.group_size=32", "grid.symmetric=false"]
    api.quantize(llama, "rtn-w4g128", folder / "packed", changes=few, evaluate=False)
    api.quantize(llama, "gguf-q4_0", folder / "gguf", evaluate=False)
    return {"float": llama, "packed": folder / "packed", "gguf": folder / "gguf"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A file of both kinds of items, and a folder that gives them to lm-evaluation-harness as two tasks."""
    folder = tmp_path_factory.mktemp("items")
    lines = {"choose": CHOICES, "write": WRITTEN, "items": CHOICES + WRITTEN}
    for name, some in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), "utf-8")
    for name, text, rest in (("choose", "{{prompt}}", CHOOSE), ("write", r"Question: {{question}}\nAnswer:", WRITE)):
        task = TASK.format(
            name=f"own_{name}", file=folder / f"{name}.jsonl", cache=folder / "cache", text=text, rest=rest
        )
        (folder / f"{name}.yaml").write_text(task, "utf-8")
    return folder


@pytest.mark.filterwarnings("ignore")  # of lm-evaluation-harness and what it imports
def test_lm_evaluation_harness_gives_the_same_figures_for_a_folder_and_a_gguf_file(models, asked):
    pytest.importorskip("lm_eval")
    options = {"tasks": ["own_choose", "own_write"], "files": [asked / "items.jsonl"], "include_path": asked}
    rows = tasks.measure([models["packed"], models["gguf"]], models["float"], device="cpu", **options)
    found = {(row.model, row.task, row.metric): row for row in rows}
    assert len(rows) == 3 * 5
    for model in ("float", "packed", "gguf"):
        own, theirs = found[model, "items.jsonl", "accuracy"], found[model, "own_choose", "acc"]
        keys = ("items", "value", "low", "high", "difference", "lost", "gained", "changed", "p")
        assert [getattr(own, key) for key in keys] == [getattr(theirs, key) for key in keys]
        own, theirs = found[model, "items.jsonl", "exact match"], found[model, "own_write", "exact_match"]
        assert (own.items, own.changed) == (theirs.items, theirs.changed)
    assert found["packed", "own_choose", "acc"].changed + found["packed", "own_write", "exact_match"].changed > 0
    assert found["float", "own_choose", "acc"].changed == 0


def test_a_choice_is_the_one_with_the_largest_likelihood_token_by_token(models):
    model, tokenizer = inference.load(models["float"]), inference.load_tokenizer(models["float"])
    asked = items.Asked(model, tokenizer)
    for row in CHOICES[:4]:
        sums = []
        for choice in row["choices"]:
            before, whole = (
                tokenizer(t, return_tensors="pt")["input_ids"] for t in (row["prompt"], f"{row['prompt']} {choice}")
            )
            log_p = model(whole).logits[0].double().log_softmax(-1)
            sums.append(sum(log_p[i - 1, whole[0, i]] for i in range(before.shape[1], whole.shape[1])))
        assert asked.choose(row["prompt"], row["choices"]) == max(range(3), key=lambda i: sums[i])


def test_what_is_written_is_what_transformers_generates(models):
    model, tokenizer = inference.load(models["gguf"]), inference.load_tokenizer(models["gguf"])
    ids = tokenizer("Question: why?\nAnswer:", return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=items.NEW_TOKENS, pad_token_id=0)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert items.Asked(model, tokenizer).write("Question: why?\nAnswer:") == text.partition("\n")[0].strip()


def test_the_command_prints_and_writes_what_changed(models, asked, command, tmp_path):
    facts = tmp_path / "facts.json"
    arguments = ("--reference", models["float"], "--items", asked / "choose.jsonl", "--limit", 6, "--json", facts)
    code, out, _ = command("eval", models["packed"], *arguments)
    assert code == 0
    assert "McNemar's exact test" in out
    told = json.loads(facts.read_text("utf-8"))
    assert [row["model"] for row in told["answers"]] == ["float", "packed"]
    assert told["answers"][1]["items"] == 6
    assert told["rows"] == []


WRONG = {
    '{"prompt": "x"}': "needs an `answer`",
    '{"answer": "x"}': "needs a `prompt` or a `question`",
    '{"prompt": "x", "question": "y", "answer": "z"}': "one of them",
    '{"prompt": "x", "choices": ["a", "b"], "answer": 2}': "neither the number of a choice, 0 to 1",
    '{"prompt": "x", "choices": ["a"], "answer": 0}': "two texts or more",
    '{"prompt": "x", "choices": ["a", "a"], "answer": 0}': "the same",
    '{"prompt": "x", "answr": "y"}': "'answr' is no key",
    '["x"]': "is list, not an object",
    "{": "is not valid JSON",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_item_is_one_clear_message(line, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(DataError, match=f"items.jsonl.*{WRONG[line]}"):
        items.read(path)


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_said_before_a_model_is_loaded(models, asked, tmp_path, command):
    pytest.importorskip("lm_eval")
    with pytest.raises(DataError, match="no such folder"):
        tasks.measure(["nowhere"], tasks=["x"], include_path=tmp_path / "none")
    code, _, err = command("eval", models["float"], "--items", asked / "choose.jsonl", "--runtime", "llama.cpp")
    assert code == 2
    assert "does not answer" in err


def test_without_lm_evaluation_harness_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(LlmquantError, match=r"pip install 'llmquant\[tasks\]'"):
        tasks.measure(["nowhere"], tasks=["arc_easy"])
