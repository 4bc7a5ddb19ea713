"""Rounding that lets gradients through (the straight-through estimator, https://huggingface.co/papers/1308.3432).

Each is one autograd function, so that training keeps and computes no more than its gradient needs.
"""

from typing import Any

import torch
from torch import Tensor


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient is that of the identity.

    Shapes: x (...) -> (...), same float dtype. The value equals `x.round()` exactly for every x.
    """
    return _Replace.apply(x, x.detach().round())


def replace_value(x: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `x`.

    Shapes: x (...), value (...) of x's shape and dtype -> (...).
    """
    return _Replace.apply(x, value.detach())


class _RoundScaled(torch.autograd.Function):
    """Keeps its operands alone, which a layer has anyway, and divides anew for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, minimum: Tensor | None
    ) -> Tensor:
        ctx.bounds = low, high
        ctx.save_for_backward(x, scale, minimum)
        found = _ratio(x, scale, minimum).clamp_(low, high).round_().mul_(scale)
        return found if minimum is None else found.add_(minimum)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, minimum = ctx.saved_tensors
        ratio = _ratio(x, scale, minimum)
        of_x = _inside(gradient, ratio, *ctx.bounds) if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            slope = ratio.clamp(*ctx.bounds).round_().sub_(_inside(ratio, ratio, *ctx.bounds))
            of_scale = slope.mul_(gradient).sum_to_size(scale.shape)
        return of_x, of_scale, None, None, None


def _ratio(x: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    return x / scale if minimum is None else (x - minimum).div_(scale)


def _inside(x: Tensor, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """x where low <= ratio <= high, else zero."""
    if isinstance(low, Tensor) or isinstance(high, Tensor) or torch.compiler.is_compiling():
        return x * ((ratio >= low) & (ratio <= high))
    infinity = torch.tensor(torch.inf, dtype=ratio.dtype)
    below, above = torch.tensor([low, high], dtype=ratio.dtype).nextafter(torch.stack([-infinity, infinity])).tolist()
    return torch.ops.aten.hardtanh_backward(x, ratio, below, above)  # one pass; it takes its bounds for outside


def round_scaled(
    x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, minimum: Tensor | None = None
) -> Tensor:
    """round(clamp((x - minimum) / scale, low, high)) * scale + minimum, differentiable in x and in the scale.

    Shapes: x (...), scale broadcastable to x, bounds numbers or broadcastable to x, minimum (0 for None) as scale -> (...),
    x's dtype.

    The gradient of x is 1 inside the bounds and 0 outside; that of the scale is round(x / s) - x / s inside and the bound
    outside (LSQ, https://huggingface.co/papers/1902.08153, eq. 3); the minimum has none.
    """
    return _RoundScaled.apply(x, scale, low, high, minimum)
