"""What a student learns from, judged by what transformers computes."""

from contextlib import nullcontext

import pytest
import torch
import transformers as hf

from llmquant import data, recipe, run, work
from llmquant.checkpoint import Checkpoint
from llmquant.progress import silent
from llmquant.stream import Stream
from llmquant.teacher import Teacher, heard
from tests.conftest import VOCABULARY

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_a_teacher_predicts_what_the_model_does(soft_cap, save_model, tmp_path):
    config = hf.Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=soft_cap)
    folder = save_model(tmp_path / "gemma", config, torch.bfloat16)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCABULARY, (70, 128), generator=torch.Generator().manual_seed(0))  # three batches
    stream = Stream(Checkpoint(folder), torch.device("cpu"), weights=False)
    teacher = Teacher(stream, tokens, tmp_path / "0", "text", nullcontext(), silent)
    assert all(p.is_meta for p in stream.decoder_layers.parameters())
    these = [69, 3, 40]
    found = teacher.predict(these)
    with torch.no_grad():
        known = model(tokens[these], output_hidden_states=True)
    torch.testing.assert_close(found.logits, known.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.hidden, known.hidden_states[-1], rtol=1e-4, atol=1e-4)


def test_what_the_output_matrix_reads_is_the_last_hidden_state(llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    with heard(model.lm_head) as inputs:
        found = model(torch.arange(3, 19).view(2, 8), output_hidden_states=True).hidden_states
    assert torch.equal(*inputs, found[-1])
    assert not torch.equal(found[-2], found[-1])


@pytest.mark.parametrize("steps", [2, 1000])
def test_the_disk_is_asked_for_what_the_teacher_takes(steps, llama, calibrated, tmp_path):
    chosen = recipe.load("rtn-w4g128", [*calibrated, f"training.steps={steps}", "training.tokens=512"])
    taken = []

    def look(what, done, total):
        if what.startswith("training"):
            kept = tmp_path / "out.work" / work.SCRATCH
            taken.append(sum(x.stat().st_size for x in kept.rglob("*") if x.is_file()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=look)
    stream = run.open_stream(llama, chosen)
    lessons = run._training_tokens(stream, chosen, False)
    plan = run.plan_for(stream, chosen)
    text = run.text_of(stream, plan, len(lessons.tokens))
    assert text.lessons == data.HELD_OUT * text.length + min(steps * 512, lessons.tokens.numel())
    assert taken == [pytest.approx(stream.dtype.itemsize * stream.hidden_size * text.lessons, rel=0.01)]
    assert run.plan_for(stream, chosen, lessons).scratch_bytes <= plan.scratch_bytes
