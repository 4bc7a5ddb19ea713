import math
from dataclasses import replace

import pytest
import torch
from conformance import DTYPES, DYNAMIC, STATIC, spec_id
from kernel_cases import INPUTS, compare, packed_weight, with_runtime
from tolerances import KERNEL, relative_error

from optimum_zsaq.kernels import KERNELS, choose_kernel, int8
from optimum_zsaq.kernels.prepacked import _ENTRIES
from optimum_zsaq.ops import unpack_codes
from optimum_zsaq.spec import LayerSpec, QuantSpec


LAYOUTS = (("tensor", None), ("row", None), ("group", 32), ("group", 64), ("group", 128))
SPECS = [QuantSpec(bits, name, size, s) for bits in range(2, 9) for name, size in LAYOUTS for s in (True, False)]
SPECS += [QuantSpec(2, name, size, ternary=True) for name, size in LAYOUTS]
HALF = {"symmetric": False, "minimum": True, "scale_bits": 16}
SPECS += [QuantSpec(bits, "group", 32, **HALF) for bits in range(2, 9)] + [QuantSpec(4, "row", None, **HALF)]
FEW = [QuantSpec(8), QuantSpec(8, symmetric=False), QuantSpec(3, "group", 32, symmetric=False), QuantSpec(2, "tensor")]
SHAPES = ((1, 17), (3, 129), (33, 64), (2, 300), (20, 17), (64, 160))  # (rows, columns)
BATCHES = (1, 40, 2, 17, 16, 0)
RUNTIMES = ("fast", "small")

int8_kernel = KERNELS["int8"]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_is_the_reference(spec, inputs):
    """Every weight scheme with every kind of input; shapes, dtypes, runtimes and biases take turns."""
    for turn, (rows, columns) in enumerate(SHAPES):
        outliers = 0.02 if turn == 5 else 0.0
        packed = packed_weight(rows, columns, LayerSpec(spec, INPUTS[inputs], outliers), seed=turn)
        for call, dtype in enumerate(DTYPES):
            packed.runtime = RUNTIMES[(turn + call) % 2]
            x = 2 * torch.randn(BATCHES[(turn + call) % 6], columns, dtype=dtype)
            bias = torch.randn(rows, dtype=dtype) if (turn + call) % 3 else None
            compare("int8", x, packed, bias)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("inputs", INPUTS)
