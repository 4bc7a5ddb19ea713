"""The bench of SQuAT's costs on a tiny model: each kind makes the gradient evaluations that its name stands for."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make


STUDY = Path(__file__).parents[2] / "examples" / "study"
# Of 10 steps: plain, two or one in turn, two, two in every fifth step, two.
EVALUATIONS = {
    "float fine-tuning": 10,
    "LSQ-QAT": 10,
    'alternate="batch"': 15,
    'alternate="step"': 20,
    'alternate="step", climb_every=5': 12,
    'alternate="none" (SAM)': 20,
}


@pytest.fixture
def bench(monkeypatch):
    """The script, with few and small turns."""
    monkeypatch.delitem(sys.modules, "squat_costs", raising=False)
    monkeypatch.syspath_prepend(str(STUDY))
    import squat_costs

    for name, value in {"TURNS": 3, "BATCH": 2, "LENGTH": 4}.items():
        monkeypatch.setattr(squat_costs, name, value)
    return squat_costs


@pytest.fixture
def folder(tmp_path) -> Path:
    make("bert-cls", vocab_size=1200).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_each_kind_makes_as_many_gradient_evaluations_as_its_name_says(bench, folder):
    assert set(EVALUATIONS) == {bench.FLOAT, *bench.KINDS}
    for kind, expected in EVALUATIONS.items():
        run, passes = bench.trainer(kind, folder), []
        run.model.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        run.train()
        assert passes == [True] * expected, kind


def test_figures_are_a_median_and_its_extremes(bench, folder, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 2)
    found = bench.measure(folder)
    assert set(found) == set(EVALUATIONS)
    assert found["LSQ-QAT"]["of_lsq"] == [1.0, 1.0, 1.0]
    for kind in bench.KINDS:
        for name in ("of_float", "of_lsq"):
            middle, least, most = found[kind][name]
            assert 0 < least <= middle <= most
