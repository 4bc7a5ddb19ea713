"""The tables of the study `zsaq`, from its finished cells. A cell that is not finished yet is an empty place."""

from collections.abc import Callable, Sequence
from typing import Any

from prequant_tables import circumstances, markdown, percent


Rows = dict[str, dict[str, Any]]
MAIN = ("w2a8e4-tensor", "w2a8e4-row", "w3a8e4-tensor", "w4a4e4-row", "w4a8e4-row")
INPUTS_ALONE = "w8a4e8-row"  # 4-bit inputs, and weights that cost nothing
SEEDS = (0, 1, 2)
RATES = {"learning_rate": 3e-4, "scale_learning_rate": 3e-4}  # of the random tokens, from their own search
FLOAT_ACCURACY = 0.8796  # of minilm-sst2 on SST-2's dev sentences; this and the next from the study `prequant`
FLOAT_PERPLEXITY = {"wikitext": 57.60, "stories": 5.712}
METHODS = {
    "rounding": "rounding, the better of mse and lsq",
    "random": "random tokens, from rounding",
    "random-start": "random tokens, compensated start",
    "start": "compensated start alone",
    "noise": "**noise** (a prior over tokens)",
    "sga": "noise, the generator climbs (SGA)",
    "sam": "noise, SAM",
    "sam-late": "noise, SAM in the last 30 %",
    "text": "**text** that a small language model wrote",
}


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], str]] = (checks, sst2, writers, sharpness, circumstances)
    return {maker.__name__: maker(rows) for maker in makers}


def cells_of(rows: Rows, task: str, method: str, scheme: str) -> list[dict[str, Any]]:
    """The finished seeds of a method; "rounding" is the better range method by KL, or by hidden error."""
    if method != "rounding":
        return [row for seed in SEEDS if (row := rows.get(f"{task}/{method}/{scheme}/{seed}"))]
    found = [row for name in ("mse", "lsq") if (row := rows.get(f"{task}/rounding-{name}/{scheme}/0"))]
    return [min(found, key=lambda row: row.get("test_kl", row.get("kl", row.get("hidden_error"))))] if found else []


def mean(cells: list[dict[str, Any]], figure: str) -> float:
    """The mean over seeds."""
    return sum(cell[figure] for cell in cells) / len(cells)


def spread(cells: list[dict[str, Any]], figure: str, form: Callable[[float], str]) -> str:
    """Mean, and least to most where there are several seeds."""
    values = [cell[figure] for cell in cells]
    several = f" ({form(min(values))}–{form(max(values))})" if len(values) > 1 else ""
    return form(sum(values) / len(values)) + several


def removed(rows: Rows, task: str, method: str, scheme: str, figure: str) -> float | None:
    """The share of rounding's distance that a method removes."""
    start, cells = cells_of(rows, task, "rounding", scheme), cells_of(rows, task, method, scheme)
    return 1.0 - mean(cells, figure) / mean(start, figure) if start and cells else None


def removed_loss(rows: Rows, method: str, scheme: str) -> float | None:
    """The share of the accuracy that rounding loses which a method wins back, where rounding loses over 1.5 points."""
    start, cells = cells_of(rows, "sst2", "rounding", scheme), cells_of(rows, "sst2", method, scheme)
    lost = FLOAT_ACCURACY - mean(start, "accuracy") if start else 0.0
    return (mean(cells, "accuracy") - mean(start, "accuracy")) / lost if lost > 0.015 and cells else None


def share(value: float | None) -> str:
    """0.612 -> "61 %"."""
    return "" if value is None else f"{100 * value:.0f} %"


def sst2(rows: Rows) -> str:
    """The classifier: every method at every scheme."""
    found = []
    for scheme in (*MAIN, INPUTS_ALONE):
        for method, title in METHODS.items():
            if cells := cells_of(rows, "sst2", method, scheme):
                figures = [
                    spread(cells, "test_kl", lambda value: f"{value:.4f}"),
                    share(removed(rows, "sst2", method, scheme, "test_kl")) if method != "rounding" else "",
                    spread(cells, "test_agreement", percent),
                    spread(cells, "accuracy", percent),
                    f"{mean(cells, 'cpu_seconds'):.0f}",
                ]
                found.append([_scheme(scheme), title, *figures])
    header = ["scheme", "method", "KL on test", "of rounding's removed", "agreement on test, %", "dev accuracy, %", "CPU s"]
    return markdown(header, found)


def _scheme(scheme: str) -> str:
    widths, granularity = scheme.split("-")
    return f"{widths.upper()} {granularity}"


