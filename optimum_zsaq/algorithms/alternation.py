"""Sharpness- and quantization-aware training (SQuAT): two objectives, of the weights and of their step sizes, in turn.

    sharpness (s fixed):  min over w  max over |eps| <= rho of  L(Q(w; s) + eps)     SAM, `sharpness.py`
    step size (w fixed):  min over s  L(Q(w; s))                                     LSQ, `step_sizes.py`

The paper (https://huggingface.co/papers/2210.07171) alternates them; its formulas are unknown to us, and how they alternate
here is our choice. "w" are all trained parameters but the step sizes: biases, norms and heads too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .looksam import ReusedClimb
from .sharded import whole
from .sharpness import Perturbation, SharpnessSettings
from .step_sizes import StepSizes


ALTERNATIONS = ("batch", "step", "epoch", "none")


@dataclass(frozen=True)
class AlternationSettings:
    """How the two objectives share the steps.

    Args:
        alternate (`str`): "batch": a step on one batch is of the weights (two gradient evaluations), the next of the step
            sizes (one). "step": every step is of both, the weights by the gradient at the perturbed weights and the step
            sizes by that at the weights (two). "epoch": as "batch", from epoch to epoch. "none": SAM alone, every
            parameter by the gradient at the perturbed weights (two).
        sharpness (`SharpnessSettings`): rho = 0 is plain LSQ: every step is of both, at the weights (one evaluation);
            `alternate` has no meaning then.
        climb_every (`int`): of the steps that are sharpness-aware, which climb; the others reuse what the last climb
            changed and take one evaluation, see `looksam.py`. 1: all.
        reuse_weight (`float`): how much of it.

    Raises:
        ValueError: a value out of range.
    """

    alternate: str = "step"
    sharpness: SharpnessSettings = field(default_factory=SharpnessSettings)
    climb_every: int = 1
    reuse_weight: float = 0.2

    def __post_init__(self):
        ReusedClimb([], self.climb_every, self.reuse_weight)
        if self.alternate not in ALTERNATIONS:
            raise ValueError(f"alternate={self.alternate!r} is unknown; use one of {ALTERNATIONS}")


class Alternation:
    """Makes of the gradients at the weights those that an optimizer shall follow.

    Args:
        model (`nn.Module`): fake-quantized, with start values for all its ranges; step sizes become trainable
            where weights are. Or low-bit with an adapter of PEFT: every step is of the adapter then.
        settings (`AlternationSettings`): how.

    Raises:
        ValueError: see `StepSizes`.
    """

    def __init__(self, model: nn.Module, settings: AlternationSettings):
        self.settings = settings
        self.step_sizes = StepSizes(model)
        scales = {id(p) for p in self.step_sizes.parameters}
        self.weights = [p for p in model.parameters() if p.requires_grad and id(p) not in scales]
        self.perturbation = Perturbation(model, settings.sharpness)
        self.reused = ReusedClimb(self.weights, settings.climb_every, settings.reuse_weight)

    def objective(self, step: int, epoch: int) -> str:
        """What a step is of: "weights", "step sizes", or "both"."""
        turn = {"batch": step, "epoch": epoch}.get(self.settings.alternate)
        if turn is None or not self.settings.sharpness.rho or not self.step_sizes.all:
            return "both"
        return "step sizes" if turn % 2 else "weights"

    def finish(self, step: int, epoch: int, replay: Callable[[], None]) -> None:
        """Complete a step whose gradients at the weights, of all its inputs, are there.

        Args:
            step (`int`): how many steps were made before.
            epoch (`int`): how many epochs were completed before.
            replay (`Callable`): computes the gradients of the same inputs, with the same dropout, anew. It is called at the
                perturbed weights, where the step needs it.
        """
        objective, scales = self.objective(step, epoch), self.step_sizes.parameters
        if objective == "step sizes":
            _drop(self.weights)
        elif self.settings.sharpness.rho:
            self._sharpen(replay)
            if objective == "weights":
                _drop(scales)
        self.step_sizes.scale_gradients()

    def _sharpen(self, replay: Callable[[], None]) -> None:
        if not self.reused.due():
            self.reused.reuse()
            return
        scales = self.step_sizes.parameters
        at_weights = _drop(scales)
        self.perturbation.apply()
        try:
            replay()
        finally:
            self.perturbation.remove()
        self.reused.keep()
        if self.settings.alternate == "step":
            for p, gradient in zip(scales, at_weights, strict=True):
                p.grad = gradient

    def restart(self) -> None:
        """Be as new: another training begins, from the step sizes as they are."""
        self.step_sizes.restart()
        self.reused.restart()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on beside the model's own state: where step sizes started, and what a climb left."""
        start = {name: whole(value) for name, value in self.step_sizes.start.items()}
        return {"start": start, "reused": self.reused.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, value in self.step_sizes.start.items():
            value.copy_(state["start"][name])
        self.reused.load_state_dict(state["reused"])


def _drop(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Take the gradients away: an optimizer leaves a parameter without one, and its momentum, as they are."""
    dropped = []
    for p in parameters:
        dropped.append(p.grad)
        p.grad = None
    return dropped
