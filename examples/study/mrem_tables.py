"""The tables of the study `mrem`, from its finished cells. A cell that is not finished yet is an empty place."""

from collections.abc import Callable, Sequence
from typing import Any

from prequant_tables import circumstances, markdown, percent
from zsaq_tables import FLOAT_PERPLEXITY, _scheme, mean, spread


Rows = dict[str, dict[str, Any]]
MAIN = ("w2a8e4-row", "w2a8e2-row", "w2a8e4-tensor", "w2a8e2-tensor")
WRITERS = ("w3a8e8-row", "w4a8e8-row")
SEEDS = (0, 1, 2)
MEMORY = (0, 1, 2, 3, 6, 12)  # stages; 0: QAT of the whole model
FORCING, STAGES, SAMPLES = (0.0, 0.5, 1.0), (1, 2, 6), (64, 256, 4096)
SHORTEST = 40  # steps
STEPS = {"row": 50, "tensor": 75}  # of the short run, whose start is compensated codes or plain rounding
METHODS = {
    "rounding": "rounding",
    "start": "compensated start alone",
    "layerwise": "layer-wise",
    "layerwise-start": "layer-wise, compensated start",
    "mrem-s": "**MREM-S**",
    **{f"mrem-s+steps={steps}": f"MREM-S, {steps} steps" for steps in (SHORTEST, *STEPS.values())},
    "mrem-p": "**MREM-P**",
    "qat": "QAT with labels, one epoch",
}


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], str]] = (checks, sst2, wikitext, curves, memory, offload, circumstances)
    return {maker.__name__: maker(rows) for maker in makers}


def cells_of(rows: Rows, task: str, method: str, scheme: str) -> list[dict[str, Any]]:
    """The finished seeds of a method."""
    return [row for seed in SEEDS if (row := rows.get(f"{task}/{method}/{scheme}/{seed}"))]


def short_run(scheme: str) -> str:
    """The method whose training is short."""
    return f"mrem-s+steps={STEPS[scheme.split('-')[1]]}"


def sst2(rows: Rows) -> str:
    """The classifier: every method at every scheme."""
    found = []
    for scheme in MAIN:
        for method, title in METHODS.items():
            if cells := cells_of(rows, "sst2", method, scheme):
                found.append([_scheme(scheme), title, str(len(cells)), *_figures(cells)])
    header = ["scheme", "method", "seeds", "KL on test", "agreement on test, %", "dev accuracy, %", "CPU s"]
    return markdown(header, found)


def _figures(cells: list[dict[str, Any]]) -> list[str]:
    return [
        spread(cells, "test_kl", lambda value: f"{value:.4f}"),
        spread(cells, "test_agreement", percent),
        spread(cells, "accuracy", percent),
        f"{mean(cells, 'cpu_seconds'):.0f}",
    ]


def wikitext(rows: Rows) -> str:
    """The language model."""
    found = []
    for scheme in WRITERS:
        for method, title in METHODS.items():
            if cells := cells_of(rows, "wikitext", method, scheme):
                figures = [
                    f"{mean(cells, 'perplexity'):.3f}",
                    f"{mean(cells, 'kl'):.4f}",
                    f"{mean(cells, 'cpu_seconds'):.0f}",
                ]
                found.append([_scheme(scheme), title, *figures])
    return markdown(["scheme", "method", f"perplexity (float: {FLOAT_PERPLEXITY['wikitext']})", "KL", "CPU s"], found)


def curves(rows: Rows) -> str:
    """Teacher forcing at 30 steps, the number of stages, the number of calibration sentences; W2A8E4 per row."""
    scheme, found = MAIN[0], []
    series = [(f"MREM-P, 30 steps, forcing {share}", f"mrem-p+steps=30+forcing={share}") for share in FORCING]
    series += [(f"MREM-S, {n} stages", "mrem-s" if n == 3 else f"mrem-s+stages={n}") for n in sorted((*STAGES, 3))]
    samples = sorted((*SAMPLES, 1024))
    series += [(f"MREM-S, {n:,} sentences", "mrem-s" if n == 1024 else f"mrem-s+samples={n}") for n in samples]
    for title, method in series:
        if cells := cells_of(rows, "sst2", method, scheme):
            found.append([title, str(len(cells)), *_figures(cells)])
    return markdown(["what", "seeds", "KL on test", "agreement on test, %", "dev accuracy, %", "CPU s"], found)