def checks(rows: Rows) -> str:
    """The bars that were set beforehand, and what was measured."""
    found = []
    for scheme in MAIN[:4]:
        for method in ("text", "noise"):
            value = removed(rows, "sst2", method, scheme, "test_kl")
            found.append(
                [f"{_scheme(scheme)}, {method}: share of rounding's KL removed", "≥ 60 %", share(value), _met(value, 0.6)]
            )
            if (value := removed_loss(rows, method, scheme)) is not None:
                title = f"{_scheme(scheme)}, {method}: share of rounding's lost dev accuracy removed"
                found.append([title, "≥ 60 %", share(value), _met(value, 0.6)])
            ours, random = (cells_of(rows, "sst2", name, scheme) for name in (method, "random"))
            ratio = mean(ours, "test_kl") / mean(random, "test_kl") if ours and random else None
            text = "" if ratio is None else f"{ratio:.2f}"
            found.append(
                [f"{_scheme(scheme)}, {method}: KL over that of random tokens", "≤ 0.8", text, _met(ratio, 0.8, False)]
            )
    for method in ("text", "noise"):
        if cells := cells_of(rows, "sst2", method, "w4a8e4-row"):
            value, met = mean(cells, "accuracy"), _met(mean(cells, "accuracy"), FLOAT_ACCURACY - 0.005)
            found.append([f"W4A8E4 row, {method}: dev accuracy", "≥ 87.46", percent(value), met])
    found += [*_gaps(rows), *_others(rows)]
    return markdown(["check", "bar", "measured", "met"], found)


def _met(value: float | None, bar: float, above: bool = True) -> str:
    if value is None:
        return ""
    return "yes" if (value >= bar if above else value <= bar) else "**no**"


def _gaps(rows: Rows) -> list[list[str]]:
    found = []
    for task, title in (("wikitext", "wikitext-opt"), ("stories", "stories260K")):
        for scheme in ("w4a8e8-row", "w3a8e8-row"):
            value = removed(rows, task, "teacher", scheme, "kl")
            row, start = (cells_of(rows, task, name, scheme) for name in ("teacher", "rounding"))
            if not row or not start:
                continue
            gaps = [mean(cells, "perplexity") - FLOAT_PERPLEXITY[task] for cells in (row, start)]
            ratio = gaps[0] / gaps[1]
            found.append(
                [
                    f"{title} {_scheme(scheme)}: gap of perplexity over rounding's",
                    "≤ 0.5",
                    f"{ratio:.2f}",
                    _met(ratio, 0.5, False),
                ]
            )
            if task == "stories":
                found.append(
                    [
                        f"{title} {_scheme(scheme)}: KL over rounding's",
                        "≤ 0.6",
                        f"{1 - value:.2f}",
                        _met(1 - value, 0.6, False),
                    ]
                )
    return found


def _others(rows: Rows) -> list[list[str]]:
    found = []
    for task, method, scheme, figure, title in (
        ("g2p", "teacher", "w3a8e8-row", "kl", "bart-g2p-en-us W3A8E8 row: KL over rounding's"),
        (
            "encoder",
            "noise",
            "w3a8e4-row",
            "hidden_error",
            "all-MiniLM-L6-v2 W3A8E4 row: error of hidden states over rounding's",
        ),
    ):
        value = removed(rows, task, method, scheme, figure)
        if value is not None:
            found.append([title, "≤ 0.6", f"{1 - value:.2f}", _met(1 - value, 0.6, False)])
    return found


def writers(rows: Rows) -> str:
    """The models that write, and the encoder without a head."""
    found = []
    for task, title, schemes in (
        ("wikitext", "wikitext-opt", ("w4a8e8-row", "w3a8e8-row")),
        ("stories", "stories260K", ("w4a8e8-row", "w3a8e8-row")),
        ("g2p", "bart-g2p-en-us", ("w3a8e8-row",)),
        ("encoder", "all-MiniLM-L6-v2", ("w3a8e4-row",)),
    ):
        for scheme in schemes:
            for method in ("rounding", "teacher", "noise"):
                for cell in cells_of(rows, task, method, scheme):
                    found.append([title, _scheme(scheme), method, *_writer(task, cell), f"{cell['cpu_seconds']:.0f}"])
    header = ["model", "scheme", "method", "perplexity (float)", "KL", "phoneme error, %", "hidden error", "CPU s"]
    return markdown(header, found)


def _writer(task: str, cell: dict[str, Any]) -> list[str]:
    perplexity = f"{cell['perplexity']:.3f} ({FLOAT_PERPLEXITY[task]})" if "perplexity" in cell else ""
    phonemes = percent(cell["error_rate"]) if "error_rate" in cell else ""
    return [
        perplexity,
        f"{cell['kl']:.4f}" if "kl" in cell else "",
        phonemes,
        f"{cell['hidden_error']:.4f}" if "hidden_error" in cell else "",
    ]


def sharpness(rows: Rows) -> str:
    """Rises of the KL to the float model on 64 real sentences, at 1 % of the weights' norm."""
    found = []
    for scheme in MAIN[:2]:
        for method in ("noise", "sam", "sam-late"):
            cell = rows.get(f"sst2/{method}/{scheme}/0")
            if cell and "sharpness" in cell:
                figures = [
                    f"{cell['sharpness'][name]:.4f}"
                    for name in ("loss", "one_step", "projected", "random_mean", "random_max")
                ]
                found.append([_scheme(scheme), METHODS[method].replace("*", ""), *figures])
    header = [
        "scheme",
        "method",
        "KL at the weights",
        "one ascent step",
        "projected ascent",
        "random, mean",
        "random, most",
    ]
    return markdown(header, found)
