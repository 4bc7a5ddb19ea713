"""The reference kernel: dequantize, then matmul. Serves every scheme, device and dtype; all others are compared with it."""

import torch
from torch import Tensor

from .packed_tensors import PackedTensors


class _DequantizedLinear(torch.autograd.Function):
    """Keeps the codes, not the dense weight, for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, packed: PackedTensors) -> Tensor:
        ctx.packed = packed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.nn.functional.linear(x, packed.weight().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad @ ctx.packed.weight().to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class Reference:
    """y = Q_in(x) @ W_hat.T + bias, with W_hat dense for the time of the call."""

    name = "reference"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Everything."""
        return True

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        return _DequantizedLinear.apply(packed.inputs(x), bias, packed)
