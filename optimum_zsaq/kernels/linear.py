"""A packed layer: eager, differentiated, or traced."""

import torch
from torch import Tensor

from .compiled import compiled_linear
from .gradient import PackedLinearFunction
from .packed_tensors import PackedTensors
from .registry import choose_kernel


def packed_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None = None) -> Tensor:
    """A Linear layer on a packed weight.

    Shapes: x (..., I) float, bias (O,) -> (..., O) in x's dtype. Gradients flow to x and to the bias.

    Raises:
        ValueError: see `choose_kernel`.
    """
    if torch.compiler.is_compiling():
        return compiled_linear(x, packed, bias)
    kernel = choose_kernel(x, packed)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return PackedLinearFunction.apply(x, bias, packed, kernel)
    return kernel(x, packed, bias)
