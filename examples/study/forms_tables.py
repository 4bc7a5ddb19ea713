"""The tables of the study `forms`, from its finished cells. A cell that is not finished yet is an empty place."""

from collections.abc import Callable, Sequence
from typing import Any

from forms_tasks import PAIRS, TASKS
from prequant_tables import circumstances, markdown, percent
from zsaq_tables import _scheme, mean, spread


Rows = dict[str, dict[str, Any]]
SCHEMES = ("w2a8e4-row", "w2a8e4-tensor", "w3a8e4-tensor", "w4a4e4-row")
SEEDS = (0, 1, 2)
BAD = {"one-token": "a source of one token", "single": "no pairs are written", "rate": "ten times the learning rate"}
_BAR = 0.45  # of rounding's KL, on pairs


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], str]] = (checks, settings, guard, circumstances)
    return {maker.__name__: maker(rows) for maker in makers}


def cells_of(rows: Rows, task: str, method: str, scheme: str) -> list[dict[str, Any]]:
    """The finished seeds of a method."""
    return [row for seed in SEEDS if (row := rows.get(f"{task}/{method}/{scheme}/{seed}"))]


def settings(rows: Rows) -> str:
    """Every task at every scheme."""
    found = []
    for task in TASKS:
        for scheme in SCHEMES:
            before, after = (cells_of(rows, task, method, scheme) for method in ("rounding", "zsaq"))
            if before and after:
                found.append([task, _scheme(scheme), *_row(before[0], after)])
    header = ["task", "scheme", "KL of rounding", "KL of ZSAQ", "ratio", "equal answers, %", "accuracy, %", "kept", "seeds"]
    return markdown(header, found)


def _row(before: dict[str, Any], after: list[dict[str, Any]]) -> list[str]:
    kl = [
        f"{before['kl']:.4f}",
        spread(after, "kl", lambda value: f"{value:.4f}"),
        f"{mean(after, 'kl') / before['kl']:.2f}",
    ]
    answers = [f"{percent(before[name])} -> {percent(mean(after, name))}" for name in ("agreement", "accuracy")]
    return [*kl, *answers, ", ".join(sorted({row["kept"] for row in after})), str(len(after))]


def guard(rows: Rows) -> str:
    """What comes out where training goes wrong."""
    found = []
    for method, title in BAD.items():
        for scheme in SCHEMES:
            before, after = (cells_of(rows, "part", name, scheme) for name in ("rounding", method))
            if before and after:
                found.append([title, _scheme(scheme), f"{before[0]['kl']:.4f}", f"{after[0]['kl']:.4f}", after[0]["kept"]])
    return markdown(["what is wrong", "scheme", "KL of rounding", "KL of the result", "kept"], found)


def checks(rows: Rows) -> str:
    """The bars."""
    pairs = list(_ratios(rows, PAIRS))
    every = list(_ratios(rows, TASKS))
    met = sum(ratio <= _BAR for ratio, _ in pairs)
    worse = sum(worse for _, worse in every)
    true, claimed = _claims(rows)
    found = [
        [f"pair tasks: KL at most {_BAR} of rounding's", "all", f"{met} of {len(pairs)}", _met(met == len(pairs))],
        ["KL worse than rounding's by more than two standard errors", "0", f"{worse} of {len(every)}", _met(not worse)],
        ["closing lines true in direction on real inputs", ">= 90 %", f"{true} of {claimed}", _met(true >= 0.9 * claimed)],
    ]
    return markdown(["check", "bar", "measured", "met"], found)


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"


def _ratios(rows: Rows, tasks: Sequence[str]) -> Any:
    for task in tasks:
        for scheme in SCHEMES:
            before, after = (cells_of(rows, task, method, scheme) for method in ("rounding", "zsaq"))
            if before and after:
                change = mean(after, "kl") - before[0]["kl"]
                yield mean(after, "kl") / before[0]["kl"], change > 2 * max(before[0]["kl_error"], after[0]["kl_error"])


def _claims(rows: Rows) -> tuple[int, int]:
    """How often the form of a task changed in the direction that the closing lines say, of how many cells."""
    true = total = 0
    for task in TASKS:
        probe = "pair, related" if task == "part" else "pair, unrelated" if task in PAIRS else "single text"
        for scheme in SCHEMES:
            before = cells_of(rows, task, "rounding", scheme)
            for row in cells_of(rows, task, "zsaq", scheme):
                if before and row["kept"] != "rounded":
                    said = row["won"][row["kept"]][probe]["output"] < row["won"]["rounded"][probe]["output"]
                    true += said == (row["kl"] < before[0]["kl"])
                    total += 1
    return true, total
