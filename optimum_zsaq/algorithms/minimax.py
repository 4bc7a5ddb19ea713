"""Zero-shot training (ZSAQ): a student learns to answer as its teacher on inputs that a generator makes harder and harder.

    min over w  max over theta  E_z [ max over |eps| <= rho of D(teacher(x), student at w + eps (x)) ],  x = G_theta(z)

alternating descent of the student, sharpness-aware (SAM), and stochastic gradient ascent of the generator (SGA):
https://huggingface.co/papers/2310.13315. The form of D, of the generator, and every number here are our choice; the paper's
are unknown to us.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import kind_of
from ..layers import LowBitLayer
from ..layers.common import SCALES
from ..surgery import low_bit_layers
from .distance import OUTPUTS, discrepancy
from .forms import Batch
from .generators import Generator, SoftBatch
from .sharpness import Perturbation, SharpnessSettings


_LEAST = torch.finfo(torch.float32).eps  # no step size becomes smaller by training


@dataclass(frozen=True)
class MinimaxSettings:
    """How to train.

    Args:
        steps (`int`): student steps.
        batch_size (`int`): sequences a step.
        learning_rate (`float`): of the student's weights, AdamW without weight decay; linear warm-up over a tenth of the
            steps, then a cosine to zero.
        scale_learning_rate (`float`): of the weights' step sizes.
        generator_every (`int`): student steps for a step of the generator; 0: a frozen generator.
        generator_learning_rate (`float`): Adam.
        entropy (`float`): weight of the entropy of the generator's choices, which keeps its inputs diverse.
        output (`str`): D of the outputs: "kl" of the softmax over the last axis, "mse", or "none" for a model without head.
        output_weight, hidden_weight (`float`): D = output_weight * D(outputs) + hidden_weight * mean over the hidden
            states h and their positions of |h_student - h_teacher|^2 / |h_teacher|^2.
        sharpness (`SharpnessSettings`): rho = 0 is plain AdamW.
        sharp_from (`float`): share of the steps that are made without SAM at first, 0 to 1.
        max_norm (`float`): gradients are clipped to this 2-norm.
        autocast (`torch.dtype`, *optional*): of the matmuls, such as bfloat16; weights and optimizer stay float32.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-4
    scale_learning_rate: float = 3e-4
    generator_every: int = 10
    generator_learning_rate: float = 1e-3
    entropy: float = 0.1
    output: str = "kl"
    output_weight: float = 0.0
    hidden_weight: float = 1.0
    sharpness: SharpnessSettings = field(default_factory=lambda: SharpnessSettings(rho=0.0))
    sharp_from: float = 0.0
    max_norm: float = 1.0
    autocast: torch.dtype | None = None

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is no count; use an integer of at least 1")
        if not isinstance(self.generator_every, int) or self.generator_every < 0:
            raise ValueError(f"generator_every={self.generator_every!r} is no count; use 0 (never) or a number of steps")
        for name in ("learning_rate", "scale_learning_rate", "generator_learning_rate", "max_norm"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0.0 < value < math.inf):
                raise ValueError(f"{name}={value!r} is not allowed; use a number above 0")
        for name in ("entropy", "output_weight", "hidden_weight"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0.0 <= value < math.inf):
                raise ValueError(f"{name}={value!r} is not allowed; use a number of at least 0")
        if not (isinstance(self.sharp_from, int | float) and 0.0 <= self.sharp_from <= 1.0):
            raise ValueError(f"sharp_from={self.sharp_from!r} is no share of the steps; use a number from 0 to 1")
        if self.output not in OUTPUTS:
            raise ValueError(f"output={self.output!r} is unknown; use one of {OUTPUTS}")
        if self.hidden_weight == 0.0 and (self.output_weight == 0.0 or self.output == "none"):
            raise ValueError("nothing to learn from: hidden_weight and output_weight are both 0; use hidden_weight=1.0")


@dataclass
class Execution:
    """How the student is run: alone and at once, or in parts and on several processes, with the same result.

    Every process draws the whole batch of a step and takes its own share.

    Args:
        student (`nn.Module`): what is called for gradients: the student itself, or what wraps it.
        backward (`Callable`): computes the gradients of a loss.
        parts (`int`): micro-batches that a process runs one after the other in a step.
        rank, world (`int`): this process, of how many.
        unsynced (`Callable`): makes a context in which `backward` does not exchange gradients.
        average (`Callable`): replaces a tensor by its mean over all processes, in place.
    """

    student: nn.Module
    backward: Callable[[Tensor], None] = Tensor.backward
    parts: int = 1
    rank: int = 0
    world: int = 1
    unsynced: Callable[[], Any] = nullcontext
    average: Callable[[Tensor], Any] = lambda tensor: tensor


