"""One Linear layer at a time."""

import copy

import pytest
import torch
from tiny_models import make, token_ids
from torch import nn

from optimum_zsaq.algorithms.layerwise import reconstruct_layers
from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings, batch_order, make_optimizer
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, prepare


SCHEME = QuantScheme(QuantSpec(2), QuantSpec(4), QuantSpec(8, "token", symmetric=False))
SETTINGS = ReconstructionSettings(start="rounding", steps=8, learning_rate=1e-3, scale_learning_rate=1e-3)


@pytest.fixture(autouse=True)
def known_models(plain_kinds):
    register_models()


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_is_a_plain_loop_over_layers():
    teacher = Chain()
    student = prepare(copy.deepcopy(teacher), QuantScheme(QuantSpec(2), None, None), "minmax")
    plain = copy.deepcopy(student)
    batches = [{"x": torch.randn(5, 6)} for _ in range(3)]
    errors = {}
    reconstruct_layers(teacher, student, batches, SETTINGS, errors.__setitem__)
    inputs = [(b["x"], b["x"]) for b in batches]
    for name in ("first", "second"):
        layer, wanted = getattr(plain, name), getattr(teacher, name)
        trained = [layer.weight, layer.bias, layer.weight_scale]
        layer.weight_scale.requires_grad_(True)
        optimizer, schedule = make_optimizer(trained[:2], trained[2:], SETTINGS)
        for _, i in zip(range(8), batch_order(3, 0), strict=False):
            optimizer.zero_grad()
            target = wanted(inputs[i][1]).detach()
            ((layer(inputs[i][0]) - target).square().sum() / target.square().sum()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        after = [(layer(x).detach(), wanted(y).detach()) for x, y in inputs]
        inputs = [(torch.relu(x), torch.relu(y)) for x, y in after]
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), plain.parameters(), strict=True))
    assert list(errors) == ["first", "second"]


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-tied", "t5-tied"])
def test_every_layer_of_every_family_is_trained(name):
    teacher = make(name)
    student = prepare(copy.deepcopy(teacher), SCHEME, "minmax")
    ids = token_ids()
    batch = uncached_batch(teacher, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    before, errors = copy.deepcopy(student.state_dict()), {}
    reconstruct_layers(teacher, student, [batch], SETTINGS, errors.__setitem__)
    layers = {n: m for n, m in low_bit_layers(student) if m.owner is m and n in errors}
    assert len(layers) == len(errors) > 3
    assert not any(torch.equal(m.weight, before[f"{n}.weight"]) for n, m in layers.items())
    table = next(n for n, m in student.named_modules() if m is student.get_input_embeddings())
    assert torch.equal(student.get_submodule(table).weight, before[f"{table}.weight"])
    assert not any(p.requires_grad for p in student.parameters())
