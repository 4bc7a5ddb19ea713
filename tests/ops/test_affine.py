import struct

import pytest
import torch
from conformance import BITS, DTYPES, GROUP, random_weight, spec_id, weight_specs
from tolerances import FORMULA, relative_error
from torch import Tensor

from optimum_zsaq.ops import clipped, dequantize, fake_quantize, fake_quantize_tokens, find_ranges, quantize, scale_dtype
from optimum_zsaq.ops.affine import expand_slices, slice_means, ternary_levels
from optimum_zsaq.spec import QuantSpec


UNIFORM = weight_specs(ternary=False)


def f32(value: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def slice_index(i: int, j: int, spec: QuantSpec) -> tuple[int, int]:
    """Where the scale of the weight (i, j) is."""
    return {"tensor": (0, 0), "row": (i, 0), "group": (i, j // (spec.group_size or 1))}[spec.granularity]


def quantize_by_loop(weight: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Stored codes and values, weight by weight; python's `round` takes halves to even."""
    codes, values = [], []
    for i, row in enumerate(weight.float().tolist()):
        for j, value in enumerate(row):
            at = slice_index(i, j, spec)
            s = scale[at].item()
            if spec.minimum:
                low = shift[at].item()
                codes.append(min(max(round(f32(f32(value - low) / s)), 0), spec.highest))
                values.append(f32(f32(codes[-1] * s) + low))
                continue
            z = 0 if shift is None else int(shift[at])
            level = min(max(round(f32(value / s)), spec.lowest - z), spec.highest - z)
            codes.append(level + z + spec.offset)
            values.append(f32(level * s))
    shape = weight.shape
    return torch.tensor(codes, dtype=torch.uint8).view(shape), torch.tensor(values, dtype=torch.float32).view(shape)


def shift_of(spec: QuantSpec, shape: tuple[int, int], zero_point: int, scale: float) -> Tensor | None:
    """The zero point, or the minimum that stands for the same."""
    if spec.symmetric:
        return None
    if spec.minimum:
        return torch.full(shape, -zero_point * scale, dtype=scale_dtype(spec))
    return torch.full(shape, zero_point, dtype=torch.uint8)


@pytest.mark.parametrize("spec", UNIFORM, ids=spec_id)
class TestUniformCodes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_the_loop(self, spec, dtype, device):
        for seed in range(4):
            weight = random_weight(3, 17, seed, dtype)
            scale, zero_point = find_ranges(weight, spec, "lsq")  # lsq clips: both ends of the range occur
            codes, values = quantize_by_loop(weight, scale, zero_point, spec)
            here = [None if t is None else t.to(device) for t in (weight, scale, zero_point)]
            assert torch.equal(quantize(*here, spec).cpu(), codes)
            assert torch.equal(dequantize(codes.to(device), *here[1:], spec).cpu(), values)
            assert torch.equal(fake_quantize(*here, spec).cpu(), values)

    def test_fake_quantize_is_dequantize_of_quantize(self, spec):
        for dtype in DTYPES:
            for seed in range(10):
                weight = random_weight(5, 33, seed, dtype)
                found = find_ranges(weight, spec, "minmax")
                before = weight.clone()
                expected = dequantize(quantize(weight, *found, spec), *found, spec)
                assert torch.equal(fake_quantize(weight, *found, spec), expected)
                assert torch.equal(weight, before)

    def test_integer_grid_survives(self, spec):
        """Integers inside the range, with scale 1 and any zero point, are their own values."""
        for z in {0, 1, spec.highest // 2, spec.highest} if not spec.symmetric else {0}:
            grid = torch.arange(spec.lowest - z, spec.highest - z + 1.0).repeat(3, 1)
            shape = spec.scale_shape(*grid.shape)
            shift = shift_of(spec, shape, z, 1.0)
            assert torch.equal(fake_quantize(grid, torch.ones(shape), shift, spec), grid)
            assert quantize(grid, torch.ones(shape), shift, spec)[0].tolist() == list(range(2**spec.bits))

    def test_zero_maps_to_zero(self, spec):
        if spec.minimum:
            pytest.skip("zero is no special value beside a minimum")
        weight = random_weight(3, 17, 0)
        weight[:, ::3] = 0
        for ranges in ("minmax", "mse", "lsq"):
            found = find_ranges(weight, spec, ranges)
            assert not fake_quantize(weight, *found, spec)[:, ::3].any()

    def test_values_outside_the_range_saturate(self, spec):
        shape, z = spec.scale_shape(1, 6), 0 if spec.symmetric else 1
        shift = shift_of(spec, shape, z, 0.5)
        x = torch.tensor([[-torch.inf, -1e30, -1000.0, 1000.0, 1e30, torch.inf]])
        ends = [spec.lowest - z] * 3 + [spec.highest - z] * 3
        assert fake_quantize(x, torch.full(shape, 0.5), shift, spec).tolist() == [[e * 0.5 for e in ends]]
        stored = [spec.lowest + spec.offset] * 3 + [spec.highest + spec.offset] * 3
        assert quantize(x, torch.full(shape, 0.5), shift, spec).tolist() == [stored]

    def test_quantizing_twice_changes_nothing(self, spec):
        weight = random_weight(3, 17, 2)
        found = find_ranges(weight, spec, "minmax")
        once = fake_quantize(weight, *found, spec)
        assert torch.equal(fake_quantize(once, *found, spec), once)

    def test_gradients_are_those_of_lsq(self, spec):
        """v = w / s (with the zero point's shift): dQ/dw = 1 inside and 0 outside; dQ/ds = round(v) - v inside, the
        bound that v passes outside (LSQ, equation 3)."""
        weight = random_weight(3, 17, 0).double().requires_grad_()
        scale, shift = find_ranges(weight, spec, "lsq")
        scale = scale.double().requires_grad_()
        upstream = torch.randn(3, 17, dtype=torch.float64)
        found = torch.autograd.grad(fake_quantize(weight, scale, shift, spec), (weight, scale), upstream)
        of_weight, of_scale = torch.zeros(3, 17, dtype=torch.float64), torch.zeros_like(scale)
        for i in range(3):
            for j in range(17):
                at = slice_index(i, j, spec)
                z = 0 if shift is None or spec.minimum else int(shift[at])
                value = weight[i, j] - shift[at].double() if spec.minimum else weight[i, j]
                v, low, high = (value / scale[at]).item(), spec.lowest - z, spec.highest - z
                inside = low <= v <= high
                of_weight[i, j] = upstream[i, j] * inside
                of_scale[at] += upstream[i, j] * (round(v) - v if inside else low if v < low else high)
        assert 0 < of_weight.count_nonzero() <= 51
        assert relative_error(found[0], of_weight) < FORMULA
        assert relative_error(found[1], of_scale.detach()) < FORMULA


@pytest.mark.parametrize("spec", weight_specs(bits=(), ternary=True), ids=spec_id)
class TestTernary:
    def test_threshold_and_codes_by_hand(self, spec):
        """Slices (a tensor, a row, a group) of (0.69, -0.71, 0.6, 0.2, -2.8): mean magnitude 1.0, threshold 0.7."""
        weight = torch.tensor([[0.69, -0.71, 0.6, 0.2, -2.8]])
        assert ternary_levels(weight, spec).tolist() == [[0, -1, 0, 0, -1]]
        scale = torch.tensor([[1.75]])
        assert quantize(weight, scale, None, spec).tolist() == [[2, 1, 2, 2, 1]]
        assert fake_quantize(weight, scale, None, spec).tolist() == [[0, -1.75, 0, 0, -1.75]]

    def test_codes_depend_on_the_own_slice_only(self, spec):
        weight = torch.tensor([[0.1, -0.5, 0.6, 1.0, -2.8, 30.0, 1.0], [1.0] * 7])
        codes = {"tensor": [0, 0, 0, 0, -1, 1, 0], "row": [0, 0, 0, 0, 0, 1, 0], "group": [0, 0, 0, 1, -1, 1, 0]}
        other = {"tensor": [0] * 7, "row": [1] * 7, "group": [1] * 7}
        expected = [codes[spec.granularity], other[spec.granularity]]
        assert ternary_levels(weight, spec).tolist() == expected

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_fake_quantize_is_dequantize_of_quantize(self, spec, dtype):
        for seed in range(10):
            weight = random_weight(3, 17, seed, dtype)
            scale, _ = find_ranges(weight, spec, "ternary")
            codes = quantize(weight, scale, None, spec)
            assert set(codes.unique().tolist()) <= {1, 2, 3}
            assert torch.equal(fake_quantize(weight, scale, None, spec), dequantize(codes, scale, None, spec))

    def test_gradients(self, spec):
        """That of the weight is 1 everywhere, that of the scale the sum of t - w / s over the slice."""
        weight = random_weight(3, 17, 0).double().requires_grad_()
        scale = find_ranges(weight, spec, "ternary")[0].double().requires_grad_()
        upstream = torch.randn(3, 17, dtype=torch.float64)
        found = torch.autograd.grad(fake_quantize(weight, scale, None, spec), (weight, scale), upstream)
        terms = upstream * (ternary_levels(weight.detach(), spec) - weight.detach() / expand_slices(scale, 17, spec))
        expected = torch.zeros_like(scale)
        for i in range(3):
            for j in range(17):
                expected[slice_index(i, j, spec)] += terms[i, j]
        assert relative_error(found[0], upstream) < FORMULA
        assert relative_error(found[1], expected) < FORMULA


@pytest.mark.parametrize("columns", [3, 15, 17])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_slices(granularity, columns):
    spec = QuantSpec(4, granularity, GROUP if granularity == "group" else None)
    x = random_weight(2, columns, 0).double()
    means = slice_means(x, spec)
    expanded = expand_slices(means, columns, spec).expand(2, columns)
    for i in range(2):
        for j in range(columns):
            members = [
                x[k, m] for k in range(2) for m in range(columns) if slice_index(k, m, spec) == slice_index(i, j, spec)
            ]
            assert relative_error(expanded[i, j], torch.stack(members).mean()) < FORMULA
    assert means.shape == spec.scale_shape(2, columns)


def test_double_precision_is_kept():
    x = torch.tensor([[1 / 3, -0.7]], dtype=torch.float64)
    scale = torch.tensor([[1 / 7]], dtype=torch.float64)
    found = fake_quantize(x, scale, None, QuantSpec(4))
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.tensor([[2.0, -5.0]], dtype=torch.float64) * scale)


@pytest.mark.parametrize("shape", [(13,), (3, 13), (2, 3, 13), (2, 0, 13)], ids=str)
def test_one_scale_a_tensor_serves_every_shape(shape, device):
    """A static input range; the shape of the input is kept."""
    x = torch.randn(shape, device=device)
    scale, zero_point = torch.tensor([[0.05]], device=device), torch.tensor([[100]], dtype=torch.uint8, device=device)
    spec = QuantSpec(8, "tensor", symmetric=False)
    found = fake_quantize(x, scale, zero_point, spec)
    assert found.shape == x.shape
    assert torch.equal(found.reshape(-1, 13), fake_quantize(x.reshape(-1, 13), scale, zero_point, spec))


def tokens_by_loop(x: Tensor, bits: int) -> Tensor:
    """Each row on its own range [min(x, 0), max(x, 0)], value by value."""
    values = []
    for row in x.float().tolist():
        low, high = min(*row, 0.0), max(*row, 0.0)
        scale = f32(f32(high - low) / (2**bits - 1)) or 1.0
        z = round(f32(-low / scale))
        values.append([f32(min(max(round(f32(v / scale)), -z), 2**bits - 1 - z) * scale) for v in row])
    return torch.tensor(values)


@pytest.mark.parametrize("bits", BITS)
class TestDynamicTokens:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_the_loop(self, bits, dtype, device):
        spec = QuantSpec(bits, "token", symmetric=False)
        for seed in range(10):
            x = random_weight(4, 13, seed, dtype)
            x[1], x[2, 1:] = 0, 0  # a token of zeros, a token with one value
            found = fake_quantize_tokens(x.to(device), spec)
            assert found.dtype == torch.float32
            assert torch.equal(found.cpu(), tokens_by_loop(x, bits))

    def test_tokens_do_not_see_each_other(self, bits):
        spec = QuantSpec(bits, "token", symmetric=False)
        x = torch.randn(2, 3, 13) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1)
        found = fake_quantize_tokens(x, spec)
        for i in range(2):
            for j in range(3):
                assert torch.equal(found[i, j], fake_quantize_tokens(x[i, j], spec))

    def test_exact_values(self, bits):
        """Zero stays zero, and so do both ends of a one-sided token and a grid that fills the range."""
        spec = QuantSpec(bits, "token", symmetric=False)
        grid = torch.arange(2.0**bits)
        x = torch.stack([grid, -grid, grid - 1])
        assert torch.equal(fake_quantize_tokens(x, spec), x)
        assert not fake_quantize_tokens(torch.zeros(2, 5), spec).any()

    def test_gradient_is_that_of_the_identity(self, bits):
        x = torch.randn(3, 13, requires_grad=True)
        upstream = torch.randn(3, 13)
        found = fake_quantize_tokens(x, QuantSpec(bits, "token", symmetric=False))
        (gradient,) = torch.autograd.grad(found, x, upstream)
        assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_clipped_values_are_those_without_a_gradient(symmetric, granularity):
    spec = QuantSpec(3, granularity, 4 if granularity == "group" else None, symmetric)
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale, zero_point = find_ranges(x, spec)
    fake_quantize(x, scale * 0.7, zero_point, spec).sum().backward()
    outside = clipped(x, scale * 0.7, zero_point, spec)
    assert torch.equal(outside, x.grad == 0)
    assert 0 < outside.sum() < x.numel()
