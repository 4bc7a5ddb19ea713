"""The study's weight-only quantizers: grids, errors and invariances that HQQ, SINQ and the second axis must have."""

import sys
from pathlib import Path

import pytest
import torch

from optimum_zsaq import QuantSpec
from optimum_zsaq.ops import fake_quantize, find_ranges


STUDY = Path(__file__).parents[2] / "examples" / "study"
QUANTIZERS = ("hqq", "sinq", "rounding", "rescaled", "second_axis")
GROUP = 8


@pytest.fixture
def study(monkeypatch):
    """The study's module, with the ones beside it."""
    for name in ("bootstrap", "prequant", "prequant_tables", "runner", "weight_only"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(STUDY))
    import weight_only

    return weight_only


def drawn(rows: int = 12, columns: int = 32, seed: int = 0, spread: bool = False) -> torch.Tensor:
    """Normal weights of about 0.05; with `spread` the deviations of rows and columns differ up to a few times."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    if spread:
        weight *= torch.rand(rows, 1, generator=generator) * 2 + 0.5
        weight *= torch.rand(1, columns, generator=generator) * 2 + 0.5
    return weight


def grouped(weight: torch.Tensor) -> torch.Tensor:
    return weight.unflatten(1, (-1, GROUP))


def between_extremes(weight: torch.Tensor, bits: int, group_size: int = GROUP) -> torch.Tensor:
    """Plain rounding between each group's minimum and maximum, with a float zero point: HQQ's start."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (((groups - low) / scale).round() * scale + low).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_shape_dtype_and_error(study, name, bits):
    """Every method leaves its input alone, and its error falls with the bits."""
    weight = drawn(spread=True)
    before = weight.clone()
    values = getattr(study, name)(weight, bits, GROUP)
    assert torch.equal(weight, before)
    assert values.shape == weight.shape
    assert values.dtype == torch.float32
    error = (values - weight).norm() / weight.norm()
    finer = getattr(study, name)(weight, bits + 1, GROUP)
    assert (finer - weight).norm() / weight.norm() < error < {2: 0.5, 3: 0.25, 4: 0.12}[bits]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_group_size_that_does_not_divide(study, name):
    if name == "rounding":
        assert study.rounding(drawn(), 4, 5).shape == (12, 32)  # the package's groups may be short
        return
    with pytest.raises(ValueError, match="group_size=5 does not divide the 32 columns of the weight"):
        getattr(study, name)(drawn(), 4, 5)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels_of_a_group(study, name, bits):
    """At most 2^bits values a group; with a second axis, once they are divided by the columns' scales."""
    weight, columns = drawn(columns=128, spread=True), torch.ones(1, 128)
    if name == "sinq":
        columns = study.balance(weight.unflatten(1, (-1, 64)).transpose(0, 1))[1].reshape(1, -1)
    elif name == "second_axis":
        columns = weight.std(dim=0, keepdim=True)
    values = (getattr(study, name)(weight, bits, 64) / columns).unflatten(1, (-1, 64)).flatten(0, 1)
    levels = 1 + (values.sort(dim=1).values.diff(dim=1) > 1e-5 * values.abs().max()).sum(dim=1)
    assert levels.max() == 2**bits


# HQQ


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size", [GROUP, 64])
def test_hqq_is_not_worse_than_its_start(study, group_size, bits, seed):
    """By the mean magnitude of the error, which ends the rounds; in groups that are not tiny also by the norm it is for."""
    weight = drawn(columns=128, seed=seed)
    start = between_extremes(weight, bits, group_size)
    errors = [(values - weight).abs() for values in (study.hqq(weight, bits, group_size), start)]
    for power in (1.0,) if group_size == GROUP else (1.0, 0.7):
        found, first = (error.pow(power).mean() for error in errors)
        assert found <= first * (1.0 + 1e-6 if group_size == GROUP else 0.995)


def test_hqq_first_round_is_the_start(study, monkeypatch):
    monkeypatch.setattr(study, "_STEPS", 1)
    weight = drawn()
    torch.testing.assert_close(study.hqq(weight, 3, GROUP), between_extremes(weight, 3))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_keeps_what_is_on_a_grid(study, bits):
    """Values on an even grid that goes through 0, with both ends in every group, come back."""
    codes = torch.randint(2**bits, (6, 32), generator=torch.Generator().manual_seed(0)).unflatten(1, (-1, GROUP))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    weight = (0.01 * (codes - 1)).flatten(1)
    torch.testing.assert_close(study.hqq(weight, bits, GROUP), weight)


