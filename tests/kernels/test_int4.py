import pytest
import torch
from conformance import DYNAMIC, spec_id
from kernel_cases import compare, packed_weight, with_runtime
from tolerances import KERNEL, relative_error

from optimum_zsaq.kernels import KERNELS, choose_kernel, int4, int8
from optimum_zsaq.kernels.prepacked import _ENTRIES
from optimum_zsaq.spec import LayerSpec, QuantSpec


LAYOUTS = (("tensor", None), ("row", None), ("group", 32), ("group", 64), ("group", 128), ("group", 256))
SPECS = [QuantSpec(bits, name, size) for bits in (2, 3, 4) for name, size in LAYOUTS]
SPECS += [QuantSpec(bits, name, size, symmetric=False) for bits in (2, 3) for name, size in LAYOUTS]
SPECS += [QuantSpec(2, name, size, ternary=True) for name, size in LAYOUTS]
SPECS += [QuantSpec(bits, name, size, False, minimum=True, scale_bits=16) for bits in (2, 4) for name, size in LAYOUTS]
SHAPES = ((1, 17), (3, 32), (33, 129), (64, 256), (32, 300), (20, 1000))  # (rows, columns)

int4_kernel = KERNELS["int4"]
pytestmark = pytest.mark.skipif(not (int4.is_available() and int8.is_exact()), reason="the machine has no such kernel")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_is_the_reference(spec):
    """Shapes, numbers of rows (many go another way), outliers and biases take turns."""
    for turn, (rows, columns) in enumerate(SHAPES):
        packed = packed_weight(rows, columns, LayerSpec(spec, None, 0.02 * (turn % 2)), seed=turn)
        for batch in (1, 2, 8, 9, 40):
            bias = normal(rows) if (turn + batch) % 3 else None
            compare("int4", normal(batch, columns), packed, bias)


@pytest.mark.parametrize("spec", SPECS[:6], ids=spec_id)
class TestInputs:
    @pytest.mark.parametrize("shape", [(129,), (1, 129), (0, 129), (2, 0, 129), (2, 3, 129), (2, 20, 129)], ids=str)
    def test_any_leading_shape(self, spec, shape):
        compare("int4", normal(*shape), packed_weight(3, 129, spec), normal(3))

    def test_any_strides(self, spec):
        packed = packed_weight(33, 129, spec)
        base = normal(4, 5, 258)
        views = [base[:, 0, :129], base[0, :, ::2], normal(129, 6).t(), normal(1, 129).expand(4, 129)]
        views += [normal(4, 1).expand(4, 129), normal(3, 2, 129).transpose(0, 1)]
        for x in views:
            assert torch.equal(compare("int4", x, packed), int4_kernel(x.clone().contiguous(), packed, None))

    def test_few_rows_and_many_agree(self, spec):
        packed = packed_weight(33, 256, spec)
        x = normal(40, 256)
        few = torch.cat([int4_kernel(x[i : i + 5], packed, None) for i in range(0, 40, 5)])
        assert relative_error(int4_kernel(x, packed, None), few) <= KERNEL[torch.bfloat16]

    def test_inference_mode_and_rows_that_are_not_finite(self, spec):
        packed = packed_weight(33, 64, LayerSpec(spec, None, 0.05))
        x = normal(3, 64)
        expected = int4_kernel(x, packed, None)
        with torch.inference_mode():
            assert torch.equal(int4_kernel(x, packed, None), expected)
        x[1, 5] = torch.inf
        found = int4_kernel(x, packed, None)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert not found[1].isfinite().all()


def test_serves_what_it_can():
    x = normal(2, 64)
    for spec in SPECS:
        packed = packed_weight(3, 64, spec)
        assert int4_kernel.serves(x, packed)
        assert choose_kernel(x, packed) is int4_kernel
        assert choose_kernel(x, with_runtime(packed, "small")).name in ("native", "int8")
        assert not int4_kernel.serves(x.float(), packed)
        assert not int4_kernel.serves(x.half(), packed)
        assert not int4_kernel.serves(x.to("meta"), packed)
        assert not int4_kernel.serves(x, packed_weight(3, 64, LayerSpec(spec, DYNAMIC)))
    others = [
        QuantSpec(5),
        QuantSpec(8),
        QuantSpec(4, symmetric=False),
        QuantSpec(4, "group", 16),
        QuantSpec(4, "group", 48),
    ]
    assert not [spec for spec in others if int4_kernel.serves(x, packed_weight(3, 64, spec))]


def test_a_machine_without_it_takes_the_next(monkeypatch):
    x, packed = normal(2, 64), packed_weight(3, 64, QuantSpec(4))
    monkeypatch.setattr(int4, "_runs", lambda: False)
    assert choose_kernel(x, packed).name in ("native", "int8")


def test_keeps_half_a_byte_a_weight():
    packed = packed_weight(64, 256, QuantSpec(3))
    int4_kernel(normal(1, 256), packed, None)
    assert set(_ENTRIES[packed.codes][1]) == {"int4"}
    codes, _, scales = _ENTRIES[packed.codes][1]["int4"][:3]
    assert codes.untyped_storage().nbytes() == 64 * 256 // 2
    assert scales.untyped_storage().nbytes() == 64 * 4


def test_many_rows_first_keep_nothing():
    packed = packed_weight(64, 256, QuantSpec(3))
    int4_kernel(normal(40, 256), packed, None)
    assert packed.codes not in _ENTRIES
