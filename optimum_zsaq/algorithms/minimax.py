"""Zero-shot training (ZSAQ): a student learns to answer as its teacher on inputs that a generator makes harder and harder.

    min over w  max over theta  E_z [ max over |eps| <= rho of D(teacher(x), student at w + eps (x)) ],  x = G_theta(z)

alternating descent of the student, sharpness-aware (SAM), and stochastic gradient ascent of the generator (SGA):
https://huggingface.co/papers/2310.13315. The form of D, of the generator, and every number here are our choice; the paper's
are unknown to us.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import kind_of
from ..layers import LowBitLayer
from ..layers.common import SCALES
from ..surgery import low_bit_layers
from .generators import Batch, NoiseGenerator, soft_embeddings
from .sharpness import Perturbation, SharpnessSettings


OUTPUTS = ("kl", "mse", "none")


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
            states h of |h_student - h_teacher|^2 / |h_teacher|^2.
        sharpness (`SharpnessSettings`): rho = 0 is plain AdamW.
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
        if self.output not in OUTPUTS:
            raise ValueError(f"output={self.output!r} is unknown; use one of {OUTPUTS}")
        if self.hidden_weight == 0.0 and (self.output_weight == 0.0 or self.output == "none"):
            raise ValueError("nothing to learn from: hidden_weight and output_weight are both 0; use hidden_weight=1.0")


def discrepancy(teacher: Any, student: Any, batch: Batch, settings: MinimaxSettings) -> Tensor:
    """D of two models' outputs on one batch; padded positions are left out.

    Args:
        teacher, student: what the models returned with `output_hidden_states=True`.

    Shapes: -> () float32.

    Raises:
        ValueError: outputs count, and the model has none.
    """
    total = torch.zeros((), device=batch["input_ids"].device)
    encoder = batch.get("attention_mask")
    if settings.output_weight and settings.output != "none":
        if getattr(student, "logits", None) is None:
            raise ValueError(
                f"output_weight={settings.output_weight!r} needs a model that returns logits, and this one returns "
                f"{type(student).__name__} without; use output_weight=0.0"
            )
        mask = encoder if student.logits.dim() == 3 and "decoder_input_ids" not in batch else None
        total = total + settings.output_weight * _output_discrepancy(teacher.logits, student.logits, mask, settings.output)
    if settings.hidden_weight:
        pairs = []
        for name, mask in (("hidden_states", encoder), ("encoder_hidden_states", encoder), ("decoder_hidden_states", None)):
            states = getattr(student, name, None)
            if states is not None:
                pairs += [(t, s, mask) for t, s in zip(getattr(teacher, name), states, strict=True)]
        errors = [_relative_error(*pair) for pair in pairs]
        total = total + settings.hidden_weight * torch.stack(errors).mean()
    return total


def _output_discrepancy(teacher: Tensor, student: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    teacher, student = teacher.float(), student.float()
    if kind == "mse":
        error = (student - teacher).square().mean(dim=-1)
    else:
        log_t, log_s = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
        error = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    if mask is None:
        return error.mean()
    return (error * mask).sum() / mask.sum()


def _relative_error(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """|s - t|^2 / |t|^2. Shapes: (B, L, D), mask (B, L) or None -> ()."""
    teacher = teacher.float()
    error, size = (student.float() - teacher).square(), teacher.square()
    if mask is not None:
        error, size = error * mask.unsqueeze(-1), size * mask.unsqueeze(-1)
    return error.sum() / size.sum().clamp(min=1e-12)


class Minimax:
    """The training of one student: `step` does one step of it, `state_dict` is all that a resumed one needs.

    Args:
        teacher (`nn.Module`): float; it is frozen and put in evaluation mode.
        student (`nn.Module`): fake-quantized; its float weights and step sizes are trained, without dropout.
        generator (`NoiseGenerator`): makes the inputs.
        settings (`MinimaxSettings`): how.
        embed (`Callable`): (model, ids) -> embeddings, as the model's own input table gives them.
        complete (`Callable`): adds to a batch what the models need beside input ids and attention mask.

    Raises:
        ValueError: the student has no fake-quantized layer, or shares weights with the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: NoiseGenerator,
        settings: MinimaxSettings,
        embed: Callable[[nn.Module, Tensor], Tensor],
        complete: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        layers = [m for _, m in low_bit_layers(student) if m.owner is m and type(m) is kind_of(m).fake]
        if not layers:
            raise ValueError("the student has no fake-quantized layer to train; call prepare(model, scheme) first")
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.eval()
        self.generator, self.settings = generator, settings
        self.embed, self.complete = embed, complete
        if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError("teacher and student share weights; make the student from copy.deepcopy(teacher)")
        self.scales = [layer.weight_scale for layer in layers]
        weights = _unfreeze(student, layers)
        self.trained = [*weights, *self.scales]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": weights, "lr": settings.learning_rate},
                {"params": self.scales, "lr": settings.scale_learning_rate},
            ],
            weight_decay=0.0,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.ascent = torch.optim.Adam(generator.parameters(), settings.generator_learning_rate, maximize=True)
        self.perturbation = Perturbation(student, settings.sharpness)
        self.done = 0

    def _rate(self, step: int) -> float:
        warm = max(1, self.settings.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.settings.steps - warm)))

    def step(self) -> dict[str, float]:
        """One step of the student and, when it is its turn, one of the generator before it.

        Returns:
            `dict`: "loss", D at the weights; "sharp_loss", D at the perturbed weights, with rho > 0; "ascent", D on the
            generator's inputs before its step, if it made one.

        Raises:
            FloatingPointError: D is NaN or infinite. Nothing was changed by this step.
        """
        figures = {}
        every = self.settings.generator_every
        if every and self.done and self.done % every == 0:
            figures["ascent"] = self._ascend()
        batch = self.complete(self.generator.sample(self.settings.batch_size))
        with torch.no_grad():
            target = self._run(self.teacher, batch)
        loss = self._descend(batch, target)
        figures["loss"] = self._checked(loss)
        if self.settings.sharpness.rho:
            self.perturbation.apply()
            try:
                figures["sharp_loss"] = self._checked(self._descend(batch, target))
            finally:
                self.perturbation.remove()
        nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group["params"]], self.settings.max_norm
        )
        smallest = [scale.detach() * 0.5 for scale in self.scales]
        self.optimizer.step()
        with torch.no_grad():  # a step size never reaches zero or changes its sign
            for scale, least in zip(self.scales, smallest, strict=True):
                torch.maximum(scale, least, out=scale)
        self.schedule.step()
        self.done += 1
        return figures

    def _descend(self, batch: Batch, target: Any) -> Tensor:
        self.optimizer.zero_grad()
        loss = discrepancy(target, self._run(self.student, batch), batch, self.settings)
        loss.backward()
        return loss.detach()

    def _ascend(self) -> float:
        batch, candidates, one_hot, entropy = self.generator.soft_sample(self.settings.batch_size)
        batch = self.complete(batch)
        try:
            for p in self.trained:
                p.requires_grad_(False)
            outputs = []
            for model in (self.teacher, self.student):
                embedded = soft_embeddings(lambda ids, model=model: self.embed(model, ids), batch, candidates, one_hot)
                inputs = {name: value for name, value in batch.items() if name != "input_ids"}
                outputs.append(self._run(model, {**inputs, "inputs_embeds": embedded}))
            loss = discrepancy(*outputs, batch, self.settings)
            value = self._checked(loss.detach())
            self.ascent.zero_grad()
            (loss + self.settings.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(self.generator.parameters(), self.settings.max_norm)
            self.ascent.step()
        finally:
            for p in self.trained:
                p.requires_grad_(True)
        return value

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        dtype = self.settings.autocast
        context = torch.autocast(next(model.parameters()).device.type, dtype) if dtype else nullcontext()
        with context:
            return model(**batch, output_hidden_states=True)

    def _checked(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"the discrepancy became {value} at step {self.done + 1} of {self.settings.steps}; the weights are those "
                f"of step {self.done}. Try a smaller learning_rate (now {self.settings.learning_rate})"
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened: student, generator, optimizers."""
        return {
            "done": self.done,
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ascent": self.ascent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        for name in ("generator", "optimizer", "schedule", "ascent"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]


def _unfreeze(student: nn.Module, layers: list[LowBitLayer]) -> list[nn.Parameter]:
    """Have the float weights and the step sizes of the weights trained; gives the former."""
    kept = {id(layer._parameters[name]) for layer in layers for name in SCALES if layer._parameters.get(name) is not None}
    weights = [p for p in student.parameters() if p.is_floating_point() and id(p) not in kept]
    for p in (*weights, *(layer.weight_scale for layer in layers)):
        p.requires_grad_(True)
    return weights
