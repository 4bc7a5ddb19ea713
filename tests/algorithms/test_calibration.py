import pytest
import torch
from conformance import DYNAMIC, STATIC, assert_same_state, exactly, fake_and_packed
from tolerances import SUM_OF_SQUARES
from torch import nn

from optimum_zsaq.algorithms import calibration
from optimum_zsaq.algorithms.calibration import calibrate, float_inputs
from optimum_zsaq.layers import PackedLinear
from optimum_zsaq.ops import fake_quantize, fake_quantize_tokens, find_input_range
from optimum_zsaq.spec import LayerSpec, QuantScheme, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, pack, prepare


class Net(nn.Module):
    """Two Linear layers with a ReLU and dropout between them, and one that runs only when asked to."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.rare = nn.Linear(13, 17), nn.Linear(17, 5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, rare=None):
        y = self.second(self.drop(torch.relu(self.first(x))))
        return y if rare is None else self.rare(y)


def static_net(bits: int = 8, packed: bool = False, skip: tuple[str, ...] = ("rare",), **inputs) -> Net:
    torch.manual_seed(0)
    spec = QuantSpec(bits, "tensor", symmetric=False)
    model = prepare(Net().eval(), QuantScheme(QuantSpec(8), activations=spec, skip=skip), "minmax")
    return pack(model) if packed else model


def batches(count: int = 3, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(rows, 13, generator=generator)} for _ in range(count)]


def inputs_of(model: nn.Module, layer: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What a layer sees of the data with float inputs, as one vector."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten()))
    with torch.no_grad(), float_inputs(model):
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("packed", [False, True], ids=["fake", "packed"])
class TestRanges:
    def test_minmax_is_exact(self, packed):
        model, data = static_net(packed=packed), batches()
        expected = {name: inputs_of(model, getattr(model, name), data) for name in ("first", "second")}
        assert calibrate(model, data, "minmax") is model
        for name, values in expected.items():
            low, high = values.min().item(), values.max().item()
            scale, zero_point = find_input_range(values, low, high, STATIC, "minmax")
            layer = getattr(model, name)
            assert torch.equal(layer.input_scale, scale)
            assert torch.equal(layer.input_zero_point, zero_point)
        assert model.second.input_zero_point.item() == 0  # after a ReLU all codes are positive

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_mse_is_no_worse_than_minmax(self, packed, bits):
        data, errors = batches(count=2, rows=60), {}
        for ranges in ("mse", "minmax"):
            model = calibrate(static_net(bits, packed), data, ranges)
            for name in ("first", "second"):
                layer = getattr(model, name)
                values = inputs_of(model, layer, data)
                quantized = fake_quantize(values, layer.input_scale, layer.input_zero_point, layer.spec.inputs)
                errors[ranges, name] = (values - quantized).double().square().sum().item()
        for name in ("first", "second"):
            # the sample is drawn with replacement, so it weighs the values a little otherwise
            assert errors["mse", name] <= errors["minmax", name] * 1.03
        assert bits == 8 or errors["mse", "first"] < 0.9 * errors["minmax", "first"]

    def test_extremes_are_those_of_all_values_not_of_the_sample(self, packed, monkeypatch):
        monkeypatch.setattr(calibration, "_KEPT_VALUES", 2)
        model, data = static_net(packed=packed), batches(count=50)
        values = inputs_of(model, model.first, data)
        calibrate(model, data, "minmax")
        spread = (values.max().clamp(min=0) - values.min().clamp(max=0)) / 255
        assert abs(model.first.input_scale.item() / spread.item() - 1) < SUM_OF_SQUARES

    def test_inputs_are_float_while_they_are_measured(self, packed):
        """A range left over from before must not shape what the next layers see."""
        once = calibrate(static_net(packed=packed), batches())
        twice = static_net(packed=packed)
        for layer in (twice.first, twice.second):
            layer.set_input_range(torch.tensor([[1e-6]]), torch.tensor([[0]], dtype=torch.uint8))
        calibrate(twice, batches())
        assert_same_state(twice.state_dict(), once.state_dict())

    def test_is_reproducible_and_the_seed_counts(self, packed):
        # 60 rows x 13 columns are below the 4,096 kept values, drawn with replacement
        states = [calibrate(static_net(4, packed), batches(1, 60), seed=s).state_dict() for s in (0, 0, 1)]
        assert_same_state(states[0], states[1])
        assert not torch.equal(states[0]["first.input_scale"], states[2]["first.input_scale"])

    def test_random_state_is_left_alone(self, packed):
        model, data = static_net(packed=packed), batches()
        before = torch.get_rng_state()
        calibrate(model, data)
        assert torch.equal(torch.get_rng_state(), before)


def test_only_input_ranges_change():
    model = static_net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calibrate(model, batches())
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    expected = {"first.input_scale", "first.input_zero_point", "second.input_scale", "second.input_zero_point"}
    assert changed <= expected
    assert {"first.input_scale", "second.input_scale"} <= changed


def test_fake_and_packed_model_agree_after_calibration():
    fake, packed = static_net(4), static_net(4, packed=True)
    for model in (fake, packed):
        calibrate(model, batches())
    x = batches(1)[0]["x"]
    expected = fake(x)
    assert torch.equal(pack(fake)(x), packed(x))
    assert torch.equal(exactly(packed)(x), expected)


def test_padded_positions_are_seen_like_any_other():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(13, 5)

        def forward(self, x, attention_mask):
            return self.linear(x) * attention_mask.unsqueeze(-1)

    scheme = QuantScheme(QuantSpec(8), activations=STATIC)
    model = prepare(Masked(), scheme, "minmax")
    x = torch.randn(2, 4, 13).clamp(-2, 2)
    x[:, 2:] = 50.0
    calibrate(model, [{"x": x, "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)}], "minmax")
    assert model.linear.input_scale.item() == pytest.approx((50 - x.min().item()) / 255)


def test_an_empty_input_shows_nothing():
    """As that of an expert that got no token of a batch."""
    with_empty, without = static_net(), static_net()
    calibrate(with_empty, [*batches(), {"x": torch.zeros(0, 13)}])
    assert_same_state(with_empty.state_dict(), calibrate(without, batches()).state_dict())


class TestErrors:
    def test_dynamic_model(self):
        model = prepare(Net(), QuantScheme(QuantSpec(4), activations=DYNAMIC), "minmax")
        with pytest.raises(ValueError, match="no layer has a static input range .*; quantize with activations='static'"):
            calibrate(model, batches())

    def test_float_model(self):
        with pytest.raises(ValueError, match="no layer has a static input range"):
            calibrate(Net(), batches())

    def test_no_batch(self):
        with pytest.raises(ValueError, match=r"no calibration batch reached \['first', 'second'\]; give at least one"):
            calibrate(static_net(), [])

    def test_layer_that_no_batch_reached(self):
        model = static_net(skip=())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"no calibration batch reached \['rare'\]; .* modules_to_not_convert"):
            calibrate(model, batches())
        assert_same_state(model.state_dict(), before)  # no range of the others either
        calibrate(model, [*batches(), {**batches(1)[0], "rare": torch.tensor(1)}])

    def test_unknown_ranges(self):
        with pytest.raises(ValueError, match="ranges='best'"):
            calibrate(static_net(), batches(), "best")

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_inputs_that_are_not_finite(self, bad):
        """Without an error the stored range would be scale 1, zero point 0."""
        data = batches()
        data[1]["x"][0, 0] = bad
        with pytest.raises(ValueError, match="first.*NaN or infinite"):
            calibrate(static_net(), data)


class TestModelIsLeftAsItWas:
    def modes(self, model):
        return {name: module.training for name, module in model.named_modules()}

    def hooks(self, model):
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_after_success(self, training):
        model = static_net().train(training)
        specs = {name: layer.spec for name, layer in low_bit_layers(model)}
        calibrate(model, batches())
        assert set(self.modes(model).values()) == {training}
        assert {name: layer.spec for name, layer in low_bit_layers(model)} == specs
        assert self.hooks(model) == 0

    def test_layers_of_different_modes(self):
        """A frozen part stays in evaluation mode while the rest trains."""
        model = static_net().train()
        model.drop.eval()
        model.first.eval()
        before = self.modes(model)
        calibrate(model, batches())
        assert self.modes(model) == before

    def test_after_an_exception_in_the_middle(self):
        model = static_net().train()
        state = {name: t.clone() for name, t in model.state_dict().items()}
        specs = {name: layer.spec for name, layer in low_bit_layers(model)}

        def broken():
            yield from batches(2)
            raise KeyboardInterrupt("in the middle")

        with pytest.raises(KeyboardInterrupt, match="in the middle"):
            calibrate(model, broken())
        assert set(self.modes(model).values()) == {True}
        assert {name: layer.spec for name, layer in low_bit_layers(model)} == specs
        assert self.hooks(model) == 0
        assert_same_state(model.state_dict(), state)

    def test_dropout_is_off_while_it_measures(self):
        trained, evaluated = static_net().train(), static_net().eval()
        for model in (trained, evaluated):
            calibrate(model, batches())
        assert_same_state(trained.state_dict(), evaluated.state_dict())

    def test_no_gradient_is_kept(self):
        model = static_net().train()
        calibrate(model, batches())
        assert all(p.grad is None for p in model.parameters())
        assert not model.first.input_scale.requires_grad


@pytest.mark.parametrize("inputs", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("state", [0, 1], ids=["fake", "packed"])
def test_float_inputs(inputs, state):
    """Inside the context a layer's input is float, after it as before: also when the context ends by an error."""
    x = torch.randn(2, 17)
    layer = fake_and_packed(nn.Linear(17, 3), LayerSpec(QuantSpec(4), inputs), x, "minmax")[state]
    model = exactly(nn.Sequential(layer))
    plain = nn.functional.linear(x, layer.quantized_weight(), layer.bias)
    quantized = model(x)
    assert not torch.equal(quantized, plain)

    def fail() -> None:
        with float_inputs(model) as same:
            assert same is model
            assert torch.equal(model(x), plain)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(model(x), quantized)
    assert layer.spec.inputs == inputs
    if inputs is DYNAMIC:
        expected = nn.functional.linear(fake_quantize_tokens(x, inputs), layer.quantized_weight(), layer.bias)
        assert torch.equal(quantized, expected)


def test_calibrated_model_is_close_to_float_inputs():
    model = calibrate(static_net(packed=True), batches(20))
    assert isinstance(model.first, PackedLinear)
    x = batches(1)[0]["x"]
    found = model(x)
    with float_inputs(model):
        expected = model(x)
    assert (found - expected).norm() < 0.02 * expected.norm()
