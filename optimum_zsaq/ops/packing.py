"""Dense bit packing: a row of n codes of b bits takes ceil(n * b / 8) bytes, for every b from 2 to 8.

A row is a little-endian bit stream: code j has the bits [j * b, (j + 1) * b) of the row, bit k is bit k % 8 of byte
k // 8; the bits after the last code are zero. Rows are packed on their own, so that a row can be read without the others.
"""

import torch
from torch import Tensor


_CHUNK = 2**20  # codes that are widened to 64 bits at a time


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes of `bits` bits takes: ceil(columns * bits / 8)."""
    return -(-columns * bits // 8)


def _row_blocks(rows: int, columns: int) -> range:
    return range(0, rows, max(1, _CHUNK // max(1, columns)))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely.

    Shapes: codes (R, C) uint8, each below 2^bits -> (R, ceil(C * bits / 8)) uint8.
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes.clone()
    packed = codes.new_empty(rows, packed_columns(columns, bits))
    blocks = _row_blocks(rows, columns)
    for start in blocks:
        block = codes[start : start + blocks.step]
        packed[start : start + blocks.step] = _pack_block(block, bits)[:, : packed.shape[1]]
    return packed


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    """Eight codes make one 64-bit word, whose lowest `bits` bytes are the stream."""
    words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).to(torch.int64).unflatten(-1, (-1, 8))
    stream = words[..., 0]
    for j in range(1, 8):
        stream = stream | (words[..., j] << (j * bits))
    return stream.contiguous().view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack_codes` packed.

    Shapes: packed (R, ceil(columns * bits / 8)) uint8 -> (R, columns) uint8; at 8 bits the tensor itself.
    """
    if bits == 8:
        return packed
    packed = packed.contiguous()
    unpack = _UNPACK.get(bits, _unpack_words)
    if torch.compiler.is_compiling():  # a loop would fix the number of rows
        return unpack(packed, bits)[:, :columns]
    blocks = _row_blocks(packed.shape[0], columns)
    if len(blocks) == 1:
        return unpack(packed, bits)[:, :columns]
    codes = packed.new_empty(packed.shape[0], columns)
    for start in blocks:
        codes[start : start + blocks.step] = unpack(packed[start : start + blocks.step], bits)[:, :columns]
    return codes


def _unpack_words(packed: Tensor, bits: int) -> Tensor:
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(-1, (-1, bits))
    words = torch.nn.functional.pad(words, (0, 8 - bits)).contiguous().view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)


# Each byte (three at 3 bits) is widened to a word of one byte a code, whose codes are moved apart in halving steps: some
# five times faster than shifting each code out on its own.


def _unpack_4(packed: Tensor, bits: int) -> Tensor:
    word = packed.to(torch.int16)
    return ((word | word << 4) & 0x0F0F).view(torch.uint8)


def _unpack_2(packed: Tensor, bits: int) -> Tensor:
    word = packed.to(torch.int32)
    word = (word | word << 12) & 0x000F000F
    return ((word | word << 6) & 0x03030303).view(torch.uint8)


def _unpack_3(packed: Tensor, bits: int) -> Tensor:
    triples = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).unflatten(-1, (-1, 3))
    low, middle, high = triples.unbind(-1)
    word = low.to(torch.int64) | middle.to(torch.int64) << 8 | high.to(torch.int64) << 16
    word = (word | word << 20) & 0x00000FFF00000FFF
    word = (word | word << 10) & 0x003F003F003F003F
    return ((word | word << 5) & 0x0707070707070707).view(torch.uint8)


_UNPACK = {2: _unpack_2, 3: _unpack_3, 4: _unpack_4}
