"""Layers on GPUs by one Triton kernel: reads the packed codes, dequantizes a tile in registers, multiplies it."""

from functools import lru_cache

import torch
from torch import Tensor

from .int8 import add_outliers
from .packed_tensors import PackedTensors


class CudaDequantize:
    """y = Q_in(x) @ W_hat.T + bias; keeps nothing beside the packed codes."""

    name = "cuda_dequantize"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Every scheme on GPUs that Triton serves, for float32, bfloat16 and float16."""
        return x.device.type == "cuda" and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and is_available()

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        from .triton_matmul import dequantized_matmul

        flat = packed.inputs(x.detach()).reshape(-1, packed.columns).contiguous()
        if packed.outlier_positions is None:
            y = dequantized_matmul(flat, packed, bias)
        else:
            y = add_outliers(dequantized_matmul(flat, packed, None).float(), flat.float(), packed)
            y = (y if bias is None else y + bias).to(x.dtype)
        return y.view(*x.shape[:-1], packed.rows)


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether Triton is installed and can compile for the GPUs here."""
    return _has_triton()


@lru_cache
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return torch.cuda.is_available() and has_triton()
