"""The rate of SAM-SGA on a nonconvex-PL minimax problem whose solution is known.

    python examples/study/pl_problem.py --output docs/results/pl_problem.json --plot docs/figures/pl_problem.png

The problem: min over w (10,) max over theta (20,) of

    F(w, theta) = Phi(w) - h(A theta - C w)
    h(u) = sum of u^2 + 3 sin^2 u,   Phi(w) = sum of v^2 / 10 + 1 - cos 2v,   v = U w

with U orthogonal, A (10, 20) of full rank and C (10, 10).

- h is PL with the constant 1/32 and not convex (https://huggingface.co/papers/1608.04636), so -F is PL in
  theta with the constant sigma_min(A)^2 / 32. F is not concave in theta, and constant along the null space of A.
- h is at least 0, and 0 at 0; A theta reaches every C w. So the maximum of F over theta is Phi, with a gradient in closed
  form. Phi is not convex: it has many local minima.
- At a fixed theta F has no lower bound in w: C is chosen so that h outgrows Phi. Descent alone runs away.

The algorithm: T times a SAM step of w and a step of theta up F, as in `algorithms/minimax.py` with `generator_every=1` but
without Adam, schedule and clipping; the climb of SAM is that of `algorithms/sharpness.py`. Every step of w and every step
of theta has a sample of its own, which adds normal noise to the gradient; both gradients of a SAM step have the same one.
Step sizes and radius are constant in a run and proportional to 1 / sqrt(T).

What is measured: the running mean (1 / T) sum over t < T of |grad Phi(w_t)|^2, w_t before each step, the start included.
Each T is a run of its own, since its step sizes depend on T; a seed draws the start, which is the same for all T, and the
samples. The slope is that of the least-squares line through log(mean over the seeds) against log(T). Theory for step sizes
and a radius of this order: O(1 / sqrt(T)), a slope of -0.5 (https://huggingface.co/papers/2310.13315).

The mean has two parts that fall at this rate: the way from the start, and what the noise leaves at the end. The means of
the first and the second half of each run are given too; the second has hardly anything but noise, and must fall as well.
The constants of `Settings` are our choice, such that the noise makes up most of the mean.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from runner import circumstances
from torch import Tensor, nn

from optimum_zsaq.algorithms.sharpness import Perturbation, SharpnessSettings


HORIZONS = (100, 316, 1000, 3162, 10000, 31623)
PARTS = ("mean", "first_half", "second_half", "gap")
_COLOR, _LATE, _GUIDE = "#1b6ca8", "#d08a2e", "#6f6f6f"


@dataclass(frozen=True)
class Settings:
    """How to run; what is divided by sqrt(T) says so.

    Args:
        step, ascent_step (`float`): of w and of theta, over sqrt(T).
        rho (`float`): radius of SAM, over sqrt(T).
        noise (`float`): standard deviation of the noise in each coordinate of each gradient.
        start (`float`): standard deviation of each coordinate of the first w; theta starts at 0.
    """

    step: float = 1.0
    ascent_step: float = 1.0
    rho: float = 0.5
    noise: float = 1.0
    start: float = 3.0


# The problem ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """F and what is known of it.

    Shapes: rotation U (D, D), reach A (D, N), coupling C (D, D); of its methods w (..., D) and theta (..., N).
    """

    rotation: Tensor
    reach: Tensor
    coupling: Tensor

    def value(self, w: Tensor, theta: Tensor) -> Tensor:
        """F. Shapes: -> (...)."""
        return self.highest(w) - self.gap(w, theta)

    def highest(self, w: Tensor) -> Tensor:
        """Phi, the maximum of F over theta. Shapes: -> (...)."""
        v = w @ self.rotation.T
        return (0.1 * v.square() + 1.0 - torch.cos(2.0 * v)).sum(dim=-1)

    def slope(self, w: Tensor) -> Tensor:
        """The gradient of Phi. Shapes: -> (..., D)."""
        v = w @ self.rotation.T
        return (0.2 * v + 2.0 * torch.sin(2.0 * v)) @ self.rotation

    def gap(self, w: Tensor, theta: Tensor) -> Tensor:
        """Phi(w) - F(w, theta) = h(A theta - C w). Shapes: -> (...)."""
        u = theta @ self.reach.T - w @ self.coupling.T
        return (u.square() + 3.0 * torch.sin(u).square()).sum(dim=-1)

    def answer(self, w: Tensor) -> Tensor:
        """The shortest theta where F is highest. Shapes: -> (..., N)."""
        return w @ self.coupling.T @ torch.linalg.pinv(self.reach).T


def make_problem(size: int = 10, seed: int = 0) -> Problem:
    """A random problem: singular values of A from 0.7 to 1, of C from 0.4 to 0.6 (squared, above the 0.1 of Phi)."""
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q

    def spread(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, size, dtype=torch.float64)

    reach = orthogonal(size) * spread(0.7, 1.0) @ orthogonal(2 * size)[:size]
    return Problem(orthogonal(size), reach, orthogonal(size) * spread(0.4, 0.6) @ orthogonal(size))


# The algorithm -------------------------------------------------------------------------------------------------------


class Player(nn.Module):
    """One side of the game: a point that it moves."""

    def __init__(self, point: Tensor):
        super().__init__()
        self.point = nn.Parameter(point)

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Along its gradient, which is used up."""
        self.point.add_(self.point.grad, alpha=step)
        self.point.grad = None


