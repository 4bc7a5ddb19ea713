"""8-bit integer matmuls on CPU, by the libraries inside PyTorch (fbgemm, oneDNN).

`runtime="fast"` keeps every weight once as int8 in the layout of one of them, one byte a weight whatever its width.
`runtime="small"` keeps nothing and widens the packed codes a block of rows at a time. The arithmetic is exact in both up to
the float32 multiplication by the scales, so the two differ by float32 roundings only.
"""

import logging
import math
import warnings
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from ..ops import unpack_codes
from .dense import dense_products, of_rows
from .integer_inputs import FEW_ROWS, IntegerInputs, integer_inputs
from .packed_tensors import PackedTensors
from .prepacked import all_prepacked, prepacked
from .sparse import add_outliers


logger = logging.getLogger(__name__)

_BLOCK = 2**19  # weights that are widened at a time: they fit the second-level cache
_SMALLEST_GROUP = 16  # smaller groups are faster dequantized


class Int8:
    """y = scale_in * (q_in - zero_in) @ (codes - zero).T * scale + bias, with integer products and sums."""

    name = "int8"

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Every scheme but very small groups, on CPUs with exact 8-bit arithmetic, for float32, bfloat16 and float16."""
        group = packed.spec.weight.group_size
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and (group is None or group >= _SMALLEST_GROUP)
            and is_exact()
        )

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], packed.rows)
        rows = x.numel() // packed.columns
        if packed.spec.inputs is None and rows > FEW_ROWS:
            return many_float_rows(x, packed, bias)
        out = _multiply(integer_inputs(x, packed), packed, bias, x.dtype)
        return out if out.dim() == x.dim() else out.view(*x.shape[:-1], packed.rows)


def many_float_rows(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    """A weight-only layer on more rows than digits pay for: the dense weight, block by block."""
    flat = x.detach().reshape(-1, packed.columns)
    y = dense_products(flat if x.dtype == torch.bfloat16 else flat.float(), packed)
    if packed.outlier_positions is not None:
        y = add_outliers(y.float(), flat.float(), packed)
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def integer_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    """A layer on an input that is quantized already.

    Shapes: codes (M, I) uint8; scale and zero_point (1, 1) or (M, 1) float32; bias (O,) or None -> (M, O) float32.
    """
    if not len(codes):
        return scale.new_empty(0, packed.rows)
    point = int(zero_point[0, 0].nan_to_num().item())  # NaN of a token that is not finite: its scale says so too
    if scale.numel() == 1:
        inputs = IntegerInputs(codes, scale.item(), point, _codes=codes)
    else:
        inputs = IntegerInputs(codes, scale, point, point - zero_point, _codes=codes)
    return _multiply(inputs, packed, bias, torch.float32)


def _multiply(inputs: IntegerInputs, packed: PackedTensors, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if packed.runtime == "small":
        return _finish(inputs, _blockwise_products(inputs, packed), packed, bias, dtype)
    weight = _integer_weight(packed, inputs.rows * inputs.digits)
    out = weight.fused(inputs)
    if out is None:
        return _finish(inputs, weight.products(inputs), packed, bias, dtype)
    if packed.outlier_positions is not None:
        low, high = -inputs.point * inputs.scale, (inputs.highest - inputs.point) * inputs.scale
        add_outliers(out.view(-1, packed.rows), inputs.rounded.clamp(low, high).view(-1, packed.columns), packed)
    if bias is not None:
        out.add_(bias)
    return out if dtype == torch.float32 else out.to(dtype)


def _finish(inputs: IntegerInputs, y: Tensor, packed: PackedTensors, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Products (M, O) float32 -> outputs in `dtype`: the inputs' scale, outliers, bias."""
    if packed.outlier_positions is not None:
        y = add_outliers(y.mul_(inputs.scale), inputs.dense(), packed)
        y = y if bias is None else y.add_(bias)
    elif bias is None:
        y = y.mul_(inputs.scale)
    elif isinstance(inputs.scale, float):
        y = torch.add(bias.float(), y, alpha=inputs.scale, out=y)
    else:
        y = torch.addcmul(bias.float(), y, inputs.scale, out=y)
    return y if dtype == torch.float32 else y.to(dtype)


# Integer weights -----------------------------------------------------------------------------------------------------


def _segments(packed: PackedTensors) -> list[tuple[int, int]]:
    """The runs of columns that share a scale in every row."""
    size = packed.spec.weight.group_size or packed.columns
    return [(start, min(start + size, packed.columns)) for start in range(0, packed.columns, size)]


def _per_row(values: Tensor, rows: int) -> Tensor:
    """Scales or zero points (1, 1), (O, 1) or (O, G) as (O, G)."""
    return values.expand(rows, -1)