def test_hqq_shrink(study):
    """0 up to where |x| = |x|^(p - 1) / beta, odd, and smaller than x."""
    edge = 0.1 ** (1 / 1.3)
    x = torch.tensor([0.0, 0.9 * edge, 1.1 * edge, 2.0])
    shrunk = study.shrink(x, 10.0)
    assert shrunk[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(shrunk[2:], x[2:] - 0.1 * x[2:] ** -0.3)
    assert torch.equal(study.shrink(-x, 10.0), -shrunk)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_groups_of_one_value(study, name):
    """Zeros stay zeros, and other constants give finite values."""
    weight = torch.zeros(4, 16)
    assert torch.equal(getattr(study, name)(weight, 4, GROUP), weight)
    assert getattr(study, name)(torch.full((4, 16), 0.3), 4, GROUP).isfinite().all()


# SINQ


def test_balance_makes_the_imbalance_fall(study):
    tiles = grouped(drawn(rows=24, spread=True)).transpose(0, 1)
    rows, columns = study.balance(tiles)
    assert rows.shape == (4, 24, 1)
    assert columns.shape == (4, 1, GROUP)
    before, after = study.imbalance(tiles), study.imbalance(tiles / columns / rows)
    assert (after < 0.7 * before).all()
    assert (rows > 0).all()
    assert (columns > 0).all()


def test_balance_never_makes_it_worse(study):
    """Also where there is nothing to gain: the first iterate is the tile as it is."""
    tiles = torch.stack([drawn(rows=GROUP, columns=GROUP, seed=seed) for seed in range(8)])
    rows, columns = study.balance(tiles)
    assert (study.imbalance(tiles / columns / rows) <= study.imbalance(tiles)).all()


def test_balance_takes_tiles_one_by_one(study):
    tiles = grouped(drawn(rows=24, spread=True)).transpose(0, 1)
    together = study.balance(tiles)
    for number, tile in enumerate(tiles):
        for found, expected in zip(study.balance(tile[None]), together, strict=True):
            torch.testing.assert_close(found[0], expected[number])


def test_imbalance(study):
    """Rows of deviations 1 and 3 (their columns lie between)."""
    tile = torch.tensor([[1.0, -1.0, 1.0, -1.0], [3.0, 3.0, -3.0, -3.0]])
    rows, columns = tile.std(dim=1), tile.std(dim=0)
    expected = max(rows.max(), columns.max()) / min(rows.min(), columns.min())
    torch.testing.assert_close(study.imbalance(tile[None]).flatten(), expected.view(1))


def test_sinq_helps_where_columns_differ(study):
    """Columns of very different size: relative to its column, the error is smaller than that of plain rounding."""
    weight = drawn(rows=32, columns=32, spread=True)
    columns = weight.std(dim=0, keepdim=True)
    errors = [((v - weight) / columns).norm() for v in (study.sinq(weight, 3, GROUP), between_extremes(weight, 3))]
    assert errors[0] < 0.9 * errors[1]


# This package's rounding and what is done around it


@pytest.mark.parametrize("symmetric", [True, False])
def test_second_axis_of_power_0_is_the_rounding(study, symmetric):
    weight, spec = drawn(), QuantSpec(3, "group", GROUP, symmetric)
    expected = fake_quantize(weight, *find_ranges(weight, spec), spec)
    assert torch.equal(study.rounding(weight, 3, GROUP, symmetric), expected)
    for columns in study.COLUMNS:
        assert torch.equal(study.second_axis(weight, 3, GROUP, columns, 0.0, symmetric), expected)


@pytest.mark.parametrize("columns", ["deviation", "sinkhorn", "sinkhorn-whole"])
def test_second_axis_helps_where_columns_differ(study, columns):
    weight = drawn(rows=32, spread=True)
    deviations = weight.std(dim=0, keepdim=True)
    found, plain = study.second_axis(weight, 3, GROUP, columns), study.rounding(weight, 3, GROUP)
    assert ((found - weight) / deviations).norm() < ((plain - weight) / deviations).norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rescaled_keeps_the_length_along_the_weight(study, symmetric):
    """<w, q> = <w, w> in every group, with the codes of the rounding."""
    weight = drawn()
    groups = grouped(weight)
    rounded, rescaled = (grouped(f(weight, 2, GROUP, symmetric)) for f in (study.rounding, study.rescaled))
    torch.testing.assert_close((groups * rescaled).sum(-1), groups.square().sum(-1))
    assert ((groups * rounded).sum(-1) < groups.square().sum(-1)).float().mean() > 0.9
    factors = (groups * rescaled).sum(-1, keepdim=True) / (groups * rounded).sum(-1, keepdim=True)
    torch.testing.assert_close(rescaled, rounded * factors)


# The study


def test_cells_and_tables(study):
    cells = study.cells()
    assert len({cell.id for cell in cells}) == len(cells) == 34
    assert all(cell.method in {"float", "prequant", "zsaq", *study.QUANTIZERS} for cell in cells)
    assert study.tables({})["perplexities"].startswith("| method | codes |")
    rows = {}
    for number, cell in enumerate(cells):
        figures = {"perplexity": 50.0 + number, "kl": 0.5, "error": 0.25, "window_loss": [4.0 + 0.001 * number] * 3}
        around = {"versions": {"torch": "2"}, "machine": {"cpu": "c", "threads": 1}, "commit": "a", "date": "2026-01-01"}
        rows[cell.id] = {**figures, **around, "seconds": 1.0}
    found = study.tables(rows)
    assert "| float32 |  | 32 | 50.000 | 50.000 | 50.000 |" in found["perplexities"]
    assert "| hqq | asymmetric | b + 0.50 | 53.000 | 64.000 | 75.000 | 0.5000 |" in found["perplexities"]
    assert "| hqq | asymmetric | +2.0 [+2.0, +2.0] |" in found["differences"]
    assert "| prequant | asymmetric |" not in found["differences"]


def test_apply_leaves_tables_and_heads(study):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=16, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    study.apply(model, study.config_of(4, True), lambda weight: weight * 2)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    layers = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["fc1", "fc2"]
    assert changed == {f"model.decoder.layers.0.{name}.weight" for name in layers}
    reference = OPTForCausalLM(config)
    reference.load_state_dict({**model.state_dict(), **before})
    assert study.weight_error(model, reference, study.config_of(4, True)) == pytest.approx(1.0)
