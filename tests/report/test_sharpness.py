"""Sharpness against closed forms and a float copy, on toy and tiny random models; packed models as fake-quantized ones."""

import copy
import math

import pytest
import torch
from conformance import SCHEMES, exactly, outputs, toy_inputs, toy_prepared
from tiny_models import inputs, logits, make, token_ids
from torch import nn

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.layers import FakeQuantTransposedLinear, PackedLinear
from optimum_zsaq.report.sharpness import Sharpness, measure_sharpness, relax
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, unpack


NAMES = ("bert-cls", "llama-tied", "gpt2-tied", "t5-tied")
BATCHES = (token_ids(2, seed=1), token_ids(3, seed=2))


def student(name: str = "bert-cls", **settings) -> nn.Module:
    settings = {"weight_bits": 3, "embedding_bits": 3, "activation_bits": None, **settings}
    return prepare(make(name), PreQuantConfig(**settings).scheme(), "minmax")


def loss(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Float64, so that a rise is not lost in the rounding of the loss."""
    return model(**inputs(model, ids)).logits.double().square().mean(), len(ids)


def toy(rows: int = 5, columns: int = 3) -> nn.Module:
    return prepare(nn.Sequential(nn.Linear(columns, rows, bias=False)), QuantScheme(QuantSpec(4)))


def quantized(model: nn.Module) -> torch.Tensor:
    return model[0].quantized_weight().detach().double()


def state(model: nn.Module) -> dict:
    """All that must not change: tensors, gradients and flags, modes and slots."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: (p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    slots = {name: getattr(layer, "perturbation", None) for name, layer in low_bit_layers(model)}
    types = {name: type(module) for name, module in model.named_modules()}
    return {"tensors": tensors, "rest": (parameters, modes, slots, types, torch.get_rng_state().tolist())}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(value, before["tensors"][name]) for name, value in after["tensors"].items())
    assert after["rest"] == before["rest"]


# Closed forms: with x = identity the output is Q(w) transposed


def linear(model: nn.Module, slope: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (model(torch.eye(3)).double().t() * slope).sum(), 1


def quadratic(model: nn.Module, curvature: torch.Tensor) -> tuple[torch.Tensor, int]:
    return 0.5 * (model(torch.eye(3)).double().t().square() * curvature).sum(), 1


def test_linear_loss():
    """The gradient is the same everywhere: eps = r |w| g / |g|, and more steps find nothing more."""
    model, slope = toy(), torch.randn(5, 3, dtype=torch.float64)
    weight = quantized(model)
    found = measure_sharpness(model, [slope], linear, radius=0.2)
    assert found.loss == pytest.approx((weight * slope).sum().item(), rel=1e-6)
    assert found.norm == pytest.approx(0.2 * weight.norm().item(), rel=1e-6)
    assert found.radius == 0.2
    assert found.one_step == pytest.approx(found.norm * slope.norm().item(), rel=1e-5)
    assert found.projected == pytest.approx(found.one_step, rel=1e-5)


def test_quadratic_loss():
    """L = |w|^2 / 2 has the gradient w: one step leads to (1 + r) w; a random eps adds w.eps (mean 0) + |eps|^2 / 2."""
    model = toy(40, 3)
    squares = quantized(model).square().sum().item()
    found = measure_sharpness(model, [torch.ones(40, 3)], quadratic, radius=0.3, draws=400)
    assert found.one_step == pytest.approx((1.3**2 - 1) / 2 * squares, rel=1e-5)
    assert found.projected == pytest.approx(found.one_step, rel=1e-5)
    assert found.random_mean == pytest.approx(0.3**2 / 2 * squares, abs=4 * 0.3 * squares / 120**0.5 / 400**0.5)
    assert found.random_max < found.one_step


def highest_rise(weight: torch.Tensor, curvature: torch.Tensor, length: float) -> float:
    """Of sum c w^2 / 2 in the ball: c (w + eps) = lambda eps with lambda above all c, found by halving."""
    low, high = curvature.max().item(), 1e6
    for _ in range(200):
        middle = (low + high) / 2
        eps = curvature * weight / (middle - curvature)
        low, high = (middle, high) if eps.norm() > length else (low, middle)
    return 0.5 * (curvature * ((weight + eps).square() - weight.square())).sum().item()


def test_projected_ascent_finds_the_highest_point():
    model, curvature = toy(), torch.logspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    one = measure_sharpness(model, [curvature], quadratic, radius=0.5, steps=1)
    more = measure_sharpness(model, [curvature], quadratic, radius=0.5, steps=50)
    highest = highest_rise(quantized(model), curvature, more.norm)
    assert one.projected == one.one_step == more.one_step < 0.99 * highest
    assert more.projected == pytest.approx(highest, rel=1e-5)


@pytest.mark.parametrize("radius", [1e-3, 1e-2, 0.1])
def test_rises_grow_with_the_radius(radius):
    """In a linear loss in proportion, all of them."""
    model, slope = toy(), torch.randn(5, 3, dtype=torch.float64)
    whole, part = (measure_sharpness(model, [slope], linear, radius=r) for r in (1.0, radius))
    for name in ("one_step", "projected", "random_mean", "random_max", "norm"):
        assert getattr(part, name) == pytest.approx(radius * getattr(whole, name), rel=1e-2)


def test_no_gradient_no_ascent():
    model = toy()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0] = 1.0
    curvature = torch.ones(5, 3)
    curvature[0, 0] = 0.0
    found = measure_sharpness(model, [curvature], quadratic)
    assert (found.one_step, found.projected) == (0.0, 0.0)
    assert found.random_mean > 0.0