class Minimax:
    """The training of one student: `step` finds the gradients of one step, `update` follows them.

    Args:
        teacher (`nn.Module`): float; it is frozen and put in evaluation mode.
        student (`nn.Module`): fake-quantized; its float weights and step sizes are trained, without dropout.
        generator (`Generator`): makes the inputs.
        settings (`MinimaxSettings`): how.
        embed (`Callable`): (model, ids) -> embeddings, as the model's own input table gives them.
        complete (`Callable`): adds to a batch what the models need beside input ids.
        options (`dict`, *optional*): what else the models are called with while the student trains.

    Raises:
        ValueError: the student has no fake-quantized layer, or shares weights with the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: Generator,
        settings: MinimaxSettings,
        embed: Callable[[nn.Module, Tensor], Tensor],
        complete: Callable[[Batch], Batch] = lambda batch: batch,
        options: dict[str, Any] | None = None,
    ):
        layers = [m for _, m in low_bit_layers(student) if m.owner is m and type(m) is kind_of(m).fake]
        if not layers:
            raise ValueError("the student has no fake-quantized layer to train; call prepare(model, scheme) first")
        if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError("teacher and student share weights; make the student from copy.deepcopy(teacher)")
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.eval()
        self.generator, self.settings = generator, settings
        self.embed, self.complete, self.options = embed, complete, options or {}
        self.execution = Execution(student)
        self.scales = [p for m in layers for p in (m.weight_scale, m.input_scale) if p is not None]
        self.weights = _unfreeze(student, layers, self.scales)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), weight_decay=0.0, fused=True)
        keep_signs(self.optimizer, self.scales)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(warm_cosine, settings.steps))
        self.ascent = torch.optim.Adam(generator.parameters(), settings.generator_learning_rate, maximize=True)
        self.perturbation = Perturbation(student, settings.sharpness)
        self.done = 0

    @property
    def trained(self) -> list[nn.Parameter]:
        """Weights, then step sizes."""
        return [*self.weights, *self.scales]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What an optimizer of the student is made of: the weights, and the step sizes with a rate of their own."""
        settings = self.settings
        return [
            {"params": self.weights, "lr": settings.learning_rate},
            {"params": self.scales, "lr": settings.scale_learning_rate},
        ]

    def step(self) -> dict[str, float]:
        """Find the student's gradients for one step; when it is its turn, the generator makes a step before.

        Returns:
            `dict`: "loss", D at the weights; "sharp_loss", D at the perturbed weights, where the step is one of SAM;
            "ascent", D on the generator's inputs before its step, if it made one.

        Raises:
            FloatingPointError: D is NaN or infinite. Nothing was changed by this step.
        """
        figures, settings, run = {}, self.settings, self.execution
        every = settings.generator_every
        if every and self.done and self.done % every == 0:
            figures["ascent"] = self._ascend()
        drawn = self.generator.sample(settings.batch_size * run.parts * run.world)
        batches = [self._share(drawn, part) for part in range(run.parts)]
        with torch.no_grad():
            targets = [self._call(self.teacher, batch) for batch in batches]
        figures["loss"] = self._descend(batches, targets)
        if settings.sharpness.rho and self.done >= settings.sharp_from * settings.steps:
            self.perturbation.apply()
            try:
                figures["sharp_loss"] = self._descend(batches, targets)
            finally:
                self.perturbation.remove()
        self.done += 1
        return figures

    def update(self) -> None:
        """Follow the gradients: clip them, and let optimizer and schedule make their step."""
        nn.utils.clip_grad_norm_(self.trained, self.settings.max_norm)
        self.optimizer.step()
        self.schedule.step()

    def _rows(self, part: int) -> slice:
        """This process's rows of a micro-batch, in the batch of the whole step."""
        start = (part * self.execution.world + self.execution.rank) * self.settings.batch_size
        return slice(start, start + self.settings.batch_size)

    def _share(self, batch: Batch, part: int) -> Batch:
        return self.complete({name: tensor[self._rows(part)] for name, tensor in batch.items()})

    def _descend(self, batches: list[Batch], targets: list[Any]) -> float:
        """The gradients of D at the weights as they are, of all micro-batches together."""
        run, total = self.execution, 0.0
        for p in self.trained:
            p.grad = None
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            with nullcontext() if i == len(batches) - 1 else run.unsynced():
                loss = discrepancy(target, self._call(run.student, batch), batch, self.settings)
                run.backward(loss / run.parts)
            total = total + loss.detach() / run.parts
        return self._checked(total)

    def _ascend(self) -> float:
        run = self.execution
        drawn = self.generator.soft_sample(self.settings.batch_size * run.parts * run.world)
        choice = drawn.choice.detach().requires_grad_()  # the parts' gradients meet here, then the network is run back once
        total = torch.zeros((), device=choice.device)
        try:
            for p in self.trained:
                p.requires_grad_(False)
            for part in range(run.parts):
                loss = self._hardness(replace(drawn, choice=choice).part(self._rows(part))) / run.parts
                loss.backward()
                total += loss.detach()
            value = self._checked(total)
            self.ascent.zero_grad()
            ((drawn.choice * choice.grad).sum() + self.settings.entropy * drawn.entropy).backward()
            for p in self.generator.parameters():
                run.average(p.grad)
            nn.utils.clip_grad_norm_(self.generator.parameters(), self.settings.max_norm)
            self.ascent.step()
        finally:
            for p in self.trained:
                p.requires_grad_(True)
        return value

    def _hardness(self, drawn: SoftBatch) -> Tensor:
        """D on sequences that gradients reach the choice of tokens through."""
        batch, outputs = self.complete(drawn.batch), []
        inputs = {name: value for name, value in batch.items() if name != "input_ids"}
        for model in (self.teacher, self.student):
            embedded = drawn.embed(lambda ids, model=model: self.embed(model, ids))
            outputs.append(self._call(model, {**inputs, "inputs_embeds": embedded}))
        return discrepancy(*outputs, batch, self.settings)

    def _call(self, model: nn.Module, batch: Batch) -> Any:
        dtype = self.settings.autocast
        context = torch.autocast(self.weights[0].device.type, dtype) if dtype else nullcontext()
        with context:
            return model(**batch, **self.options, output_hidden_states=True)

    def _checked(self, loss: Tensor) -> float:
        """The mean loss of all processes."""
        loss = loss.clone()
        self.execution.average(loss)
        value = loss.item()
        if not math.isfinite(value):
            for p in self.trained:
                p.grad = None
            raise FloatingPointError(
                f"the discrepancy became {value} at step {self.done + 1} of {self.settings.steps}; the weights are those "
                f"of step {self.done}. Try a smaller learning_rate (now {self.settings.learning_rate})"
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened: student, generator, optimizers."""
        own = {"student": self.student, "optimizer": self.optimizer, "schedule": self.schedule}
        return {**self.alternation_state(), **{name: part.state_dict() for name, part in own.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.load_alternation_state(state)
        for name in ("student", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])

    def alternation_state(self) -> dict[str, Any]:
        """What is left for one who keeps the student, its optimizer and its schedule himself, as a Trainer does."""
        return {"done": self.done, "generator": self.generator.state_dict(), "ascent": self.ascent.state_dict()}

    def load_alternation_state(self, state: dict[str, Any]) -> None:
        """Go on from what `alternation_state` gave."""
        self.generator.load_state_dict(state["generator"])
        self.ascent.load_state_dict(state["ascent"])
        self.done = state["done"]


def warm_cosine(steps: int, step: int) -> float:
    """The share of the learning rate in a step: linear warm-up over a tenth of the steps, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def keep_signs(optimizer: torch.optim.Optimizer, scales: list[nn.Parameter]) -> None:
    """No step of an optimizer more than halves a step size, or takes it nearer to zero than float32's epsilon.

    So none changes its sign, and one that is pushed down step after step does not become zero, which would have no
    gradient.
    """
    least: list[tuple[Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        sizes = ((scale.detach().sign(), scale.detach().abs()) for scale in scales)
        least[:] = [(sign, torch.maximum(size * 0.5, size.clamp(max=_LEAST))) for sign, size in sizes]

    def after(*_: Any) -> None:
        with torch.no_grad():
            for scale, (sign, bound) in zip(scales, least, strict=True):
                torch.maximum(scale * sign, bound, out=scale)
                scale.mul_(sign)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _unfreeze(student: nn.Module, layers: list[LowBitLayer], scales: list[nn.Parameter]) -> list[nn.Parameter]:
    """Have the float weights and the step sizes trained; gives the former."""
    kept = {id(layer._parameters[name]) for layer in layers for name in SCALES if layer._parameters.get(name) is not None}
    weights = [p for p in student.parameters() if p.is_floating_point() and id(p) not in kept]
    for p in (*weights, *scales):
        p.requires_grad_(True)
    return weights
