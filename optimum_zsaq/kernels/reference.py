"""The reference kernel: dequantize, then matmul. Serves every scheme, device and dtype; all others are compared with it."""

import torch
from torch import Tensor

from .packed_tensors import PackedTensors


class Reference:
    """y = Q_in(x) @ W_hat.T + bias, with W_hat dense for the time of the call."""

    name = "reference"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Everything."""
        return True

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        return torch.nn.functional.linear(packed.inputs(x), packed.weight().to(x.dtype), bias)
