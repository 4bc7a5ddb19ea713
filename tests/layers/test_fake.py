import pytest
import torch
from conformance import (
    DYNAMIC,
    GROUP,
    LAYERS,
    STATIC,
    TransposedLinear,
    random_weight,
    spec_id,
    weight_specs,
)
from tolerances import FORMULA, relative_error
from torch import nn

from optimum_zsaq.layers import FakeQuantEmbedding, FakeQuantLinear, FakeQuantTransposedLinear, fake
from optimum_zsaq.layers.fake import row_blocks
from optimum_zsaq.ops import fake_quantize, find_ranges
from optimum_zsaq.spec import LayerSpec, QuantSpec
from optimum_zsaq.surgery import range_method


FAKE = {"linear": FakeQuantLinear, "transposed": FakeQuantTransposedLinear, "embedding": FakeQuantEmbedding}


def make(name: str, spec: LayerSpec, weight: torch.Tensor, ranges: str = "minmax"):
    layer = FAKE[name].from_float(LAYERS[name].build(weight), spec)
    layer.find_ranges(range_method(spec, ranges))
    return layer


@pytest.mark.parametrize("name", LAYERS)
class TestEveryKind:
    def test_from_float_shares_the_parameters(self, name):
        layer = LAYERS[name].build(random_weight(3, 17, 0))
        new = FAKE[name].from_float(layer, LayerSpec(QuantSpec(4)))
        assert new.weight is layer.weight
        assert name == "embedding" or new.bias is layer.bias

    def test_from_float_works_on_meta(self, name):
        with torch.device("meta"):
            layer = LAYERS[name].build(torch.empty(3, 17))
            new = FAKE[name].from_float(layer, LayerSpec(QuantSpec(4, symmetric=False), STATIC, 0.1))
        tensors = new.state_dict().values()
        assert len(tensors) >= 7
        assert all(t.is_meta for t in tensors)

    def test_new_tensors_are_where_the_weight_is(self, name, device):
        layer = LAYERS[name].build(random_weight(3, 17, 0)).to(device)
        new = FAKE[name].from_float(layer, LayerSpec(QuantSpec(4, symmetric=False), STATIC, 0.1))
        assert {t.device.type for t in new.state_dict().values()} == {device.type}

    def test_ranges_are_set_only_when_asked(self, name):
        """No parameter is born, and no scale changes, in a forward pass."""
        layer = FAKE[name].from_float(LAYERS[name].build(random_weight(3, 17, 0)), LayerSpec(QuantSpec(4)))
        layer(LAYERS[name].inputs(3, 17, torch.float32, torch.Generator()))
        assert torch.equal(layer.weight_scale, torch.ones(3, 1))
        scale = layer.weight_scale
        layer.find_ranges("minmax")
        assert layer.weight_scale is scale
        assert torch.equal(scale, find_ranges(random_weight(3, 17, 0), QuantSpec(4), "minmax")[0])

    def test_unknown_ranges(self, name):
        layer = FAKE[name].from_float(LAYERS[name].build(random_weight(3, 17, 0)), LayerSpec(QuantSpec(4)))
        with pytest.raises(ValueError, match="ranges='best' is unknown"):
            layer.find_ranges("best")

    def test_outliers_keep_their_float_value(self, name):
        """The largest 5 weights are stored exactly, and the ranges are those of the rest."""
        weight = random_weight(3, 17, 0)
        layer = make(name, LayerSpec(QuantSpec(3), outliers=0.1), weight)
        positions = weight.abs().flatten().topk(5).indices.sort().values
        assert torch.equal(layer.weight_outlier_positions.long(), positions)
        rest = weight.flatten().index_fill(0, positions, 0).view_as(weight)
        assert torch.equal(layer.weight_scale, find_ranges(rest, QuantSpec(3), "minmax")[0])
        found = layer.quantized_weight().flatten()
        assert torch.allclose(found[positions], weight.flatten()[positions], rtol=1e-6, atol=0)
        kept = torch.ones(51, dtype=torch.bool).index_fill(0, positions, False)
        plain = fake_quantize(weight, layer.weight_scale, None, QuantSpec(3)).flatten()
        assert torch.equal(found[kept], plain[kept])

    def test_outliers_of_rows_are_as_many_of_each(self, name):
        weight = random_weight(3, 17, 0)
        weight[0] *= 9  # the largest of the matrix are all in this row
        layer = make(name, LayerSpec(QuantSpec(3), outliers=6 / 51, outlier_scope="row"), weight)
        positions = weight.abs().topk(2, dim=1).indices + torch.tensor([[0], [17], [34]])
        assert layer.weight_outlier_positions.tolist() == sorted(positions.flatten().tolist())
        assert torch.allclose(layer.quantized_weight().flatten()[positions], weight.flatten()[positions], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("spec", weight_specs((3,)), ids=spec_id)
    def test_block_by_block_is_the_same(self, name, spec, monkeypatch):
        weight = random_weight(7, 17, 0)
        expected = make(name, LayerSpec(spec, outliers=0.1), weight)
        monkeypatch.setattr(fake, "_CHUNK", 35)  # two rows a block
        found = make(name, LayerSpec(spec, outliers=0.1), weight)
        assert torch.equal(found.quantized_weight(), expected.quantized_weight())
        assert torch.equal(found.weight_outlier_values, expected.weight_outlier_values)

    @pytest.mark.parametrize("spec", weight_specs((2, 4)), ids=spec_id)
    def test_number_of_levels(self, name, spec):
        layer = make(name, LayerSpec(spec), random_weight(3, 129, 0))
        for row in layer.quantized_weight():
            for part in row.split(GROUP if spec.granularity == "group" else 129):
                assert len(part.unique()) <= (3 if spec.ternary else 2**spec.bits)


@pytest.mark.parametrize("spec", weight_specs((4,)), ids=spec_id)
def test_row_blocks_cover_the_weight_once(spec, monkeypatch):
    weight = random_weight(7, 17, 0, torch.bfloat16)
    monkeypatch.setattr(fake, "_CHUNK", 35)
    blocks = list(row_blocks(weight, spec))
    assert [start for start, _ in blocks] == ([0] if spec.ternary and spec.granularity == "tensor" else [0, 2, 4, 6])
    assert torch.equal(torch.cat([rows for _, rows in blocks]), weight.float())


@pytest.mark.parametrize("inputs", [None, DYNAMIC, STATIC], ids=["float", "dynamic", "static"])
def test_forward_is_that_of_linear(inputs, device):
    spec = LayerSpec(QuantSpec(4, "group", GROUP), inputs)
    layer = make("linear", spec, random_weight(3, 17, 0)).to(device)
    if layer.input_scale is not None:
        layer.set_input_range(torch.tensor([[0.02]]), torch.tensor([[128]], dtype=torch.uint8))
    x = torch.randn(2, 3, 17, device=device)
    expected = nn.functional.linear(layer.quantize_inputs(x), layer.quantized_weight(), layer.bias)
    assert torch.equal(layer(x), expected)


def test_transposed_weights_are_read_as_rows():
    """The rows of a transposed layer are its outputs: scales, groups and outliers are those of W.T."""
    spec, weight = LayerSpec(QuantSpec(3, "group", GROUP), outliers=0.1), random_weight(3, 17, 0)
    transposed, plain = make("transposed", spec, weight), make("linear", spec, weight)
    assert (transposed.out_features, transposed.in_features) == (3, 17)
    assert torch.equal(transposed.master(), weight)
    assert torch.equal(transposed.quantized_weight(), plain.quantized_weight())
    for key in ("weight_scale", "weight_outlier_positions", "weight_outlier_values"):
        assert torch.equal(getattr(transposed, key), getattr(plain, key))


def test_transposed_layer_computes_what_its_float_layer_does():
    """Integers that fill 8 bits are exact, so the float layer's output is kept."""
    layer = TransposedLinear(5, 3)
    layer.weight.data = torch.randint(-128, 128, (5, 3)).float()
    layer.weight.data[0] = -128
    layer.bias.data = torch.tensor([1.0, -2.0, 3.0])
    x = torch.randint(-9, 9, (2, 5)).float()
    expected = layer(x)
    new = FakeQuantTransposedLinear.from_float(layer, LayerSpec(QuantSpec(8)))
    new.find_ranges("minmax")
    assert torch.equal(new(x), expected)


class TestEmbedding:
    @pytest.mark.parametrize("ids", [(3,), (2, 4), (2, 0), ()], ids=str)
    @pytest.mark.parametrize("spec", weight_specs((3, 8)), ids=spec_id)
    def test_rows_of_the_quantized_table(self, spec, ids):
        layer = make("embedding", LayerSpec(spec, outliers=0.1), random_weight(7, 17, 0))
        index = torch.randint(7, ids)
        assert torch.equal(layer(index), layer.quantized_weight()[index])
        assert torch.equal(layer(index.int()), layer(index))

    def test_gradient_reaches_the_rows_that_were_read(self):
        layer = make("embedding", LayerSpec(QuantSpec(8)), random_weight(7, 17, 0))
        layer(torch.tensor([1, 1, 4])).sum().backward()
        rows = layer.weight.grad.sum(dim=1) / 17
        assert torch.allclose(rows, torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0]))

    @pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(2, "tensor", ternary=True)], ids=["by-row", "whole-table"])
    def test_padding_row_is_not_trained(self, spec):
        table = nn.Embedding(7, 17, padding_idx=2)
        layer = FakeQuantEmbedding.from_float(table, LayerSpec(spec))
        layer.find_ranges(range_method(layer.spec, "minmax"))
        layer(torch.tensor([2, 3])).sum().backward()
        assert not layer.weight.grad[2].any()
        assert layer.weight.grad[3].any()

    def test_ids_outside_the_table(self):
        layer = make("embedding", LayerSpec(QuantSpec(4)), random_weight(7, 17, 0))
        for bad in (7, -1):
            with pytest.raises(IndexError, match="out of range"):
                layer(torch.tensor([bad]))


