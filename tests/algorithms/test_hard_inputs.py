"""Which inputs one stored range cannot hold, and what is done about them."""

import pytest
import torch
from torch import nn

from optimum_zsaq.algorithms.calibration import calibrate
from optimum_zsaq.algorithms.hard_inputs import free_hard_inputs, input_errors
from optimum_zsaq.ops import dequantize, fake_quantize_tokens, quantize
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, pack, prepare


WIDTH, TOKENS = 24, 200


class Net(nn.Module):
    """Two layers whose inputs may have tokens of very different sizes, and one between whose input is normed."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.easy, self.hard, self.harder = (nn.Linear(WIDTH, size, bias=False) for size in (WIDTH, WIDTH, 2 * WIDTH))

    def forward(self, x, attention_mask=None):
        return self.easy(self.norm(x)).sum() + self.hard(x).sum() + self.harder(x[..., :1] * x).sum()


def net(bits: int = 8, packed: bool = False) -> Net:
    torch.manual_seed(0)
    inputs = QuantSpec(bits, "tensor", symmetric=False)
    model = prepare(Net().eval(), QuantScheme(QuantSpec(8), activations=inputs), "minmax")
    return pack(model) if packed else model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, ::50] *= 100.0
    return {"x": x}


def ranges(model: nn.Module) -> dict[str, str]:
    return {name: layer.spec.inputs.granularity for name, layer in low_bit_layers(model)}


@pytest.mark.parametrize("packed", [False, True], ids=["fake", "packed"])
class TestChoice:
    def test_the_hardest_first_as_far_as_the_share_goes(self, packed):
        expected = {0.0: [], 0.24: [], 0.26: ["hard"], 0.55: ["harder"], 0.76: ["harder", "hard"], 1.0: ["harder", "hard"]}
        for share, names in expected.items():
            model = calibrate(net(packed=packed), [batch()], "minmax")
            assert free_hard_inputs(model, [batch(1)], share) == names
            assert ranges(model) == {n: "token" if n in names else "tensor" for n in ("easy", "hard", "harder")}

    def test_then_each_token_has_its_own_range(self, packed):
        model = calibrate(net(packed=packed), [batch()], "minmax")
        free_hard_inputs(model, [batch()], 1.0)
        x = batch(2)["x"]
        assert torch.equal(model.hard.quantize_inputs(x), fake_quantize_tokens(x, model.hard.spec.inputs))
        assert model.hard.input_scale is None
        assert "hard.input_scale" not in model.state_dict()
        assert model.easy.input_scale.isfinite()

    def test_tokens_of_one_size_are_easy(self, packed):
        data = {"x": torch.randn(2, TOKENS, WIDTH)}
        data["x"][..., 0] = 1.0
        assert free_hard_inputs(calibrate(net(packed=packed), [data]), [data], 1.0) == []


def test_coarse_inputs_stay_as_they_are():
    model = calibrate(net(bits=4), [batch()], "minmax")
    assert free_hard_inputs(model, [batch()], 1.0) == []


def test_errors_are_those_of_the_output():
    model = calibrate(net(), [batch()], "minmax")
    layers = dict(low_bit_layers(model))
    found = input_errors(model, layers, [batch(), batch(1)])
    for name in ("hard", "easy"):
        layer, errors = layers[name], []
        for data in (batch(), batch(1)):
            x = data["x"].view(-1, WIDTH)
            x = model.norm(x) if name == "easy" else x
            codes = quantize(x, layer.input_scale, layer.input_zero_point, layer.spec.inputs)
            y, weight = (
                dequantize(codes, layer.input_scale, layer.input_zero_point, layer.spec.inputs),
                layer.quantized_weight(),
            )
            errors.append(((y - x) @ weight.t()).square().sum(1) / (x @ weight.t()).square().sum(1))
        assert found[name][0] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)
        assert found[name][1] < found[name][0]


def test_padding_does_not_count_and_the_model_is_as_before():
    model, data = calibrate(net(), [batch()], "minmax"), batch()
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[:, TOKENS // 2 :] = 0
    other = {"x": data["x"].clone(), "attention_mask": mask}
    other["x"][:, TOKENS // 2 :] = 1e4
    layers, before = dict(low_bit_layers(model)), model(**data)
    cut = {"x": data["x"][:, : TOKENS // 2]}
    found, expected = input_errors(model, layers, [other]), input_errors(model, layers, [cut])
    assert {n: pytest.approx(errors) for n, errors in expected.items()} == found
    assert torch.equal(model(**data), before)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
