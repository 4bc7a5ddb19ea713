"""The tables of the study `adapters`, from its finished cells. A cell that is not finished yet is an empty place."""

from collections.abc import Callable, Sequence
from typing import Any

from prequant_tables import circumstances, interval, markdown, percent, right


Rows = dict[str, dict[str, Any]]
SCHEMES = ("w4a8e4", "w3a8e3")
SEEDS = (0, 1, 2)
TASKS = {"sst2": "accuracy", "cola": "mcc"}
TITLES = {
    "full": "full tuning of the float model",
    "outliers": "**outliers**, from their residuals",
    "outliers-row": "**outliers of each row**, from their residuals",
    "outliers-zero": "outliers, from zero",
    "random": "random positions",
    "lora": "LoRA, rank 6 on query and value",
    "bitfit": "BitFit: all biases",
    "head": "the new head alone",
}
CRITERIA = ("magnitude", "deviation", "error", "random")
SHARES = (0.001, 0.0025, 0.01, 0.02)


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], str]] = (methods, paired, sweeps, writers, circumstances)
    return {maker.__name__: maker(rows) for maker in makers}


def seeds_of(rows: Rows, task: str, method: str, scheme: str) -> list[dict[str, Any]]:
    """The finished seeds of a method."""
    scheme = "float32" if method == "full" else scheme
    return [row for seed in SEEDS if (row := rows.get(f"{task}/{method}/{scheme}/{seed}"))]


def score(rows: Rows, task: str, method: str, scheme: str) -> str:
    """The mean over seeds in points, and their range if there are several."""
    values = [row[TASKS[task]] for row in seeds_of(rows, task, method, scheme)]
    if not values:
        return ""
    several = f" ({percent(min(values))} to {percent(max(values))}, {len(values)} seeds)" if len(values) > 1 else ""
    return percent(sum(values) / len(values)) + several


def methods(rows: Rows) -> str:
    """Scores, trained values, the file and the time of a training step, by method and scheme."""
    found = []
    for scheme in SCHEMES:
        for method, title in TITLES.items():
            scores = [score(rows, task, method, scheme) for task in TASKS]
            some = [row for task in TASKS for row in seeds_of(rows, task, method, scheme)]
            if not some or (method == "full" and scheme != SCHEMES[0]):
                continue
            sizes = [f"{some[0]['trained']:,}", f"{some[0]['bytes'] / 1024:.0f} KiB" if "bytes" in some[0] else ""]
            seconds = [row["train_cpu_seconds"] / row["steps"] for row in some]
            name = "float32" if method == "full" else scheme.upper()
            found.append([name, title, *scores, *sizes, f"{sum(seconds) / len(seconds):.2f}"])
    header = ["base", "trained", "SST-2 accuracy", "CoLA MCC", "values beside the head", "file", "CPU s a step"]
    return markdown(header, found)


def paired(rows: Rows) -> str:
    """Differences of accuracy on the same dev sentences, seed 0, in points."""
    found = []
    for scheme in SCHEMES:
        for other in (name for name in TITLES if name != "outliers"):
            differences = []
            for task in TASKS:
                ours, theirs = (seeds_of(rows, task, method, scheme)[:1] for method in ("outliers", other))
                differences.append(interval(right(ours[0]), right(theirs[0])) if ours and theirs else "")
            if any(differences):
                found.append([scheme.upper(), TITLES[other], *differences])
    return markdown(["base", "outliers against", "SST-2, right answers [95 %]", "CoLA, right answers [95 %]"], found)


def sweeps(rows: Rows) -> str:
    """Shares, criteria and ranges."""
    names = {f"share-{share}": f"{100 * share:g} % largest magnitudes" for share in SHARES}
    names |= {f"by-{name}": f"0.5 % by {name}, on a base that stores none" for name in CRITERIA}
    names |= {f"outliers-{name}": f"stored 0.5 %, ranges {name}" for name in ("minmax", "lsq")}
    found = []
    for scheme in SCHEMES:
        for method, title in names.items():
            scores = [score(rows, task, method, scheme) for task in TASKS]
            if any(scores):
                found.append([scheme.upper(), title, *scores])
    return (
        markdown(["base", "trained", "SST-2 accuracy", "CoLA MCC"], found) if found else "No cell of these is finished yet."
    )


def writers(rows: Rows) -> str:
    """The models that write: their own measure and the divergence from the float model."""
    found = []
    titles = {"base": "nothing", "outliers": TITLES["outliers"], "random": TITLES["random"]}
    for task, measure in {"wikitext": "perplexity", "g2p": "error_rate"}.items():
        for method, title in titles.items():
            row = rows.get(f"{task}/{method}/w4a8e4/0")
            if row:
                value = percent(row[measure]) + " %" if task == "g2p" else f"{row[measure]:.2f}"
                trained = [f"{row['trained']:,}", f"{row['rate']:g}"] if "trained" in row else ["", ""]
                found.append([task, title, value, f"{row['kl']:.4f}", *trained])
    header = ["task", "trained", "perplexity, phoneme error", "KL from the float model", "values", "rate"]
    return markdown(header, found) if found else "No cell of these is finished yet."
