"""How sharp the loss is around the weights of a trained low-bit model: how much it rises on held-out inputs within a ball.

    rise(eps) = L(Q(w) + eps) - L(Q(w)),   ||eps||_2 <= radius * ||Q(w)||_2

with one norm over the weights of all low-bit layers; biases, norms, step sizes and layers that stayed float are not moved.
The radius is relative because a model can be scaled without changing what it computes, which scales an absolute one. Three
directions: the gradient (SAM, https://huggingface.co/papers/2010.01412, eq. 2), projected gradient ascent
(https://huggingface.co/papers/1706.06083), and random ones.

The perturbation stands in the layers' `perturbation` slot and the gradient is that of the slot, so it counts a weight that
was clipped too, where the straight-through gradient of the master weight is 0. Where inputs are quantized, it is
straight-through.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import kind_of, reader_of
from ..layers import LowBitLayer
from ..layers.common import INTEGERS, SCALES
from ..ops import dequantize, quantize, unpack_codes
from ..spec import LayerSpec
from ..surgery import low_bit_layers, swap


Loss = Callable[[nn.Module, Any], tuple[Tensor, float]]


@dataclass(frozen=True)
class Sharpness:
    """What was measured of a model; a rise is a loss minus `loss`, in the loss's unit, and may be negative.

    Args:
        loss (`float`): at the weights.
        one_step (`float`): rise after one step up the gradient, as long as the radius.
        projected (`float`): the highest rise on the way of projected ascent, whose first point is that of `one_step`.
        random_mean, random_max (`float`): rise in random directions, as long as the radius.
        radius (`float`): relative, as it was given.
        norm (`float`): the radius times the 2-norm of all low-bit weights.
    """

    loss: float
    one_step: float
    projected: float
    random_mean: float
    random_max: float
    radius: float
    norm: float


def measure_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    radius: float = 0.01,
    steps: int = 5,
    draws: int = 5,
    seed: int = 0,
) -> Sharpness:
    """Measure the sharpness of a low-bit model; it is left as it was, bit for bit. The defaults are our choice.

    Args:
        model (`nn.Module`): fake-quantized, or packed, of which a fake-quantized copy is measured (see `relax`). It runs in
            evaluation mode and in its own dtype; a perturbation below the resolution of float16 or bfloat16 is lost there.
        batches (`Iterable`): held-out inputs, on the model's device; they are run one at a time, `steps + draws + 1` times.
        loss (`Callable`): (model, batch) -> (mean loss (), of how many it is the mean), such as
            `lambda model, batch: (model(**batch).loss, len(batch["labels"]))`. The loss of all is the weighted mean.
        radius (`float`): of the ball, relative to the norm of the low-bit weights.
        steps (`int`): of projected ascent, each as long as the radius; the first is `one_step`.
        draws (`int`): random directions, uniform on the sphere.
        seed (`int`): of the directions.

    Returns:
        `Sharpness`: loss and rises.

    Raises:
        ValueError: a value out of range; no batches; no low-bit layer; a loss that is not as described, not finite, has no
            gradient or one that is not finite; see `relax`.
    """
    _check(radius, steps, draws)
    batches = list(batches)
    if not batches:
        raise ValueError("there is nothing to measure on; give at least one batch")
    with torch.inference_mode(False), torch.no_grad(), measured_layers(model) as (model, layers):
        norm = radius * _norm([layer.quantized_weight() for layer in layers])
        surface = _Surface(model, layers, batches, loss, radius)
        at_weights, *ascent = _ascend(surface, norm, steps)
        random = [surface.loss(direction) for direction in _directions(layers, norm, draws, seed)]
    rises = [value - at_weights for value in random]
    one_step, projected = ascent[0] - at_weights, max(ascent) - at_weights
    return Sharpness(at_weights, one_step, projected, sum(rises) / draws, max(rises), radius, norm)


def _check(radius: float, steps: int, draws: int) -> None:
    if not (isinstance(radius, int | float) and 0.0 < radius < math.inf):
        raise ValueError(f"radius={radius!r} is no relative radius; use a number above 0, such as 0.01")
    for name, value in (("steps", steps), ("draws", draws)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is no count; use an integer of at least 1, such as 5")


@contextmanager
def measured_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[LowBitLayer]]]:
    """The model, a relaxed copy of a packed one, and its layers with a weight of their own.

    In evaluation mode, frozen and without perturbation for as long as the context lasts; then all is as it was.
    """
    if next(low_bit_layers(model), None) is None:
        raise ValueError(f"{type(model).__name__} has no low-bit layer to perturb; call prepare(model, scheme) first")
    if any(_is_packed(layer) for _, layer in low_bit_layers(model)):
        model = relax(copy.deepcopy(model))
    layers = [layer for _, layer in low_bit_layers(model) if layer.owner is layer]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    perturbations = [layer.perturbation for layer in layers]
    try:
        model.eval().requires_grad_(False)
        for layer in layers:
            layer.perturbation = None
        yield model, layers
    finally:
        for layer, perturbation in zip(layers, perturbations, strict=True):
            layer.perturbation = perturbation
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, training in modes:
            module.training = training


class _Surface:
    """The mean loss of all batches as a function of a perturbation: tensors (O, I) float32, one a layer."""

    def __init__(self, model: nn.Module, layers: Sequence[LowBitLayer], batches: Sequence[Any], loss: Loss, radius: float):
        self.layers = layers
        self._model, self._batches, self._loss, self._radius = model, batches, loss, radius

    def loss(self, perturbation: Sequence[Tensor]) -> float:
        """The loss there."""
        self._move(perturbation)
        return self._mean([self._run(batch) for batch in self._batches], perturbation)

    def climb(self, perturbation: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss there and a multiple of its gradient. Only one batch's graph is alive at a time."""
        slots = [tensor.detach().requires_grad_() for tensor in perturbation]
        self._move(slots)
        found, gradient = [], [torch.zeros_like(tensor) for tensor in perturbation]
        for batch in self._batches:
            with torch.enable_grad():
                value, count = self._run(batch)
            if not value.requires_grad:
                raise ValueError(
                    "the loss has no gradient in the low-bit weights; compute it from the model's outputs, and not under "
                    "torch.no_grad()"
                )
            for total, part in zip(gradient, torch.autograd.grad(value, slots, allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part, alpha=count)
            found.append((value.detach(), count))
        return self._mean(found, perturbation), gradient

    def _move(self, perturbation: Sequence[Tensor]) -> None:
        for layer, tensor in zip(self.layers, perturbation, strict=True):
            layer.perturbation = tensor

    def _run(self, batch: Any) -> tuple[Tensor, float]:
        found = self._loss(self._model, batch)
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[0].dim() == 0
        if not pair or not isinstance(found[1], int | float) or not 0.0 < found[1] < math.inf:
            raise ValueError(
                f"loss(model, batch) returned {found!r:.80}; return (mean loss (), of how many it is the mean), such as "
                "(model(**batch).loss, len(batch['labels']))"
            )
        return found

    def _mean(self, found: Sequence[tuple[Tensor, float]], perturbation: Sequence[Tensor]) -> float:
        mean = sum(value.item() * count for value, count in found) / sum(count for _, count in found)
        if not math.isfinite(mean):
            moved = any(tensor.any() for tensor in perturbation)
            place = f"at a perturbation; use a smaller radius (now {self._radius})" if moved else "at the weights"
            raise ValueError(f"the loss is {mean} {place}" + ("" if moved else "; check the model and the batches"))
        return mean


def _ascend(surface: _Surface, norm: float, steps: int) -> list[float]:
    """The loss at the weights, then after each step: a gradient of length `norm`, then back to the ball."""
    perturbation = [torch.zeros(layer.shape, dtype=torch.float32, device=layer.weight.device) for layer in surface.layers]
    losses = []
    for _ in range(steps):
        loss, gradient = surface.climb(perturbation)
        losses.append(loss)
        size = _norm(gradient)
        if not math.isfinite(size):
            raise ValueError(f"the gradient of the loss has the norm {size}; use a loss that is smooth there, or float32")
        for tensor, part in zip(perturbation, gradient, strict=True):
            tensor.add_(part, alpha=norm / size if size else 0.0)
        outside = _norm(perturbation) / norm if norm else 1.0
        for tensor in perturbation:
            tensor.div_(max(outside, 1.0))
    return [*losses, surface.loss(perturbation)]


def _directions(layers: Sequence[LowBitLayer], norm: float, draws: int, seed: int) -> Iterator[list[Tensor]]:
    """Random perturbations of length `norm`; drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        drawn = [
            torch.randn(layer.shape, generator=generator, dtype=torch.float32).to(layer.weight.device) for layer in layers
        ]
        size = _norm(drawn)
        yield [tensor.mul_(norm / size) for tensor in drawn]


def _norm(tensors: Iterable[Tensor]) -> float:
    """One 2-norm over all."""
    return math.hypot(*(torch.linalg.vector_norm(tensor).item() for tensor in tensors))


@torch.no_grad()
def relax(model: nn.Module) -> nn.Module:
    """Turn packed layers back into fake-quantized ones, in place: the way back from `pack`, but for what rounding took.

    The master weight is what the codes alone stand for; scales, zero points, outliers and static input ranges are kept. A
    value on the grid gets its own code again, so outputs are those of the packed model on the kernel "reference", exactly,
    and `pack` gives the same codes. A model without packed layers is left as it is.

    Args:
        model (`nn.Module`): a packed model; its weights become Parameters to train, in the dtype of the layers' markers.

    Returns:
        `nn.Module`: the same model.

    Raises:
        ValueError: a weight that does not keep its codes in the model's dtype, as very small ones in float16. The model is
            unchanged.
    """
    packed = {name: layer for name, layer in low_bit_layers(model) if _is_packed(layer)}
    masters = {id(layer): _master(name, layer) for name, layer in packed.items() if layer.owner is layer}

    def build(layer: LowBitLayer, spec: LayerSpec) -> nn.Module:
        return _fake(layer, spec, masters[id(layer.owner)])

    swap(model, dict.fromkeys(packed, build), {name: layer.spec for name, layer in packed.items()})
    reader_of(model).changed(model)
    return model


def _is_packed(layer: LowBitLayer) -> bool:
    return type(layer) is kind_of(layer).packed


def _master(name: str, layer: LowBitLayer) -> Tensor:
    """The values that the codes stand for, without outliers, in the marker's dtype. Shapes: -> (O, I)."""
    packed, spec = layer.packed(), layer.spec.weight
    codes = unpack_codes(packed.codes, spec.bits, packed.columns)
    values = dequantize(codes, packed.scale, packed.shift, spec).to(layer.weight.dtype)
    if not torch.equal(quantize(values, packed.scale, packed.shift, spec), codes):
        raise ValueError(f"{name}: the values of its codes do not fit {values.dtype}; call model.float() first")
    return values


def _fake(layer: LowBitLayer, spec: LayerSpec, master: Tensor) -> LowBitLayer:
    """The fake-quantized layer of a packed one; `swap` ties it."""
    kind = kind_of(layer)
    weight = nn.Parameter(kind.fake.oriented(master).contiguous())
    fake = kind.fake(weight, spec, layer.padding_idx) if kind.table else kind.fake(weight, layer.bias, spec)
    for name in (*SCALES, *INTEGERS):
        value = getattr(layer, name, None)
        if value is not None and name != "weight_codes":
            getattr(fake, name).copy_(value)
    return fake
