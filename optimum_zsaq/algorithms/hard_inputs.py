"""Inputs that one stored range cannot hold: the layers that lose most by it read each token in a range of its own.

In a gated language model the product before the last layer of a block is such an input: a few tokens are a hundred times as
large as the others. Which layers are left out, and how many, is our choice (docs/methods/language_models.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.packed_tensors import quantize_inputs
from ..layers import LowBitLayer
from ..ops import fake_quantize_tokens
from ..surgery import low_bit_layers
from .calibration import float_inputs
from .energy import watch_inputs


_SHARE = 0.05  # of the multiply-adds of all layers with a stored range
_HARD = 0.01  # relative error of a layer's output from which its input counts as hard,
_BETTER = 0.25  # if a range a token leaves no more than this part of it
_BITS = 8  # coarser inputs are coarse everywhere


@torch.no_grad()
def free_hard_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]], share: float = _SHARE) -> list[str]:
    """Give the layers whose stored range costs most a range a token instead, in place.

    Args:
        model (`nn.Module`): fake-quantized or packed, calibrated, in evaluation mode.
        batches (`Iterable[Mapping[str, Any]]`): what it is called with; positions where a mask is 0 do not count.
        share (`float`): of the multiply-adds of the layers with a stored 8-bit range that may be freed.

    Returns:
        `list[str]`: the names of the layers, the hardest first.
    """
    layers = {n: m for n, m in low_bit_layers(model) if m.spec.inputs and m.spec.inputs.granularity == "tensor"}
    layers = {name: layer for name, layer in layers.items() if layer.spec.inputs.bits == _BITS}
    errors = input_errors(model, layers, batches)
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in layers.items()}
    hard = [n for n, (static, dynamic) in errors.items() if static >= _HARD and dynamic <= _BETTER * static]
    hard.sort(key=lambda name: (errors[name][1] - errors[name][0]) / sizes[name])
    left, freed = share * sum(sizes.values()), []
    for name in hard:
        if sizes[name] <= left:
            left -= sizes[name]
            layers[name].free_input_range()
            freed.append(name)
    return freed


def input_errors(
    model: nn.Module, layers: Mapping[str, LowBitLayer], batches: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """What quantizing its input does to each layer's output, with the stored range and with a range a token.

    The mean over positions of |W (Q(x) - x)|^2 / |W x|^2, the inputs before the layer being float.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    specs = {name: layer.spec.inputs for name, layer in layers.items()}

    def see(name: str, layer: LowBitLayer, x: Tensor) -> None:
        weight = layer.quantized_weight()
        static = quantize_inputs(x, specs[name], layer.input_scale, layer.input_zero_point)
        found = torch.stack([static, fake_quantize_tokens(x, replace(specs[name], granularity="token"))])
        size = (x @ weight.t()).square().sum(dim=-1)
        error = ((found - x) @ weight.t()).square().sum(dim=-1) / size.clamp(min=1e-12)
        sums[name] = sums.get(name, 0.0) + error[:, size > 0].sum(dim=-1)
        counts[name] = counts.get(name, 0) + int((size > 0).sum())

    with float_inputs(model):
        watch_inputs(model, layers, batches, see)
    return {name: tuple((total / max(1, counts[name])).tolist()) for name, total in sums.items()}
