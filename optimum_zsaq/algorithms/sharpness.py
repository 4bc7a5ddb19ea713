"""Sharpness-aware minimisation (SAM): climb to where the loss is worst near the weights, and take the gradient there.

    eps = rho * T^2 g / ||T g||,   T = 1 (SAM) or |w| + eta (ASAM; biases and norms keep 1)

with one norm over all perturbed tensors. SAM: https://huggingface.co/papers/2010.01412, eq. 2; ASAM:
https://huggingface.co/papers/2102.11600, eq. 4. Step sizes are never perturbed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kinds import kind_of
from ..layers import LowBitLayer
from ..layers.common import SCALES
from .sharded import whole


PERTURBED = ("quantized", "latent")


@dataclass(frozen=True)
class SharpnessSettings:
    """How far, and what, to climb.

    Args:
        rho (`float`): radius, the 2-norm of the perturbation; 0 switches it off. The papers' default for SAM is 0.05, for
            ASAM 0.5.
        adaptive (`bool`): ASAM.
        perturb (`str`): "quantized": eps is taken at and added to the quantized weights, the third case of SAQ
            (https://huggingface.co/papers/2111.12273), since a small change of a float weight leaves its code as it is.
            "latent": it is added to the float weights.
        eta (`float`): ASAM's constant.

    Raises:
        ValueError: a value out of range.
    """

    rho: float = 0.05
    adaptive: bool = False
    perturb: str = "quantized"
    eta: float = 0.01

    def __post_init__(self):
        if not (isinstance(self.rho, int | float) and 0.0 <= self.rho < math.inf):
            raise ValueError(f"rho={self.rho!r} is no radius; use a number of at least 0, such as 0.05 (0: no sharpness)")
        if self.perturb not in PERTURBED:
            raise ValueError(f"perturb={self.perturb!r} is unknown; use one of {PERTURBED}")
        if not (isinstance(self.eta, int | float) and self.eta >= 0.0):
            raise ValueError(f"eta={self.eta!r} is not allowed; use a number of at least 0, such as 0.01")


class Perturbation:
    """The perturbation of one model, made from its gradients; `remove` undoes it exactly.

    The gradients themselves become the perturbation of quantized weights, so the climb needs no memory beyond the second
    set of gradients and a copy of what is perturbed in place: biases and norms, or, with "latent", everything.
    """

    def __init__(self, model: nn.Module, settings: SharpnessSettings):
        self.settings = settings
        layers = [m for m in model.modules() if isinstance(m, LowBitLayer) and m.owner is m and type(m) is kind_of(m).fake]
        step_sizes = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name in SCALES}
        slots = {id(m.weight): m for m in layers} if settings.perturb == "quantized" else {}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in step_sizes]
        self._targets = [(p, slots.get(id(p))) for p in trained]
        self._saved: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def apply(self) -> float:
        """Climb along the gradients, which are used up (None afterwards); a tensor without one stays where it is.

        Returns:
            `float`: ||T g||. If it is zero or not finite, nothing is perturbed.
        """
        self.remove()
        targets = [(p, layer) for p, layer in self._targets if p.grad is not None]
        for p, layer in targets:
            self._stretch(p, layer)
        norm = math.hypot(*(whole(torch.linalg.vector_norm(p.grad.float())).item() for p, _ in targets))
        length = self.settings.rho / (norm + 1e-12) if math.isfinite(norm) and norm > 0.0 else 0.0
        for p, layer in targets:
            self._stretch(p, layer)
            direction, p.grad = p.grad.mul_(length), None
            if not length:
                continue
            if layer is not None:
                layer.perturbation = layer.oriented(whole(direction)).float()
            else:
                self._saved.append((p, p.detach().clone()))
                p.add_(direction)
        return norm

    def _stretch(self, p: nn.Parameter, layer: LowBitLayer | None) -> None:
        """Multiply a gradient by T in place."""
        if self.settings.adaptive and p.dim() > 1:
            size = p.abs() if layer is None else layer.oriented(layer.quantized_weight()).abs()
            p.grad.mul_(size.add_(self.settings.eta))

    @torch.no_grad()
    def remove(self) -> None:
        """Back to the weights as they were, bit for bit."""
        for _, layer in self._targets:
            if layer is not None:
                layer.perturbation = None
        for p, value in self._saved:
            p.copy_(value)
        self._saved = []
