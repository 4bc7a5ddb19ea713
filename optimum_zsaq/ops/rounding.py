"""Rounding that lets gradients through (the straight-through estimator, https://huggingface.co/papers/1308.3432)."""

import torch
from torch import Tensor


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient is that of the identity.

    Shapes: x (...) -> (...), same float dtype. The value equals `x.round()` exactly for every finite x.
    """
    return x + (x.round() - x).detach()


def replace_value(x: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `x`.

    Shapes: x (...), value (...) of x's shape and dtype -> (...).
    """
    return torch.where(torch.isfinite(x), value.detach() + (x - x.detach()), value.detach())
