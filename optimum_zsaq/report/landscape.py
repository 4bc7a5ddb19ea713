"""The loss around the weights of low-bit models on a plane, and a figure of it: flat or sharp, side by side.

    L(Q(w) + a d1 + b d2),   |d1| = |d2| = |Q(w)|

for a and b on a grid. d1 and d2 are random directions, each row as long as the row of the weights that it moves (filter
normalisation, https://huggingface.co/papers/1712.09913), so that models of other norms can be compared. Biases, norms and
layers that stayed float are not moved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .sharpness import Loss, measured_layers


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid.

    Args:
        positions (`list[float]`): of the grid on both axes, relative to the weights' norm; the middle one is 0.
        losses (`list[list[float]]`): at (a, b), rows by a.
    """

    positions: list[float]
    losses: list[list[float]]


def loss_landscape(
    model: nn.Module, batches: Iterable[Any], loss: Loss, reach: float = 0.05, points: int = 11, seed: int = 0
) -> Landscape:
    """Losses of a low-bit model on a plane around its weights; the model is left as it was.

    Args:
        model (`nn.Module`), batches (`Iterable`), loss (`Callable`): as in `measure_sharpness`; each batch is run
            `points`^2 times.
        reach (`float`): how far the grid goes, relative to the norm of the weights. Our choice.
        points (`int`): on each axis, odd.
        seed (`int`): of the directions; models of one architecture get the same.

    Raises:
        ValueError: a value out of range; no batches; no low-bit layer.
    """
    if not (isinstance(reach, int | float) and 0.0 < reach < float("inf")):
        raise ValueError(f"reach={reach!r} is not allowed; use a number above 0, such as 0.05")
    if not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise ValueError(f"points={points!r} has no middle and two sides; use an odd number of at least 3, such as 11")
    batches = list(batches)
    if not batches:
        raise ValueError("there is nothing to measure on; give at least one batch")
    half = points // 2
    positions = [reach * (i - half) / half for i in range(points)]
    with torch.inference_mode(False), torch.no_grad(), measured_layers(model) as (model, layers):
        generator = torch.Generator().manual_seed(seed)
        first, second = ([_direction(layer.quantized_weight(), generator) for layer in layers] for _ in range(2))
        found = []
        for a in positions:
            found.append([])
            for b in positions:
                for layer, one, other in zip(layers, first, second, strict=True):
                    layer.perturbation = a * one + b * other
                found[-1].append(_mean(model, batches, loss))
    return Landscape(positions, found)


def _direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random, each row as long as the weight's. Shapes: (O, I) -> (O, I)."""
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
    return drawn * (weight.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _mean(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    found = [loss(model, batch) for batch in batches]
    return sum(value.item() * count for value, count in found) / sum(count for _, count in found)


def draw_landscapes(landscapes: Mapping[str, Landscape], path: Path) -> None:
    """Write a PNG of landscapes side by side, by title, in one range of colours. Needs matplotlib (extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = [value for landscape in landscapes.values() for row in landscape.losses for value in row]
    figure, axes = plt.subplots(1, len(landscapes), figsize=(4.5 * len(landscapes), 4), layout="constrained", squeeze=False)
    for axis, (title, landscape) in zip(axes[0], landscapes.items(), strict=True):
        drawn = axis.contourf(
            landscape.positions, landscape.positions, landscape.losses, levels=20, vmin=min(values), vmax=max(values)
        )
        axis.plot(0, 0, "+", color="white", markersize=10)
        axis.set_title(f"{title}: {landscape.losses[len(landscape.losses) // 2][len(landscape.losses) // 2]:.3f} at +")
        axis.set_xlabel("direction 2, relative to the weights' norm")
        axis.set_ylabel("direction 1")
        figure.colorbar(drawn, ax=axis, label="loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
