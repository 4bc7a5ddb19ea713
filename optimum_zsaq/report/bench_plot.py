"""The figure of a bench: for each workload the contestants as horizontal bars, and their memory."""

from pathlib import Path
from typing import Any


_OURS, _PEER, _BASELINE = "#1b6ca8", "#b8b8b8", "#6f6f6f"
_LOGARITHMIC = 30.0  # slowest / fastest from which bars are drawn on a logarithmic axis
MIB = 2**20


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the result of `run_bench` as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no contestant was measured.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib; run: pip install 'optimum-zsaq[bench]'") from error
    panels = _panels(result)
    if not panels:
        raise ValueError("no contestant was measured, so there is nothing to draw")
    height = 1.5 + 0.27 * max(len(rows) for _, rows, _ in panels)
    figure = Figure(figsize=(0.5 + 5.2 * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, rows, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _bars(axes, title, rows, unit, result["settings"]["baseline"])
    settings, model = result["settings"], result["model"]
    clock = "processor time" if settings["clock"] == "cpu" else "wall time"
    figure.suptitle(
        f"{model['name']} on {result['machine']['processor']}, {threads(settings)}\n"
        f"{clock}, median of {settings['rounds']} rounds, 95 % interval; blue: this package, dark: {settings['baseline']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def threads(settings: dict[str, Any]) -> str:
    """ "1 thread", "2 threads"."""
    return f"{settings['threads']} thread" + ("s" if settings["threads"] > 1 else "")


Row = tuple[str, float, float, float]


def _panels(result: dict[str, Any]) -> list[tuple[str, list[Row], str]]:
    """(title, rows, unit); a row is (contestant, value, low, high), the best first."""
    measured = {name: entry for name, entry in result["contestants"].items() if entry["results"]}
    panels = []
    for workload in result["workloads"]:
        rows = [(name, *values(entry["results"][workload["name"]], workload)) for name, entry in measured.items()]
        rows.sort(key=lambda row: -row[1] if workload["rate"] else row[1])
        unit = "tokens/s, more is better" if workload["rate"] else "ms, less is better"
        panels.append((workload["name"], rows, unit))
    memory = {name: entry["memory"]["warm"] / MIB for name, entry in measured.items() if entry["memory"]}
    if memory:
        rows = sorted(((name, value, value, value) for name, value in memory.items()), key=lambda row: row[1])
        panels.append(("memory after the first calls", rows, "MiB, less is better"))
    return panels if measured else []


def values(found: dict[str, Any], workload: dict[str, Any]) -> Row:
    """(median, low, high) of a workload in the unit it is shown in: tokens a second, or milliseconds."""
    times = (found["seconds"], *found["interval"])
    if workload["rate"]:
        median, low, high = (workload["steps"] / value for value in times)
        return median, high, low
    return tuple(1000 * value for value in times)


def _bars(axes: Any, title: str, rows: list[Row], unit: str, baseline: str) -> None:
    names = [row[0] for row in rows]
    colors = [_BASELINE if name == baseline else _OURS if name.startswith("zsaq") else _PEER for name in names]
    middle = [max(row[1], 0.0) for row in rows]
    errors = [[row[1] - row[2] for row in rows], [row[3] - row[1] for row in rows]]
    axes.barh(names, middle, color=colors, xerr=errors, error_kw={"elinewidth": 1, "ecolor": "#333333"})
    positive = [value for value in middle if value > 0]
    if positive and max(positive) / min(positive) > _LOGARITHMIC:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.5, 2.2 * max(positive))
        unit += ", logarithmic"
    else:
        axes.set_xlim(0, 1.18 * max(middle, default=1.0))
    for place, row in enumerate(rows):
        axes.annotate(f"{row[1]:,.3g}" if row[1] < 1000 else f"{row[1]:,.0f}", (max(row[3], 0.0), place), (4, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    for label in axes.get_yticklabels():
        if label.get_text().startswith("zsaq"):
            label.set_color(_OURS)
    axes.spines[["top", "right"]].set_visible(False)
