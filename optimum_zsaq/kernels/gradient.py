"""Gradients of a packed layer, whichever kernel computed it: to its input, its bias and its outliers' residuals.

Those to the input go through the dense weight; those to the residuals are computed at their positions alone.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.affine import compute_dtype
from .packed_tensors import PackedTensors
from .sparse import value_gradient


if TYPE_CHECKING:
    from .registry import Kernel


class PackedLinearFunction(torch.autograd.Function):
    """Keeps the codes, not the dense weight, for the backward pass.

    Rounding passes gradients straight through; a static range stops them where it clips, a dynamic one clips nothing.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx, x: Tensor, bias: Tensor | None, values: Tensor | None, packed: PackedTensors, kernel: "Kernel"
    ) -> Tensor:
        ctx.packed = replace(packed, outlier_values=None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        static = packed.input_scale is not None and packed.spec.inputs is not None
        ctx.save_for_backward(x if static or ctx.needs_input_grad[2] else None, values)
        return kernel(x, packed, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        x, values = ctx.saved_tensors
        packed = replace(ctx.packed, outlier_values=values)
        grad_x = input_gradient(grad, packed, x) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        grad_values = value_gradient(grad, packed.inputs(x), packed.outlier_positions) if ctx.needs_input_grad[2] else None
        return grad_x, grad_bias, grad_values, None, None


def input_gradient(grad: Tensor, packed: PackedTensors, x: Tensor | None) -> Tensor:
    """Shapes: grad (..., O); x (..., I), needed of a static range only -> (..., I)."""
    grad = grad @ packed.weight().to(grad.dtype)
    spec = packed.spec.inputs
    if spec is None or packed.input_scale is None:
        return grad
    levels = x.detach().to(compute_dtype(x)) / packed.input_scale.view(()) + packed.input_zero_point.view(())
    return grad * ((levels >= spec.lowest) & (levels <= spec.highest))