class _IntegerWeight(ABC):
    """A weight as int8, in a library's layout: weight[o, i] = scale[o, g] * w[o, i] - zero[o, g].

    Only 8-bit codes with a zero point and codes with a minimum need `zero`; the others are int8 after their zero point was
    subtracted.
    """

    @torch.no_grad()
    def __init__(self, packed: PackedTensors):
        spec = packed.spec.weight
        self.segments = _segments(packed)
        widths = torch.tensor([stop - start for start, stop in self.segments])
        scale, zero = _per_row(packed.scale.float(), packed.rows), None
        if packed.shift is not None:
            zero = _per_row(packed.shift, packed.rows)
        weight = unpack_codes(packed.codes, spec.bits, packed.columns)
        self.zero = None
        if spec.minimum:
            middle = 128 if spec.bits == 8 else 0
            weight = weight - middle
            self.zero = -zero.float() - middle * scale
        elif zero is not None and spec.bits < 8:
            weight = weight - zero.repeat_interleave(widths, dim=1, output_size=packed.columns)
        else:
            weight = weight - 2 ** (spec.bits - 1)
        if zero is not None and spec.bits == 8 and not spec.minimum:
            self.zero = (zero.float() - 128.0) * scale
        weight = weight.view(torch.int8)  # what wrapped around in uint8 is right in int8
        sums = torch.stack([weight[:, a:b].sum(dim=1, dtype=torch.int32) for a, b in self.segments], dim=1)
        self.sums = sums * scale if self.zero is None else sums * scale - self.zero * widths
        parts = (weight[:, a:b].contiguous() for a, b in self.segments)
        self.parts = [self.pack(part, scale[:, group].contiguous()) for group, part in enumerate(parts)]

    @abstractmethod
    def pack(self, weight: Tensor, scale: Tensor) -> tuple:
        """What `multiply` needs of the columns of one group. Shapes: weight (O, g) int8, scale (O,) float32."""

    @abstractmethod
    def multiply(self, part: tuple, inputs: IntegerInputs, columns: slice | None) -> Tensor:
        """levels[:, columns] @ w.T * scale; None: all columns. Shapes: -> (digits * M, O) float32."""

    def products(self, inputs: IntegerInputs) -> Tensor:
        """The input's integers times the weight. Shapes: -> (M, O) float32."""
        total = None
        for group, (part, (start, stop)) in enumerate(zip(self.parts, self.segments, strict=True)):
            columns = slice(start, stop)
            y = inputs.combine(self.multiply(part, inputs, columns if len(self.parts) > 1 else None))
            if inputs.shift is not None:
                y.addr_(inputs.shift.view(-1), self.sums[:, group])
            if self.zero is not None:
                sums = inputs.combine(
                    inputs.codes[:, columns].sum(dim=1, dtype=torch.int32).float() - inputs.point * (stop - start)
                )
                y.addr_(sums, self.zero[:, group], alpha=-1)
            total = y if total is None else total.add_(y)
        return total

    def fused(self, inputs: IntegerInputs) -> Tensor | None:
        """`products` times the inputs' scale, (..., O), where the library does both at once; else None."""
        return None


