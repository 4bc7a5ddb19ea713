"""Ways to choose outlier weights, to compare the package's (the largest magnitudes of a matrix) with others.

A criterion gives each weight a score; the highest scores are the outliers. Shapes: weight (O, I) -> scores (O, I).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimum_zsaq import QuantScheme, QuantSpec, pack, prepare
from optimum_zsaq.algorithms.outliers import chance, error
from optimum_zsaq.ops import fake_quantize, find_ranges, largest_positions
from optimum_zsaq.surgery import low_bit_layers


def by_error(weight: Tensor, spec: QuantSpec) -> Tensor:
    """What rounding does to a weight, in the range that is best without outliers."""
    return error(weight, fake_quantize(weight, *find_ranges(weight, spec), spec))


def by_row(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Magnitude against the standard deviation of the row."""
    return weight.abs() / weight.std(dim=1, keepdim=True).clamp(min=1e-8)


def by_chance(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Any weights: what the bytes alone are worth."""
    return chance(weight)


CRITERIA: dict[str, Callable[[Tensor, QuantSpec], Tensor]] = {"error": by_error, "row": by_row, "chance": by_chance}


@torch.no_grad()
def quantize_by(model: nn.Module, scheme: QuantScheme, criterion: str) -> nn.Module:
    """Quantize a float model with MSE ranges and outliers by a criterion, in place; otherwise as the package does it."""
    prepare(model, scheme, "mse")
    for _, layer in low_bit_layers(model):
        if layer.owner is not layer:
            continue
        spec, weight = layer.spec.weight, layer.master().detach().float()
        scores = CRITERIA[criterion](weight, spec)
        positions = largest_positions(scores, len(layer.weight_outlier_positions))
        others = weight.flatten().index_fill(0, positions.long(), 0.0).view_as(weight)
        scale, zero_point = find_ranges(others, spec)
        error = weight - fake_quantize(weight, scale, zero_point, spec)
        layer.weight_scale.copy_(scale)
        layer.weight_outlier_positions.copy_(positions)
        layer.weight_outlier_values.copy_(error.flatten()[positions.long()])
    return pack(model)
