"""Choosing the outlier weights that are tuned after quantization (PreQuant's second stage).

A criterion gives every weight of a matrix a score, and the highest scores are the outliers: of each matrix by itself, of
each of its rows, or of all matrices together. Which criterion PreQuant uses is unknown to us; these four are candidates,
and the choice among them is ours (docs/methods/prequant_adapters.md). Not here: the values at the outliers, which a PEFT
tuner trains (`integrations/peft.py`).

Source: PreQuant (https://huggingface.co/papers/2306.00014) tunes about 0.5 % of the weights; GOBO
(https://huggingface.co/papers/2005.03842) calls those outliers that are unlikely under a Gaussian of their matrix.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..kinds import kind_of
from ..layers import FakeQuantLinear, LowBitLayer, PackedLinear
from ..ops import first_largest, largest_of_rows, largest_positions


STORED = "stored"
SCOPES = ("matrix", "row", "model")


def magnitude(weight: Tensor, rounded: Tensor | None = None, seed: int = 0) -> Tensor:
    """The magnitude of a weight.

    Shapes: weight (O, I) float, rounded (O, I) float -> (O, I) float, not negative. All criteria have this signature and
    use what they need of it.

    Args:
        weight (`torch.Tensor`): the float weight, or on a packed layer the one that its codes and outliers stand for.
        rounded (`torch.Tensor`, *optional*): what its codes alone stand for; None where there is only one of the two.
        seed (`int`): of a random criterion.
    """
    return weight.abs()


def deviation(weight: Tensor, rounded: Tensor | None = None, seed: int = 0) -> Tensor:
    """The distance from the matrix's mean in its standard deviations; 0 everywhere if it is constant."""
    weight = weight.float()
    centred = weight - weight.mean()
    sigma = centred.square().mean().sqrt()
    return centred.abs() / torch.where(sigma > 0, sigma, torch.inf)


def error(weight: Tensor, rounded: Tensor | None = None, seed: int = 0) -> Tensor:
    """What rounding did to a weight, |W - Q(W)|.

    Raises:
        ValueError: `rounded` is None.
    """
    if rounded is None:
        raise ValueError(
            "criterion='error' needs |W - Q(W)|, and this layer has only one of the two: a packed layer has no float "
            "weight, a float layer no codes; use criterion='magnitude', or choose on the model with packed=False"
        )
    return (weight - rounded).abs()


def chance(weight: Tensor, rounded: Tensor | None = None, seed: int = 0) -> Tensor:
    """Any weights: the control."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)


Criterion = Callable[[Tensor, Tensor | None, int], Tensor]
CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "deviation": deviation, "error": error, "random": chance}


def check_choice(criterion: str, fraction: float, scope: str) -> None:
    """Raise a ValueError for an unknown criterion or scope, or a fraction outside (0, 1)."""
    if criterion not in (STORED, *CRITERIA):
        raise ValueError(f"criterion={criterion!r} is unknown; use one of {sorted((STORED, *CRITERIA))}")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; use one of {SCOPES}")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction={fraction!r} is not a share of the weights; use a number in (0, 1), such as 0.005")


@torch.no_grad()
def choose_outliers(
    layers: Mapping[str, nn.Module],
    criterion: str = "magnitude",
    fraction: float = 0.005,
    scope: str = "matrix",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The positions of the outliers of some Linear layers, in whichever state.

    Args:
        layers (`Mapping[str, nn.Module]`): packed, fake-quantized or float layers that compute a matmul, by name.
        criterion (`str`): a name in `CRITERIA`, or "stored": those that the layer stores already, whatever `fraction` is.
        fraction (`float`): share of the weights, in (0, 1).
        scope (`str`): "matrix": that share of each matrix, at least one weight of it. "row": as many weights of each row of
            a matrix, as far as they can be shared out. "model": that share of all of them together, so that a matrix may
            have none.
        seed (`int`): of criterion="random"; matrix number n draws with seed + n.

    Returns:
        `dict[str, torch.Tensor]`: name -> (k,) int32, positions in the flattened (O, I) weight, ascending, on the layer's
        device. Of equal scores the first in the matrix are taken, and of equal matrices the first layers'.

    Raises:
        ValueError: an unknown criterion or scope, a fraction outside (0, 1), a criterion that a layer cannot serve.
    """
    check_choice(criterion, fraction, scope)
    if criterion == STORED:
        return {name: _stored(name, layer) for name, layer in layers.items()}
    sizes = {name: rows * columns for name, (rows, columns) in ((n, weight_shape(layer)) for n, layer in layers.items())}
    if scope == "model":
        return _choose_together(layers, criterion, max(1, round(fraction * sum(sizes.values()))), seed)
    largest = largest_of_rows if scope == "row" else largest_positions
    scores = ((name, _scores(name, layer, criterion, seed + n)) for n, (name, layer) in enumerate(layers.items()))
    return {name: largest(found, max(1, round(fraction * sizes[name]))) for name, found in scores}


def _choose_together(layers: Mapping[str, nn.Module], criterion: str, count: int, seed: int) -> dict[str, Tensor]:
    """The `count` highest scores of all matrices; never more than twice as many candidates are kept."""
    values, owners, positions = torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    for number, (name, layer) in enumerate(layers.items()):
        scores = _scores(name, layer, criterion, seed + number)
        where = largest_positions(scores, count)
        found = scores.reshape(-1)[where.long()].float().cpu()
        values, positions = torch.cat([values, found]), torch.cat([positions, where.cpu()])
        owners = torch.cat([owners, torch.full_like(where, number, dtype=torch.int64, device="cpu")])
        keep = first_largest(values, count)
        values, owners, positions = values[keep], owners[keep], positions[keep]
    devices = {name: layer.weight.device for name, layer in layers.items()}
    return {name: positions[owners == number].to(device) for number, (name, device) in enumerate(devices.items())}


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(O, I) of a layer that computes a matmul, in whichever state."""
    return layer.shape if isinstance(layer, LowBitLayer) else tuple(kind_of(layer).fake.oriented(layer.weight).shape)


def _scores(name: str, layer: nn.Module, criterion: str, seed: int) -> Tensor:
    try:
        return CRITERIA[criterion](*_weights(layer, criterion == "error"), seed)
    except ValueError as fault:
        raise ValueError(f"{name}: {fault}") from fault


def _weights(layer: nn.Module, both: bool) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer as (O, I), and with `both` what its codes alone stand for, where it has both."""
    if isinstance(layer, PackedLinear):
        return layer.quantized_weight(), None
    if isinstance(layer, FakeQuantLinear):
        return layer.master().detach(), layer.rounded_weight() if both else None
    return kind_of(layer).fake.oriented(layer.weight).detach(), None


def _stored(name: str, layer: nn.Module) -> Tensor:
    positions = layer.owner.weight_outlier_positions if isinstance(layer, LowBitLayer) else None
    if positions is None:
        raise ValueError(
            f"{name} stores no outliers; use criterion='magnitude', or quantize with PreQuantConfig(outliers=0.005)"
        )
    return positions.detach().clone()