def run(problem: Problem, settings: Settings, horizon: int, seed: int) -> tuple[Tensor, Tensor]:
    """SAM-SGA for `horizon` steps. Shapes: -> w (T, D) and theta (T, N), before each step."""
    generator, scale = torch.Generator().manual_seed(seed), 1.0 / math.sqrt(horizon)
    rows, columns = problem.reach.shape

    def normal(size: int, deviation: float) -> Tensor:
        return deviation * torch.randn(size, generator=generator, dtype=torch.float64)

    w, theta = Player(normal(rows, settings.start)), Player(torch.zeros(columns, dtype=torch.float64))
    climb = Perturbation(w, SharpnessSettings(settings.rho * scale, perturb="latent"))
    path = torch.empty(horizon, rows + columns, dtype=torch.float64)
    for place in path:
        place.copy_(torch.cat([w.point.detach(), theta.point.detach()]))
        sample = normal(rows, settings.noise)
        for sharp in (False, True):
            if sharp:
                climb.apply()
            (problem.value(w.point, theta.point.detach()) + sample @ w.point).backward()
        climb.remove()
        w.move(-settings.step * scale)
        sample = normal(columns, settings.noise)
        (problem.value(w.point.detach(), theta.point) + sample @ theta.point).backward()
        theta.move(settings.ascent_step * scale)
    return path[:, :rows], path[:, rows:]


def measure(problem: Problem, w: Tensor, theta: Tensor) -> dict[str, float]:
    """Means of |grad Phi|^2 over a run and its halves, and of Phi - F, by which theta lags behind."""
    squares, half = problem.slope(w).square().sum(dim=-1), len(w) // 2
    parts = (squares, squares[:half], squares[half:], problem.gap(w, theta))
    return {name: part.mean().item() for name, part in zip(PARTS, parts, strict=True)}


# The study -----------------------------------------------------------------------------------------------------------


