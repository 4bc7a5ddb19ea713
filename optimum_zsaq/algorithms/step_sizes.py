"""Learned step sizes (LSQ, https://huggingface.co/papers/1902.08153): which a model has, their gradients' scale, drift.

A step size is the scale of a weight, or of an input whose range is static. It has its start value before this is used:
`prepare` and `calibrate` set it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..kinds import kind_of
from ..layers import LowBitLayer
from ..layers.common import STEP_SIZES
from ..ops import clipped
from ..surgery import low_bit_layers
from .sharded import whole


@dataclass(frozen=True)
class StepSize:
    """One tensor of step sizes.

    Args:
        name (`str`): of the Parameter, in the model.
        parameter (`nn.Parameter`): float32.
        gradient_scale (`float`): 1 / sqrt(N * Qp), LSQ, section 2.2; N is how many weights share a step size (LSQ: all of
            a layer's), of an input how many features the layer has, and Qp is the largest code.
    """

    name: str
    parameter: nn.Parameter
    gradient_scale: float


def trained_layers(model: nn.Module) -> dict[str, LowBitLayer]:
    """The fake-quantized layers with a weight of their own that is trained, by name."""
    return {name: layer for name, layer in _fake_layers(model).items() if layer.weight.requires_grad}


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter onto a model: its weights are frozen then, and the adapter is trained."""
    return bool(getattr(model, "peft_config", None))


def _fake_layers(model: nn.Module) -> dict[str, LowBitLayer]:
    return {name: m for name, m in low_bit_layers(model) if m.owner is m and type(m) is kind_of(m).fake}


class StepSizes:
    """The step sizes of the layers whose weights are trained: making this makes them trainable, and freezes all others.

    Args:
        model (`nn.Module`): fake-quantized, or low-bit with an adapter of PEFT, which has none.

    Raises:
        ValueError: no fake-quantized layer, or none that is trained; a static input range without a start value.
    """

    def __init__(self, model: nn.Module):
        every, name = _fake_layers(model), type(model).__name__
        self._layers = trained_layers(model)
        if not every and not has_adapter(model):
            raise ValueError(
                f"{name} has no fake-quantized layer to train; load it with quantization_config=SQuATConfig(...), or call "
                "prepare(model, scheme)"
            )
        if not self._layers and not has_adapter(model):
            raise ValueError(f"the weights of all {len(every)} fake-quantized layers of {name} are frozen; unfreeze some")
        for layer in every.values():
            for kind in STEP_SIZES:
                if (scale := getattr(layer, kind, None)) is not None:
                    scale.requires_grad_(layer.weight.requires_grad)
        self.all = [size for name, layer in self._layers.items() for size in _of_layer(name, layer)]
        for size in self.all:
            if whole(size.parameter).isnan().any():
                raise ValueError(f"{size.name} has no start value; call optimum_zsaq.calibrate(model, batches)")
        self.restart()

    def restart(self) -> None:
        """Measure drift from the values that they have now."""
        self.start = {size.name: size.parameter.detach().clone() for size in self.all}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return [size.parameter for size in self.all]

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Multiply each gradient there is by its `gradient_scale`, in place."""
        for size in self.all:
            if size.parameter.grad is not None:
                size.parameter.grad.mul_(size.gradient_scale)

    @torch.no_grad()
    def drift(self) -> float:
        """How far the step sizes are from where they started: the mean of |s - s0| / s0."""
        pairs = ((whole(size.parameter), whole(self.start[size.name])) for size in self.all)
        moved = [((now - start) / start).abs() for now, start in pairs]
        return sum(m.sum().item() for m in moved) / max(sum(m.numel() for m in moved), 1)

    @torch.no_grad()
    def clipped(self) -> float:
        """The share of all weights that lie outside the range of their codes."""
        outside, count = 0, 0
        for layer in self._layers.values():
            shift = None if layer.weight_shift is None else whole(layer.weight_shift)
            found = clipped(whole(layer.master()), whole(layer.weight_scale), shift, layer.spec.weight)
            outside, count = outside + found.sum().item(), count + found.numel()
        return outside / max(count, 1)


def _of_layer(name: str, layer: LowBitLayer) -> list[StepSize]:
    rows, columns = layer.shape
    weight, inputs = layer.weight_scale, layer.input_scale
    shared = rows * columns / weight.numel()
    found = [StepSize(f"{name}.weight_scale", weight, 1.0 / math.sqrt(shared * layer.spec.weight.highest))]
    if inputs is not None:
        scale = 1.0 / math.sqrt(columns * layer.spec.inputs.highest)
        found.append(StepSize(f"{name}.input_scale", inputs, scale))
    return found