class TestInputs:
    @pytest.mark.parametrize("shape", [(129,), (1, 129), (2, 0, 129), (0, 129), (2, 3, 129), (1, 2, 20, 129)], ids=str)
    def test_any_leading_shape(self, inputs, runtime, shape):
        for spec in FEW:
            compare("int8", torch.randn(shape), packed_weight(3, 129, LayerSpec(spec, INPUTS[inputs]), runtime=runtime))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_strides(self, inputs, runtime, dtype):
        """Transposed, every other row or column, the last column first, expanded: the numbers of a contiguous copy."""
        views = {
            "transposed": torch.randn(129, 20, dtype=dtype).t(),
            "rows": torch.randn(40, 129, dtype=dtype)[::2],
            "columns": torch.randn(20, 258, dtype=dtype)[:, ::2],
            "slice": torch.randn(20, 300, dtype=dtype)[:, 100:229],
            "first token": torch.randn(4, 5, 129, dtype=dtype)[:, 0],
            "permuted": torch.randn(5, 4, 129, dtype=dtype).transpose(0, 1),
            "expanded": torch.randn(1, 129, dtype=dtype).expand(20, 129),
            "a constant": torch.randn(20, 1, dtype=dtype).expand(20, 129),
            "one number": torch.tensor(0.7, dtype=dtype).expand(2, 129),
        }
        for spec in FEW:
            packed = packed_weight(33, 129, LayerSpec(spec, INPUTS[inputs]), runtime=runtime)
            for name, x in views.items():
                found = compare("int8", x, packed)
                assert torch.equal(found, int8_kernel(x.clone(memory_format=torch.contiguous_format), packed, None)), name

    @pytest.mark.parametrize("rows", [1, 2, 20], ids=str)
    def test_rows_of_every_kind(self, inputs, runtime, rows):
        """Zero, constant, one-sided, tiny, huge, and with values a million times the others."""
        one = torch.randn(rows, 256)
        kinds = {"zero": 0 * one, "constant": 0 * one + 3, "positive": one.abs(), "negative": -one.abs()}
        kinds |= {"tiny": 1e-20 * one, "huge": 1e20 * one, "outlier": one.clone(), "relu": one.relu(), "mixed": one.clone()}
        kinds["outlier"][:, 7] = 1e6
        kinds["mixed"] *= torch.logspace(-8, 8, rows)[:, None]
        kinds["mixed"][0] = 0
        for spec in FEW:
            packed = packed_weight(33, 256, LayerSpec(spec, INPUTS[inputs]), runtime=runtime)
            for name, x in kinds.items():
                found, expected = int8_kernel(x, packed, None), KERNELS["reference"](x, packed, None)
                for row, (a, b) in enumerate(zip(found, expected, strict=True)):
                    assert relative_error(a, b) <= KERNEL[torch.float32] or torch.equal(a, b), (name, row, spec)

    def test_many_columns_and_rows(self, inputs, runtime):
        """Sums of 4096 products of the largest codes; 300 rows."""
        for spec in FEW:
            packed = packed_weight(17, 4096, LayerSpec(spec, INPUTS[inputs]), runtime=runtime)
            compare("int8", torch.randn(300, 4096), packed)
            compare("int8", torch.randn(2, 4096).abs() + 1, packed)

    def test_inference_mode(self, inputs, runtime):
        for spec in FEW:
            packed = packed_weight(33, 64, LayerSpec(spec, INPUTS[inputs]), runtime=runtime)
            x = torch.randn(20, 64)
            expected = int8_kernel(x, packed, None)
            with torch.inference_mode():
                made_inside = x + 0
                for same in (x, made_inside, x):
                    assert torch.equal(int8_kernel(same, packed, None), expected)
                made_inside.zero_()
                assert not int8_kernel(made_inside, packed, None).any()
            assert torch.equal(int8_kernel(x, packed, None), expected)

    def test_result_is_a_new_tensor(self, inputs, runtime):
        packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), INPUTS[inputs]), runtime=runtime)
        x, bias = torch.randn(20, 64), torch.randn(33)
        before = x.clone(), bias.clone()
        first = int8_kernel(x, packed, bias)
        kept = first.clone()
        second = int8_kernel(x, packed, bias)
        second.add_(1.0)
        assert torch.equal(first, kept)
        assert torch.equal(int8_kernel(x, packed, bias), kept)
        assert torch.equal(x, before[0])
        assert torch.equal(bias, before[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("inputs", ["float", "dynamic-8", "dynamic-4"])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_row_that_is_not_finite_spoils_no_other(rows, runtime, inputs, bad):
    for spec in FEW:
        for where in (0, rows - 1):
            packed = packed_weight(33, 64, LayerSpec(spec, INPUTS[inputs], 0.05), runtime=runtime)
            x = torch.randn(rows, 64)
            clean = int8_kernel(x, packed, None)
            x[where, 5] = bad
            found = int8_kernel(x, packed, None)
            others = torch.arange(rows) != where
            assert relative_error(found[others], clean[others]) <= KERNEL[torch.float32]
            if INPUTS[inputs] is not None:
                assert found[where].isnan().all(), spec
            else:
                assert not found[where].isfinite().any(), spec


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", [2, 20])
def test_static_codes_of_infinities_are_the_ends_of_the_range(rows, runtime):
    """As the reference: what lies outside saturates."""
    for inputs in ("static-8", "static-4"):
        packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), INPUTS[inputs]), runtime=runtime)
        x = torch.randn(rows, 64)
        x[0, 3], x[1, 4], x[1, 5] = math.inf, -math.inf, 1e30
        compare("int8", x, packed)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", [2, 20])
