import pytest
import torch
from tiny_models import make

from optimum_zsaq import PreQuantConfig, prepare
from optimum_zsaq.algorithms.step_sizes import StepSizes, trained_layers
from optimum_zsaq.surgery import low_bit_layers


def student(name: str = "bert-cls", **settings):
    fields = {"weight_bits": 3, "embedding_bits": 2, **settings}
    return prepare(make(name), PreQuantConfig(**fields).scheme())


@pytest.mark.parametrize(
    ("granularity", "size", "shared"), [("tensor", None, 32 * 37), ("row", None, 32), ("group", 8, 8)], ids=str
)
def test_gradient_scales_are_lsqs(granularity, size, shared):
    """1 / sqrt(N Qp): N is how many weights share a step size."""
    model = student(granularity=granularity, group_size=size, symmetric=True)
    found = {s.name: s.gradient_scale for s in StepSizes(model).all}
    name = "bert.encoder.layer.1.intermediate.dense.weight_scale"
    assert found[name] == pytest.approx((shared * 3) ** -0.5)
    table = "bert.embeddings.word_embeddings.weight_scale"
    assert found[table] == pytest.approx((8 if size else 32) ** -0.5)


def test_of_asymmetric_codes_and_static_inputs():
    model = student(symmetric=False, activations="static", activation_bits=4)
    for _, layer in low_bit_layers(model):
        if layer.input_scale is not None:
            layer.set_input_range(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    found = {s.name: s.gradient_scale for s in StepSizes(model).all}
    assert found["bert.encoder.layer.1.output.dense.weight_scale"] == pytest.approx((37 * 7) ** -0.5)
    assert found["bert.encoder.layer.1.output.dense.input_scale"] == pytest.approx((37 * 15) ** -0.5)


def test_scaling_leaves_other_gradients_alone():
    model = student()
    sizes = StepSizes(model)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    sizes.parameters[0].grad = None
    sizes.scale_gradients()
    assert sizes.parameters[0].grad is None
    assert all((s.parameter.grad == s.gradient_scale).all() for s in sizes.all[1:])
    assert (model.classifier.weight.grad == 1).all()


def test_drift_is_relative_to_the_start():
    sizes = StepSizes(student())
    assert sizes.drift() == 0.0
    with torch.no_grad():
        for p in sizes.parameters:
            p.mul_(1.5)
    assert sizes.drift() == pytest.approx(0.5)


def test_clipped_is_the_share_outside_the_range():
    model = student(ranges="minmax")
    assert StepSizes(prepare(make("bert-cls"), PreQuantConfig(weight_bits=3).scheme(), "minmax")).clipped() < 0.01
    for _, layer in low_bit_layers(model):
        layer.weight_scale.data.fill_(1e-9)
    zeros = sum((layer.weight == 0).sum().item() for _, layer in low_bit_layers(model))
    count = sum(layer.weight.numel() for _, layer in low_bit_layers(model))
    assert StepSizes(model).clipped() == pytest.approx(1.0 - zeros / count)


def test_tied_and_frozen_layers_have_none_of_their_own():
    model = student("llama-tied")
    model.model.layers[0].requires_grad_(False)
    names = trained_layers(model)
    assert "model.embed_tokens" in names
    assert not [name for name in names if name == "lm_head" or ".layers.0." in name]
    assert [name for name in names if ".layers.1." in name]
