"""Codes and ranges made better for each other, against a search over all codes and least squares, both spelled out."""

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from optimum_zsaq.algorithms.compensation import CompensationSettings, compensate_layer
from optimum_zsaq.algorithms.refinement import best_ranges, can_refine, refine, sweep
from optimum_zsaq.kinds import kind_of
from optimum_zsaq.layers import LowBitLayer
from optimum_zsaq.ops import dequantize, find_ranges, quantize, stored_scale
from optimum_zsaq.spec import LayerSpec, QuantSpec


ROWS, COLUMNS, SIZE = 5, 36, 8
LAYOUTS = {"tensor": ("tensor", None), "row": ("row", None), "group": ("group", SIZE)}
FORMS = {"symmetric": {}, "asymmetric": {"symmetric": False}}
FORMS["minimum"] = {"symmetric": False, "minimum": True, "scale_bits": 16}
SPECS = [QuantSpec(bits, *layout, **form) for bits in (2, 3) for layout in LAYOUTS.values() for form in FORMS.values()]


def weight_and_hessian(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 5, generator=random) @ torch.randn(5, COLUMNS, generator=random)
    x += torch.randn(200, COLUMNS, generator=random) * (0.3 + torch.rand(COLUMNS, generator=random))
    return torch.randn(ROWS, COLUMNS, generator=random), x.t() @ x / len(x)


def error(found: Tensor, wanted: Tensor, hessian: Tensor) -> float:
    change = (found - wanted).double()
    return ((change @ hessian.double()) * change).sum().item()


def low_bit(weight: Tensor, spec: QuantSpec) -> LowBitLayer:
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = weight.clone()
    layer = kind_of(layer).fake.from_float(layer, LayerSpec(spec))
    layer.find_ranges("minmax")
    return layer


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_sweep_is_a_search_over_all_codes_column_by_column(spec):
    wanted, hessian = weight_and_hessian()
    scale, shift = find_ranges(wanted, spec, "minmax")
    scale = stored_scale(scale, spec)
    levels = [
        dequantize(torch.full((ROWS, COLUMNS), c, dtype=torch.uint8), scale, shift, spec) for c in range(2**spec.bits)
    ]
    levels = torch.stack(levels)
    codes = quantize(wanted, scale, shift, spec).long()
    for row in range(ROWS):
        for j in range(COLUMNS):
            tried = []
            for c in range(2**spec.bits):
                codes[row, j] = c
                values = levels[:, row].gather(0, codes[row][None])
                tried.append(error(values, wanted[row : row + 1], hessian))
            codes[row, j] = min(range(len(tried)), key=tried.__getitem__)
    found = sweep(wanted, wanted, hessian, scale, shift, spec)
    assert torch.equal(quantize(found, scale, shift, spec).long(), codes)
    assert not torch.equal(codes, quantize(wanted, scale, shift, spec).long())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.granularity != "tensor"], ids=str)
def test_ranges_are_least_squares(spec):
    wanted, hessian = weight_and_hessian()
    scale, shift = find_ranges(wanted, spec, "minmax")
    codes = quantize(wanted, scale, shift, spec)
    new = best_ranges(codes, wanted, hessian, scale, shift, spec)
    factor = torch.linalg.cholesky(hessian.double())  # tr(E H E^T) = |E factor|^2
    size = SIZE if spec.granularity == "group" else COLUMNS
    for row in range(ROWS):
        features = []
        for g in range(scale.shape[1]):
            inside = (torch.arange(COLUMNS) // size == g).double()
            zero = 0 if spec.minimum else spec.offset if spec.symmetric else shift[row, g].double()
            features.append(inside * (codes[row].double() - zero))
        features += [(torch.arange(COLUMNS) // size == g).double() for g in range(scale.shape[1])] if spec.minimum else []
        best = torch.linalg.lstsq((torch.stack(features) @ factor).t(), factor.t() @ wanted[row].double()).solution
        found = torch.cat([new[0][row], new[1][row]]) if spec.minimum else new[0][row]
        assert torch.allclose(found.double(), best, rtol=0.02, atol=0.02)  # a ten-thousandth pulls to the old ones
    before, after = (error(dequantize(codes, *ranges, spec), wanted, hessian) for ranges in ((scale, shift), new))
    assert after < before


def test_a_scale_that_would_turn_stays():
    wanted, hessian = weight_and_hessian()
    spec = QuantSpec(3, "group", SIZE, symmetric=False, minimum=True)
    scale, shift = find_ranges(wanted, spec, "minmax")
    codes = quantize(wanted, scale, shift, spec)
    codes[0, :SIZE] = 7 - codes[0, :SIZE]
    new, minimum = best_ranges(codes, wanted, hessian, scale, shift, spec)
    assert (new > 0).all()
    assert (new[0, 0], minimum[0, 0]) == (scale[0, 0], shift[0, 0])
    assert not torch.equal(new[0, 1:], scale[0, 1:])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_round_wins(spec):
    wanted, hessian = weight_and_hessian()
    found = []
    for rounds in (0, 1, 4):
        layer = low_bit(wanted, spec)
        compensate_layer(layer, hessian, torch.zeros_like(hessian), CompensationSettings(rounds=rounds))
        found.append(error(layer.quantized_weight().detach(), wanted, hessian))
    assert found[1] < (1.01 if spec.granularity == "tensor" else 1.0) * found[0]  # the error is that without damping
    assert found[2] < 1.01 * found[1]


def test_few_rows_at_a_time(monkeypatch):
    wanted, hessian = weight_and_hessian()
    spec, found = QuantSpec(2, "group", SIZE, **FORMS["minimum"]), []
    for most in (2**24, 1):
        monkeypatch.setattr("optimum_zsaq.algorithms.refinement._AT_ONCE", most)
        layer = low_bit(wanted, spec)
        refine(layer, wanted, hessian, 2)
        found.append(layer.quantized_weight().detach())
    assert relative_error(found[1], found[0]) < 1e-5


def test_a_group_that_carries_nothing():
    """Without inputs no range is better than another: nothing becomes NaN."""
    wanted, hessian = weight_and_hessian()
    hessian[:SIZE], hessian[:, :SIZE] = 0, 0
    layer = low_bit(wanted, QuantSpec(2, "group", SIZE, **FORMS["minimum"]))
    compensate_layer(layer, hessian, torch.zeros_like(hessian), CompensationSettings(rounds=2))
    assert torch.isfinite(layer.quantized_weight()).all()
    assert (layer.weight_scale > 0).all()


def test_what_cannot_be_refined_is_left_alone():
    ternary = kind_of(torch.nn.Linear(COLUMNS, ROWS)).fake.from_float(
        torch.nn.Linear(COLUMNS, ROWS), LayerSpec(QuantSpec(2, ternary=True))
    )
    assert not can_refine(ternary)
    wanted, hessian = weight_and_hessian()
    found = []
    for rounds in (0, 2):
        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight.data = wanted.clone()
        layer = kind_of(layer).fake.from_float(layer, LayerSpec(QuantSpec(3), outliers=0.05))
        layer.find_ranges("minmax")
        compensate_layer(layer, hessian, torch.zeros_like(hessian), CompensationSettings(rounds=rounds))
        found.append(layer.weight)
    assert torch.equal(*found)
