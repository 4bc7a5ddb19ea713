"""8-bit integer matmuls on NVIDIA GPUs, by cuBLAS through `torch._int_mm`."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from .int8 import widened
from .packed_tensors import PackedTensors
from .prepacked import prepacked
from .sparse import add_outliers


logger = logging.getLogger(__name__)

_INNER = 8  # cuBLAS takes multiples of it for columns and output rows
_FEWEST_ROWS = 17  # and no fewer rows of the input
_TINY = torch.finfo(torch.float32).tiny


class CudaInt8:
    """y = scale_in * (q_in - zero_in) @ (codes - zero).T * scale + bias, with int32 sums; one byte a weight."""

    name = "cuda_int8"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Quantized inputs and weights with one scale a row or a matrix, on GPUs with int8 tensor cores."""
        return (
            x.device.type == "cuda"
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and packed.spec.inputs is not None
            and packed.spec.weight.granularity != "group"
            and not packed.spec.weight.minimum
            and packed.runtime == "fast"
            and is_available()
        )

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype. Never waits for the GPU."""
        flat = x.detach().reshape(-1, packed.columns)
        codes, scale, zero = _signed_inputs(flat, packed)
        weight, sums, offset = prepacked(packed, "cuda_int8", _pack)
        y = _padded_int_mm(codes, weight)[: len(flat), : packed.rows]
        y = y - zero * sums
        if offset is not None:
            y -= (codes.sum(dim=1, keepdim=True, dtype=torch.int32) - packed.columns * zero) * offset
        y = y.float().mul_(packed.scale.view(-1)).mul_(scale)
        if packed.outlier_positions is not None:
            y = add_outliers(y, (codes.to(torch.int32) - zero) * scale, packed)
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def _signed_inputs(x: Tensor, packed: PackedTensors) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs' codes less 128, their scale and their zero points less 128, as `PackedTensors.inputs` defines them.

    Shapes: x (M, I) -> (M, I) int8, (M, 1) or (1, 1) float32, (M, 1) or (1, 1) int32.
    """
    spec, x = packed.spec.inputs, x.float()
    if spec.granularity == "tensor":
        scale, zero_point = packed.input_scale.detach(), packed.input_zero_point.float()
    else:
        low = x.amin(dim=1, keepdim=True).clamp_(max=0.0)
        scale = (x.amax(dim=1, keepdim=True).clamp_(min=0.0) - low).div_(spec.highest).clamp_min_(_TINY)
        scale = torch.where(scale.isfinite(), scale, torch.nan)  # a token that is not finite gives NaN
        zero_point = (-low / scale).round_().nan_to_num_()
    codes = (x / scale).round_().add_(zero_point).clamp_(0, spec.highest).nan_to_num_().sub_(128)
    return codes.to(torch.int8), scale, zero_point.to(torch.int32) - 128


@torch.no_grad()
def _pack(packed: PackedTensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight (O', I') int8, padded; the sums of its rows (O,) int32; zero points (1 or O,) int32, None for zeros."""
    weight, offset = widened(packed, slice(None))
    padding = (0, -packed.columns % _INNER, 0, -packed.rows % _INNER)
    sums = weight.sum(dim=1, dtype=torch.int32)
    return torch.nn.functional.pad(weight, padding), sums, None if offset is None else offset[:, 0]


def _padded_int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """codes @ weight.T. Shapes: (M, I) int8, (O', I') int8 with I' >= I -> (max(M, 17), O') int32."""
    padding = (0, weight.shape[1] - codes.shape[1], 0, max(0, _FEWEST_ROWS - len(codes)))
    codes = torch.nn.functional.pad(codes, padding) if any(padding) else codes
    return torch._int_mm(codes, weight.t())


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether this machine's GPUs multiply 8-bit integers exactly; it is tried once."""
    return _multiplies_exactly()


@lru_cache
def _multiplies_exactly() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        for device in range(torch.cuda.device_count()):
            weight = torch.tensor([[127] * 64, [-128] * 64, [1] * 64] * 8, dtype=torch.int8, device=f"cuda:{device}")
            codes = torch.tensor([[127] * 64, [-128] * 64, [3, -4] * 32], dtype=torch.int8, device=weight.device)
            found = _padded_int_mm(codes, weight)[: len(codes)]
            if not torch.equal(found.double(), codes.double() @ weight.double().t()):
                return False
    except RuntimeError as error:
        logger.warning("8-bit matmuls are not available on this GPU, weights are dequantized instead: %s", error)
        return False
    return True