@pytest.mark.parametrize("spec", weight_specs((3,), ternary=False), ids=spec_id)
def test_gradients_reach_weight_scale_bias_and_input(spec):
    """The straight-through gradients of the layer, from those of its parts (`ops/test_affine.py` has the formulas)."""
    layer = make("linear", LayerSpec(spec), random_weight(3, 17, 0), "lsq").double()
    scale = layer.weight_scale.detach().double().requires_grad_()
    layer.weight_scale.requires_grad_()
    x, upstream = torch.randn(5, 17, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    weight = layer.weight.detach().clone().requires_grad_()
    quantized = fake_quantize(weight, scale, layer.weight_shift, spec)
    quantized.backward(upstream.t() @ x.detach())
    assert relative_error(layer.weight.grad, weight.grad) < 1e-6  # the layer quantizes in float32
    assert relative_error(layer.weight_scale.grad, scale.grad) < 1e-6
    assert relative_error(layer.bias.grad, upstream.sum(dim=0)) < FORMULA
    assert relative_error(x.grad, upstream @ quantized.detach()) < 1e-6


def test_static_scale_of_the_input_is_learnable():
    layer = make("linear", LayerSpec(QuantSpec(8), STATIC), random_weight(3, 17, 0))
    layer.set_input_range(torch.tensor([[0.01]]), torch.tensor([[128]], dtype=torch.uint8))
    layer.input_scale.requires_grad_()
    layer(torch.randn(2, 17)).sum().backward()
    assert layer.input_scale.grad.abs() > 0
