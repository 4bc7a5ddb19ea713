"""Criteria and choosing, compared with sorted Python lists."""

import pytest
import torch
from conformance import DYNAMIC, LAYERS, fake_and_packed, random_weight
from torch import nn

from optimum_zsaq.algorithms.outliers import CRITERIA, chance, choose_outliers, deviation, error, magnitude
from optimum_zsaq.ops import fake_quantize
from optimum_zsaq.spec import LayerSpec, QuantSpec


SHAPES = {"wide": (3, 17), "tall": (40, 5), "tiny": (1, 2)}


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


def float_layers(levels=None):
    """Three layers; with `levels` their weights are small integers, most of them equal."""
    layers = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        weight = random_weight(*shape, seed=number)
        if levels:
            weight = torch.randint(-levels, levels + 1, shape).float()
        layers[name] = linear(weight)
    return layers


def low_bit(weight, outliers=0.0, bits=3):
    spec = LayerSpec(QuantSpec(bits), DYNAMIC, outliers)
    return fake_and_packed(linear(weight), spec, torch.randn(2, weight.shape[1]), "mse")


def by_sorting(scores, count):
    """(matrix, position) of the highest scores; of equal ones the first."""
    flat = [(-value, n, p) for n, matrix in enumerate(scores) for p, value in enumerate(matrix.flatten().tolist())]
    return [(n, p) for _, n, p in sorted(flat)[:count]]


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("criterion", ["magnitude", "deviation", "random"])
@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
class TestChoosing:
    def scores(self, layers, criterion):
        return [CRITERIA[criterion](layer.weight.detach(), None, 7 + n) for n, layer in enumerate(layers.values())]

    def test_of_each_matrix(self, criterion, fraction, levels):
        layers = float_layers(levels)
        found = choose_outliers(layers, criterion, fraction, seed=7)
        for (name, positions), scores in zip(found.items(), self.scores(layers, criterion), strict=True):
            count = max(1, round(fraction * scores.numel()))
            assert positions.dtype == torch.int32
            assert positions.tolist() == sorted(p for _, p in by_sorting([scores], count)), name

    def test_of_each_row(self, criterion, fraction, levels):
        layers = float_layers(levels)
        found = choose_outliers(layers, criterion, fraction, "row", seed=7)
        for (name, positions), scores in zip(found.items(), self.scores(layers, criterion), strict=True):
            count = max(1, round(fraction * scores.numel()))
            of_rows = torch.bincount(positions.long() // scores.shape[1], minlength=len(scores))
            assert len(positions) == count
            assert of_rows.max() - of_rows.min() <= 1, name
            for row, some in enumerate(of_rows.tolist()):
                mine = positions[positions.long() // scores.shape[1] == row] - row * scores.shape[1]
                assert mine.tolist() == sorted(p for _, p in by_sorting([scores[row]], some)), (name, row)

    def test_of_all_matrices_together(self, criterion, fraction, levels):
        layers = float_layers(levels)
        found = choose_outliers(layers, criterion, fraction, "model", seed=7)
        scores = self.scores(layers, criterion)
        expected = by_sorting(scores, max(1, round(fraction * sum(s.numel() for s in scores))))
        for number, (name, positions) in enumerate(found.items()):
            assert positions.dtype == torch.int32
            assert positions.tolist() == sorted(p for n, p in expected if n == number), name


class TestCriteria:
    def test_magnitude(self):
        assert magnitude(torch.tensor([[-3.0, 0.0, 2.0]])).tolist() == [[3.0, 0.0, 2.0]]

    def test_deviation_counts_sigmas_from_the_mean(self):
        weight = torch.tensor([[1.0, 3.0, 1.0, 3.0], [1.0, 3.0, 1.0, 3.0]])  # mean 2, sigma 1
        assert deviation(weight + 5).tolist() == [[1.0] * 4] * 2
        assert deviation(torch.full((2, 3), 4.0)).tolist() == [[0.0] * 3] * 2
        assert torch.allclose(deviation(10 * weight), deviation(weight))

    def test_error_is_that_of_the_codes_alone(self):
        weight = random_weight(7, 33, 0)
        fake, _ = low_bit(weight, outliers=0.1)
        codes = fake_quantize(weight, fake.weight_scale, None, fake.spec.weight)
        assert torch.equal(error(weight, codes), (weight - codes).abs())
        (found,) = choose_outliers({"layer": fake}, "error", 0.1).values()
        assert found.tolist() == sorted(p for _, p in by_sorting([(weight - codes).abs()], 23))

    def test_chance_differs_by_seed_alone(self):
        weight = torch.zeros(5, 7)
        assert torch.equal(chance(weight, seed=1), chance(weight, seed=1))
        assert not torch.equal(chance(weight, seed=1), chance(weight, seed=2))

    @pytest.mark.parametrize("criterion", CRITERIA)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_scores_are_not_negative(self, criterion, dtype):
        weight = random_weight(5, 33, 0, dtype)
        scores = CRITERIA[criterion](weight, weight + 0.1, 0)
        assert scores.shape == weight.shape
        assert (scores >= 0).all()


class TestStates:
    def test_stored_positions_are_those_of_the_layer_whatever_the_fraction(self):
        for layer in low_bit(random_weight(7, 33, 0), outliers=0.05):
            (found,) = choose_outliers({"layer": layer}, "stored", 0.5).values()
            assert torch.equal(found, layer.weight_outlier_positions)
            assert found.data_ptr() != layer.weight_outlier_positions.data_ptr()

    def test_a_packed_layer_is_judged_by_what_its_codes_stand_for(self):
        fake, packed = low_bit(random_weight(7, 33, 0))
        assert torch.equal(
            choose_outliers({"layer": packed}, "magnitude", 0.1)["layer"],
            choose_outliers({"layer": linear(fake.quantized_weight())}, "magnitude", 0.1)["layer"],
        )

    def test_the_largest_magnitudes_of_a_packed_layer_are_those_that_it_stores(self):
        """The residuals make them the float weights again, and no code is larger."""
        _, packed = low_bit(random_weight(7, 33, 0), outliers=0.05)
        found = choose_outliers({"layer": packed}, "magnitude", 0.05)["layer"]
        assert torch.equal(found, packed.weight_outlier_positions)

    def test_transposed_layers_count_in_rows_of_outputs(self, toy_kinds):
        weight = random_weight(7, 33, 0)
        layer = LAYERS["transposed"].build(weight)
        fake, packed = fake_and_packed(layer, LayerSpec(QuantSpec(8)), torch.randn(2, 33), "minmax")
        expected = choose_outliers({"layer": linear(weight)}, "magnitude", 0.1)["layer"]
        for state in (layer, fake, packed):
            assert torch.equal(choose_outliers({"layer": state}, "magnitude", 0.1)["layer"], expected)

    def test_nothing_is_changed(self):
        fake, packed = low_bit(random_weight(7, 33, 0), outliers=0.05)
        layers = {"fake": fake, "packed": packed, "float": linear(random_weight(7, 33, 0))}
        before = {n: t.clone() for n, layer in layers.items() for n, t in layer.state_dict(prefix=n).items()}
        for scope in ("matrix", "model"):
            choose_outliers(layers, "magnitude", 0.1, scope)
        after = {n: t for n, layer in layers.items() for n, t in layer.state_dict(prefix=n).items()}
        assert all(torch.equal(before[name], after[name]) for name in before)


class TestErrors:
    @pytest.mark.parametrize("fraction", [0, 0.0, 1.0, 1.5, -0.1, True, "0.1", None, float("nan")])
    def test_fraction(self, fraction):
        with pytest.raises(ValueError, match="is not a share of the weights; use a number in"):
            choose_outliers(float_layers(), "magnitude", fraction)

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="criterion='size' is unknown; use one of .*'magnitude'"):
            choose_outliers(float_layers(), "size")
        with pytest.raises(ValueError, match="scope='layer' is unknown; use one of"):
            choose_outliers(float_layers(), scope="layer")

    def test_error_without_both_weights(self):
        _, packed = low_bit(random_weight(7, 33, 0))
        for layer in (packed, linear(random_weight(7, 33, 0))):
            for scope in ("matrix", "model"):
                with pytest.raises(ValueError, match="a.b: criterion='error' needs .*a packed layer has no float weight"):
                    choose_outliers({"a.b": layer}, "error", scope=scope)

    def test_stored_without_any(self):
        fake, packed = low_bit(random_weight(7, 33, 0))
        for layer in (fake, packed, linear(random_weight(7, 33, 0))):
            with pytest.raises(ValueError, match="a.b stores no outliers; use criterion='magnitude'"):
                choose_outliers({"a.b": layer}, "stored")
