"""Quantize, dequantize and fake-quantize a tensor: the only place where codes become values.

`fake_quantize(x)` equals `dequantize(quantize(x))` exactly; everything is computed in float32 (float64 stays float64).
Does not find scales (see `ranges.py`) or pack bits (see `packing.py`).
"""

import torch
from torch import Tensor

from ..spec import QuantSpec
from .rounding import replace_value, round_scaled


_LEAST_HALF = 2.0**-24  # the smallest positive float16
_THRESHOLD = 0.7  # TWN section 3.1: a weight is zero where |w| <= 0.7 * mean |w|


def expand_slices(per_slice: Tensor, columns: int, spec: QuantSpec) -> Tensor:
    """One value a slice -> one a weight, as far as broadcasting needs it.

    Shapes: per_slice (1, 1), (O, 1) or (O, ceil(I / g)) -> (), (O, 1) or (O, I).
    """
    if spec.granularity == "tensor":
        return per_slice.reshape(())
    if spec.granularity != "group":
        return per_slice
    return per_slice.repeat_interleave(spec.group_size, dim=-1)[..., :columns]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for every other float dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bounds(shift: Tensor | None, spec: QuantSpec) -> tuple[Tensor | float, Tensor | float]:
    """The least and the greatest multiple of the scale."""
    if shift is None or spec.minimum:
        return float(spec.lowest), float(spec.highest)
    return spec.lowest - shift, spec.highest - shift


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """A scale as a checkpoint stores it, with the gradient of the scale itself. Shapes: any float32 -> same."""
    return scale if spec.scale_bits == 32 else replace_value(scale, to_stored(scale.detach(), spec).to(scale.dtype))


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """Of a stored scale and minimum."""
    return torch.float16 if spec.scale_bits == 16 else torch.float32


def to_stored(values: Tensor, spec: QuantSpec) -> Tensor:
    """Scales or minima in the dtype that they are stored in; one too small for float16 becomes its smallest number.

    Shapes: any float dtype -> same, float32 or float16.

    Raises:
        ValueError: a value beyond float16.
    """
    found = values.to(scale_dtype(spec))
    if spec.scale_bits == 32:
        return found
    if found.isinf().any() and values.isfinite().all():
        raise ValueError(
            f"a weight's scale or minimum is {values.abs().max().item():g}, beyond the 65504 that float16 holds; "
            "check the float checkpoint, or use granularity='row'"
        )
    return torch.where(
        (found == 0) & (values != 0), torch.copysign(torch.tensor(_LEAST_HALF), values).to(found.dtype), found
    )


def ternary_levels(x: Tensor, spec: QuantSpec) -> Tensor:
    """TWN's codes {-1, 0, 1} of a weight; the threshold is 0.7 times the mean magnitude of each slice.

    Shapes: x (O, I) -> (O, I).
    """
    return torch.sign(x) * (x.abs() > _THRESHOLD * expand_slices(slice_means(x.abs(), spec), x.shape[-1], spec))


def slice_means(x: Tensor, spec: QuantSpec) -> Tensor:
    """Mean of each slice that shares a scale.

    Shapes: x (O, I) -> (1, 1), (O, 1) or (O, ceil(I / g)).
    """
    if spec.granularity == "tensor":
        return x.mean().view(1, 1)
    if spec.granularity == "row":
        return x.mean(dim=-1, keepdim=True)
    size = spec.group_size
    whole = x.shape[-1] // size * size
    means = [x[:, :whole].unflatten(-1, (-1, size)).mean(dim=-1)] if whole else []
    if whole < x.shape[-1]:
        means.append(x[:, whole:].mean(dim=-1, keepdim=True))
    return torch.cat(means, dim=-1)


def _operands(x: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec):
    dtype = compute_dtype(x)
    scale = expand_slices(scale, x.shape[-1], spec).to(dtype)
    if shift is not None:
        shift = expand_slices(shift, x.shape[-1], spec).to(dtype)
    return x.to(dtype), scale, shift


