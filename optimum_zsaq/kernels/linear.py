"""A packed layer: eager, differentiated, or traced."""

import torch
from torch import Tensor

from .compiled import compiled_linear
from .gradient import PackedLinearFunction
from .packed_tensors import PackedTensors
from .registry import choose_kernel


def packed_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None = None) -> Tensor:
    """A Linear layer on a packed weight.

    Shapes: x (..., I) float, bias (O,) -> (..., O) in x's dtype or, under autocast, in that of autocast, as `nn.Linear`.
    Gradients flow to x, to the bias and to the outliers' residuals.

    Raises:
        ValueError: see `choose_kernel`.
    """
    y = _linear(x, packed, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return y.to(torch.get_autocast_dtype(x.device.type))
    return y


def _linear(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return compiled_linear(x, packed, bias)
    kernel = choose_kernel(x, packed)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, packed.outlier_values)):
        return PackedLinearFunction.apply(x, bias, packed.outlier_values, packed, kernel)
    return kernel(x, packed, bias)
