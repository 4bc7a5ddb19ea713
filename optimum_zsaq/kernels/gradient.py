"""Gradients of a packed layer, whichever kernel computed it: to its input and its bias, through the dense weight."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.affine import compute_dtype
from .packed_tensors import PackedTensors


if TYPE_CHECKING:
    from .registry import Kernel


class PackedLinearFunction(torch.autograd.Function):
    """Keeps the codes, not the dense weight, for the backward pass.

    Rounding passes gradients straight through; a static range stops them where it clips, a dynamic one clips nothing.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, packed: PackedTensors, kernel: "Kernel") -> Tensor:  # noqa: D102
        ctx.packed = packed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if packed.input_scale is not None and packed.spec.inputs is not None else None)
        return kernel(x, packed, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        (x,) = ctx.saved_tensors
        grad_x = input_gradient(grad, ctx.packed, x) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


def input_gradient(grad: Tensor, packed: PackedTensors, x: Tensor | None) -> Tensor:
    """Shapes: grad (..., O); x (..., I), of a static range only -> (..., I)."""
    grad = grad @ packed.weight().to(grad.dtype)
    if x is None:
        return grad
    spec = packed.spec.inputs
    levels = x.detach().to(compute_dtype(x)) / packed.input_scale.view(()) + packed.input_zero_point.view(())
    return grad * ((levels >= spec.lowest) & (levels <= spec.highest))
