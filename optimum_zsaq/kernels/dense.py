"""Weight-only layers on many rows: a block of rows of the weight is dequantized at a time, then multiplied."""

import torch
from torch import Tensor

from ..ops import dequantize, unpack_codes
from .packed_tensors import PackedTensors


_BLOCK = 2**20  # weights that are dense at a time


def dense_products(x: Tensor, packed: PackedTensors) -> Tensor:
    """x @ weight.T without outliers. Shapes: x (M, I) -> (M, O), in x's dtype."""
    spec, out = packed.spec.weight, x.new_empty(len(x), packed.rows)
    step = max(1, _BLOCK // packed.columns)
    for start in range(0, packed.rows, step):
        rows = slice(start, start + step)
        codes = unpack_codes(packed.codes[rows], spec.bits, packed.columns)
        weight = dequantize(codes, of_rows(packed.scale, rows), of_rows(packed.shift, rows), spec)
        out[:, rows] = torch.nn.functional.linear(x, weight.to(x.dtype))
    return out


def of_rows(values: Tensor | None, rows: slice) -> Tensor | None:
    """Scales or shifts of some rows, or that of all. Shapes: (1, G) or (O, G) -> (1, G) or (r, G)."""
    return values if values is None or len(values) == 1 else values[rows]
