from dataclasses import replace

import pytest
import torch
from conformance import DTYPES, GROUP, random_weight, spec_id, weight_specs
from tolerances import MSE_SEARCH, ONE_DIVISION, SUM_OF_SQUARES, relative_error
from torch import Tensor

from optimum_zsaq.ops import RANGES, fake_quantize, find_input_range, find_ranges, ranges, scale_dtype, search
from optimum_zsaq.spec import QuantSpec


UNIFORM = weight_specs(ternary=False)
METHODS = ("minmax", "mse", "signed", "lsq")


def squared_error(weight: Tensor, found: ranges.Range, spec: QuantSpec) -> Tensor:
    """Squared error of each row, in float64."""
    return (weight - fake_quantize(weight, *found, spec)).double().square().sum(dim=1)


@pytest.mark.parametrize("spec", UNIFORM, ids=spec_id)
class TestEveryUniformSpec:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_shapes_and_dtypes(self, spec, method, dtype, device):
        weight = random_weight(3, 17, 0, dtype).to(device)
        before = weight.clone()
        scale, shift = find_ranges(weight, spec, method)
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, spec.scale_shape(3, 17))
        assert (scale != 0).all() if method == "signed" else (scale > 0).all()
        if spec.symmetric:
            assert shift is None
        else:
            assert (shift.dtype, shift.shape) == (scale_dtype(spec) if spec.minimum else torch.uint8, scale.shape)
            assert spec.minimum or shift.max() <= spec.highest
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("method", METHODS)
    def test_slices_are_found_one_by_one(self, spec, method):
        """What a whole weight gets is what each of its slices gets alone: also the short last group."""
        weight = random_weight(3, 17, 2)
        scale, shift = find_ranges(weight, spec, method)
        if spec.granularity == "tensor":
            slices = [((0, 0), weight.reshape(1, -1))]
        else:
            size = spec.group_size or 17
            slices = [
                ((i, g), weight[i : i + 1, g * size : (g + 1) * size]) for i in range(3) for g in range(-(-17 // size))
            ]
        row = replace(spec, granularity="row", group_size=None)
        for at, part in slices:
            alone, zero = find_ranges(part, row, method)
            assert relative_error(scale[at], alone[0, 0]) < ONE_DIVISION
            assert zero is None or shift[at] == zero[0, 0]

    @pytest.mark.parametrize("method", METHODS)
    def test_block_by_block_is_the_same(self, spec, method, monkeypatch):
        if spec.granularity == "tensor" and method in ("mse", "signed"):
            return self.tensor_wide_search_block_by_block(spec, method, monkeypatch)
        weight = random_weight(5, 17, 0)
        scale, zero_point = find_ranges(weight, spec, method)
        monkeypatch.setattr(ranges, "CHUNK", 40)
        monkeypatch.setattr(search, "CHUNK", 40)
        again, zero = find_ranges(weight, spec, method)
        assert relative_error(again, scale) < ONE_DIVISION
        assert zero is None or torch.equal(zero, zero_point)

    @staticmethod
    def tensor_wide_search_block_by_block(spec, method, monkeypatch):
        """Sums over blocks round otherwise, so another scale of equal error may win."""
        weight = random_weight(5, 17, 0)
        error = squared_error(weight, find_ranges(weight, spec, method), spec).sum()
        monkeypatch.setattr(ranges, "CHUNK", 40)
        monkeypatch.setattr(search, "CHUNK", 40)
        again = squared_error(weight, find_ranges(weight, spec, method), spec).sum()
        assert abs(again / error - 1) < SUM_OF_SQUARES

    def test_mse_is_never_worse_than_minmax(self, spec):
        for seed in range(4):
            weight = random_weight(3, 33, seed)
            best = squared_error(weight, find_ranges(weight, spec, "mse"), spec).sum()
            plain = squared_error(weight, find_ranges(weight, spec, "minmax"), spec).sum()
            assert best <= plain * (1 + SUM_OF_SQUARES)

    def test_signed_is_never_worse_than_mse_of_either_sign(self, spec):
        for seed in range(4):
            weight = random_weight(3, 33, seed)
            found = find_ranges(weight, spec, "signed")
            best = squared_error(weight, found, spec).sum()
            for turned in (weight, -weight) if spec.symmetric else (weight,):
                plain = squared_error(turned, find_ranges(turned, spec, "mse"), spec).sum()
                assert best <= plain * 1.07  # of many levels the error is jagged: another start finds another spot
            if spec.symmetric:
                there = squared_error(-weight, find_ranges(-weight, spec, "signed"), spec).sum()
                assert abs(there / best - 1) < SUM_OF_SQUARES
            else:
                assert all(map(torch.equal, found, find_ranges(weight, spec, "mse")))

    @pytest.mark.parametrize("method", ["minmax", "mse"])
    def test_a_grid_that_fills_the_range_survives(self, spec, method):
        """An exact anchor: the weights are scale * code for all codes, the scale a power of two."""
        low = spec.lowest if spec.symmetric else -(spec.highest // 3)
        grid = (torch.arange(2.0**spec.bits) + low).repeat(2, 1) * 0.25
        size = 2**spec.bits if spec.granularity == "group" else None
        spec = QuantSpec(spec.bits, spec.granularity, size, spec.symmetric)
        found = find_ranges(grid, spec, method)
        assert torch.equal(fake_quantize(grid, *found, spec), grid)

    @pytest.mark.parametrize("method", METHODS)
    def test_zeros_get_a_scale_that_works(self, spec, method):
        weight = torch.zeros(2, 17)
        found = find_ranges(weight, spec, method)
        assert torch.equal(found[0], torch.ones_like(found[0]))
        assert torch.equal(fake_quantize(weight, *found, spec), weight)

    @pytest.mark.parametrize("method", METHODS)
    def test_tiny_weights_stay_finite(self, spec, method):
        """Subnormal weights, whose scale may underflow to zero."""
        weight = torch.tensor([[1e-45, -1e-45, 0.0], [1e-44, -3e-45, 1e-45]])
        found = find_ranges(weight, spec, method)
        assert torch.isfinite(fake_quantize(weight, *found, spec)).all()


@pytest.mark.parametrize("bits", range(2, 9))
class TestMinmaxByHand:
    def test_symmetric(self, bits):
        """The full signed range: the larger of high / (2^(b-1) - 1) and -low / 2^(b-1), by row."""
        weight = torch.tensor([[-1.0, 0.5, 3.0], [-3.0, 0.5, 1.0], [2.0, 1.0, 0.5]])
        scale, _ = find_ranges(weight, QuantSpec(bits), "minmax")
        top, bottom = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        expected = torch.tensor([[3.0 / top], [max(3.0 / bottom, 1.0 / top)], [2.0 / top]])
        assert torch.equal(scale, expected)

    def test_asymmetric(self, bits):
        """[min(low, 0), max(high, 0)] / (2^b - 1), so a one-sided row has its zero at the end of the codes."""
        weight = torch.tensor([[1.0, 4.0, 2.0], [-3.0, -1.0, -2.0], [-1.0, 1.0, 0.0]])
        top = 2**bits - 1
        scale, zero_point = find_ranges(weight, QuantSpec(bits, symmetric=False), "minmax")
        assert torch.equal(scale, torch.tensor([[4.0], [3.0], [2.0]]) / top)
        assert zero_point[:2].flatten().tolist() == [0, top]
        assert zero_point[2].item() in (top // 2, top // 2 + 1)

    def test_nothing_is_clipped(self, bits):
        for symmetric in (True, False):
            spec = QuantSpec(bits, symmetric=symmetric)
            for seed in range(20):
                weight = random_weight(4, 17, seed)
                found = find_ranges(weight, spec, "minmax")
                error = (weight - fake_quantize(weight, *found, spec)).abs()
                # half a step; asymmetric: a whole one at the ends, as the zero point is rounded
                assert (error <= found[0] * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()


def varied_rows(seed: int, columns: int = 768) -> Tensor:
    """Eight rows: normal, heavy-tailed, with outliers, one-sided."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, columns, generator=generator)
    weight[2:4] *= torch.randn(2, columns, generator=generator).abs()
    weight[4:6, : columns // 50] *= 8
    weight[6:] = weight[6:].abs() + torch.tensor([[0.0], [0.3]])
    return weight


def least_error_by_grid(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The least squared error of each row over 300 scales and, asymmetric, every zero point near that of minmax."""
    scale, middle = find_ranges(weight, spec, "minmax")
    fractions = torch.linspace(0.02, 1.05, 300)[:, None, None]
    least = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for step in (0,) if spec.symmetric else range(-8, 9):
        z = 0 if spec.symmetric else (middle.float() + step).clamp(spec.lowest, spec.highest)
        levels = (weight / (scale * fractions)).round_().clamp_(spec.lowest - z, spec.highest - z)
        least = torch.minimum(least, (weight - levels * scale * fractions).square_().sum(-1).amin(0).double())
    return least


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
class TestMSEMatchesAnExhaustiveSearch:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_each_row(self, bits, symmetric):
        spec = QuantSpec(bits, symmetric=symmetric)
        for seed in range(2):
            weight = varied_rows(seed)
            ratio = squared_error(weight, find_ranges(weight, spec, "mse"), spec) / least_error_by_grid(weight, spec)
            assert (ratio <= MSE_SEARCH).all(), f"seed {seed}: {ratio.tolist()}"

    def test_many_levels(self, symmetric):
        """Of 256 levels the error is jagged in the scale and each row has a lucky spot: the mean over rows counts."""
        spec, weight = QuantSpec(8, symmetric=symmetric), varied_rows(0)
        ratio = squared_error(weight, find_ranges(weight, spec, "mse"), spec) / least_error_by_grid(weight, spec)
        assert ratio.mean() <= MSE_SEARCH, ratio.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_start_by_hand(bits):
    """2 * mean|w| / sqrt(Qp), mean|w| = 2; asymmetric twice that, zero point at -min / scale."""
    weight = torch.tensor([[-1.0, 3.0, -2.0, 2.0]])
    scale, zero_point = find_ranges(weight, QuantSpec(bits), "lsq")
    assert scale.item() == pytest.approx(4.0 / (2 ** (bits - 1) - 1) ** 0.5, rel=ONE_DIVISION)
    assert zero_point is None
    scale, zero_point = find_ranges(weight, QuantSpec(bits, symmetric=False), "lsq")
    assert scale.item() == pytest.approx(8.0 / (2**bits - 1) ** 0.5, rel=ONE_DIVISION)
    assert zero_point.item() == round(2.0 / scale.item())


def test_ternary_by_hand():
    """TWN: Delta = 0.7 * mean|w| = 0.7, kept are 1.0 and -2.8, so alpha = 1.9; a group of equal weights keeps them all."""
    weight = torch.tensor([[0.1, -0.5, 0.6, 1.0, -2.8, 0.25, -0.25]])
    spec = QuantSpec(2, "group", GROUP, ternary=True)
    scale, zero_point = find_ranges(weight, spec, "ternary")
    assert zero_point is None
    assert torch.allclose(scale, torch.tensor([[1.9, 0.25]]), rtol=ONE_DIVISION, atol=0)
    expected = torch.tensor([[0, 0, 0, 1.9, -1.9, 0.25, -0.25]])
    assert torch.allclose(fake_quantize(weight, scale, None, spec), expected, rtol=ONE_DIVISION, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_ternary_of_zeros(granularity):
    spec = QuantSpec(2, granularity, GROUP if granularity == "group" else None, ternary=True)
    scale, _ = find_ranges(torch.zeros(2, 7), spec, "ternary")
    assert torch.equal(scale, torch.ones(spec.scale_shape(2, 7)))


def test_signed_puts_the_code_more_where_the_longest_weight_is():
    """Levels -2, -1, 0, 1 times a scale of either sign hold both rows exactly; a positive one alone cannot."""
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0]]) * 0.25
    scale, zero_point = find_ranges(weight, QuantSpec(2), "signed")
    assert zero_point is None
    assert torch.equal(scale, torch.tensor([[0.25], [-0.25]]))
    assert torch.equal(fake_quantize(weight, scale, None, QuantSpec(2)), weight)


class TestErrors:
    def test_unknown_method(self):
        known = r"\['energy', 'lsq', 'minmax', 'mse', 'signed', 'ternary'\]"
        with pytest.raises(ValueError, match=f"ranges='max' is unknown; use one of {known}"):
            find_ranges(torch.ones(2, 3), QuantSpec(4), "max")

    @pytest.mark.parametrize(
        ("spec", "method"),
        [
            pytest.param(QuantSpec(2), "ternary", id="method-only"),
            pytest.param(QuantSpec(2, ternary=True), "mse", id="spec-only"),
        ],
    )
    def test_ternary_with_something_else(self, spec, method):
        with pytest.raises(ValueError, match=f"ranges='{method}' does not go with ternary={spec.ternary}"):
            find_ranges(torch.ones(2, 3), spec, method)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
    @pytest.mark.parametrize("spec", weight_specs((4,)), ids=spec_id)
    def test_weights_that_are_not_finite(self, spec, bad):
        weight = random_weight(3, 17, 0)
        weight[2, 16] = bad
        for method in ("ternary",) if spec.ternary else METHODS:
            with pytest.raises(
                ValueError, match="a weight is NaN or infinite and has no range; check the float checkpoint"
            ):
                find_ranges(weight, spec, method)


@pytest.mark.parametrize("spec", weight_specs((3,), ternary=False), ids=spec_id)
def test_a_registered_method_is_found(spec, monkeypatch):
    """A new method sees the slices as rows, and what it returns lands in the scale's shape."""
    seen = []

    def largest(slices, spec):
        seen.append(tuple(slices.shape))
        scale = slices.abs().amax(dim=1)
        return scale, None if spec.symmetric else torch.full_like(scale, 3.0)

    monkeypatch.setitem(RANGES, "largest", largest)
    weight = torch.arange(1.0, 15.0).view(2, 7)
    scale, zero_point = find_ranges(weight, spec, "largest")
    expected = {"tensor": [[14.0]], "row": [[7.0], [14.0]], "group": [[5.0, 7.0], [12.0, 14.0]]}[spec.granularity]
    assert scale.tolist() == expected
    assert seen == {"tensor": [(1, 14)], "row": [(2, 7)], "group": [(2, 5), (2, 2)]}[spec.granularity]
    assert zero_point is None if spec.symmetric else (zero_point == 3).all()


@pytest.mark.parametrize("bits", [3, 8])
class TestInputRange:
    def test_minmax_takes_the_extremes_of_everything_seen(self, bits):
        spec = QuantSpec(bits, "tensor", symmetric=False)
        scale, zero_point = find_input_range(torch.tensor([0.5, 0.25]), -1.0, 4.0, spec, "minmax")
        assert (scale.shape, scale.dtype) == ((1, 1), torch.float32)
        assert (zero_point.shape, zero_point.dtype) == ((1, 1), torch.uint8)
        assert scale.item() == pytest.approx(5.0 / (2**bits - 1), rel=ONE_DIVISION)
        assert zero_point.item() == round((2**bits - 1) / 5.0)

    def test_mse_beats_minmax_on_what_it_saw(self, bits):
        spec = QuantSpec(bits, "tensor", symmetric=False)
        for seed in range(5):
            values = varied_rows(seed)[4]
            low, high = values.min().item(), values.max().item()
            error = {}
            for method in ("mse", "minmax"):
                found = find_input_range(values, low, high, spec, method)
                error[method] = squared_error(values.view(1, -1), found, spec).item()
            assert error["mse"] < error["minmax"]

    def test_one_sided_inputs_use_all_codes(self, bits):
        spec = QuantSpec(bits, "tensor", symmetric=False)
        values = torch.rand(50, generator=torch.Generator().manual_seed(0))
        for method in ("mse", "minmax"):
            for sign, zero in ((1, 0), (-1, 2**bits - 1)):
                x = sign * values
                _, zero_point = find_input_range(x, x.min().item(), x.max().item(), spec, method)
                assert zero_point.item() == zero


class TestEnergy:
    """The error of a weight counts by what it is multiplied with."""

    @staticmethod
    def weighted_error(weight: Tensor, found: ranges.Range, spec: QuantSpec, energies: Tensor) -> Tensor:
        return ((weight - fake_quantize(weight, *found, spec)).double().square() * energies).sum(dim=1)

    @staticmethod
    def uneven(columns: int) -> Tensor:
        """A few channels carry a thousand times what the others do."""
        return torch.where(torch.arange(columns) % 7 == 3, 1000.0, 1.0)

    @pytest.mark.parametrize("spec", [s for s in UNIFORM if s.granularity != "tensor"], ids=spec_id)
    def test_no_other_method_has_less_of_it(self, spec):
        weight, energies = random_weight(16, 34, 0), self.uneven(34)
        found = self.weighted_error(weight, find_ranges(weight, spec, "energy", energies), spec, energies)
        for method in ("minmax", "mse", "signed"):
            other = self.weighted_error(weight, find_ranges(weight, spec, method), spec, energies)
            assert found.sum() <= other.sum() * MSE_SEARCH

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_is_near_the_best_of_every_scale(self, bits):
        """Against a slow reference: 4,000 scales of either sign, one after the other."""
        spec, energies = QuantSpec(bits, "row"), self.uneven(21)
        weight = random_weight(6, 21, 3)
        found = self.weighted_error(weight, find_ranges(weight, spec, "energy", energies), spec, energies)
        largest = weight.abs().amax(dim=1, keepdim=True)
        tried = [
            self.weighted_error(weight, (sign * largest * i / 2000 / 2 ** (bits - 1), None), spec, energies)
            for i in range(1, 4001)
            for sign in (1.0, -1.0)
        ]
        best = torch.stack([error.nan_to_num(torch.inf) for error in tried]).amin(dim=0)
        assert found.sum() <= best.sum() * 1.05  # of a row, three channels decide, and the error is jagged in the scale

    def test_equal_energies_count_nothing(self):
        weight, spec = random_weight(8, 32, 1), QuantSpec(3, "group", GROUP)
        found = find_ranges(weight, spec, "energy", torch.full((32,), 5.0))[0]
        assert relative_error(found, find_ranges(weight, spec, "signed")[0]) < SUM_OF_SQUARES

    @pytest.mark.parametrize("method", ["row", "group"])
    def test_a_channel_without_any_does_not_stretch_the_range(self, method):
        spec = QuantSpec(4, method, GROUP if method == "group" else None)
        weight, energies = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.ones(16)
        weight[:, 5], energies[5] = 30.0, 0.0
        scale = find_ranges(weight, spec, "energy", energies)[0]
        assert (scale[:, 5 // GROUP if method == "group" else 0].abs() < 1.5).all()

    def test_of_inputs_that_are_zero(self):
        weight, spec = random_weight(4, 16, 2), QuantSpec(4, "row")
        found = find_ranges(weight, spec, "energy", torch.zeros(16))[0]
        assert torch.isfinite(found).all()
        assert (found != 0).all()

    @pytest.mark.parametrize(
        ("method", "energies", "message"),
        [
            ("energy", None, "energies=None do not go together"),
            ("mse", torch.ones(16), "ranges='mse' and energies=given"),
            ("energy", torch.ones(15), r"shape \(15,\) and the weight has 16 columns"),
            ("energy", -torch.ones(16), "negative, NaN or infinite"),
            ("energy", torch.full((16,), float("nan")), "negative, NaN or infinite"),
        ],
    )
    def test_what_is_refused(self, method, energies, message):
        with pytest.raises(ValueError, match=message):
            find_ranges(random_weight(4, 16, 2), QuantSpec(4, "row"), method, energies)
