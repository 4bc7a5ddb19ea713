"""The sweeps of the study `adapters` as one figure: share of trained weights, criterion, range method.

python examples/study/adapters_figure.py --results docs/results --plot docs/figures/adapters.png
"""

from typing import Any

from adapters_tables import SHARES, TASKS, Rows, seeds_of
from figures import figure_command


SCHEME = "w4a8e4"
PANELS = {
    "largest magnitudes, % of the weights": {
        "0": "head",
        **{f"{100 * share:g}": f"share-{share}" for share in SHARES[:2]},
        "0.5": "outliers",
        **{f"{100 * share:g}": f"share-{share}" for share in SHARES[2:]},
    },
    "criterion, 0.5 %, base without outliers": {
        name: f"by-{name}" for name in ("magnitude", "deviation", "error", "random")
    },
    "where the outliers are, 0.5 %": {"of the matrix": "outliers", "of each row": "outliers-row", "anywhere": "random"},
    "ranges of the base, 0.5 %": {"minmax": "outliers-minmax", "mse": "outliers", "lsq": "outliers-lsq"},
}
NAMES = {"sst2": "SST-2, accuracy, %", "cola": "CoLA, MCC × 100"}


def points(rows: Rows) -> dict[str, dict[str, list[tuple[str, list[float]]]]]:
    """Title of a panel -> task -> (place, the scores of every seed that is finished, in points)."""
    return {
        title: {
            task: [
                (place, [100 * row[measure] for row in seeds_of(rows, task, method, SCHEME)])
                for place, method in methods.items()
            ]
            for task, measure in TASKS.items()
        }
        for title, methods in PANELS.items()
    }


def draw(rows: Rows, pyplot: Any) -> Any:
    """The figure: a row of panels a task; dots are seeds, lines their means, dashed ones full tuning."""
    panels = points(rows)
    figure, axes = pyplot.subplots(len(TASKS), len(panels), figsize=(13, 5.6), sharey="row", layout="constrained")
    for across, (title, of_tasks) in enumerate(panels.items()):
        for task, column in zip(of_tasks, axes[:, across], strict=True):
            places = [place for place, _ in of_tasks[task]]
            found = [(number, values) for number, (_, values) in enumerate(of_tasks[task]) if values]
            line = {"lw": 1} if across == 0 else {"lw": 0, "marker": "_", "markersize": 22}
            column.plot([n for n, _ in found], [sum(v) / len(v) for _, v in found], color="tab:blue", **line)
            column.scatter([n for n, v in found for _ in v], [value for _, v in found for value in v], s=16)
            full = [100 * row[TASKS[task]] for row in seeds_of(rows, task, "full", SCHEME)]
            if full:
                column.axhline(sum(full) / len(full), color="tab:gray", ls="--", lw=1)
            column.set_xticks(range(len(places)), places, fontsize=8)
            column.set_xlim(-0.5, len(places) - 0.5)
            column.grid(alpha=0.3)
            column.set_title(title if task == "sst2" else "", fontsize=9)
    for axis, name in zip(axes[:, 0], NAMES.values(), strict=True):
        axis.set_ylabel(name)
    return figure


if __name__ == "__main__":
    figure_command("adapters", __doc__, draw)