def test_uncalibrated_range_gives_nan(rows, runtime):
    packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), STATIC), runtime=runtime)
    packed.input_scale = torch.full((1, 1), math.nan)
    packed.input_zero_point = torch.zeros(1, 1, dtype=torch.uint8)
    assert int8_kernel(torch.randn(rows, 64), packed, torch.randn(33)).isnan().all()


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_integers_equal_64_bit_arithmetic(spec):
    """With every scale 1, results are integers below 2^24: nothing may be off by anything."""
    packed = packed_weight(33, 129, LayerSpec(spec, STATIC), unit=True)
    codes = unpack_codes(packed.codes, spec.bits, 129).long()
    zero = torch.tensor([[spec.offset]]) if spec.symmetric else packed.shift.long() * (-1 if spec.minimum else 1)
    zero = zero.repeat_interleave(spec.group_size, dim=1)[:, :129] if spec.group_size and not spec.symmetric else zero
    for batch in (20, 1, 2, 20):
        x = torch.randint(-90, 175, (batch, 129)).float()  # the range is [-85, 170]
        expected = ((x.long() + 85).clamp(0, 255) - 85) @ (codes - zero).t()
        for runtime in RUNTIMES:
            assert torch.equal(int8_kernel(x, with_runtime(packed, runtime), None).long(), expected), (batch, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(3, "group", 16, False),
        QuantSpec(8, symmetric=False),
        QuantSpec(4, "group", 16, **HALF),
        QuantSpec(8, **HALF),
    ],
    ids=spec_id,
)
def test_dynamic_arithmetic_by_hand(spec, runtime):
    """Plain Python, number by number: codes of the input, integer sums, one multiplication by the scales a group."""
    packed = packed_weight(3, 40, LayerSpec(spec, DYNAMIC), runtime=runtime)
    codes, x = unpack_codes(packed.codes, spec.bits, 40).tolist(), torch.randn(2, 40)
    size = spec.group_size or 40
    for row, values in zip(int8_kernel(x, packed, None).tolist(), x.tolist(), strict=True):
        low, high = min(0.0, *values), max(0.0, *values)
        scale = (high - low) / 255
        zero = round(-low / scale)
        inputs = [min(max(round(v / scale) + zero, 0), 255) for v in values]
        for o, found in enumerate(row):
            expected = 0.0
            for g, start in enumerate(range(0, 40, size)):
                columns, step, u = range(start, min(start + size, 40)), packed.scale[o, g].item(), packed.shift[o, g].item()
                if spec.minimum:
                    expected += scale * u * sum(inputs[i] - zero for i in columns)
                    u = 0
                expected += scale * step * sum((inputs[i] - zero) * (codes[o][i] - u) for i in columns)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_both_libraries_give_the_same_bits(spec):
    """Which layout is kept depends on the inputs seen before, which must not show in the outputs."""
    for inputs in INPUTS.values():
        x = torch.randn(16 if inputs is None else 20, 129)  # 16 rows of float inputs are 64 of digits
        packed = packed_weight(33, 129, LayerSpec(spec, inputs, 0.01))
        first = int8_kernel(x, packed, None)
        assert "onednn" in _ENTRIES[packed.codes][1]
        int8_kernel(x[:1], packed, None)
        assert "fbgemm" in _ENTRIES[packed.codes][1]
        assert "onednn" not in _ENTRIES[packed.codes][1]
        assert torch.equal(int8_kernel(x, packed, None), first)


