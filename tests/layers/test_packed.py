import copy
import pickle

import pytest
import torch
from conformance import (
    BITS,
    DYNAMIC,
    LAYERS,
    STATIC,
    Sizes,
    assert_same_state,
    fake_and_packed,
    random_weight,
    spec_id,
    weight_specs,
)
from tolerances import KERNEL, relative_error
from torch import nn

from optimum_zsaq.kernels.prepacked import _ENTRIES
from optimum_zsaq.kinds import kind_of
from optimum_zsaq.layers import PackedEmbedding, PackedLinear
from optimum_zsaq.ops import packed_columns
from optimum_zsaq.spec import LayerSpec, QuantSpec


pytestmark = pytest.mark.usefixtures("toy_kinds")


def make(name: str, spec: LayerSpec, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A packed layer (7, 17) and inputs for it."""
    kind = LAYERS[name]
    x = kind.inputs(7, 17, dtype, torch.Generator().manual_seed(seed))
    layer = kind.build(random_weight(7, 17, seed, dtype))
    return fake_and_packed(layer, spec, x, "minmax")[1], x


@pytest.mark.parametrize("name", LAYERS)
class TestEveryKind:
    @pytest.mark.parametrize("spec", weight_specs(), ids=spec_id)
    def test_size_law(self, name, spec):
        """Codes of ceil(I * bits / 8) bytes a row, a scale a slice, a zero point or a minimum, 8 bytes an outlier."""
        packed, _ = make(name, LayerSpec(spec, outliers=0.05))
        state = packed.state_dict()
        slices = spec.scale_shape(7, 17)[0] * spec.scale_shape(7, 17)[1]
        expected = {
            "weight": 7 * 4,
            "weight_codes": 7 * packed_columns(17, spec.bits),
            "weight_scale": spec.scale_bits // 8 * slices,
        }
        if spec.minimum:
            expected["weight_minimum"] = spec.scale_bits // 8 * slices
        elif not spec.symmetric:
            expected["weight_zero_point"] = slices
        expected |= {"weight_outlier_positions": 4 * 6, "weight_outlier_values": 4 * 6}
        if name != "embedding":
            expected["bias"] = 7 * 4
        assert {key: t.numel() * t.element_size() for key, t in state.items()} == expected

    def test_marker_takes_the_place_of_the_weight(self, name):
        """A process without the package gets a shape that fits no layer, a merge into the layer fails."""
        packed, _ = make(name, LayerSpec(QuantSpec(4)), dtype=torch.bfloat16)
        assert isinstance(packed.weight, nn.Parameter)
        assert (packed.weight.dtype, packed.weight.shape) == (torch.bfloat16, (7, 1))
        assert not packed.weight.any()
        assert not packed.weight.requires_grad
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            LAYERS[name].build(torch.zeros(7, 17)).load_state_dict(packed.state_dict(), strict=False)
        with pytest.raises(RuntimeError, match="shape"):
            packed.weight.data += torch.ones(7, 17)

    def test_skeleton_on_meta(self, name):
        with torch.device("meta"):
            layer = LAYERS[name].build(torch.empty(7, 17))
        spec = LayerSpec(QuantSpec(3, symmetric=False), None if name == "embedding" else STATIC, 0.05)
        skeleton = kind_of(layer).packed.skeleton(layer, spec)
        packed, x = make(name, spec)
        assert all(t.is_meta for t in skeleton.state_dict().values())
        assert list(skeleton.state_dict()) == list(packed.state_dict())
        skeleton.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(skeleton(x), packed(x))

    def test_skeleton_is_made_where_the_layer_is(self, name, device):
        layer = LAYERS[name].build(torch.zeros(7, 17)).to(device)
        packed = kind_of(layer).packed.skeleton(layer, LayerSpec(QuantSpec(3), outliers=0.05))
        assert {t.device.type for t in packed.state_dict().values()} == {device.type}

    @pytest.mark.parametrize("bits", BITS)
    def test_runtime_changes_no_value(self, name, bits):
        """Bit for bit on the reference kernel, but for the order of float sums on the others."""
        packed, x = make(name, LayerSpec(QuantSpec(bits, symmetric=False), outliers=0.05))
        assert (packed.runtime, packed.kernel) == ("fast", "")
        chosen = packed(x)
        packed.set_runtime("fast", "reference")
        expected = packed(x)
        assert relative_error(chosen, expected) <= KERNEL[torch.float32]
        for runtime in ("small", "fast"):
            packed.set_runtime(runtime)
            assert packed.runtime == runtime
            assert relative_error(packed(x), expected) <= KERNEL[torch.float32]
            packed.set_runtime(runtime, "reference")
            assert torch.equal(packed(x), expected)

    @pytest.mark.parametrize("inputs", [None, DYNAMIC], ids=["float", "dynamic"])
    @pytest.mark.parametrize("spec", [s for s in weight_specs((2, 4), ternary=False) if not s.minimum], ids=spec_id)
    def test_a_negative_scale_turns_the_codes_around(self, name, spec, inputs):
        packed, x = make(name, LayerSpec(spec, None if name == "embedding" else inputs))
        packed.set_runtime("fast", "reference")
        bias, expected = getattr(packed, "bias", None), packed(x)
        packed.weight_scale.neg_()
        found = packed(x)
        offset = torch.zeros(()) if bias is None else 2 * bias
        assert relative_error(found, offset - expected) <= KERNEL[torch.float32]
        packed.set_runtime("fast")
        assert relative_error(packed(x), found) <= KERNEL[torch.float32]

    @pytest.mark.parametrize("spec", weight_specs((3,)), ids=spec_id)
    def test_scaled_rows_are_what_the_codes_stand_for_times_a_factor(self, name, spec):
        """Scales become float32, so that nothing is rounded a second time."""
        packed, x = make(name, LayerSpec(spec))
        factors, before = torch.linspace(0.5, 2.0, 7), packed.quantized_weight()
        if spec.granularity == "tensor":
            factors = factors[:1]
        packed.scale_rows(factors)
        assert packed.weight_scale.dtype == torch.float32
        assert relative_error(packed.quantized_weight(), before * factors.view(-1, 1)) < 1e-6
        assert packed.spec.weight.scale_bits == 32
        assert torch.isfinite(packed(x)).all()

    def test_unknown_runtime(self, name):
        packed, _ = make(name, LayerSpec(QuantSpec(4)))
        with pytest.raises(ValueError, match=r"runtime='quick' is unknown; use one of \('fast', 'small'\)"):
            packed.set_runtime("quick")
        assert packed.runtime == "fast"

    @pytest.mark.parametrize("runtime", ["fast", "small"])
    def test_forward_adds_nothing_to_the_state(self, name, runtime):
        packed, x = make(name, LayerSpec(QuantSpec(3), outliers=0.05))
        packed.set_runtime(runtime)
        before, size = copy.deepcopy(packed.state_dict()), len(pickle.dumps(packed))
        packed(x)
        assert_same_state(packed.state_dict(), before)
        assert len(pickle.dumps(packed)) == size

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_duplicates_are_equal_and_apart(self, name, duplicate):
        packed, x = make(name, LayerSpec(QuantSpec(3, symmetric=False), outliers=0.05))
        packed.set_runtime("small")
        expected = packed(x)
        twin = duplicate(packed)
        assert torch.equal(twin(x), expected)
        assert (twin.runtime, twin.spec) == ("small", packed.spec)
        twin.weight_codes.zero_()
        twin.weight_scale.fill_(9.0)
        assert torch.equal(packed(x), expected)

    @pytest.mark.parametrize("bits", BITS)
    def test_other_weights_take_effect_after_a_forward(self, name, bits):
        """What was widened for running must not outlive the codes it came from."""
        spec = LayerSpec(QuantSpec(bits))
        (first, x), (second, _) = make(name, spec, seed=0), make(name, spec, seed=4)
        first(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))

    @pytest.mark.parametrize("calls", [1, 2, 3])
    def test_set_weight_takes_effect_after_a_forward(self, name, calls):
        """However often it was called since: a new tensor may lie where an old one lay."""
        kind, spec = LAYERS[name], LayerSpec(QuantSpec(4))
        packed, x = make(name, spec)
        for seed in range(10):
            packed(x)
            for call in range(calls):
                other = kind.build(random_weight(7, 17, 10 * seed + call))
                other.bias = getattr(packed, "bias", None)
                fake, expected = fake_and_packed(other, spec, x, "minmax")
                packed.set_weight(fake)
            found = packed(x)
            assert torch.equal(found, expected(x))
            for layer in (packed, expected):
                layer.set_runtime("fast", "reference")
            assert torch.equal(packed(x), expected(x))
            packed.set_runtime("fast")
            assert torch.equal(packed(x), found)

    def test_a_forward_in_inference_mode_leaves_the_layer_usable(self, name):
        packed, x = make(name, LayerSpec(QuantSpec(3)))
        with torch.inference_mode():
            expected = packed(x)
        if x.is_floating_point():
            x.requires_grad_()
            packed(x).sum().backward()
            assert x.grad is not None
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("name", ["linear", "transposed"])
class TestPackedLinear:
    def test_is_a_linear_layer_for_others(self, name):
        packed, _ = make(name, LayerSpec(QuantSpec(4)))
        assert isinstance(packed, nn.Linear)
        assert (packed.in_features, packed.out_features) == (17, 7)

    @pytest.mark.parametrize("spec", weight_specs((2, 3, 8)), ids=spec_id)
    def test_gradcheck(self, name, spec):
        packed, _ = make(name, LayerSpec(spec, outliers=0.05))
        packed.bias = nn.Parameter(torch.randn(7, dtype=torch.float64))
        x = torch.randn(2, 2, 17, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, bias: packed(x), (x, packed.bias))

    def test_dynamic_inputs_are_straight_through(self, name):
        packed, _ = make(name, LayerSpec(QuantSpec(4), DYNAMIC))
        x = torch.randn(5, 17, requires_grad=True)
        upstream = torch.randn(5, 7)
        packed(x).backward(upstream)
        assert torch.equal(x.grad, upstream @ packed.quantized_weight())

    def test_nothing_but_the_bias_is_trained(self, name):
        packed, x = make(name, LayerSpec(QuantSpec(4, symmetric=False), STATIC, 0.05))
        packed(x.requires_grad_()).sum().backward()
        assert [key for key, p in packed.named_parameters() if p.grad is not None] == ["bias"]

    def test_bias_is_shared_with_the_layer_it_was_made_of(self, name):
        layer = LAYERS[name].build(random_weight(7, 17, 0))
        assert kind_of(layer).packed.skeleton(layer, LayerSpec(QuantSpec(4))).bias is layer.bias

    def test_autocast_is_that_of_linear(self, name):
        packed, x = make(name, LayerSpec(QuantSpec(4)))
        x.requires_grad_()
        for kernel in ("reference", None):
            packed.set_runtime("fast", kernel)
            x.grad = None
            with torch.autocast("cpu", torch.bfloat16):
                y = packed(x)
                expected = nn.functional.linear(x, packed.quantized_weight(), packed.bias)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, expected) or kernel is None
            assert relative_error(y, expected) <= KERNEL[torch.bfloat16]
            y.float().sum().backward()
            assert x.grad.dtype == torch.float32


class TestPackedEmbedding:
    @pytest.mark.parametrize("ids", [(3,), (2, 4), (2, 0), ()], ids=str)
    @pytest.mark.parametrize("spec", weight_specs(), ids=spec_id)
    def test_rows_of_the_dense_table(self, spec, ids):
        packed, _ = make("embedding", LayerSpec(spec, outliers=0.05))
        index = torch.randint(7, ids)
        assert torch.equal(packed(index), packed.quantized_weight()[index])
        assert torch.equal(packed(index.int()), packed(index))

    @pytest.mark.parametrize("runtime", ["fast", "small"])
    @pytest.mark.parametrize("bad", [7, 100, -1], ids=str)
    def test_ids_outside_the_table(self, bad, runtime):
        """As `nn.Embedding` does: -1 is no row."""
        packed, _ = make("embedding", LayerSpec(QuantSpec(4)))
        packed.set_runtime(runtime)
        with pytest.raises(IndexError, match="out of"):
            packed(torch.tensor([bad]))

    def test_attributes_of_the_float_table(self):
        table = nn.Embedding(7, 17, padding_idx=2)
        packed = PackedEmbedding.skeleton(table, LayerSpec(QuantSpec(4)))
        assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (7, 17, 2)
        assert isinstance(packed, nn.Embedding)

    @pytest.mark.parametrize("runtime", ["fast", "small"])
    def test_lookup_reads_the_rows_that_are_asked_for(self, runtime):
        """In a table of a million rows no tensor of a call is larger than a few rows, and nothing is kept."""
        table = PackedEmbedding(100_000, 17, LayerSpec(QuantSpec(4), outliers=0.01))
        table.weight_outlier_positions.data = torch.arange(17_000, dtype=torch.int32) * 100
        table.set_runtime(runtime)
        with Sizes() as sizes:
            table(torch.tensor([1, 99_999]))
        assert max(sizes.made) <= 8 * 2 * 17
        assert table.weight_codes not in _ENTRIES


def test_linear_without_bias_has_none():
    packed = PackedLinear(17, 7, False, LayerSpec(QuantSpec(4)))
    assert packed.bias is None
    assert "bias" not in packed.state_dict()
    assert packed(torch.randn(2, 17)).shape == (2, 7)


@pytest.mark.parametrize("runtime", ["fast", "small"])
@pytest.mark.parametrize("stored", [0.0, 0.1])
def test_other_outliers_in_a_call(stored, runtime):
    """They take the place of the layer's own, change nothing in it, and get gradients."""
    layer, x = make("linear", LayerSpec(QuantSpec(4), DYNAMIC, stored))
    layer.set_runtime(runtime)
    before, own = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, layer(x)
    positions, values = torch.tensor([0, 3, 118], dtype=torch.int32), torch.randn(3, requires_grad=True)
    twin = copy.deepcopy(layer)
    twin.store_outliers(positions, values.detach().clone())
    y = layer(x, outliers=(positions, values))
    assert torch.equal(y, twin(x))
    y.sum().backward()
    assert values.grad.any()
    assert torch.equal(layer(x), own)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
