"""A layer's input as 8-bit integers, exactly as its scheme defines them, with as few passes over memory as torch allows.

Inputs that stay float (`inputs=None`) become three or four 8-bit digits of fixed-point numbers: int8 matmuls then
compute a weight-only layer, with an error far below that of its dtype.
"""

import math
import threading
import weakref
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..spec import QuantSpec
from .packed_tensors import PackedTensors


FEW_ROWS = 16  # up to here fbgemm is faster, which takes levels, above oneDNN, which takes codes: our choice
_TINY = torch.finfo(torch.float32).tiny  # the scale of a row of zeros
_BLOCK = 2**18  # values that are quantized at a time
_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
_RANGES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # input_scale -> (stamp of both, scale, zero point)
_LAST = threading.local()


@dataclass(slots=True, eq=False)
class IntegerInputs:
    """M rows of I values: x = scale * (sum over digits d of 256^(digits - 1 - d) * levels[d] + shift).

    Shapes: x (..., I) float32, bfloat16 or float16; scale () float or (M, 1) float32; shift (M, 1) float32, integers, or
    None for zero; levels and codes (digits * M, I). `highest` is the largest code.
    """

    x: Tensor
    scale: float | Tensor
    point: int
    shift: Tensor | None = None
    highest: int = 255
    digits: int = 1
    _codes: Tensor | None = None
    _rounded: Tensor | None = None
    _dense: Tensor | None = None

    @property
    def rows(self) -> int:
        """M."""
        return self.x.numel() // self.x.shape[-1]

    @property
    def levels(self) -> Tensor:
        """codes - point, for few rows. Shapes: (digits * M, I) float32, integers."""
        if self._codes is not None:
            return self._codes.float().sub_(self.point)
        return self._levels(self._flat(), self.scale, self.shift)

    def _flat(self) -> Tensor:
        return self.x.reshape(-1, self.x.shape[-1]).contiguous()

    @property
    def codes(self) -> Tensor:
        """levels + point. Shapes: (digits * M, I) uint8. Made some rows at a time: what is between stays in the cache."""
        if self._codes is None:
            step = max(1, _BLOCK // self.x.shape[-1])
            parts = (self._flat().split(step), self._split(self.scale, step), self._split(self.shift, step))
            blocks = [_to_bytes(self._levels(*part), self.point) for part in zip(*parts, strict=True)]
            self._codes = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return self._codes

    @property
    def rounded(self) -> Tensor:
        """scale * levels, for one scale: divided by it, it gives the levels again. Shapes: as x, float32."""
        if self._rounded is None:
            levels = self._levels(self.x, self.scale, None) if self._codes is None else self.levels
            self._rounded = levels.mul_(self.scale)
        return self._rounded

    def _split(self, values: float | Tensor | None, step: int) -> Sequence[float | Tensor | None]:
        return values.split(step) if isinstance(values, Tensor) else [values] * -(-self.rows // step)

    def _levels(self, x: Tensor, scale: float | Tensor, shift: Tensor | None) -> Tensor:
        """Of some rows. Eight-bit ones may lie outside by one yet: they saturate when they become bytes."""
        levels = (x.float() / scale).round_()
        if shift is not None:
            levels.sub_(shift)
        return levels if self.highest == 255 else levels.clamp_(-self.point, self.highest - self.point)

    def dense(self) -> Tensor:
        """The values, kept for the next layer that reads them. Shapes: (M, I) float32."""
        if self._dense is None:
            if self.digits == 1:
                offset = self.point if self.shift is None else self.point - self.shift
                self._dense = self.codes.float().sub_(offset).mul_(self.scale)
            else:
                self._dense = self.combine(self.codes.float().sub_(self.point)).mul_(self.scale)
        return self._dense

    def combine(self, products: Tensor) -> Tensor:
        """One row of every `digits`. Shapes: (digits * M, N) float32 -> (M, N)."""
        if self.digits == 1:
            return products
        high, *rest = products.unflatten(0, (self.digits, -1))
        for low in rest:
            high = high * 256.0 + low
        return high


def _to_bytes(levels: Tensor, point: int) -> Tensor:
    """levels + point as uint8, saturating."""
    quantized = torch.quantize_per_tensor(levels, 1.0, point, torch.quint8)
    codes = torch.empty(0, dtype=torch.uint8)  # over the same bytes: int_repr() would copy them, and slowly
    return codes.set_(quantized.untyped_storage(), 0, levels.shape)


def integer_inputs(x: Tensor, packed: PackedTensors) -> IntegerInputs:
    """The input of a layer as integers. Layers that read the same tensor in the same way, as Q, K and V do, share it.

    Shapes: x (..., I) float32, bfloat16 or float16 with at least one element. A NaN in a row makes the row's results NaN,
    except with a static range, whose codes have no NaN.
    """
    spec = packed.spec.inputs
    static = static_range(packed) if spec is not None and spec.granularity == "tensor" else None
    key = (spec, static)
    if x.is_inference():  # cannot tell whether it was written to since
        return _integers(x, spec, static)
    last = getattr(_LAST, "value", None)
    if last is not None and last[0]() is x and last[1] == (x._version, key):
        return last[2]
    inputs = _integers(x, spec, static)
    _LAST.value = (weakref.ref(x, _forget), (x._version, key), inputs)
    return inputs


def _forget(reference: weakref.ref) -> None:
    last = getattr(_LAST, "value", None)
    if last is not None and last[0] is reference:
        _LAST.value = None


def static_range(packed: PackedTensors) -> tuple[float, int]:
    """Scale and zero point of a static input."""
    scale, point = packed.input_scale, packed.input_zero_point
    version = None
    if not (scale.is_inference() or point.is_inference()):
        version = scale.data_ptr(), scale._version, id(point), point.data_ptr(), point._version
    kept = _RANGES.get(scale)
    if kept is None or version is None or kept[0] != version:
        kept = _RANGES[scale] = (version, scale.item(), int(point.item()))
    return kept[1:]


def _integers(x: Tensor, spec: QuantSpec | None, static: tuple[float, int] | None) -> IntegerInputs:
    x = x.detach() if x.dim() > 1 else x.detach().unsqueeze(0)  # fbgemm takes no single axis
    if static is not None:
        return IntegerInputs(x, *static, highest=spec.highest)
    if spec is not None and x.numel() == x.shape[-1]:
        return _one_token(x, spec)
    x = x.reshape(-1, x.shape[-1]).contiguous()
    return _fixed_point(x) if spec is None else _tokens(x, spec)


def _one_token(x: Tensor, spec: QuantSpec) -> IntegerInputs:
    """As `_tokens`, the arithmetic of the range in Python: a single row is all overhead."""
    low, high = (value.item() for value in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _float32(_float32(high - low) / spec.highest)
    if not math.isfinite(scale):
        return IntegerInputs(x, math.nan, 0)
    scale = scale or 1.0
    return IntegerInputs(x, scale, round(_float32(-low / scale)), highest=spec.highest)


def _float32(value: float) -> float:
    """Rounded as float32 arithmetic would; one operation in float64 before does not change that."""
    return c_float(value).value


def _tokens(x: Tensor, spec: QuantSpec) -> IntegerInputs:
    """`ops.fake_quantize_tokens`, but for the last multiplication."""
    low = x.amin(dim=-1, keepdim=True).float().clamp_(max=0.0)
    scale = x.amax(dim=-1, keepdim=True).float().clamp_(min=0.0).sub_(low).div_(spec.highest).clamp_min_(_TINY)
    zero_point = low.neg_().div_(scale).round_()
    first = zero_point[0].item()
    point = int(first) if math.isfinite(first) else 0  # near the others, so that little is lost in subtracting them
    return IntegerInputs(x, scale, point, point - zero_point, spec.highest)


def _fixed_point(x: Tensor) -> IntegerInputs:
    """Each row in units of 2^-31 of its largest magnitude, in half precision 2^-23: small values keep their precision."""
    digits = _DIGITS[x.dtype]
    offset = sum(128 << (8 * d) for d in range(digits))
    highest = 2 ** (8 * digits) - 1 - offset & -128  # a float32
    scale = x.abs().amax(dim=-1, keepdim=True).float().div_(highest)
    scale.masked_fill_(scale == 0, 1.0)
    fixed = (x / scale).round_().clamp_(-highest, highest).to(torch.int64).add_(offset)
    digit_bytes = fixed.unsqueeze(-1).view(torch.uint8)[..., :digits].flip(-1)  # little-endian: the highest digit first
    codes = digit_bytes.permute(2, 0, 1).reshape(-1, x.shape[1])
    return IntegerInputs(x, scale, 128, digits=digits, _codes=codes)
