from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import make
from torch import nn

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.algorithms.sharpness import Perturbation, SharpnessSettings
from optimum_zsaq.surgery import low_bit_layers


def student(name: str = "bert-cls", bits: int = 3) -> nn.Module:
    model = make(name).eval()
    return prepare(model, PreQuantConfig(weight_bits=bits, embedding_bits=bits).scheme())


def loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 35).view(2, 16)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return model(**inputs).logits.float().square().mean()


@contextmanager
def perturbed(model: nn.Module, settings: SharpnessSettings) -> Iterator[float]:
    perturbation = Perturbation(model, settings)
    try:
        yield perturbation.apply()
    finally:
        perturbation.remove()


def climbed(model: nn.Module, settings: SharpnessSettings) -> torch.Tensor:
    loss(model).backward()
    with perturbed(model, settings), torch.no_grad():
        return loss(model)


def reference(model: nn.Module, settings: SharpnessSettings) -> torch.Tensor:
    """The formula on a float copy: every quantized weight a Parameter of its own, eps = rho T^2 g / ||T g||."""
    loss(model).backward()
    layers = {name: layer for name, layer in low_bit_layers(model) if layer.owner is layer}
    fixed = {id(layer._parameters[n]) for layer in layers.values() for n in ("weight_scale",)}
    values, gradients = {}, {}
    for name, p in model.named_parameters():
        if p.grad is None or id(p) in fixed:
            continue
        layer = layers.get(name.removesuffix(".weight")) if settings.perturb == "quantized" else None
        value = p.detach() if layer is None else layer.oriented(layer.quantized_weight().detach())
        stretch = value.abs() + settings.eta if settings.adaptive and p.dim() > 1 else torch.ones_like(value)
        values[name], gradients[name] = stretch, p.grad.clone()
    norm = torch.sqrt(sum((values[n] * g).double().square().sum() for n, g in gradients.items()))
    eps = {n: settings.rho * values[n] ** 2 * g / norm for n, g in gradients.items()}
    with torch.no_grad():
        for name, e in eps.items():
            layer = layers.get(name.removesuffix(".weight")) if settings.perturb == "quantized" else None
            if layer is not None:
                layer.perturbation = layer.oriented(e).float()
            else:
                model.get_parameter(name).add_(e)
        return loss(model)


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "gpt2-tied", "t5-tied"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("perturb", ["quantized", "latent"])
def test_is_the_formula(name, adaptive, perturb):
    settings = SharpnessSettings(0.3, adaptive, perturb)
    torch.manual_seed(0)
    model = student(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = climbed(model, settings)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.zero_grad()
    expected = reference(model, settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    model.load_state_dict(state)


class TestTheClimb:
    def test_raises_the_loss_and_is_undone_exactly(self):
        model = student()
        before, state = loss(model).detach(), {k: v.clone() for k, v in model.state_dict().items()}
        assert climbed(model, SharpnessSettings(0.5)) > before
        assert torch.equal(loss(model).detach(), before)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(layer.perturbation is None for _, layer in low_bit_layers(model))

    def test_moves_by_rho_in_one_norm(self):
        model = student()
        loss(model).backward()
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        with perturbed(model, SharpnessSettings(0.25)):
            slots = [layer.perturbation for _, layer in low_bit_layers(model) if layer.perturbation is not None]
            moved = [p.detach() - trained[n] for n, p in model.named_parameters() if n in trained]
            total = sum(t.double().square().sum() for t in (*slots, *moved)) ** 0.5
        assert len(slots) > 10
        assert total.item() == pytest.approx(0.25, rel=1e-5)

    def test_uses_the_gradients_up_and_leaves_new_ones(self):
        model = student()
        loss(model).backward()
        with perturbed(model, SharpnessSettings()):
            assert all(p.grad is None for p in model.parameters() if p.requires_grad)
            loss(model).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_step_sizes_stay_where_they_are(self):
        model = student()
        for _, layer in low_bit_layers(model):
            layer.weight_scale.requires_grad_(True)
        loss(model).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight_scale")}
        with perturbed(model, SharpnessSettings(1.0, perturb="latent")):
            assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())

    def test_latent_perturbation_below_half_a_step_changes_no_code(self):
        """SAQ's second case: what the quantized weights do not show."""
        model = student(bits=2)
        before = loss(model).detach()
        loss(model).backward()
        quantized = {id(layer.weight) for _, layer in low_bit_layers(model)}
        for p in model.parameters():
            if id(p) not in quantized:
                p.grad = None
        with perturbed(model, SharpnessSettings(1e-7, perturb="latent")):
            assert torch.equal(loss(model).detach(), before)

    @pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
    def test_a_gradient_without_direction_perturbs_nothing(self, value):
        model = student()
        before = loss(model).detach()
        loss(model).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(value)
        with perturbed(model, SharpnessSettings(1.0)) as norm:
            assert norm == 0.0 or norm != norm or norm == float("inf")
            assert torch.equal(loss(model).detach(), before)

    def test_an_error_inside_leaves_the_model_as_it_was(self):
        model = student()
        before = loss(model).detach()
        loss(model).backward()
        with pytest.raises(RuntimeError, match="inside"), perturbed(model, SharpnessSettings(1.0)):
            raise RuntimeError("inside")
        assert torch.equal(loss(model).detach(), before)

    def test_is_not_saved_and_not_packed(self):
        model = student()
        keys = set(model.state_dict())
        loss(model).backward()
        perturbation = Perturbation(model, SharpnessSettings(1.0))
        perturbation.apply()
        assert set(model.state_dict()) == keys
        assert not hasattr(next(layer for _, layer in low_bit_layers(pack(model))), "perturbation")

    def test_layers_that_store_their_weight_transposed(self):
        model = student("gpt2-untied")
        loss(model).backward()
        layer = model.get_submodule("transformer.h.0.mlp.c_fc")
        gradient = layer.weight.grad.clone()
        with perturbed(model, SharpnessSettings(1.0)) as norm:
            assert layer.perturbation.shape == layer.shape == gradient.t().shape
            torch.testing.assert_close(layer.perturbation, gradient.t() / norm, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1 is no radius; use a number of at least 0"),
        ({"rho": float("nan")}, "rho=nan is no radius"),
        ({"rho": "big"}, "rho='big' is no radius"),
        ({"perturb": "codes"}, r"perturb='codes' is unknown; use one of \('quantized', 'latent'\)"),
        ({"eta": -1}, "eta=-1 is not allowed"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SharpnessSettings(**fields)