# Models


def float_copy(model: nn.Module, radius: float) -> tuple[float, float, float]:
    """Loss, rise of one step, and its length, on a float copy: every low-bit weight a Parameter."""
    names = [name for name, layer in low_bit_layers(model) if layer.owner is layer]
    float_model = unpack(copy.deepcopy(model))
    weights = [float_model.get_submodule(name).weight for name in names]
    length = radius * math.sqrt(sum(w.double().square().sum().item() for w in weights))
    count = sum(map(len, BATCHES))
    value = sum(loss(float_model, ids)[0] * len(ids) for ids in BATCHES) / count
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    norm = torch.sqrt(sum(g.double().square().sum() for g in gradients if g is not None))
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.add_(length * gradient / norm)
        moved = sum(loss(float_model, ids)[0] * len(ids) for ids in BATCHES) / count
    return value.item(), (moved - value).item(), length


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_formula(name):
    model = student(name, outliers=0.02)
    value, rise, length = float_copy(model, 0.05)
    found = measure_sharpness(model, BATCHES, loss, radius=0.05)
    assert found.loss == pytest.approx(value, rel=1e-5)
    assert found.one_step == pytest.approx(rise, rel=1e-4)
    assert found.norm == pytest.approx(length, rel=1e-5)
    assert found.projected >= found.one_step > 0
    assert found.random_mean <= found.random_max <= found.projected


