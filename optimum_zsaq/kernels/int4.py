"""Weight-only layers at 2 to 4 bits in bfloat16, by ATen's int4 kernel for CPUs: made for decoding, few rows at once."""

from functools import lru_cache

import torch
from torch import Tensor

from ..ops import unpack_codes
from .int8 import is_exact, many_float_rows
from .packed_tensors import PackedTensors
from .prepacked import prepacked
from .sparse import add_outliers


_GROUPS = (256, 128, 64, 32)  # what the kernel serves
_ROWS = 32  # output rows are padded to its tile
_FEW_ROWS = 8  # more rows take the dense weight, block by block: our choice


class Int4:
    """y = x @ ((codes - 8) * scale + shift).T + bias; scale and shift are rounded to bfloat16."""

    name = "int4"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """bfloat16 inputs that stay float, on CPU; weights whose codes fit 4 signed bits, in groups it knows."""
        weight = packed.spec.weight
        return (
            x.dtype == torch.bfloat16
            and packed.spec.inputs is None
            and packed.runtime == "fast"
            and x.device.type == "cpu"
            and weight.bits <= (4 if weight.symmetric or weight.minimum else 3)
            and (weight.granularity != "group" or weight.group_size in _GROUPS)
            and is_available()
            and is_exact()
        )

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) bfloat16."""
        if x.numel() > _FEW_ROWS * packed.columns:
            return many_float_rows(x, packed, bias)
        codes, size, scales = prepacked(packed, "int4", _pack)
        flat = x.detach().reshape(-1, packed.columns).contiguous()
        padding = len(scales) * size - packed.columns
        padded = torch.nn.functional.pad(flat, (0, padding)) if padding else flat
        y = torch._weight_int4pack_mm_for_cpu(padded, codes, size, scales)
        y = y if y.shape[1] == packed.rows else y[:, : packed.rows].contiguous()
        if packed.outlier_positions is not None:
            y = add_outliers(y.float(), flat.float(), packed).to(x.dtype)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], packed.rows)


@torch.no_grad()
def _pack(packed: PackedTensors) -> tuple[Tensor, int, Tensor]:
    """The kernel's layout of the codes, its group size, and scales with zeros (groups, padded O, 2) bfloat16."""
    spec, columns = packed.spec.weight, packed.columns
    size = spec.group_size or next((g for g in _GROUPS if columns % g == 0), _GROUPS[-1])
    groups = -(-columns // size)
    levels = unpack_codes(packed.codes, spec.bits, columns).to(torch.int32)
    middle = 2 ** (spec.bits - 1)
    if spec.symmetric or spec.minimum:
        levels -= middle
    else:
        zero = packed.shift.to(torch.int32).expand(packed.rows, -1)
        levels -= zero.repeat_interleave(size, dim=1)[:, :columns] if zero.shape[1] > 1 else zero
    padding = (0, groups * size - columns, 0, -packed.rows % _ROWS)
    codes = torch.nn.functional.pad(levels + 8, padding, value=8)
    scale = packed.scale.float().expand(packed.rows, groups)
    shift = packed.shift.float().expand(packed.rows, groups) + middle * scale if spec.minimum else torch.zeros_like(scale)
    scales = torch.nn.functional.pad(torch.stack([scale, shift], dim=-1), (0, 0, 0, 0, 0, -packed.rows % _ROWS))
    scales = scales.transpose(0, 1).to(torch.bfloat16).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1), size, scales


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether this PyTorch has the kernel for this CPU."""
    return _runs()


@lru_cache
def _runs() -> bool:
    try:
        codes = torch._convert_weight_to_int4pack_for_cpu(torch.full((32, 32), 9, dtype=torch.int32), 1)
        scales = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(1, 32, 2).contiguous()
        y = torch._weight_int4pack_mm_for_cpu(torch.ones(1, 32, dtype=torch.bfloat16), codes, 32, scales)
    except (RuntimeError, AttributeError):
        return False
    return bool((y == 32).all())