def fit(horizons: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the least-squares line through log10 of the values against log10 of the horizons."""
    x = torch.tensor(horizons, dtype=torch.float64).log10()
    y = torch.tensor(values, dtype=torch.float64).log10()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return slope.item(), (y.mean() - slope * x.mean()).item()


def study(horizons: Sequence[int], seeds: int, settings: Settings) -> dict[str, Any]:
    """All runs, and for each part of them its mean, least and most over the seeds, and the slopes."""
    problem, runs = make_problem(), []
    for horizon in horizons:
        began = time.perf_counter()
        for seed in range(seeds):
            runs.append({"horizon": horizon, "seed": seed, **measure(problem, *run(problem, settings, horizon, seed))})
        print(f"T={horizon}: {seeds} runs, {time.perf_counter() - began:.1f} s", flush=True)
    return {"settings": asdict(settings), "horizons": list(horizons), "seeds": seeds, "runs": runs, **summary(runs)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs say.

    Returns:
        `dict`: "figures", by part and horizon; "slopes" by part; "slopes_by_seed" and "slopes_between" neighbouring
        horizons, of the mean.
    """
    horizons = sorted({each["horizon"] for each in runs})
    by_horizon = [[each for each in runs if each["horizon"] == horizon] for horizon in horizons]
    figures = {}
    for part in PARTS:
        values = [[each[part] for each in group] for group in by_horizon]
        figures[part] = [{"mean": sum(v) / len(v), "least": min(v), "most": max(v)} for v in values]
    means = {part: [entry["mean"] for entry in figures[part]] for part in PARTS}
    by_seed = [[each["mean"] for each in runs if each["seed"] == seed] for seed in sorted({each["seed"] for each in runs})]
    between = [fit(horizons[i : i + 2], means["mean"][i : i + 2])[0] for i in range(len(horizons) - 1)]
    return {
        "figures": figures,
        "slopes": {part: fit(horizons, means[part])[0] for part in PARTS},
        "slopes_by_seed": [fit(horizons, values)[0] for values in by_seed],
        "slopes_between": between,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The running mean and that of the second half against T, with the fitted line and a slope of -1/2.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError("the figure needs matplotlib; run: pip install 'optimum-zsaq[bench]'") from error
    horizons, figures = result["horizons"], result["figures"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for part, color, label in (("mean", _COLOR, "whole run"), ("second_half", _LATE, "second half of the run")):
        _series(axes, horizons, figures[part], color, label)
    top = 1.35 * figures["mean"][0]["most"]
    guide = [top * (horizons[0] / horizon) ** 0.5 for horizon in horizons]
    axes.plot(horizons, guide, ":", color=_GUIDE, linewidth=1.2, label="slope -0.5, for comparison")
    axes.set(xscale="log", yscale="log", xlabel="steps T of a run", ylabel=r"$|\nabla\Phi(w_t)|^2$, mean over $t$")
    axes.set_xticks(horizons, [f"{horizon:,}" for horizon in horizons])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.set_title(f"SAM-SGA on a nonconvex-PL problem; {result['seeds']} seeds, band: least to most", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _series(axes: Any, horizons: list[int], entries: list[dict[str, float]], color: str, label: str) -> None:
    values = {name: [entry[name] for entry in entries] for name in ("mean", "least", "most")}
    axes.fill_between(horizons, values["least"], values["most"], color=color, alpha=0.2, linewidth=0)
    axes.plot(horizons, values["mean"], "o", color=color, markersize=5, label=label)
    slope, offset = fit(horizons, values["mean"])
    line = [10.0**offset * horizon**slope for horizon in horizons]
    axes.plot(horizons, line, "--", color=color, linewidth=1.2, label=f"fitted slope {slope:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write; needs matplotlib")
    parser.add_argument(
        "--horizons", type=int, nargs="+", default=HORIZONS, help=f"steps T of the runs (default: {HORIZONS})"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs for each T (default: 5)")
    for name, value in asdict(Settings()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=value, help=f"see Settings (default: {value})")
    args = parser.parse_args()
    horizons = sorted(set(args.horizons))
    if len(horizons) < 2 or horizons[0] < 2:
        parser.error(f"--horizons {args.horizons} have no slope; give at least two different ones of at least 2 steps")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds} is no count; give at least 1")
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    torch.set_num_threads(1)
    result = {"command": shlex.join(["python", "examples/study/pl_problem.py", *sys.argv[1:]])}
    result |= {**study(horizons, args.seeds, settings), **circumstances()}
    for path in filter(None, (args.output, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"slope {result['slopes']['mean']:.3f}, of the second half {result['slopes']['second_half']:.3f}")
    if args.plot:
        draw(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
