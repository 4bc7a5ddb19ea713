"""Our own kernels: equal among instruction sets, threads and numbers of rows; the reference up to float32 rounding."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conformance import DTYPES, DYNAMIC, STATIC, spec_id
from kernel_cases import INPUTS, compare, packed_weight

from optimum_zsaq.kernels import KERNELS, choose_kernel, packed_linear
from optimum_zsaq.kernels.native import native_linear
from optimum_zsaq.kernels.prepacked import all_prepacked
from optimum_zsaq.native import AVX2, AVX512, PORTABLE, best, has
from optimum_zsaq.ops.affine import expand_slices
from optimum_zsaq.spec import LayerSpec, QuantSpec


LAYOUTS = (("tensor", None), ("row", None), ("group", 32), ("group", 64), ("group", 128))
SPECS = [QuantSpec(bits, name, size, s) for bits in (2, 3, 4, 8) for name, size in LAYOUTS for s in (True, False)]
SPECS += [QuantSpec(2, name, size, ternary=True) for name, size in LAYOUTS]
HALF = {"symmetric": False, "minimum": True, "scale_bits": 16}
SPECS += [QuantSpec(bits, "group", size, **HALF) for bits in (2, 3, 4, 8) for size in (32, 64, 128)]
SPECS += [QuantSpec(4, "row", None, **HALF), QuantSpec(3, "group", 32, scale_bits=16)]
ANY = [QuantSpec(bits, "group", size, False) for bits, size in ((5, 32), (6, 48), (7, 17), (4, 7), (2, 256))]

SHAPES = ((1, 32), (3, 129), (33, 576), (17, 1), (20, 1537), (5, 512))  # (rows, columns)
ROWS = (1, 5, 14, 9, 33, 40)

native = KERNELS["native"]
needs_fast = pytest.mark.skipif(best() == PORTABLE, reason="a processor without AVX2")
ISAS = {PORTABLE: "portable C++", AVX2: "AVX2", AVX512: "AVX-512 VNNI"}
ISAS = [pytest.param(i, id=n, marks=pytest.mark.skipif(not has(i), reason=f"no {n} here")) for i, n in ISAS.items()]


def inputs_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes."""
    return (torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("spec", SPECS + ANY, ids=spec_id)
def test_results_do_not_depend_on_how_they_are_computed(spec, inputs):
    """Instruction sets, threads, rows at a time: not one bit differs, and the reference is within float32 rounding."""
    threads = torch.get_num_threads()
    for turn, ((rows, columns), count) in enumerate(zip(SHAPES, ROWS, strict=True)):
        packed = packed_weight(rows, columns, LayerSpec(spec, INPUTS[inputs]), seed=turn)
        x, bias = inputs_of(count, columns), torch.randn(rows) if turn % 2 else None
        found = native_linear(x, packed, bias, PORTABLE)
        for isa in filter(has, (AVX2, AVX512)):
            try:
                torch.set_num_threads(2)
                assert torch.equal(native_linear(x, packed, bias, isa), found), isa
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(torch.cat([native_linear(row, packed, bias, isa) for row in x.split(1)]), found), isa
        assert (error_of(found, x, packed, bias) <= 1e-6).all(), (rows, columns)


def error_of(found, x, packed, bias):
    """Of each output, as a share of the sum of its products' magnitudes, which float32 arithmetic may lose."""
    terms, bias = (packed.inputs(x).double(), packed.weight().double().t()), 0.0 if bias is None else bias.double()
    magnitudes = terms[1].abs()
    if packed.spec.weight.minimum:  # which takes off most of what the code is worth
        magnitudes = magnitudes + 2 * expand_slices(packed.shift.double().abs(), packed.columns, packed.spec.weight).t()
    size = terms[0].abs() @ magnitudes + abs(bias)
    return (found - (terms[0] @ terms[1] + bias)).abs() / size.clamp(min=1e-30)


@needs_fast
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_is_the_reference(spec, inputs):
    for turn, (rows, columns) in enumerate((rows + 16, columns) for rows, columns in SHAPES):
        packed = packed_weight(rows, columns, LayerSpec(spec, INPUTS[inputs], 0.02 * (turn == 4)), seed=turn)
        for call, dtype in enumerate(DTYPES):
            bias = torch.randn(rows, dtype=dtype) if (turn + call) % 3 else None
            compare("native", torch.randn(ROWS[(turn + call) % 6], columns, dtype=dtype), packed, bias)


def test_half_precision_is_rounded_once():
    packed = packed_weight(64, 576, LayerSpec(QuantSpec(4, "group", 32, **HALF), DYNAMIC))
    bias = torch.randn(64).to(torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        x = inputs_of(3, 576, dtype) / 100
        assert torch.equal(native_linear(x, packed, bias), native_linear(x.float(), packed, bias.float()).to(dtype))


def test_float16_at_its_ends():
    """Infinity, the smallest numbers and halfway cases are rounded as PyTorch does."""
    values = torch.tensor([65519.9, 65520.0, 1e9, 6e-8, 2.9e-8, 2.98023224e-8, 6.1e-5, 1.00048828125, 1.0014648])
    packed = packed_weight(1, 1, LayerSpec(QuantSpec(8), DYNAMIC), unit=True)
    packed.codes.fill_(129)  # the value 1
    for dtype in (torch.float16, torch.bfloat16):
        for value in [*values, *-values]:
            bias = value.view(1)
            x = torch.zeros(1, 1, dtype=dtype)
            assert torch.equal(native_linear(x, packed, bias), bias.to(dtype).view(1, 1)), value


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [3, 700])
def test_tokens_that_are_not_finite(isa, columns):
    """They alone are NaN; where the range is stored, NaN has no code."""
    x = torch.randn(4, columns)
    sound = native_linear(x, packed_weight(5, columns, LayerSpec(QuantSpec(4), DYNAMIC)), None, isa)
    x[1, columns - 1], x[2, 0], x[3, 1] = torch.nan, torch.inf, -torch.inf
    found = native_linear(x, packed_weight(5, columns, LayerSpec(QuantSpec(4), DYNAMIC)), None, isa)
    assert torch.equal(found[0], sound[0])
    assert found[1:].isnan().all()
    assert native_linear(x, packed_weight(5, columns, LayerSpec(QuantSpec(4), STATIC)), None, isa).isfinite().all()


@needs_fast
class TestUse:
    def test_schemes_dtypes_and_devices(self):
        x = torch.randn(2, 64)
        for spec in SPECS:
            for inputs in INPUTS.values():
                assert choose_kernel(x, packed_weight(3, 64, LayerSpec(spec, inputs))) is native
        served = LayerSpec(QuantSpec(4, "group", 32), DYNAMIC)
        assert not native.serves(x.double(), packed_weight(3, 64, served))
        assert not native.serves(x.to("meta"), packed_weight(3, 64, served))
        for spec in ANY[:4]:
            assert not native.serves(x, packed_weight(3, 64, LayerSpec(spec, DYNAMIC)))

    def test_nothing_is_kept_beside_the_codes(self):
        """Any number of rows of a weight in groups; few rows of one with a scale a row."""
        for spec, rows in ((QuantSpec(4, "group", 32, **HALF), (1, 40)), (QuantSpec(2), (1, 16))):
            packed = packed_weight(256, 512, LayerSpec(spec, DYNAMIC))
            for count in rows:
                packed_linear(torch.randn(count, 512), packed)
            kept = vars(all_prepacked(packed)["native"])
            shared = {t.data_ptr() for t in (packed.scale, packed.shift) if t is not None}
            assert {t.data_ptr() for t in kept["_copies"] if t is not None} == shared

    def test_written_codes_are_seen(self):
        packed, x = packed_weight(8, 64, LayerSpec(QuantSpec(4, "group", 32), DYNAMIC)), torch.randn(2, 64)
        before = packed_linear(x, packed)
        for tensor in (packed.codes, packed.scale):
            tensor.add_(1)
            assert torch.equal(packed_linear(x, packed), packed_linear(x, copy.deepcopy(packed)))
        packed.scale = packed.scale.clone() * 3
        assert torch.equal(packed_linear(x, packed), packed_linear(x, copy.deepcopy(packed)))
        assert not torch.equal(packed_linear(x, packed), before)

    def test_any_strides(self):
        packed = packed_weight(5, 64, LayerSpec(QuantSpec(4), DYNAMIC))
        for x in (torch.randn(64, 6).t(), torch.randn(6, 128)[:, ::2], torch.randn(1, 64).expand(4, 64), torch.randn(64)):
            assert torch.equal(packed_linear(x, packed), packed_linear(x.contiguous(), packed))
        wide = packed_weight(10, 64, LayerSpec(QuantSpec(4), DYNAMIC))
        part = copy.copy(wide)
        part.codes, part.scale = wide.codes[::2], wide.scale[::2]
        x = torch.randn(3, 64)
        assert torch.equal(packed_linear(x, part), packed_linear(x, wide)[:, ::2])

    def test_threads_of_the_caller(self):
        packed = packed_weight(512, 576, LayerSpec(QuantSpec(4, "group", 32, **HALF), DYNAMIC))
        batches = [torch.randn(n, 576) for n in (1, 2, 5, 16, 17, 40, 64, 3)]
        expected = [packed_linear(x, packed) for x in batches]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                found = list(pool.map(lambda x: packed_linear(x, packed), batches))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_a_lying_shape_is_refused(self):
        x = torch.randn(1, 64)
        for name, change in (
            ("codes", lambda t: t[:, :-1].contiguous()),
            ("codes", lambda t: t.to(torch.int32)),
            ("scale", lambda t: t[:-1].clone()),
            ("scale", lambda t: t.double()),
            ("shift", lambda t: t[:, :1].clone()),
            ("shift", lambda t: t.float()),
        ):
            packed = packed_weight(8, 64, LayerSpec(QuantSpec(4, "group", 32, symmetric=False), DYNAMIC))
            setattr(packed, name, change(getattr(packed, name)))
            with pytest.raises(ValueError, match=f"the {name} of a packed weight is .* load the checkpoint anew"):
                native_linear(x, packed, None)

    def test_another_width_is_refused(self):
        packed = packed_weight(8, 64, LayerSpec(QuantSpec(4), DYNAMIC))
        with pytest.raises(RuntimeError, match="do not fit a weight"):
            native_linear(torch.randn(1, 63), packed, None)
        with pytest.raises(RuntimeError, match="do not fit a weight"):
            native_linear(torch.randn(1, 64), packed, torch.randn(7))
