"""Quantization-aware training, so that the quantized model predicts what the float one does.

Weights, scales and what stays float are trained. The student computes with what would be stored (``llmquant.fake``),
beginning with what the recipe's own algorithms found; the teacher is the float model (``llmquant.distillation``).
Sequences that no step is taken on tell which step was the best; that is what is kept.

Whatever leads to the next step is in the work folder, bit by bit: a run that was killed ends as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmquant import activations, distillation, work
from llmquant.activations import Inputs
from llmquant.data import CalibrationTokens
from llmquant.distillation import Predictions, Training, divergence
from llmquant.errors import NumericsError
from llmquant.fake import FakeQuantized, straight
from llmquant.grid import QuantizedTensor
from llmquant.plan import Plan
from llmquant.progress import Progress
from llmquant.stream import Stream
from llmquant.teacher import Teacher, heard

LOOKS = 10  # at the held-out divergence, in a whole training
KEEP = 60.0  # seconds after which the state is written again
WARM = 0.05  # of all steps, in which rates rise
LONGEST = 2.0  # step of a weight that counts little, beside Adam's
TINY = torch.finfo(torch.float32).tiny


class Student(nn.Module):
    """A model that computes with quantized weights; its parameters are those of them, and those that stay float.

    weights: of the plan's linears that have a grid, in its order. floats: the dtype that such a parameter is stored in.
    """

    def __init__(self, stream: Stream, plan: Plan, log: work.Work, floats: bool) -> None:
        """floats: whether what stays float is trained."""
        super().__init__()
        self.linears = [x for x in plan.linears if x.grid is not None]
        self.model = stream.load_all(but=[x.weight_name for x in self.linears])
        head, tied = f"{plan.spec.head}.weight", stream.tied and not plan.untie
        if plan.untie and stream.tied:
            own = nn.Parameter(stream.head_weight().clone(), requires_grad=False)
            self.model.get_submodule(plan.spec.head).weight = own
        self.fakes = [FakeQuantized(log.load(x).to(stream.device)) for x in self.linears]
        self.weights = nn.ModuleList(self.fakes)
        self._places: list[tuple[str, ...]] = []  # the parameters that each weight stands for
        for linear, weight in zip(self.linears, self.fakes, strict=True):
            module = self.model.get_submodule(linear.name)
            module.weight = nn.Parameter(torch.empty(0, device=stream.device), requires_grad=False)
            if weight.inputs is not None:
                module.register_forward_pre_hook(_rounding(weight.inputs))
            self._places.append((linear.weight_name, head) if linear.lookup and tied else (linear.weight_name,))
        self.floats: dict[str, torch.dtype] = {}
        for name, parameter in self.model.named_parameters():
            if floats and parameter.numel() and name in stream.checkpoint.infos:
                parameter.requires_grad_()
                self.floats[name] = stream.checkpoint.infos[name].dtype
        embedding = f"{plan.spec.embed}.weight"
        self._also = {embedding: head} if tied and embedding in self.floats else {}
        self._head = plan.spec.head

    def forward(self, tokens: Int[Tensor, "sequences time"]) -> Predictions:
        """As ``predict``, but in the precision of steps: accelerate puts its autocast around this method."""
        return self.predict(tokens)

    def predict(self, tokens: Int[Tensor, "sequences time"]) -> Predictions:
        """Return what the model predicts as it would be stored now."""
        given: dict[str, Tensor] = {}
        for linear, weight, places in zip(self.linears, self.fakes, self._places, strict=True):
            value = weight()
            turned = isinstance(self.model.get_submodule(linear.name), Conv1D)
            given |= dict.fromkeys(places, value.T if turned else value)
        for name, dtype in self.floats.items():
            value = self.model.get_parameter(name)
            given[name] = straight(value, value.detach().to(dtype).to(value.dtype))
        given |= {other: given[name] for name, other in self._also.items()}
        settings = {"input_ids": tokens, "use_cache": False}
        with heard(self.model.get_submodule(self._head)) as inputs:
            out = torch.func.functional_call(self.model, given, (), settings, tie_weights=False)
        return Predictions(out.logits, *inputs)

    def changing(self) -> dict[str, Tensor]:
        """Return all that training changes, and what that is measured in."""
        of_weights = {name.partition(".")[2]: v for name, v in self.state_dict().items() if name.startswith("weights.")}
        return of_weights | {name: self.model.get_parameter(name).detach() for name in self.floats}

    def stored(self) -> dict[str, Tensor]:
        """Return what is to be stored, by the names in a work folder's files."""
        found = {f"{work.FLOAT}{name}": value.clone() for name, value in self._floats().items()}
        for linear, weight in zip(self.linears, self.fakes, strict=True):
            found |= {f"{linear.name}:{key}": value for key, value in work.stored(weight.quantized()).items()}
        return found

    def _floats(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().to(dtype) for name, dtype in self.floats.items()}

    def groups(self, settings: Training) -> list[dict[str, Any]]:
        """Return the parameters with their rates."""
        found: list[dict[str, Any]] = []
        for fake in self.fakes:
            found += _groups(fake, settings)
        for name in self.floats:
            parameter = self.model.get_parameter(name)
            size = float(parameter.detach().square().mean().sqrt())
            found.append({"params": [parameter], "lr": settings.float_rate * (size or 1.0)})
        return found


