"""Cheaper sharpness (LookSAM): the climb is made every k-th step only, and what it changed is reused in between.

    climbed step:  g_v = g_s - (<g_s, g> / |g|^2) g        the part of SAM's gradient g_s that is orthogonal to g
    in between:    g + alpha * (|g| / |g_v|) * g_v

with inner products and norms over all tensors together. Source: https://huggingface.co/papers/2203.02714, algorithm 1,
which finds that g_v changes much more slowly than g. Its unofficial implementations have alpha 0.7 and k 5; alpha is 0.2
here, our choice, tried by hand (docs/methods/squat.md).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .sharded import whole


class ReusedClimb:
    """The reused direction of one model's weights.

    Args:
        weights (`Sequence[nn.Parameter]`): what is climbed with.
        every (`int`): k; 1 climbs at each step, and nothing is reused.
        weight (`float`): alpha.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, weights: Sequence[nn.Parameter], every: int = 1, weight: float = 0.2):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"climb_every={every!r} is no count of steps; use 1 (at each step) or more, such as 5")
        if not (isinstance(weight, int | float) and 0.0 <= weight < math.inf):
            raise ValueError(f"reuse_weight={weight!r} is not allowed; use a number of at least 0, such as 0.2")
        self._weights, self._every, self._weight = list(weights), every, weight
        self._done = 0
        self._direction: list[Tensor | None] = []
        self._before: list[Tensor | None] = []

    def due(self) -> bool:
        """Whether this step climbs, as one does that has nothing to reuse; asked once a step.

        If so, the gradients at the weights are noted.
        """
        climb = self._done % self._every == 0 or not self._direction
        self._done += 1
        if climb and self._every > 1:
            self._before = [None if p.grad is None else p.grad.clone() for p in self._weights]
        return climb

    @torch.no_grad()
    def keep(self) -> None:
        """After a climb: keep of the gradients at the perturbed weights what is orthogonal to those at the weights."""
        if self._every == 1:
            return
        before, self._before = self._before, []
        sharp = [p.grad for p in self._weights]
        share = _product(sharp, before) / max(_product(before, before), 1e-24)
        self._direction = [None if s is None or g is None else s - share * g for s, g in zip(sharp, before, strict=True)]

    @torch.no_grad()
    def reuse(self) -> None:
        """In between: add the kept direction to the gradients at the weights, in place."""
        gradients = [p.grad for p in self._weights]
        size = math.sqrt(_product(gradients, gradients))
        length = math.sqrt(_product(self._direction, self._direction))
        factor = self._weight * size / length if length > 0.0 and math.isfinite(size) else 0.0
        for gradient, direction in zip(gradients, self._direction, strict=True):
            if gradient is not None and direction is not None:
                gradient.add_(direction, alpha=factor)

    def restart(self) -> None:
        """Forget what was kept: the next step is a first one."""
        self._done, self._direction = 0, []

    def state_dict(self) -> dict[str, object]:
        """Steps asked about, and the direction."""
        return {"done": self._done, "direction": [d if d is None else whole(d) for d in self._direction]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is of other weights.
        """
        direction = state["direction"] if self._every > 1 else []
        if direction and len(direction) != len(self._weights):
            raise ValueError(
                f"the checkpoint's last climb was of {len(direction)} tensors, and {len(self._weights)} are trained now; "
                "freeze what was frozen then, or resume with climb_every=1"
            )
        self._done = state["done"]
        self._direction = [d if d is None else d.to(p.device) for d, p in zip(direction, self._weights, strict=False)]


def _product(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """One inner product over all tensors that are on both sides."""
    pairs = ((a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)
    return sum(whole((a.float() * b.float()).sum()).item() for a, b in pairs)
