"""The tables of the study `squat`, from its finished cells: one that has no finished cell is left out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bootstrap import from_bitmap, paired_interval
from prequant_tables import circumstances, markdown
from squat_torchao import METHODS as PEERS
from squat_torchao import SCHEMES as PEER_SCHEMES


Rows = dict[str, dict[str, Any]]
SCHEMES = ("w2a8e2-row", "w4a4e4-row", "w3a8e3-row", "w2a8e2-tensor")
SEEDS = (0, 1, 2)
TASKS = {"sst2": ("SST-2, accuracy", "accuracy"), "cola": ("CoLA, MCC", "mcc")}
METHODS = {
    "float": "float",
    "lsq": "LSQ-QAT",
    "sam": "+ SAM, no alternation",
    "squat": "SQuAT",
    "lsq-steps": "LSQ-QAT, as many steps as SQuAT",
    "sam-steps": "+ SAM, as many steps as SQuAT",
}
_BATCH = {"alternate": "batch", "climb_every": 1, "num_train_epochs": 1.0}
_STEP = {"alternate": "step", "climb_every": 1, "num_train_epochs": 0.75}
SEARCH: dict[str, dict[str, Any]] = {
    "lsq+rate=1e-4": {"num_train_epochs": 1.5},
    "lsq+rate=3e-4": {"num_train_epochs": 1.5, "learning_rate": 3e-4, "scale_learning_rate": 3e-4},
    "squat+rho=0.005": {**_BATCH, "rho": 0.005},
    "squat+rho=0.01": {**_BATCH, "rho": 0.01},
    "squat+rho=0.05": {**_BATCH, "rho": 0.05},
    "squat+asam+rho=0.2": {**_BATCH, "rho": 0.2, "adaptive": True},
    "squat+step+rho=0.01": {**_STEP, "rho": 0.01},
    "squat+step+climb_every=5+rho=0.01": {**_STEP, "climb_every": 5, "reuse_weight": 0.7, "num_train_epochs": 1.25},
    "lsq+evaluations=600": {"num_train_epochs": 2.4},
    "squat+step+evaluations=600": {**_STEP, "num_train_epochs": 1.2},
    "squat+step+rate=2e-4+evaluations=600": {**_STEP, "learning_rate": 2e-4, "num_train_epochs": 1.2},
    "squat+step+climb_every=5+reuse=0.2+evaluations=600": {"num_train_epochs": 2.0},
}
RISES = ("one_step", "projected", "random_mean")


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], list]] = (scores, search, sharpness, cost, writers, torchao)
    made = {maker.__name__: maker(rows) for maker in makers}
    found = {name: markdown(*table) if table[1] else "No cell of these is finished yet." for name, table in made.items()}
    return {**found, "circumstances": circumstances(rows)}


def cells_of(rows: Rows, task: str, method: str, scheme: str) -> list[dict[str, Any]]:
    """The finished seeds."""
    return [row for seed in SEEDS if (row := rows.get(f"{task}/{method}/{scheme}/{seed}"))]


def right(row: dict[str, Any]) -> np.ndarray:
    """Which dev sentences are answered as labelled."""
    answers, labels = (from_bitmap(row[name], row["count"]) for name in ("answers", "labels"))
    return (answers == labels).astype(np.float64)


def _groups(rows: Rows) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """(task, scheme, method, cells), where there are any."""
    found = []
    for task in TASKS:
        for scheme in ("float", *SCHEMES):
            for method in METHODS:
                if cells := cells_of(rows, task, method, scheme):
                    found.append((task, scheme, method, cells))
    return found


def _spread(values: list[float]) -> str:
    several = f" ({100 * min(values):.1f}–{100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * sum(values) / len(values):.1f}{several}"


def _against(rows: Rows, task: str, scheme: str, cells: list[dict[str, Any]]) -> str:
    """Right answers more than LSQ-QAT's of the same seed, in points, with the interval of 95 % (paired bootstrap)."""
    plain = {cell["seed"]: cell for cell in cells_of(rows, task, "lsq", scheme)}
    pairs = [(right(cell), right(plain[cell["seed"]])) for cell in cells if cell["seed"] in plain]
    if not pairs:
        return ""
    mean, low, high = paired_interval(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def scores(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What each method reaches on dev."""
    found = []
    for task, scheme, method, cells in _groups(rows):
        title, figure = TASKS[task]
        line = [title, scheme, METHODS[method], _spread([cell[figure] for cell in cells])]
        evaluations = [str(cells[0].get(name, "")) for name in ("steps", "evaluations")]
        difference = "" if method in ("float", "lsq") else _against(rows, task, scheme, cells)
        found.append([*line, difference, *evaluations, str(len(cells))])
    header = [
        "task",
        "scheme",
        "method",
        "dev, %",
        "right answers beyond LSQ-QAT's",
        "steps",
        "gradient evaluations",
        "seeds",
    ]
    return header, found


def search(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What was tried on held-out training sentences, at equal gradient evaluations."""
    found = []
    for method in SEARCH:
        if row := rows.get(f"sst2/{method}/{SCHEMES[0]}/0"):
            figures = [f"{100 * row['accuracy']:.1f}", f"{row['dev_loss']:.4f}", f"{row['radii']['one_step']:.2f}"]
            found.append([method.replace("+", ", "), *figures, str(row["steps"]), str(row["evaluations"])])
    header = [
        "setting",
        "held-out accuracy, %",
        "held-out loss",
        "rise of the loss, one ascent step",
        "steps",
        "evaluations",
    ]
    return header, found


def sharpness(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Rises of the loss on 96 dev sentences, at 1 % of the weights' norm."""
    found = []
    for task, scheme, method, cells in _groups(rows):
        if "radii" in cells[0]:
            means = [sum(cell["radii"][name] for cell in cells) / len(cells) for name in ("loss", *RISES)]
            found.append([TASKS[task][0], scheme, METHODS[method], *(f"{value:.4f}" for value in means)])
    return ["task", "scheme", "method", "loss", "one ascent step", "projected ascent", "random, mean"], found


def writers(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The decoder and the encoder-decoder model."""
    found = []
    for task, name in (("wikitext", "perplexity"), ("g2p", "error_rate")):
        for method in ("rounding", "lsq", "squat"):
            if row := rows.get(f"{task}/{method}/w3a8e8-row/0"):
                title = METHODS.get(method, method)
                figure = f"{row[name]:.3f}" if task == "wikitext" else f"{100 * row[name]:.2f} %"
                found.append([task, title, figure, str(row.get("steps", "")), f"{row['cpu_seconds']:.0f}"])
    return ["task", "method", "perplexity, phoneme error", "steps", "CPU s"], found


def torchao(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """torchao's training beside ours, SST-2."""
    titles = {**METHODS, "torchao": "torchao", "torchao-range": "torchao, learned ranges"}
    found = []
    for scheme in PEER_SCHEMES:
        for method in PEERS:
            if row := rows.get(f"sst2/{method}/{scheme}/0"):
                figures = [f"{100 * row['accuracy']:.2f}", f"{row['dev_loss']:.4f}", str(row["evaluations"])]
                found.append([scheme, titles[method], *figures, f"{row['cpu_seconds'] / row['evaluations']:.2f}"])
    return ["scheme", "method", "dev accuracy, %", "dev loss", "gradient evaluations", "CPU s an evaluation"], found


def cost(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Seconds of one core; what is measured afterwards is not counted."""
    found = []
    for task, scheme, method, cells in _groups(rows):
        if "steps" in cells[0]:
            seconds = [cell["cpu_seconds"] for cell in cells]
            steps = [s / cell["steps"] for s, cell in zip(seconds, cells, strict=True)]
            line = [f"{sum(values) / len(values):.2f}" for values in (steps, seconds)]
            found.append([TASKS[task][0], scheme, METHODS[method], *line])
    return ["task", "scheme", "method", "CPU s a step", "CPU s in all"], found
