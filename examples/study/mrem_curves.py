"""The curves of the study `mrem` as one figure: teacher forcing, stages, calibration sentences.

python examples/study/mrem_curves.py --results docs/results --plot docs/figures/mrem_curves.png
"""

from typing import Any

from figures import figure_command
from mrem_tables import FORCING, MAIN, SAMPLES, STAGES, Rows, cells_of


def points(rows: Rows) -> dict[str, list[tuple[float, list[float]]]]:
    """Title of a curve -> (x, the KL of every seed that is finished), at W2A8E4 per row."""
    methods = {
        "MREM-P, 30 steps: teacher forcing, share of the steps": {s: f"mrem-p+steps=30+forcing={s}" for s in FORCING},
        "MREM-S: stages": {n: "mrem-s" if n == 3 else f"mrem-s+stages={n}" for n in sorted((*STAGES, 3))},
        "MREM-S: calibration sentences": {
            n: "mrem-s" if n == 1024 else f"mrem-s+samples={n}" for n in sorted((*SAMPLES, 1024))
        },
    }
    found = {}
    for title, curve in methods.items():
        values = {x: [cell["test_kl"] for cell in cells_of(rows, "sst2", name, MAIN[0])] for x, name in curve.items()}
        found[title] = [(float(x), kls) for x, kls in values.items() if kls]
    return found


def draw(rows: Rows, pyplot: Any) -> Any:
    """The figure: means, with bars from the least to the most of the seeds."""
    curves = points(rows)
    figure, axes = pyplot.subplots(1, len(curves), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (title, curve) in zip(axes, curves.items(), strict=True):
        places, means = [x for x, _ in curve], [sum(kls) / len(kls) for _, kls in curve]
        bars = [
            [mean - min(kls) for mean, (_, kls) in zip(means, curve, strict=True)],
            [max(kls) - mean for mean, (_, kls) in zip(means, curve, strict=True)],
        ]
        axis.errorbar(places, means, yerr=bars, marker="o", capsize=3)
        if "sentences" in title:
            axis.set_xscale("log", base=2)
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0.0)
    axes[0].set_ylabel("KL to the float model, SST-2's test sentences")
    return figure


if __name__ == "__main__":
    figure_command("mrem", __doc__, draw)
