import pytest
import torch
from tiny_models import make

from optimum_zsaq import PreQuantConfig, prepare
from optimum_zsaq.algorithms.alternation import Alternation, AlternationSettings
from optimum_zsaq.algorithms.sharpness import SharpnessSettings
from optimum_zsaq.surgery import low_bit_layers


class Run:
    """One alternation on a tiny model, and how often gradients were computed."""

    def __init__(self, alternate: str, rho: float = 0.3):
        self.model = prepare(make("bert-cls"), PreQuantConfig(weight_bits=3, embedding_bits=3).scheme())
        self.alternation = Alternation(self.model, AlternationSettings(alternate, SharpnessSettings(rho)))
        self.evaluations, self.perturbed = 0, []

    def evaluate(self) -> None:
        self.evaluations += 1
        layers = [layer for _, layer in low_bit_layers(self.model)]
        self.perturbed.append(any(layer.perturbation is not None for layer in layers))
        ids = torch.arange(3, 35).view(2, 16)
        self.model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()

    def step(self, step: int = 0, epoch: int = 0) -> tuple[bool, bool]:
        """Whether weights, and step sizes, have gradients afterwards."""
        self.model.zero_grad()
        self.evaluate()
        self.alternation.finish(step, epoch, self.evaluate)
        weights, scales = self.alternation.weights, self.alternation.step_sizes.parameters
        found = [{p.grad is not None for p in group} for group in (weights[:40], scales)]
        assert all(len(group) == 1 for group in found)
        return found[0].pop(), found[1].pop()


@pytest.mark.parametrize(
    ("alternate", "turns", "evaluations"),
    [
        ("batch", [(True, False), (False, True)] * 2, 6),
        ("step", [(True, True)] * 4, 8),
        ("none", [(True, True)] * 4, 8),
        ("epoch", [(True, False)] * 2 + [(False, True)] * 2, 6),
    ],
)
def test_whose_gradients_are_left_and_what_they_cost(alternate, turns, evaluations):
    run = Run(alternate)
    assert [run.step(step, epoch=step // 2) for step in range(4)] == turns
    assert run.evaluations == evaluations
    assert sum(run.perturbed) == evaluations - 4


def test_without_radius_every_step_is_of_both():
    run = Run("batch", rho=0.0)
    assert [run.step(step) for step in range(3)] == [(True, True)] * 3
    assert run.evaluations == 3


def test_step_sizes_see_the_weights_unperturbed():
    """ "step" takes their gradient before the climb, "none" after it."""
    plain, step, none = Run("none", rho=0.0), Run("step"), Run("none")
    for run in (plain, step, none):
        run.step()
    gradients = [[p.grad for p in run.alternation.step_sizes.parameters] for run in (plain, step, none)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*gradients[::2], strict=True))


def test_an_interrupted_replay_leaves_the_weights_as_they_were():
    run = Run("none")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.evaluate()

    def fail():
        raise FloatingPointError("nan")

    with pytest.raises(FloatingPointError):
        run.alternation.finish(0, 0, fail)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(layer.perturbation is None for _, layer in low_bit_layers(run.model))


def test_an_unknown_alternation():
    with pytest.raises(ValueError, match="alternate='often' is unknown; use one of"):
        AlternationSettings("often")