class _OneDNN(_IntegerWeight):
    """In oneDNN's layout, which is the fastest from some 16 rows on."""

    def pack(self, weight: Tensor, scale: Tensor) -> tuple:
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        return torch.ops.onednn.qlinear_prepack(weight, None), scale, zeros

    def multiply(self, part: tuple, inputs: IntegerInputs, columns: slice | None) -> Tensor:
        codes = inputs.codes if columns is None else inputs.codes[:, columns].contiguous()
        weight, scales, zeros = part
        linear = torch.ops.onednn.qlinear_pointwise.default  # its own scale and bias would round otherwise than fbgemm's
        return linear(codes, 1.0, inputs.point, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


class _Fbgemm(_IntegerWeight):
    """In fbgemm's layout, which is the fastest for few rows."""

    def pack(self, weight: Tensor, scale: Tensor) -> tuple:
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            packed = torch.ops.quantized.linear_prepack(quantized, None)
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.op, packed
        finally:
            torch.backends.quantized.engine = engine

    def multiply(self, part: tuple, inputs: IntegerInputs, columns: slice | None) -> Tensor:
        linear, weight = part
        return linear(inputs.levels if columns is None else inputs.levels[:, columns], 1.0, inputs.point, weight)

    def fused(self, inputs: IntegerInputs) -> Tensor | None:
        """Only for few rows, which always come here: rounding must not depend on what a layer computed before."""
        one_range = isinstance(inputs.scale, float) and not math.isnan(inputs.scale) and inputs.digits == 1
        if not one_range or inputs.rows > FEW_ROWS or len(self.parts) > 1 or self.zero is not None:
            return None
        linear, weight = self.parts[0]
        return linear(inputs.rounded, inputs.scale, inputs.point, weight)


def _integer_weight(packed: PackedTensors, rows: int) -> _IntegerWeight:
    """In oneDNN's layout until the first input of few rows, then in fbgemm's: never both."""
    kept = all_prepacked(packed)
    if "fbgemm" in kept:
        return kept["fbgemm"]
    if rows <= FEW_ROWS and _multiplies_exactly(_Fbgemm):
        return prepacked(packed, "fbgemm", _Fbgemm, instead_of="onednn")
    return kept["onednn"] if "onednn" in kept else prepacked(packed, "onednn", _OneDNN)


# Packed codes, a block of rows at a time ---------------------------------------------------------------------------------


def _blockwise_products(inputs: IntegerInputs, packed: PackedTensors) -> Tensor:
    """The input's integers times the weight, from int32 sums. Shapes: -> (M, O) float32.

    With q = codes of the input - 128, z = its zero point - 128, w the codes of the weight and u their zero point, over n
    columns: sum (q - z)(w - u) = sum qw - z sum w - u (sum q - n z). A row of ones among the inputs gives sum w. A minimum
    m adds m (sum q - n z) to the products times the scale.
    """
    signed = inputs.codes.bitwise_xor(128).view(torch.int8)
    left = torch.cat([signed, signed.new_ones(1, packed.columns)])
    zero = _zero_points(inputs)
    segments = _segments(packed)
    sums = [left[:-1, a:b].sum(dim=1, dtype=torch.int32) for a, b in segments]
    if zero is not None:
        sums = [s - zero * (b - a) for s, (a, b) in zip(sums, segments, strict=True)]
    out = torch.empty(inputs.rows, packed.rows)
    step = max(1, _BLOCK // packed.columns)
    for start in range(0, packed.rows, step):
        rows = slice(start, min(start + step, packed.rows))
        weight, offset = widened(packed, rows)
        scale = _per_row(of_rows(packed.scale, rows).float(), len(weight))
        minimum = _minimum(packed, rows, scale)
        total = None
        for group, (a, b) in enumerate(segments):
            y = torch._int_mm(left[:, a:b], weight[:, a:b].t())
            y, weight_sums = y[:-1], y[-1]
            if zero is not None:
                y.addr_(zero, weight_sums, alpha=-1)
            if offset is not None:
                y.addr_(sums[group], offset[:, group], alpha=-1)
            y = y * scale[:, group]
            if minimum is not None:
                y.addr_(sums[group].float(), minimum[:, group])
            y = inputs.combine(y)
            total = y if total is None else total.add_(y)
        out[:, rows] = total
    return out


def _zero_points(inputs: IntegerInputs) -> Tensor | None:
    """The zero point of each row of `codes - 128`, (M,) int32; None where all are zero."""
    if inputs.shift is not None:
        return (inputs.point - 128) - inputs.shift.view(-1).nan_to_num().to(torch.int32)
    if inputs.point == 128:
        return None
    return torch.full((inputs.rows,), inputs.point - 128, dtype=torch.int32)


def widened(packed: PackedTensors, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Codes of some rows as (r, I) int8, and their zero points as (r, G) int32, None where all are zero or a minimum."""
    spec = packed.spec.weight
    weight, shift = unpack_codes(packed.codes[rows], spec.bits, packed.columns), 0
    if spec.bits == 8:
        weight, shift = weight ^ 128, 128
    if spec.minimum:
        offset = None
    elif spec.symmetric:
        offset = None if spec.offset == shift else torch.tensor(spec.offset).view(1, 1)
    else:
        offset = of_rows(packed.shift, rows)
    if offset is not None:
        offset = _per_row(offset.to(torch.int32) - shift, len(weight))
        if offset.shape[1] == 1 and packed.spec.weight.granularity == "group":
            offset = offset.expand(-1, len(_segments(packed)))
    return weight.view(torch.int8), offset


def _minimum(packed: PackedTensors, rows: slice, scale: Tensor) -> Tensor | None:
    """The minimum of some rows, of codes as `widened` has them: (r, G) float32; None where there is none."""
    spec = packed.spec.weight
    if not spec.minimum:
        return None
    minimum = _per_row(of_rows(packed.shift, rows).float(), len(scale))
    return minimum + 128 * scale if spec.bits == 8 else minimum


# Whether this machine can --------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def is_exact() -> bool:
    """Whether 8-bit matmuls are exact here: CPUs without VNNI saturate 16-bit sums."""
    return _multiplies_exactly(_OneDNN) and _multiplies_exactly(None)


@lru_cache
def _multiplies_exactly(layout: type[_IntegerWeight] | None) -> bool:
    """Extreme codes in a library's layout, or None for packed codes. What PyTorch warns of once, it says here, unheard."""
    weight = torch.tensor([[127] * 64, [-128] * 64, [1] * 64], dtype=torch.int8)
    codes = torch.tensor([[255] * 64, [0] * 64, [200, 3] * 32], dtype=torch.uint8).repeat(FEW_ROWS, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = IntegerInputs(codes.float() - 3, 1.0, 3)
            signed = inputs.codes.bitwise_xor(128).view(torch.int8)
            if layout is None:
                found = torch._int_mm(signed, weight.t()) + 125 * weight.sum(dim=1, dtype=torch.int32)
            else:
                layer = object.__new__(layout)
                layer.parts = [layer.pack(weight, torch.ones(3))]
                found = layer.multiply(layer.parts[0], inputs, None)
    except (RuntimeError, AttributeError) as error:
        logger.info("8-bit matmuls are not available on this machine: %s", error)
        return False
    return torch.equal(found.double(), (codes.double() - 3) @ weight.double().t())
