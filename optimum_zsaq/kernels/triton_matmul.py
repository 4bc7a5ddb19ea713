"""The Triton kernel of `cuda_dequantize`. Importing this module needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed_tensors import PackedTensors


@triton.jit
def dequantize_and_multiply(
    x,
    codes,
    scale,
    shift,
    bias,
    out,
    rows,
    outputs,
    columns,
    row_bytes,
    scale_row,  # strides of scale and shift; 0 where all rows or all groups share one
    scale_group,
    group_size,
    OFFSET: tl.constexpr,  # zero point of a symmetric scheme
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    MINIMUM: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of x @ W.T + bias, with float32 sums.

    W is (codes - zero) * scale or, with a minimum, codes * scale + minimum.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + m[:, None].to(tl.int64) * columns
    code_rows = codes + n[:, None].to(tl.int64) * row_bytes
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (n[:, None] < outputs) & (k[None, :] < columns)
        tile = tl.load(x_rows + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < columns), other=0.0)
        byte = k * BITS // 8
        word = tl.load(code_rows + byte[None, :], mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may end in the next byte
            beyond = tl.load(code_rows + byte[None, :] + 1, mask=inside & (byte[None, :] + 1 < row_bytes), other=0)
            word |= beyond.to(tl.int32) << 8
        level = (word >> (k * BITS % 8)[None, :]) & (2**BITS - 1)
        group = n[:, None] * scale_row + (k // group_size)[None, :] * scale_group
        if MINIMUM:
            level = level.to(tl.float32) * tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
            weight = (level + tl.load(shift + group, mask=inside, other=0.0).to(tl.float32)).to(tile.dtype)
        else:
            level -= tl.load(shift + group, mask=inside, other=0).to(tl.int32) if ASYMMETRIC else OFFSET
            factor = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
            weight = (level.to(tl.float32) * factor).to(tile.dtype)
        total += tl.dot(tile, tl.trans(weight), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    target = out + m[:, None].to(tl.int64) * outputs + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < outputs))


def dequantized_matmul(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias without outliers. Shapes: x (M, I) contiguous, bias (O,) or None -> (M, O) in x's dtype."""
    spec, scale = packed.spec.weight, packed.scale.detach()
    out = x.new_empty(len(x), packed.rows)
    if not out.numel():
        return out
    block_m, block_n, block_k = (16, 32, 128) if len(x) <= 16 else (64, 64, 32)  # our choice, not tuned
    grid = (triton.cdiv(packed.rows, block_n), triton.cdiv(len(x), block_m))
    codes = packed.codes.contiguous()
    with torch.cuda.device_of(x):
        dequantize_and_multiply[grid](
            x,
            codes,
            scale,
            scale if packed.shift is None else packed.shift,
            scale if bias is None else bias.detach(),
            out,
            len(x),
            packed.rows,
            packed.columns,
            codes.shape[1],
            0 if len(scale) == 1 else scale.stride(0),
            0 if scale.shape[1] == 1 else scale.stride(1),
            spec.group_size or packed.columns,
            OFFSET=spec.offset,
            BITS=spec.bits,
            ASYMMETRIC=packed.shift is not None and not spec.minimum,
            MINIMUM=spec.minimum,
            BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return out
