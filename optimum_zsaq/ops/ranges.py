"""Finding scales, zero points and minima: one function a method, in the registry `RANGES`.

A method gets slices that share a scale, as rows (R, n) float32, and returns scale (R,) and zero point or minimum (R,), or
None where codes are symmetric.
"energy" gets a weight of each value's squared error beside them, in the same shape.
A new method is one function here, one line in `RANGES` and one row in the tests.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..spec import QuantSpec
from .affine import ternary_levels, to_stored
from .search import CHUNK, Range, from_bounds, positive, search


NOT_FINITE = "a weight is NaN or infinite and has no range; check the float checkpoint"
_LEAST_ENERGY = 1e-4  # energy: of a channel, as a share of the mean


def minmax(slices: Tensor, spec: QuantSpec) -> Range:
    """The smallest range that clips nothing."""
    return from_bounds(slices.amin(dim=1), slices.amax(dim=1), spec)


def lsq(slices: Tensor, spec: QuantSpec) -> Range:
    """LSQ's start value 2 * mean|w| / sqrt(Qp) (https://huggingface.co/papers/1902.08153, section 2.1).

    Asymmetric: twice that, with the minimum at code 0 where the range allows it (BinaryBERT's code does so).
    """
    factor = 2.0 if spec.symmetric else 4.0
    scale = positive(factor * slices.abs().mean(dim=1) / spec.highest**0.5)
    if spec.symmetric:
        return scale, None
    low = slices.amin(dim=1)
    return scale, low if spec.minimum else torch.clamp(torch.round(-low / scale), spec.lowest, spec.highest)


def ternary(slices: Tensor, spec: QuantSpec) -> Range:
    """TWN's scale: the mean magnitude of the weights above the threshold (section 3.1)."""
    kept = ternary_levels(slices, QuantSpec(2, "row", ternary=True)).abs()
    return positive((slices.abs() * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1.0)), None


def mse(slices: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> Range:
    """The range of least squared error, see `search.py`. `weights` (R, n) count the errors."""
    return search(slices, spec, weights)


def signed(slices: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> Range:
    """As "mse"; a symmetric slice that is better off with its one code more on the positive side gets a negative scale.

    Source: AutoRound's symmetric codes (https://github.com/intel/auto-round), our search.
    """
    return search(slices, spec, weights, both_signs=True)


def energy(slices: Tensor, spec: QuantSpec, weights: Tensor) -> Range:
    """As "signed", and the error of a weight counts by the energy of the input that it is multiplied with.

    An input channel without energy keeps 1e-4 of the mean, so that a slice of such channels has a range too.

    Source: the diagonal of the Hessian of a layer's squared output error, as in GPTQ
    (https://huggingface.co/papers/2210.17323, section 3); our search, measured in docs/methods/language_models.md.
    """
    return signed(slices, spec, weights)


RANGES: dict[str, Callable[..., Range]] = {
    "minmax": minmax,
    "mse": mse,
    "signed": signed,
    "energy": energy,
    "lsq": lsq,
    "ternary": ternary,
}


def find_ranges(weight: Tensor, spec: QuantSpec, ranges: str = "mse", energies: Tensor | None = None) -> Range:
    """Scale, and zero point or minimum, of every slice of a weight, as they can be stored.

    Shapes: weight (O, I) any float dtype -> scale float32 and zero point uint8, minimum float32 or float16, or None if
    symmetric; shaped as in `QuantSpec.scale_shape`.

    Args:
        weight (`torch.Tensor`): the float weight.
        spec (`QuantSpec`): what its codes shall mean.
        ranges (`str`): a name in `RANGES`.
        energies (`torch.Tensor`, *optional*): (I,) float32, the mean square of each input channel; exactly with "energy".

    Raises:
        ValueError: an unknown method; "ternary" with a spec that is not ternary; NaN or infinite weights; a scale that
            float16 is to hold and cannot; energies that are missing, not asked for, negative, not finite or of another
            length.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges={ranges!r} is unknown; use one of {sorted(RANGES)}")
    if (ranges == "ternary") != spec.ternary:
        raise ValueError(f"ranges={ranges!r} does not go with ternary={spec.ternary}; use both or neither")
    weight = weight.detach()
    parts = list(_equal_slices(weight, spec))
    counted = [None] * len(parts)
    if ranges == "energy" or energies is not None:
        counts = _error_weights(energies, weight.shape[1], ranges).to(weight.device)
        counted = list(_equal_slices(counts.expand_as(weight), spec))
    parts = [_flat_range(part, spec, RANGES[ranges], w) for part, w in zip(parts, counted, strict=True)]
    shape = spec.scale_shape(*weight.shape)
    scale = torch.cat([p[0] for p in parts], dim=-1).reshape(shape)
    scale = to_stored(scale, spec).float()
    if spec.symmetric:
        return scale, None
    shift = torch.cat([p[1] for p in parts], dim=-1).reshape(shape)
    return scale, to_stored(shift, spec) if spec.minimum else shift.to(torch.uint8)


def _error_weights(energies: Tensor | None, columns: int, ranges: str) -> Tensor:
    """What the squared error of each column counts: (I,) float32, 1 on average."""
    if energies is None or ranges != "energy":
        raise ValueError(
            f"ranges={ranges!r} and energies={'None' if energies is None else 'given'} do not go together; "
            "use ranges='energy' with the mean square of each input channel, or neither"
        )
    if energies.shape != (columns,):
        raise ValueError(
            f"energies have shape {tuple(energies.shape)} and the weight has {columns} columns; give one a column"
        )
    energies = energies.detach().float()
    if not torch.isfinite(energies).all() or (energies < 0).any():
        raise ValueError("an input's energy is negative, NaN or infinite; check the float model and what it was run on")
    mean = energies.mean()
    return energies / mean + _LEAST_ENERGY if mean > 0 else torch.ones_like(energies)


def _equal_slices(weight: Tensor, spec: QuantSpec) -> Iterator[Tensor]:
    """The weight as (O, G, n) slices of equal length; a short last group comes on its own."""
    if spec.granularity == "tensor":
        yield weight.reshape(1, 1, -1)
    elif spec.granularity == "row":
        yield weight.unsqueeze(1)
    else:
        whole = weight.shape[1] // spec.group_size * spec.group_size
        if whole:
            yield weight[:, :whole].unflatten(-1, (-1, spec.group_size))
        if whole < weight.shape[1]:
            yield weight[:, whole:].unsqueeze(1)


def _flat_range(slices: Tensor, spec: QuantSpec, method: Callable[..., Range], weights: Tensor | None) -> Range:
    """Apply a method block of rows by block of rows: (O, G, n), and what errors count in the same shape -> (O, G)."""
    rows, groups, length = slices.shape
    step = max(1, CHUNK // (groups * length))
    found = []
    for start in range(0, rows, step):
        block = slices[start : start + step].float().reshape(-1, length)
        if not torch.isfinite(block).all():
            raise ValueError(NOT_FINITE)
        counted = () if weights is None else (weights[start : start + step].reshape(-1, length),)
        found.append(method(block, spec, *counted))
    scale = torch.cat([f[0] for f in found]).view(rows, groups)
    return scale, None if found[0][1] is None else torch.cat([f[1] for f in found]).view(rows, groups)


def find_input_range(values: Tensor, low: float, high: float, spec: QuantSpec, ranges: str = "mse") -> Range:
    """Scale and zero point of a layer's input, from what was seen of it.

    Shapes: values (n,) float32, a sample -> scale (1, 1) float32, zero point (1, 1) uint8. "minmax" takes the extremes
    `low` and `high` of everything seen; every other method searches the range of least squared error on the sample.
    """
    if ranges == "minmax":
        found = from_bounds(values.new_tensor([low]), values.new_tensor([high]), spec)
    else:
        found = mse(torch.cat([values, values.new_tensor([low, high])]).view(1, -1), spec)
    scale, zero_point = found
    return scale.view(1, 1), None if zero_point is None else zero_point.view(1, 1).to(torch.uint8)
