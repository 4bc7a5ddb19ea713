"""Layers on GPUs by one Triton kernel: reads the packed codes, dequantizes a tile in registers, multiplies it."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from ..spec import LayerSpec, QuantSpec
from .packed_tensors import PackedTensors
from .sparse import add_outliers


logger = logging.getLogger(__name__)


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
    """Whether Triton is installed, compiles for the GPUs here, and multiplies right; it is tried once."""
    return _multiplies_right()


@lru_cache
def _multiplies_right() -> bool:
    from torch.utils._triton import has_triton

    if not (torch.cuda.is_available() and has_triton()):
        return False
    from .triton_matmul import dequantized_matmul

    codes, spec = torch.arange(33 * 24).view(33, 24).remainder(256).to(torch.uint8), LayerSpec(QuantSpec(3))
    packed = PackedTensors(spec, 64, codes.cuda(), torch.full((33, 1), 0.5, device="cuda"))
    x = torch.arange(3 * 64, device="cuda").view(3, 64).remainder(7).float()
    try:
        return torch.equal(dequantized_matmul(x, packed, None), x @ packed.weight().t())  # small integers: exact
    except Exception as error:  # whatever a compiler does
        logger.warning("The Triton kernel does not run on this GPU, weights are dequantized by PyTorch instead: %s", error)
        return False