def _time_checks(name: str, scheme: str, cells: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Of MREM-S and of its short run, against QAT's."""
    found = []
    for method in ("mrem-s", short_run(scheme)):
        if ours := cells[method]:
            title = METHODS[method].strip("*")
            time = mean(cells["qat"], "cpu_seconds") / mean(ours, "cpu_seconds")
            found.append([f"{name}: CPU time of QAT over that of {title}", "≥ 6", f"{time:.1f}", _met(time >= 6.0)])
            if method != "mrem-s":
                gap = 100 * (mean(ours, "accuracy") - mean(cells["qat"], "accuracy"))
                found.append([f"{name}: accuracy of {title} minus that of QAT", "≥ -1.0", f"{gap:+.2f}", _met(gap >= -1.0)])
    return found


def offload(rows: Rows) -> str:
    """A model whose float weights stay on the disk."""
    found = []
    if row := rows.get("memory/offload/w3a8e8-row/0"):
        over = row["peak_bytes"] - row["before_bytes"]
        found.append([f"{n / 2**20:,.0f}" for n in (row["checkpoint_bytes"], over, row["peak_bytes"], row["packed_bytes"])])
    return markdown(
        ["float checkpoint, MiB", "most private memory for it, MiB", "of the process, MiB", "packed, MiB"], found
    )


def memory(rows: Rows) -> str:
    """Peak memory of a random model of 12 blocks, above that of the process without it."""
    cells = {count: row for count in MEMORY if (row := rows.get(f"memory/stages={count}/w2a8e4-row/0"))}
    found = []
    for count, row in cells.items():
        title = f"MREM-S, {count} stage{'s' if count > 1 else ''}" if count else "QAT of the whole model"
        share = f"{row['peak_bytes'] / cells[0]['peak_bytes']:.2f}" if 0 in cells else ""
        found.append([title, f"{row['peak_bytes'] / row['parameters']:.1f}", f"{row['peak_bytes'] / 2**20:.0f}", share])
    return markdown(["training", "bytes a parameter", "MiB", "of QAT's"], found)


def checks(rows: Rows) -> str:
    """The bars that were set beforehand, and what was measured."""
    found = []
    for scheme in MAIN:
        cells = {method: cells_of(rows, "sst2", method, scheme) for method in METHODS}
        ours = cells["mrem-s"]
        if not ours:
            continue
        name = _scheme(scheme)
        if other := cells["layerwise"]:
            ratio = mean(ours, "test_kl") / mean(other, "test_kl")
            found.append([f"{name}: KL of MREM-S over that of layer-wise", "< 1", f"{ratio:.2f}", _met(ratio < 1.0)])
        if other := cells["qat"]:
            gap = 100 * (mean(ours, "accuracy") - mean(other, "accuracy"))
            found.append([f"{name}: accuracy of MREM-S minus that of QAT", "≥ -1.0", f"{gap:+.2f}", _met(gap >= -1.0)])
            found += _time_checks(name, scheme, cells)
        if other := cells["mrem-p"]:
            gap = 100 * (mean(other, "accuracy") - mean(ours, "accuracy"))
            found.append([f"{name}: accuracy of MREM-P minus that of MREM-S", "≥ -0.3", f"{gap:+.2f}", _met(gap >= -0.3)])
            ratio = mean(other, "test_kl") / mean(ours, "test_kl")
            found.append([f"{name}: KL of MREM-P over that of MREM-S", "≤ 1.10", f"{ratio:.2f}", _met(ratio <= 1.1)])
    return markdown(["check", "bar", "measured", "met"], [*found, *_writer_checks(rows)])


def _writer_checks(rows: Rows) -> list[list[str]]:
    found = []
    for scheme in WRITERS:
        for other in ("rounding", "layerwise"):
            cells = [cells_of(rows, "wikitext", method, scheme) for method in ("mrem-s", other)]
            if all(cells):
                gaps = [mean(c, "perplexity") - FLOAT_PERPLEXITY["wikitext"] for c in cells]
                title = f"wikitext-opt {_scheme(scheme)}: perplexity gap of MREM-S, of {METHODS[other]}"
                found.append([title, "less", f"{gaps[0]:.2f}, {gaps[1]:.2f}", _met(gaps[0] < gaps[1])])
    return found


def _met(whether: bool) -> str:
    return "yes" if whether else "**no**"
