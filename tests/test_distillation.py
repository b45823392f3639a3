"""What a student is trained towards, against the formula, token by token."""

import math

import pytest
import torch

from llmquant import distillation
from llmquant.distillation import Predictions, Training


def predictions(seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, 11, generator=generator)
    return Predictions(logits.requires_grad_(requires_grad), torch.randn(2, 5, 7, generator=generator))


TOKENS = torch.arange(10).view(2, 5)


def softmax(logits, temperature=1.0):
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    return [w / sum(weights) for w in weights]


def kl(student, teacher, temperature):
    """Return the mean over tokens of sum p log(p / q), p of the teacher."""
    sums = []
    for mine, theirs in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        q, p = softmax(mine, temperature), softmax(theirs, temperature)
        sums.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(sums) / len(sums)


@pytest.fixture(params=[distillation.CACHED, 25, 1])
def logits_at_a_time(request, monkeypatch):
    """All tokens at once, two (and never less than one) of them."""
    monkeypatch.setattr(distillation, "CACHED", request.param)


@pytest.mark.usefixtures("logits_at_a_time")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_from_the_teacher_to_the_student_at_a_temperature(temperature):
    student, teacher = predictions(0).logits, predictions(1).logits
    found = distillation.divergence(student, teacher, temperature)
    assert float(found) == pytest.approx(kl(student, teacher, temperature), rel=1e-5)
    assert float(distillation.divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-7)


def test_the_parts_of_the_loss_add_up_by_their_shares():
    student, teacher = predictions(0), predictions(1)
    of_text = [
        -math.log(softmax(student.logits[i, j])[int(TOKENS[i, j + 1])]) for i in range(2) for j in range(4)
    ]  # the last token of a sequence predicts nothing
    of_hidden = [
        float((student.hidden[i, j] - teacher.hidden[i, j]).square().sum() / teacher.hidden[i, j].square().sum())
        for i in range(2)
        for j in range(5)
    ]
    expected = 0.75 * 4 * kl(student.logits, teacher.logits, 2.0) + 0.25 * sum(of_text) / 8 + 0.5 * sum(of_hidden) / 10
    settings = Training(temperature=2.0, language=0.25, hidden=0.5)
    assert float(distillation.loss(student, teacher, TOKENS, settings)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("logits_at_a_time")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_leads_the_student_to_the_teacher(temperature):
    student, teacher = predictions(0, requires_grad=True), predictions(1)
    distillation.loss(student, teacher, TOKENS, Training(temperature=temperature)).backward()
    apart = (student.logits / temperature).softmax(-1) - (teacher.logits / temperature).softmax(-1)
    expected = temperature * apart / 10  # of T² KL, once divided by T
    torch.testing.assert_close(student.logits.grad, expected, atol=1e-6, rtol=1e-5)


def test_as_many_sequences_are_computed_at_once_as_their_logits_leave_room_for():
    assert distillation.together(3072, 256) == 16  # TOKENS tokens
    assert distillation.together(131072, 256) == 2  # LOGITS logits
    assert distillation.together(262144, 8192) == 1
