"""Layers from the codes as they are packed: our own kernels (`optimum_zsaq/native`).

Inputs are 8-bit integers; those that stay float become fixed-point numbers of three or four 8-bit digits, whose error is
far below that of their dtype. Nothing is kept beside the codes. Sums of products are integers and the order of roundings is
fixed (native/layout.h), so results are bit-equal whatever the threads, the rows at a time, and the instruction set.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ..native import BEST, PORTABLE, Input, Weight, best, library
from .int8 import Int8
from .integer_inputs import FEW_ROWS, static_range
from .packed_tensors import PackedTensors
from .prepacked import prepacked
from .sparse import add_outliers


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BITS = (2, 3, 4, 8)  # with a fast way to widen codes
_GROUPS = (32, 64, 128)
_MOST_COLUMNS = 2**16  # sums of products fit 32 bits


class Native:
    """y = scale_in * sum over groups of (scale * sum of q_in (codes - zero) + minimum * sum of q_in) + bias."""

    name = "native"

    def __init__(self):
        self._many = Int8()

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """CPUs with AVX2 or AVX-512 VNNI; 2, 3, 4 and 8 bits, one scale for a row or the matrix, groups of 32, 64, 128."""
        weight = packed.spec.weight
        return (
            x.device.type == "cpu"
            and x.dtype in _TYPES
            and weight.bits in _BITS
            and (weight.granularity != "group" or weight.group_size in _GROUPS or weight.group_size >= packed.columns)
            and packed.columns <= _MOST_COLUMNS
            and runs()
        )

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        elsewhere = packed.spec.inputs is None or packed.spec.weight.granularity != "group"
        if elsewhere and x.numel() > FEW_ROWS * packed.columns and self._many.serves(x, packed):
            return self._many(x, packed, bias)
        if packed.outlier_positions is None or not x.numel():
            return native_linear(x, packed, bias)
        x = x.detach()
        y = native_linear(x.float(), packed, None).view(-1, packed.rows)
        add_outliers(y, packed.inputs(x.float()).view(-1, packed.columns), packed)
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


@torch.compiler.assume_constant_result
def runs() -> bool:
    """Whether the kernels are built and this processor has what makes them fast."""
    return library() is not None and best() != PORTABLE


def native_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None, isa: int = BEST) -> Tensor:
    """A layer without its outliers. Shapes: x (..., I), bias (O,) or None -> (..., O) in x's dtype.

    Raises:
        RuntimeError: x or bias have another width than the weight; the processor has not the instruction set.
        ValueError: the tensors of the weight are not those of its scheme.
    """
    shape, dtype, columns = x.shape, x.dtype, packed.columns
    if shape[-1] != columns or bias is not None and bias.numel() != packed.rows:
        shapes = f"x {tuple(shape)} and bias {None if bias is None else tuple(bias.shape)}"
        raise RuntimeError(f"{shapes} do not fit a weight {packed.rows, columns}")
    kept = prepacked(packed, "native", _Described)
    y = torch.empty((*shape[:-1], kept.rows), dtype=dtype)
    tokens = x.numel() // columns
    if not tokens or not kept.rows:
        return y
    x = x if x.is_contiguous() else x.contiguous()
    spec = packed.spec.inputs
    static = static_range(packed) if spec is not None and spec.granularity == "tensor" else None
    inputs = _input(None if spec is None else spec.highest, static, dtype)
    address, kind = None, 0
    if bias is not None:
        bias = bias if bias.dtype in _TYPES and bias.is_contiguous() else bias.float().contiguous()
        address, kind = bias.data_ptr(), _TYPES[bias.dtype]
    failed = kept.run(
        kept.address,
        ctypes.byref(inputs),
        x.data_ptr(),
        tokens,
        address,
        kind,
        y.data_ptr(),
        _TYPES[dtype],
        torch.get_num_threads(),
        isa,
    )
    if failed:
        raise RuntimeError(f"instruction set {isa} is not there; use {best()}, or {BEST} for the best")
    return y


@lru_cache(maxsize=4096)
def _input(highest: int | None, static: tuple[float, int] | None, dtype: torch.dtype) -> Input:
    """How inputs are read: as codes up to `highest`, or as digits."""
    if highest is None:
        return Input(4 if dtype == torch.float32 else 3, 0, 0, 0, 0.0)
    scale, zero = static or (0.0, 0)
    return Input(0, highest, static is not None, zero, scale)


class _Described:
    """The addresses of a weight. Codes that are contiguous are not kept alive: the entry must die with them."""

    def __init__(self, packed: PackedTensors):
        spec = packed.spec.weight
        shift = 2 if spec.minimum else 0 if packed.shift is None else 1
        tensors = [packed.codes, packed.scale, packed.shift]
        self._copies = [t if t is None else t.detach().contiguous() for t in tensors]
        addresses = [None if t is None else t.data_ptr() for t in self._copies]
        if packed.codes.is_contiguous():
            self._copies[0] = None
        self._check(packed)
        size = min(spec.group_size or packed.columns, packed.columns)
        one, scales = spec.granularity == "tensor", _TYPES[packed.scale.dtype]
        self._weight = Weight(spec.bits, packed.rows, packed.columns, size, one, shift, scales, *addresses)
        self.address, self.rows = ctypes.addressof(self._weight), packed.rows
        self.run = library().zsaq_linear

    @staticmethod
    def _check(packed: PackedTensors) -> None:
        """The library reads where it is told to.

        Raises:
            ValueError: a tensor of another shape or dtype than the scheme's.
        """
        spec = packed.spec.weight
        shape = spec.scale_shape(packed.rows, packed.columns)
        dtypes = {"zero point": torch.uint8, "minimum": packed.scale.dtype}
        wanted = [("codes", packed.codes, (packed.rows, -(-packed.columns * spec.bits // 8)), torch.uint8)]
        wanted += [("scale", packed.scale, shape, torch.float16 if packed.scale.dtype == torch.float16 else torch.float32)]
        if packed.shift is not None:
            wanted += [("shift", packed.shift, shape, dtypes["minimum" if spec.minimum else "zero point"])]
        for name, tensor, size, dtype in wanted:
            if tuple(tensor.shape) != tuple(size) or tensor.dtype != dtype:
                raise ValueError(
                    f"the {name} of a packed weight is {tuple(tensor.shape)} {tensor.dtype}, and its scheme "
                    f"({spec}) needs {tuple(size)} {dtype}; load the checkpoint anew"
                )