def _rounding(inputs: Inputs) -> Any:
    """Return a hook that lets a linear read rounded activations."""

    def hook(_linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            rounded = activations.rounded(inputs, args[0])
        return (straight(args[0], rounded), *args[1:])

    return hook


@dataclass
class _Told:
    """How a training went. losses, held_out: (step, value). waited: looks since the best."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    waited: int = 0
    finished: bool = False
    seconds: float = 0.0


def train(
    plan: Plan, stream: Stream, log: work.Work, text: CalibrationTokens, settings: Training, progress: Progress
) -> dict[str, Any]:
    """Train the quantized model in a work folder, and return what a report should tell.

    stream: of the float model. A training that was broken off goes on; one that was finished is not done again.
    """
    if not finished(log):
        with log.scratch() as folder:
            _Trainer(plan, stream, log, text, settings, folder, progress).run()
    found = log.training()
    assert found is not None
    known = {*plan.parts, *plan.float_parts}
    parts: dict[int | str, dict[str, Tensor]] = {}
    for name, value in found[0].items():
        part = part_of(plan, name)
        if part not in known:
            raise log.damaged_training(f"{name} belongs to no part of this model")
        parts.setdefault(part, {})[name] = value
    for part, tensors in parts.items():
        log.replace(part, tensors)
    return outcome(log)


def outcome(log: work.Work) -> dict[str, Any]:
    """Return what a report should tell of the training in a work folder."""
    found = log.training()
    assert found is not None
    try:
        return {key: found[1][key] for key in ("step", "best", "losses", "held_out", "seconds")}
    except KeyError as error:
        raise log.damaged_training(f"it does not tell {error}") from None


def finished(log: work.Work) -> bool:
    """Whether a work folder's training is over."""
    found = log.training()
    return found is not None and found[1].get("finished") is True


def part_of(plan: Plan, name: str) -> int | str:
    """Return the part of a work folder that a tensor belongs to, by its name there: a layer, or a module outside."""
    module = name.removeprefix(work.FLOAT).rpartition(".")[0] if name.startswith(work.FLOAT) else name.partition(":")[0]
    below = module.removeprefix(f"{plan.spec.layers}.")
    number = below.partition(".")[0]
    return module if below == module or not number.isdecimal() else int(number)


class _Trainer:
    """One training of the quantized model in a work folder."""

    def __init__(
        self,
        plan: Plan,
        stream: Stream,
        log: work.Work,
        text: CalibrationTokens,
        settings: Training,
        folder: Path,
        progress: Progress,
    ) -> None:
        """stream: of the float model. folder: for what is needed until the training is over, of this rank."""
        self._log, self._text, self._settings, self._ranks = log, text, settings, stream.ranks
        self._progress = progress
        low = settings.precision == "bfloat16" or (settings.precision == "auto" and _fast_in_16_bits(stream.device))
        AcceleratorState._reset_state(reset_partial_state=True)  # it refuses another precision in the same process
        self._accelerator = Accelerator(cpu=stream.device.type == "cpu", mixed_precision="bf16" if low else "no")
        length, available = text.tokens.shape[1], len(text.tokens)
        self._together = distillation.together(stream.vocabulary, length)
        self._count = sequences_of_step(settings, length, stream.ranks.size)
        changed = work.Transformed(stream.checkpoint, log, range(plan.layers))
        own = Stream(changed, stream.device, weights=False, ranks=stream.ranks)
        own.dtype = torch.float32
        self._student = Student(own, plan, log, settings.float_rate > 0)
        optimizer = _Adam(self._student.groups(settings))
        self._computing, self._optimizer = self._accelerator.prepare(self._student, optimizer)
        self._told = _Told()
        self._best: dict[str, Tensor] = {}
        if (kept := log.training()) is not None:
            self._go_on_from(*kept)
        read = chosen(0, min(settings.steps * self._count, available), available, settings.seed)
        self._place = {sequence: place for place, sequence in enumerate(read)}
        self._lessons = Teacher(stream, text.tokens[read], folder, "steps", self._accelerator.autocast(), progress)
        self._judge = Teacher(stream, text.held_out[::2], folder, "looks", nullcontext(), progress)

    def run(self) -> None:
        """Train, and leave the best in the work folder."""
        told, settings = self._told, self._settings
        look = max(settings.steps // LOOKS, 1)
        saved = started = time.monotonic()
        if not told.held_out:
            self._look()
            self._save()
        while not told.finished:
            held_out = f"{told.held_out[-1][1]:.5f}, best {told.best:.5f}"
            loss = f"{told.losses[-1][1]:.5f}, " if told.losses else ""
            self._progress(f"training: loss {loss}held-out KLD {held_out}", told.step, settings.steps)
            told.losses.append((told.step, self._take_step()))
            told.step += 1
            if told.step % look == 0 or told.step == settings.steps:
                self._look()
                told.finished = told.step == settings.steps or told.waited == settings.patience
            if told.finished or self._long_since(saved):
                told.seconds += time.monotonic() - started
                self._save()
                saved = started = time.monotonic()

    def _long_since(self, saved: float) -> bool:
        return self._ranks.from_first(lambda: time.monotonic() - saved > KEEP)

    def _take_step(self) -> float:
        """Take one step on the next sequences, and return its loss."""
        settings, ranks = self._settings, self._ranks
        these = chosen(self._told.step, self._count, len(self._text.tokens), settings.seed)
        own = [self._place[sequence] for sequence in these[ranks.rank :: ranks.size]]
        total = 0.0
        for i in range(0, len(own), self._together):
            part, last = own[i : i + self._together], i + self._together >= len(own)
            with self._accelerator.autocast(), nullcontext() if last else self._accelerator.no_sync(self._computing):
                loss = self._loss(part) * (len(part) / len(own))
                self._accelerator.backward(loss)
            total += float(loss.detach())
        share = _rate(self._told.step, settings.steps)
        _step(self._optimizer, self._student.fakes, settings, share, self._told.step / settings.steps)
        return sum(ranks.each(lambda: total)) / ranks.size

    def _loss(self, these: Sequence[int]) -> Float[Tensor, ""]:
        tokens = self._lessons.tokens[list(these)].to(self._accelerator.device)
        with torch.no_grad():
            expected = self._lessons.predict(these)
        return distillation.loss(self._computing(tokens), expected, tokens, self._settings)

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the divergence on held-out sequences, and keep what is there if it is the best so far."""
        told, ranks = self._told, self._ranks
        total = torch.zeros(2, dtype=torch.float64)
        own = range(ranks.rank, len(self._judge.tokens), ranks.size)
        for i in range(0, len(own), self._together):
            part = own[i : i + self._together]
            tokens = self._judge.tokens[list(part)].to(self._accelerator.device)
            ours, theirs = self._student.predict(tokens), self._judge.predict(part)  # in 32 bits
            of_batch = float(divergence(ours.logits, theirs.logits)) * len(part)
            total += torch.tensor([of_batch, len(part)], dtype=torch.float64)
        ranks.add(total)
        found = float(total[0] / total[1])
        if not math.isfinite(found):
            raise NumericsError(
                f"training: after step {told.step} the divergence on held-out text is not finite. Set a smaller "
                "training.rate"
            )
        told.held_out.append((told.step, found))
        told.waited = 0 if found < told.best else told.waited + 1
        if found < told.best:
            told.best = found
            self._best = self._student.stored()

    def _save(self) -> None:
        """Write all that the next step depends on; after the last one, what was best."""
        tensors = self._best if self._told.finished else self._state()
        self._log.save_training(tensors, asdict(self._told))

    def _state(self) -> dict[str, Tensor]:
        found = {f"best.{name}": value for name, value in self._best.items()}
        found |= {f"student.{name}": value for name, value in self._student.changing().items()}
        for i, parameter in enumerate(self._parameters):
            found |= {f"optimizer.{i}.{name}": value for name, value in self._optimizer.state[parameter].items()}
        return found

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _go_on_from(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Take up what ``_save`` wrote; raise CheckpointError where that is something else."""
        try:
            pairs = {key: [(int(step), float(value)) for step, value in told[key]] for key in ("losses", "held_out")}
            self._told = _Told(**{**told, **pairs})
        except (TypeError, ValueError, KeyError):
            raise self._log.damaged_training("it does not tell its steps") from None
        self._best = {name.removeprefix("best."): v for name, v in tensors.items() if name.startswith("best.")}
        if self._told.step:
            for parameter in self._parameters:
                self._optimizer.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        own = self._state()
        wanted = {f"best.{name}": value for name, value in self._student.stored().items()}
        wanted |= {name: value for name, value in own.items() if not name.startswith("best.")}
        for name in wanted.keys() | tensors.keys():
            found, should = (x.get(name) for x in (tensors, wanted))
            if found is None or should is None or (found.shape, found.dtype) != (should.shape, should.dtype):
                raise self._log.damaged_training(f"{name} is not what this training keeps")
        for name, value in own.items():
            if not name.startswith("best."):
                value.copy_(tensors[name])


class AdamSteps:
    """AdamW's steps for the linears of a layer (``llmquant.learned.Steps``): weights, scales and offsets."""

    def __init__(self, done: Mapping[str, QuantizedTensor], settings: Training) -> None:
        self._fakes = {name: FakeQuantized(q) for name, q in done.items()}
        self._settings = settings
        groups = [group for fake in self._fakes.values() for group in _groups(fake, settings)]
        self._optimizer = _Adam(groups)

    def weights(self) -> dict[str, Tensor]:
        return {name: fake() for name, fake in self._fakes.items()}

    def step(self, share: float) -> None:
        _step(self._optimizer, self._fakes.values(), self._settings, share, 1 - share)

    def quantized(self) -> dict[str, QuantizedTensor]:
        return {name: fake.quantized() for name, fake in self._fakes.items()}


def _groups(fake: FakeQuantized, settings: Training) -> list[dict[str, Any]]:
    """Return the parameters of a weight with their rates."""
    return [
        {"params": [fake.places], "lr": settings.rate * fake.gap, "rounded": True},
        {"params": fake.levels, "lr": settings.scale_rate},
    ]


class _Adam(torch.optim.AdamW):
    """Adam, with shorter steps for the weights that are rounded if they count much, and longer ones if little.

    Adam's step is m / v^(1/2), of the mean m and the mean square v of a weight's gradients. Another level, however, is
    worth going to where m exceeds half the curvature times the distance; with v, which is about in proportion to the
    curvature (as Fisher information), m / v would tell. Steps of that length carry the noise of weights that count
    little too far. What lies between both is taken: m / v^(3/4).
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """groups: of parameters, with their highest rates; those with "rounded" are places of weights."""
        super().__init__([{**group, "highest": group["lr"]} for group in groups], weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        places = [x for group in self.param_groups if group.get("rounded") for x in group["params"]]
        before = [x.clone() for x in places]
        super().step(closure)
        for place, old in zip(places, before, strict=True):
            deviation = self.state[place]["exp_avg_sq"].sqrt()
            longer = (deviation.mean() / deviation.clamp(min=TINY)).sqrt_().clamp_(max=LONGEST)
            place.copy_(old.lerp_(place, longer))


def _step(
    optimizer: torch.optim.Optimizer, fakes: Iterable[FakeQuantized], settings: Training, share: float, done: float
) -> None:
    """Take a step, at a share of the highest rates. done: the share of the steps that were taken before."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["highest"]
    for fake in fakes:
        fake.draw(share * settings.rate * settings.dampening * done**2)
    optimizer.step()
    optimizer.zero_grad()


def _fast_in_16_bits(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are faster than those of float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def sequences_of_step(settings: Training, length: int, ranks: int) -> int:
    """Return how many sequences a step is taken on, by all ranks, each on as many."""
    return max(math.ceil(settings.tokens / length / ranks), 1) * ranks


def chosen(step: int, count: int, available: int, seed: int) -> list[int]:
    """Return the sequences of a step: all that are available again and again, shuffled anew each time."""
    places = range(step * count, (step + 1) * count)
    orders = {
        turn: torch.randperm(available, generator=torch.Generator().manual_seed(seed + turn)).tolist()
        for turn in {place // available for place in places}
    }
    return [orders[place // available][place % available] for place in places]


def _rate(step: int, steps: int) -> float:
    """Return the share of the highest rate at a step."""
    rising = (step + 1) / max(WARM * steps, 1)
    return min(rising, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
