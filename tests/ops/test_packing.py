import pytest
import torch
from conformance import BITS

from optimum_zsaq.ops import pack_codes, packed_columns, packing, unpack_codes


COLUMNS = (1, 2, 3, 8, 13, 33)
ROWS = (1, 2, 5)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def pack_by_loop(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The documented format, bit by bit: bit k of a row's stream is bit k % 8 of byte k // 8."""
    packed = []
    for row in codes.tolist():
        stream = [(code >> k) & 1 for code in row for k in range(bits)]
        stream += [0] * (-len(stream) % 8)
        packed.append([sum(stream[start + k] << k for k in range(8)) for start in range(0, len(stream), 8)])
    return torch.tensor(packed, dtype=torch.uint8)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
class TestEveryWidth:
    def test_equals_the_bit_loop(self, bits, columns, device):
        for rows in ROWS:
            codes = random_codes(rows, columns, bits)
            assert torch.equal(pack_codes(codes.to(device), bits).cpu(), pack_by_loop(codes, bits))

    def test_size_law(self, bits, columns):
        expected = -(-columns * bits // 8)
        assert packed_columns(columns, bits) == expected
        assert pack_codes(random_codes(3, columns, bits), bits).shape == (3, expected)

    def test_round_trip_leaves_its_inputs_alone(self, bits, columns, device):
        for rows in ROWS:
            codes = random_codes(rows, columns, bits, seed=rows).to(device)
            before = codes.clone()
            packed = pack_codes(codes, bits)
            stored = packed.clone()
            unpacked = unpack_codes(packed, bits, columns)
            assert unpacked.dtype == packed.dtype == torch.uint8
            assert torch.equal(unpacked, before)
            assert torch.equal(codes, before)
            assert torch.equal(packed, stored)

    def test_extreme_codes(self, bits, columns):
        for code in (0, 2**bits - 1):
            codes = torch.full((2, columns), code, dtype=torch.uint8)
            assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
class TestRows:
    def test_packed_codes_have_their_own_memory(self, bits):
        codes = random_codes(4, 13, bits)
        packed = pack_codes(codes, bits)
        before = packed.clone()
        codes.zero_()
        assert torch.equal(packed, before)

    def test_a_row_is_packed_on_its_own(self, bits):
        codes = random_codes(4, 13, bits)
        packed = pack_codes(codes, bits)
        for i in range(4):
            assert torch.equal(pack_codes(codes[i : i + 1], bits), packed[i : i + 1])
            assert torch.equal(unpack_codes(packed[i : i + 1], bits, 13), codes[i : i + 1])

    def test_block_by_block_is_the_same(self, bits, monkeypatch):
        codes = random_codes(7, 13, bits)
        expected = pack_codes(codes, bits)
        monkeypatch.setattr(packing, "_CHUNK", 30)  # two rows a block, the last block has one
        assert torch.equal(pack_codes(codes, bits), expected)
        assert torch.equal(unpack_codes(expected, bits, 13), codes)

    def test_strided_codes(self, bits):
        codes = random_codes(13, 3, bits).t()
        packed = pack_codes(codes, bits)
        assert torch.equal(packed, pack_by_loop(codes, bits))
        strided = packed.t().contiguous().t()
        assert torch.equal(unpack_codes(strided, bits, 13), codes)


def test_by_hand():
    """Codes 1, 2, 7 of 3 bits: the stream 100 010 111, so byte 0 is 0b11010001 and byte 1 is 0b1."""
    assert pack_codes(torch.tensor([[1, 2, 7]], dtype=torch.uint8), 3).tolist() == [[0b11010001, 0b1]]
