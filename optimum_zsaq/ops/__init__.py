"""Pure tensor maths: rounding, ranges, quantize/dequantize/fake-quantize, bit packing, outliers.

Functions of tensors and a `QuantSpec`; no modules, no state, inputs are never changed.
"""

from .affine import clipped, dequantize, fake_quantize, fake_quantize_tokens, quantize, scale_dtype, stored_scale, to_stored
from .outliers import (
    add_outliers,
    first_largest,
    gather_outlier_rows,
    largest_of_rows,
    largest_positions,
    sum_at_positions,
    union_of_positions,
)
from .packing import pack_codes, packed_columns, unpack_codes
from .ranges import NOT_FINITE, RANGES, find_input_range, find_ranges
from .rounding import round_ste


__all__ = [
    "NOT_FINITE",
    "RANGES",
    "add_outliers",
    "clipped",
    "dequantize",
    "fake_quantize",
    "fake_quantize_tokens",
    "find_input_range",
    "find_ranges",
    "first_largest",
    "gather_outlier_rows",
    "largest_of_rows",
    "largest_positions",
    "pack_codes",
    "packed_columns",
    "quantize",
    "round_ste",
    "scale_dtype",
    "stored_scale",
    "sum_at_positions",
    "to_stored",
    "union_of_positions",
    "unpack_codes",
]