@pytest.mark.parametrize("settings", [{}, {"activation_bits": 8, "outliers": 0.02}], ids=["float-inputs", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_model_is_measured_as_the_fake_quantized_one(name, settings):
    model = student(name, **settings)
    expected = measure_sharpness(model, BATCHES, loss, radius=0.05)
    before = state(pack(model))
    assert measure_sharpness(model, BATCHES, loss, radius=0.05) == expected
    assert_unchanged(model, before)


@pytest.mark.usefixtures("toy_kinds")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("row", SCHEMES)
def test_schemes(row, tied):
    """Every kind of codes, static ranges, a transposed layer; one model in its two states."""

    def squares(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.cat(model(ids), dim=-1).double().square().mean(), len(ids)

    model = toy_prepared(SCHEMES[row], tied)
    expected = measure_sharpness(model, [toy_inputs()], squares, radius=0.05)
    assert expected.projected >= expected.one_step > 0
    assert measure_sharpness(pack(model), [toy_inputs()], squares, radius=0.05) == expected


def test_batches_are_weighted():
    """Whichever way the samples are batched, and if the batches are an iterator."""
    model, ids = student(), token_ids(5)
    expected = measure_sharpness(model, [ids], loss, radius=0.1)
    found = measure_sharpness(model, iter(ids.split([1, 4])), loss, radius=0.1)
    for name in Sharpness.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def test_seed_draws_the_directions():
    model = student()
    first, same, other = (measure_sharpness(model, BATCHES, loss, draws=2, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first.random_mean != other.random_mean
    assert first.projected == other.projected


# What is left behind


def used(name: str = "bert-cls") -> nn.Module:
    """A model in the middle of training: gradients, mixed modes and flags, a perturbation."""
    model = student(name).train()
    model.base_model.eval()
    loss(model, BATCHES[0])[0].backward()
    next(model.parameters()).requires_grad_(False)
    layer = next(layer for _, layer in low_bit_layers(model))
    layer.perturbation = torch.ones(layer.shape)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name):
    model = used(name)
    before = state(model)
    found = measure_sharpness(model, BATCHES, loss)
    assert_unchanged(model, before)
    for _, layer in low_bit_layers(model):
        layer.perturbation = None
    assert measure_sharpness(model.eval(), BATCHES, loss) == found


@pytest.mark.parametrize("call", [1, 2, 3, 9, 11, 13])
def test_an_interrupt_leaves_the_model_as_it_was(call):
    model, calls = used(), []
    before = state(model)

    def interrupted(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        measure_sharpness(model, BATCHES, interrupted)
    assert_unchanged(model, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_wherever_it_is_called(context):
    model = pack(student())
    expected = measure_sharpness(model, BATCHES, loss)
    with context():
        assert measure_sharpness(model, BATCHES, loss) == expected


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "radius=0.0 is no relative radius; use a number above 0, such as 0.01"),
        ({"radius": -1}, "radius=-1 is no relative radius"),
        ({"radius": math.nan}, "radius=nan is no relative radius"),
        ({"radius": "big"}, "radius='big' is no relative radius"),
        ({"steps": 0}, "steps=0 is no count; use an integer of at least 1, such as 5"),
        ({"steps": 1.5}, "steps=1.5 is no count"),
        ({"draws": 0}, "draws=0 is no count"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        measure_sharpness(student(), BATCHES, loss, **settings)


def test_no_batches():
    with pytest.raises(ValueError, match="nothing to measure on; give at least one batch"):
        measure_sharpness(student(), [], loss)


def test_no_low_bit_layer():
    with pytest.raises(ValueError, match=r"BertFor.* has no low-bit layer to perturb; call prepare\(model, scheme\) first"):
        measure_sharpness(make("bert-cls"), BATCHES, loss)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda value: value, r"returned tensor\(.*; return \(mean loss \(\), of how many it is the mean\), such as"),
        (lambda value: (value.item(), 1), r"returned \(0\.0.*, 1\); return"),
        (lambda value: (value.expand(2), 1), r"returned \(tensor\(\[.*; return"),
        (lambda value: (value, 0), r"loss\(model, batch\) returned \(tensor\(.*; return"),
        (lambda value: (value, torch.tensor(2)), r"returned \(tensor\(.*; return"),
        (lambda value: (value * math.nan, 1), "the loss is nan at the weights; check the model and the batches"),
        (lambda value: (value.detach(), 1), "no gradient in the low-bit weights; .* not under torch.no_grad"),
        (lambda value: (value * 0 + (value * 0).sqrt(), 1), "the gradient of the loss has the norm nan; use a loss"),
    ],
    ids=["no-count", "no-tensor", "no-mean", "of-nothing", "of-a-tensor", "nan", "no-gradient", "no-finite-gradient"],
)
def test_bad_losses(found, message):
    model = used()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        measure_sharpness(model, BATCHES, lambda model, batch: found(loss(model, batch)[0]))
    assert_unchanged(model, before)


def test_radius_beyond_what_the_loss_bears():
    def logarithm(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return -(1.0 - model(x) / model[0].quantized_weight().detach().sum().abs().clamp(min=9.0)).log().sum(), 1

    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at a perturbation; use a smaller radius \(now 1000.0\)"):
        measure_sharpness(toy(), [torch.eye(3)], logarithm, radius=1000.0)


# Relaxing a packed model


@pytest.mark.usefixtures("toy_kinds")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", SCHEMES)
def test_relaxed_model_computes_what_the_packed_one_does(row, dtype, tied):
    model = pack(toy_prepared(SCHEMES[row], tied, dtype))
    codes = {name: value.clone() for name, value in model.state_dict().items()}
    expected = outputs(exactly(model), toy_inputs())
    relaxed = relax(model)
    assert relaxed is model
    assert torch.equal(outputs(model, toy_inputs()), expected)
    assert all(layer.weight.requires_grad and layer.weight.dtype == dtype for _, layer in low_bit_layers(model))
    assert tied == (model.output.weight is model.table.weight)
    found = pack(model).state_dict()
    assert found.keys() == codes.keys()
    assert all(torch.equal(value, codes[name]) for name, value in found.items())


@pytest.mark.parametrize("name", [*NAMES, "bart-tied", "gpt2-untied"])
def test_relaxed_families(name, tmp_path):
    model = pack(student(name, activation_bits=8, outliers=0.02))
    expected = logits(exactly(model))
    assert torch.equal(logits(relax(model)), expected)
    assert not model.config.quantization_config.packed
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)


def test_relaxed_transposed_layer():
    layer = relax(pack(student("gpt2-tied"))).get_submodule("transformer.h.0.mlp.c_fc")
    assert type(layer) is FakeQuantTransposedLinear
    assert layer.weight.shape == layer.shape[::-1]
    assert layer.weight.is_contiguous()


def test_relaxed_without_packed_layers():
    model = student()
    before = state(model)
    assert relax(model) is model
    assert_unchanged(model, before)


def test_codes_that_the_dtype_does_not_hold():
    model = nn.Sequential(nn.Linear(33, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    model = pack(prepare(model, QuantScheme(QuantSpec(8)))).half()
    with pytest.raises(
        ValueError, match=r"1: the values of its codes do not fit torch.float16; call model.float\(\) first"
    ):
        relax(model)
    assert all(type(layer) is PackedLinear for layer in model)
    relax(model.float())
