import pytest
import torch
from conformance import (
    DYNAMIC,
    LAYERS,
    STATIC,
    ToyModel,
    fake_and_packed,
    random_weight,
    spec_id,
    weight_specs,
)
from torch import nn

from optimum_zsaq.layers import FakeQuantEmbedding, FakeQuantLinear, PackedEmbedding, PackedLinear
from optimum_zsaq.layers.common import INTEGERS, SCALES
from optimum_zsaq.ops import fake_quantize, fake_quantize_tokens
from optimum_zsaq.spec import LayerSpec, QuantSpec


pytestmark = pytest.mark.usefixtures("toy_kinds")
FULL = LayerSpec(QuantSpec(4, "group", 5, symmetric=False), STATIC, outliers=0.1)


def both_states(name: str, spec: LayerSpec):
    kind = LAYERS[name]
    x = kind.inputs(3, 17, torch.float32, torch.Generator().manual_seed(0))
    return fake_and_packed(kind.build(random_weight(3, 17, 0)), spec, x, "minmax")


@pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
@pytest.mark.parametrize("name", LAYERS)
class TestDtypes:
    def layer(self, name, state):
        inputs = None if name == "embedding" else STATIC
        return both_states(name, LayerSpec(FULL.weight, inputs, FULL.outliers))[state]

    @pytest.mark.parametrize(
        "cast",
        [
            pytest.param(lambda layer: layer.to(torch.bfloat16), id="to-bfloat16"),
            pytest.param(lambda layer: layer.half(), id="half"),
            pytest.param(lambda layer: layer.double(), id="double"),
            pytest.param(lambda layer: nn.Sequential(layer).bfloat16().float()[0], id="there-and-back"),
        ],
    )
    def test_scales_stay_float32_and_exact(self, name, state, cast):
        layer = self.layer(name, state)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        dtype = cast(nn.Linear(2, 2)).weight.dtype
        assert cast(layer) is layer
        assert layer.weight.dtype == dtype
        for key, value in layer.state_dict().items():
            if key in SCALES:
                assert value.dtype == torch.float32
                assert torch.equal(value, before[key])
            elif key in INTEGERS:
                assert value.dtype == before[key].dtype
                assert torch.equal(value, before[key])

    def test_a_cast_leaves_the_layer_usable(self, name, state):
        layer = self.layer(name, state).to(torch.bfloat16)
        x = LAYERS[name].inputs(3, 17, torch.bfloat16, torch.Generator().manual_seed(1))
        assert layer(x).dtype == torch.bfloat16

    def test_only_the_float_weight_and_the_bias_are_trainable(self, name, state):
        trainable = {key for key, p in self.layer(name, state).named_parameters() if p.requires_grad}
        assert trainable <= {"weight", "bias"} - ({"weight"} if state else set())

    def test_tensors_are_parameters_not_buffers(self, name, state):
        """DDP re-broadcasts buffers."""
        layer = self.layer(name, state)
        assert not list(layer.buffers())
        assert set(dict(layer.named_parameters())) == set(layer.state_dict())


class TestQuantizeInputs:
    """Each state's `quantize_inputs` is the ops' function of the layer's own spec."""

    x = torch.randn(2, 3, 17)

    @pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
    def test_float(self, state):
        assert both_states("linear", LayerSpec(QuantSpec(4)))[state].quantize_inputs(self.x) is self.x

    @pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
    def test_dynamic(self, state):
        layer = both_states("linear", LayerSpec(QuantSpec(4), DYNAMIC))[state]
        assert layer.input_scale is None
        assert torch.equal(layer.quantize_inputs(self.x), fake_quantize_tokens(self.x, DYNAMIC))

    @pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
    def test_static(self, state):
        layer = both_states("linear", LayerSpec(QuantSpec(4), STATIC))[state]
        scale, zero_point = torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8)
        parameter = layer.input_scale
        layer.set_input_range(scale, zero_point)
        assert layer.input_scale is parameter  # in place: an optimizer may hold it
        assert torch.equal(layer.quantize_inputs(self.x), fake_quantize(self.x, scale, zero_point, STATIC))