def quantize(x: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    """The codes of a tensor, as unsigned integers of `spec.bits` bits.

    Shapes: x (O, I) any float dtype, scale and shift (zero point, minimum or None) as in `QuantSpec` -> (O, I) uint8; a
    symmetric code c is stored as c + 2^(bits - 1).
    """
    x, scale, shift = _operands(x.detach(), scale.detach(), shift, spec)
    if spec.minimum:
        return ((x - shift) / scale).clamp_(*_bounds(shift, spec)).round_().to(torch.uint8)
    levels = ternary_levels(x, spec) if spec.ternary else (x / scale).clamp_(*_bounds(shift, spec)).round_()
    return (levels + (spec.offset if shift is None else shift)).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    """The values that codes stand for.

    Shapes: codes (O, I) uint8, scale and shift (zero point, minimum or None) as in `QuantSpec` -> (O, I) float32.
    """
    levels, columns = codes.to(torch.float32), codes.shape[-1]
    if spec.minimum:
        return levels.mul_(expand_slices(scale, columns, spec)).add_(expand_slices(shift, columns, spec))
    levels -= spec.offset if shift is None else expand_slices(shift, columns, spec).to(levels.dtype)
    return levels.mul_(expand_slices(scale, columns, spec))


def fake_quantize(x: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    """`dequantize(quantize(x))`, differentiable in x and in the scale.

    Shapes: x (O, I) or, for spec.granularity "tensor", (..., I), scale and shift as in `quantize` -> x's shape, float32
    (float64 for float64).

    The gradient of x is 1 inside the range and 0 outside (ternary: 1 everywhere); that of the scale is
    round(x / s) - x / s inside the range and the bound outside it (LSQ, https://huggingface.co/papers/1902.08153, eq. 3).
    """
    if spec.ternary:
        x, scale, _ = _operands(x, scale, shift, spec)
        return replace_value(x / scale, ternary_levels(x.detach(), spec)) * scale
    if spec.granularity == "group" and x.shape[-1] % spec.group_size == 0:  # a value a group is broadcast, not repeated
        dtype, shape = compute_dtype(x), x.shape
        x = x.to(dtype).unflatten(-1, (-1, spec.group_size))
        scale, shift = (t if t is None else t.to(dtype).unsqueeze(-1) for t in (scale, shift))
        return _round(x, scale, shift, spec).view(shape)
    return _round(*_operands(x, scale, shift, spec), spec)


def _round(x: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    return round_scaled(x, scale, *_bounds(shift, spec), shift if spec.minimum else None)


def clipped(x: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    """Which values lie outside the range of their codes; of ternary codes none, whose gradient is 1 everywhere.

    Shapes: as in `fake_quantize` -> x's, bool.
    """
    x, scale, shift = _operands(x.detach(), scale.detach(), shift, spec)
    if spec.ternary:
        return torch.zeros_like(x, dtype=torch.bool)
    low, high = _bounds(shift, spec)
    ratio = (x - shift if spec.minimum else x) / scale
    return (ratio < low) | (ratio > high)


def fake_quantize_tokens(x: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize each token on its own range, which is found from its values (dynamic, asymmetric).

    Shapes: x (..., I) any float dtype -> (..., I) float32 (float64 for float64). The range of a token is
    [min(x, 0), max(x, 0)], so zero stays zero; the gradient is that of the identity.
    """
    x = x.to(compute_dtype(x))
    value = x.detach()
    low = value.amin(dim=-1, keepdim=True).clamp(max=0.0)
    high = value.amax(dim=-1, keepdim=True).clamp(min=0.0)
    highest = 2**spec.bits - 1
    scale = (high - low) / highest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.round(-low / scale)
    codes = (value / scale).round_()
    torch.maximum(codes, -zero_point, out=codes)  # half the time of a clamp with bounds a token
    torch.minimum(codes, highest - zero_point, out=codes)
    return replace_value(x, codes.mul_(scale))