@pytest.mark.parametrize("sign", [-1.0, 0.0], ids=["negative", "zero"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_learned_scales_may_change_sign(runtime, sign):
    for spec in FEW:
        packed = packed_weight(33, 64, LayerSpec(spec, DYNAMIC), runtime=runtime)
        packed.scale[0] *= sign
        for batch in (1, 20):
            compare("int8", torch.randn(batch, 64), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_inputs_keep_what_their_dtype_resolves(dtype):
    """Each number of the result against float64; also where one input is many times the others and its weight is zero."""
    packed = packed_weight(33, 512, LayerSpec(QuantSpec(4)))
    packed.codes[:, 0] = packed.codes[:, 0] & 0xF0 | 8  # the first column is zero
    for factor in (1.0, 100.0, 10_000.0):
        x = torch.randn(20, 512, dtype=dtype)
        x[:, 0] = factor
        expected = x.double() @ packed.weight().double().t()
        found = int8_kernel(x, packed, None)
        assert relative_error(found, expected) <= KERNEL[dtype], factor


class TestServes:
    def test_schemes_dtypes_and_devices(self):
        x = torch.randn(2, 64)
        for spec in SPECS:
            for inputs in INPUTS.values():
                assert int8_kernel.serves(x, packed_weight(3, 64, LayerSpec(spec, inputs)))
        assert not int8_kernel.serves(x.double(), packed_weight(3, 64, QuantSpec(4)))
        assert not int8_kernel.serves(x.to("meta"), packed_weight(3, 64, QuantSpec(4)))
        assert not int8_kernel.serves(x, packed_weight(3, 64, QuantSpec(4, "group", 15)))
        assert int8_kernel.serves(x, packed_weight(3, 64, QuantSpec(4, "group", 16)))

    def test_a_machine_without_exact_arithmetic_gets_the_reference(self, monkeypatch):
        monkeypatch.setattr("optimum_zsaq.kernels.native.runs", lambda: False)
        x = torch.randn(2, 64)
        cases = [(dtype, inputs) for dtype in DTYPES for inputs in INPUTS.values()]
        packed = packed_weight(3, 64, QuantSpec(4))
        assert choose_kernel(x, packed).name == "int8"
        monkeypatch.setattr(int8, "_multiplies_exactly", lambda layout: False)
        for dtype, inputs in cases:
            packed = packed_weight(3, 64, LayerSpec(QuantSpec(4), inputs))
            for runtime in RUNTIMES:
                assert choose_kernel(x.to(dtype), with_runtime(packed, runtime)).name == "reference"

    def test_a_machine_whose_fbgemm_is_inexact_does_without(self, monkeypatch):
        exactly = int8._multiplies_exactly
        monkeypatch.setattr(int8, "_multiplies_exactly", lambda layout: layout is not int8._Fbgemm and exactly(layout))
        for batch in (1, 2, 20):
            packed = packed_weight(3, 64, LayerSpec(QuantSpec(8), DYNAMIC))
            compare("int8", torch.randn(batch, 64), packed)
            assert set(_ENTRIES[packed.codes][1]) == {"onednn"}

    def test_the_check_sees_saturation(self, monkeypatch):
        """Sums of two products in 16 bits, as CPUs without VNNI have them."""
        multiply = int8._OneDNN.multiply

        def saturating(self, part, inputs, columns):
            y = multiply(self, part, inputs, columns)
            return y.clamp(-(2.0**20), 2.0**20)

        int8._multiplies_exactly.cache_clear()
        monkeypatch.setattr(int8._OneDNN, "multiply", saturating)
        try:
            assert not int8.is_exact()
        finally:
            int8._multiplies_exactly.cache_clear()

    def test_a_machine_without_the_libraries_gets_the_reference(self, monkeypatch):
        def missing(*args):
            raise RuntimeError("Didn't find engine for operation quantized::linear_prepack NoQEngine")

        int8._multiplies_exactly.cache_clear()
        monkeypatch.setattr("optimum_zsaq.kernels.native.runs", lambda: False)
        monkeypatch.setattr(int8._OneDNN, "pack", missing)
        try:
            assert choose_kernel(torch.randn(2, 64), packed_weight(3, 64, QuantSpec(4))).name == "reference"
        finally:
            int8._multiplies_exactly.cache_clear()


class TestSmall:
    def test_keeps_nothing(self):
        for spec in FEW:
            packed = packed_weight(33, 64, LayerSpec(spec, DYNAMIC, 0.05), runtime="small")
            for batch in (1, 20):
                compare("int8", torch.randn(batch, 64), packed)
            assert packed.codes not in _ENTRIES

    @pytest.mark.parametrize("inputs", ["float", "dynamic-8"])
    @pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, "group", 128, symmetric=False)], ids=spec_id)
    def test_scratch_memory_is_bounded(self, spec, inputs):
        """A call on a weight of 8 million takes less than it would as int8; so does each larger one."""
        packed = packed_weight(4096, 2048, LayerSpec(spec, INPUTS[inputs]), runtime="small")
        x = torch.randn(1, 2048)
        int8_kernel(x, packed, None)
        assert peak_memory(lambda: int8_kernel(x.clone(), packed, None)) < 16 * int8._BLOCK

    def test_blocks_do_not_show(self, monkeypatch):
        packed = packed_weight(33, 64, LayerSpec(QuantSpec(3, "group", 32, symmetric=False), DYNAMIC), runtime="small")
        x = torch.randn(20, 64)
        expected = int8_kernel(x, packed, None)
        monkeypatch.setattr(int8, "_BLOCK", 5 * 64)  # five rows at a time, the last block has three
        assert torch.equal(int8_kernel(x.clone(), packed, None), expected)
        monkeypatch.setattr(int8, "_BLOCK", 1)
        assert torch.equal(int8_kernel(x.clone(), packed, None), expected)


def peak_memory(call) -> int:
    """The most bytes that PyTorch's allocator has given out at a time during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events
    return peak


def test_runtimes_agree_on_the_same_tensors():
    for spec in SPECS:
        packed = packed_weight(33, 129, LayerSpec(spec, DYNAMIC, 0.01))
        x = torch.randn(5, 129)
        fast, small = (int8_kernel(x, replace(packed, runtime=runtime), None) for runtime in RUNTIMES)
        assert relative_error(small, fast) <= KERNEL[torch.float32]