class TestTiedLayers:
    def tied(self):
        spec = LayerSpec(QuantSpec(4, symmetric=False), outliers=0.1)
        weight = nn.Parameter(random_weight(ToyModel.VOCABULARY, 13, 0))
        table, output = FakeQuantEmbedding(weight, spec), FakeQuantLinear(weight, None, spec)
        output.tie_to(table)
        table.find_ranges("minmax")
        return table, output

    def test_the_tied_layer_has_no_tensors_of_its_own(self):
        table, output = self.tied()
        assert output.owner is table
        assert table.owner is table
        assert list(output.state_dict()) == ["weight"]
        assert not list(output.children())  # the owner is no child: it would be saved twice

    def test_both_read_the_same_weight(self):
        table, output = self.tied()
        assert torch.equal(output.quantized_weight(), table.quantized_weight())
        packed_table = PackedEmbedding.skeleton(table, table.spec)
        packed_output = PackedLinear.skeleton(output, output.spec)
        packed_output.tie_to(packed_table)
        packed_table.set_weight(table)
        packed_output.set_weight(output)
        assert list(packed_output.state_dict()) == ["weight"]
        assert torch.equal(packed_output.quantized_weight(), table.quantized_weight())
        x = torch.randn(2, 13)
        packed_output.set_runtime("fast", "reference")
        assert torch.equal(packed_output(x), output(x))

    def test_ranges_of_a_tied_layer_are_its_owners(self):
        table, output = self.tied()
        before = table.weight_scale.clone()
        output.find_ranges("lsq")
        assert output.weight_scale is None
        assert torch.equal(table.weight_scale, before)

    def test_its_repr_says_so(self):
        table, output = self.tied()
        assert repr(output).endswith("W4 row, outliers=0.1, tied)")
        assert "tied" not in repr(table)


@pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
def test_repr_names_the_scheme(state):
    layer = both_states("linear", FULL)[state]
    assert "in_features=17, out_features=3, bias=True, W4 group/5, A8 static, outliers=0.1" in repr(layer)
    assert "A8 dynamic" in repr(both_states("linear", LayerSpec(QuantSpec(4), DYNAMIC))[state])


@pytest.mark.parametrize("spec", weight_specs((2, 5, 8)), ids=spec_id)
@pytest.mark.parametrize("name", LAYERS)
def test_both_states_have_the_same_weight(name, spec):
    fake, packed = both_states(name, LayerSpec(spec, outliers=0.1))
    assert packed.quantized_weight().dtype == torch.float32
    assert torch.equal(packed.quantized_weight(), fake.quantized_weight())
    assert packed.quantized_weight().shape == (3, 17)


@pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
@pytest.mark.parametrize("name", LAYERS)
class TestStoringOutliers:
    @pytest.mark.parametrize("count", [0, 1, 7, 50])
    @pytest.mark.parametrize("before", [0.0, 0.1])
    def test_they_replace_those_before_and_the_spec_knows_their_number(self, name, state, before, count):
        layer = both_states(name, LayerSpec(FULL.weight, None, before))[state]
        bare = both_states(name, LayerSpec(FULL.weight, None, before))[state]
        bare.store_outliers(torch.empty(0, dtype=torch.int32), torch.empty(0))
        assert bare.spec.outliers == 0.0
        positions, values = torch.arange(count, dtype=torch.int32), torch.randn(count)
        layer.store_outliers(positions, values)
        assert layer.spec.outlier_count(3, 17) == count
        expected = bare.quantized_weight().flatten().index_add(0, positions.long(), values).view(3, 17)
        assert torch.equal(layer.quantized_weight(), expected)
        assert ("weight_outlier_values" in layer.state_dict()) == (count > 0)

    def test_a_share_that_gives_their_number_is_taken(self, name, state):
        layer = both_states(name, LayerSpec(FULL.weight))[state]
        layer.store_outliers(torch.arange(5, dtype=torch.int32), torch.randn(5), share=0.1)
        assert layer.spec.outliers == 0.1
        layer.store_outliers(torch.arange(6, dtype=torch.int32), torch.randn(6), share=0.1)
        assert layer.spec.outliers == 6 / 51

    def test_a_tied_layer_has_none_of_its_own(self, name, state):
        layer, owner = both_states(name, FULL)[state], both_states(name, FULL)[state]
        layer.tie_to(owner)
        with pytest.raises(ValueError, match="reads another layer's weight stores no outliers of its own"):
            layer.store_outliers(torch.arange(5, dtype=torch.int32), torch.randn(5))
