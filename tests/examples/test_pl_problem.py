"""The nonconvex-PL problem is what it says, the algorithm is SAM-SGA, the results in the docs are those of their runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import FORMULA
from torch import Tensor


ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "study"
RESULTS = ROOT / "docs/results/pl_problem.json"


@pytest.fixture
def pl(monkeypatch):
    """The script as a module."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("pl_problem", "runner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(STUDY))
    import pl_problem

    return pl_problem


def points(count: int, size: int, deviation: float = 3.0) -> Tensor:
    return deviation * torch.randn(count, size, dtype=torch.float64)


def gradient(function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# The problem


def test_the_maximum_is_the_closed_form(pl):
    """It is reached, nothing is above it, and its gradient is that of F there (Danskin)."""
    problem, w = pl.make_problem(), points(200, 10)
    answer = problem.answer(w)
    torch.testing.assert_close(problem.value(w, answer), problem.highest(w), rtol=FORMULA, atol=FORMULA)
    assert (problem.value(w, points(200, 20)) < problem.highest(w)).all()
    torch.testing.assert_close(problem.slope(w), gradient(problem.highest, w), rtol=FORMULA, atol=FORMULA)
    found = gradient(lambda w: problem.value(w, answer), w)
    torch.testing.assert_close(found, problem.slope(w), rtol=1e-9, atol=1e-9)


def test_pl_in_theta_with_the_constant_it_says(pl):
    """|dF/dtheta|^2 >= 2 mu (Phi - F), near the answer and far from it."""
    problem = pl.make_problem()
    mu = torch.linalg.svdvals(problem.reach).min().item() ** 2 / 32
    assert mu == pytest.approx(0.7**2 / 32)
    for deviation in (0.01, 0.3, 1.0, 3.0, 30.0):
        w = points(2000, 10)
        theta = problem.answer(w) + points(2000, 20, deviation)
        squares = gradient(lambda theta, w=w: problem.value(w, theta), theta).square().sum(dim=-1)
        assert (squares >= 2 * mu * problem.gap(w, theta)).all()


def test_neither_concave_in_theta_nor_convex_in_w(pl):
    problem = pl.make_problem()
    curvatures = []
    for theta in points(20, 20):
        hessian = torch.autograd.functional.hessian(lambda theta: problem.value(torch.zeros(10).double(), theta), theta)
        assert (torch.linalg.eigvalsh(hessian).abs() < 1e-9).sum() == 10  # the null space of A
        curvatures.append(torch.linalg.eigvalsh(hessian).max())
    assert max(curvatures) > 0.1
    hessians = [torch.autograd.functional.hessian(problem.highest, w) for w in points(20, 10)]
    assert min(torch.linalg.eigvalsh(hessian).min() for hessian in hessians) < -1.0


def test_no_lower_bound_at_a_fixed_theta(pl):
    problem, w, theta = pl.make_problem(), points(50, 10), points(50, 20)
    assert (problem.value(1e3 * w, theta) < -1e5).all()
    assert (problem.highest(points(1000, 10, 10.0)) >= 0).all()


# The algorithm


def test_steps_are_the_formula(pl):
    """Four steps by hand, the same samples: SAM of w, then ascent of theta at the new w."""
    problem, settings, horizon = pl.make_problem(), pl.Settings(), 4
    found_w, found_theta = pl.run(problem, settings, horizon, seed=3)
    generator, root = torch.Generator().manual_seed(3), math.sqrt(horizon)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    w, theta = settings.start * normal(10), torch.zeros(20, dtype=torch.float64)
    for step in range(horizon):
        torch.testing.assert_close(found_w[step], w, rtol=1e-6, atol=1e-6)  # the climb's norm is float32
        torch.testing.assert_close(found_theta[step], theta, rtol=1e-6, atol=1e-6)
        sample, now = settings.noise * normal(10), theta
        g = gradient(lambda w, now=now: problem.value(w, now), w) + sample
        sharp = w + settings.rho / root * g / g.norm()
        w = w - settings.step / root * (gradient(lambda w, now=now: problem.value(w, now), sharp) + sample)
        sample, here = settings.noise * normal(20), w
        g = gradient(lambda theta, here=here: problem.value(here, theta), theta) + sample
        theta = theta + settings.ascent_step / root * g


def test_the_start_is_the_same_for_every_horizon(pl):
    problem, settings = pl.make_problem(), pl.Settings()
    short, long = (pl.run(problem, settings, horizon, seed=1)[0][0] for horizon in (2, 5))
    assert torch.equal(short, long)
    assert not torch.equal(short, pl.run(problem, settings, 2, seed=2)[0][0])


def test_measures_are_means_over_the_run(pl):
    problem, w, theta = pl.make_problem(), points(7, 10), points(7, 20)
    squares = [gradient(problem.highest, point).square().sum().item() for point in w]
    found = pl.measure(problem, w, theta)
    assert found["mean"] == pytest.approx(sum(squares) / 7)
    assert found["first_half"] == pytest.approx(sum(squares[:3]) / 3)
    assert found["second_half"] == pytest.approx(sum(squares[3:]) / 4)
    assert found["gap"] == pytest.approx((problem.highest(w) - problem.value(w, theta)).mean().item())


def test_line_through_a_power(pl):
    horizons = (10, 40, 90, 1000)
    slope, offset = pl.fit(horizons, [7 * horizon**-0.43 for horizon in horizons])
    assert slope == pytest.approx(-0.43)
    assert 10**offset == pytest.approx(7)


def test_without_noise_the_second_half_has_arrived(pl):
    """What is left there with noise is the noise's."""
    problem = pl.make_problem()
    found = pl.measure(problem, *pl.run(problem, pl.Settings(noise=0.0), 400, seed=0))
    assert found["second_half"] < 1e-2 * found["mean"]


# The script


def test_a_short_run(tmp_path):
    output, plot = tmp_path / "new" / "result.json", tmp_path / "new" / "plot.png"
    command = [sys.executable, STUDY / "pl_problem.py", "--output", output, "--plot", plot, "--seeds", "2", "--horizons"]
    done = subprocess.run([*command, "64", "32", "128", "256"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slope -0." in done.stdout
    result = json.loads(output.read_text())
    assert result["horizons"] == [32, 64, 128, 256]
    assert [(each["horizon"], each["seed"]) for each in result["runs"]] == [
        (h, s) for h in (32, 64, 128, 256) for s in (0, 1)
    ]
    assert len(result["slopes_by_seed"]) == 2
    assert len(result["slopes_between"]) == 3
    assert result["slopes"]["mean"] < -0.25  # the way from the start is not behind them yet
    assert {"command", "settings", "machine", "versions", "commit"} < set(result)
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--horizons", "100", "100"), "have no slope; give at least two different ones of at least 2 steps"),
        (("--horizons", "1", "100"), "have no slope"),
        (("--seeds", "0"), "--seeds 0 is no count; give at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(pl, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["pl_problem.py", "--output", "result.json", *arguments])
    with pytest.raises(SystemExit):
        pl.main()
    assert message in capsys.readouterr().err


def test_drawing_needs_matplotlib(pl, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"the figure needs matplotlib; run: pip install 'optimum-zsaq\[bench\]'"):
        pl.draw({}, tmp_path / "plot.png")


def test_results_in_the_docs_are_those_of_their_runs(pl):
    """The rate, in the mean, in every seed and in the noise alone; most of the mean is noise."""
    result = json.loads(RESULTS.read_text())
    for name, found in pl.summary(result["runs"]).items():
        assert found == result[name], name
    assert result["horizons"] == list(pl.HORIZONS)
    assert result["settings"] == pl.asdict(pl.Settings())
    assert max(result["slopes"]["mean"], result["slopes"]["second_half"], *result["slopes_by_seed"]) <= -0.45
    for whole, late in zip(result["figures"]["mean"], result["figures"]["second_half"], strict=True):
        assert late["mean"] > 0.5 * whole["mean"]


def test_a_run_in_the_docs_again(pl):
    kept = json.loads(RESULTS.read_text())["runs"][0]
    problem = pl.make_problem()
    found = pl.measure(problem, *pl.run(problem, pl.Settings(), kept["horizon"], kept["seed"]))
    assert found == pytest.approx({name: kept[name] for name in pl.PARTS}, rel=1e-3)
