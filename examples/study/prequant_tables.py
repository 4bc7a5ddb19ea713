"""The tables of the study `prequant`, from its finished cells. A cell that is not finished yet is an empty place."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from bootstrap import from_bitmap, paired_interval


Rows = dict[str, dict[str, Any]]
BITS = {8: 8, 4: 4, 3: 4, 2: 4}  # of Linear layers: of the embedding table beside them
SCHEMES = ((8, 8), (4, 8), *list(BITS.items())[1:])  # the same and PreQuantConfig's default, W4 and E8
OUTLIERS = "-outliers0.005"

# Bars that were set before these measurements. ROUNDING: perplexity of a plain W4A8 rounding of the Linear layers per row.
ACCURACY_BARS = {8: 0.873, 4: 0.870, 3: 0.850}
ROUNDING = {"wikitext": 58.2, "stories": 6.61}
TITLES = {"wikitext": "wikitext-opt", "stories": "stories260K", "g2p": "bart-g2p-en-us"}


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    makers: Sequence[Callable[[Rows], str]] = (checks, sst2, outliers, criteria, ranges, inputs, writers, circumstances)
    return {maker.__name__: maker(rows) for maker in makers}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    """0.8796 -> "87.96"."""
    return f"{100 * share:.2f}"


def mebibytes(row: dict[str, Any]) -> str:
    """The size of the weight files."""
    return f"{row['bytes'] / 2**20:.2f}"


def find(rows: Rows, task: str, scheme: str, seed: int = 0) -> dict[str, Any] | None:
    """The finished cell of a scheme; "float" is the float model."""
    return rows.get(f"{task}/float/float32/0" if scheme == "float" else f"{task}/prequant/{scheme}/{seed}")


def right(row: dict[str, Any]) -> np.ndarray:
    """Which sentences a model has right, (n,)."""
    return from_bitmap(row["right"], row["samples"])


def edit_rates(row: dict[str, Any]) -> np.ndarray:
    """What each word adds to the phoneme error, (n,): its edits over the mean length of a word."""
    return np.array(row["edits"]) / np.mean(row["lengths"])


def interval(scores: np.ndarray, others: np.ndarray) -> str:
    """Difference in points and its 95 % interval."""
    mean, low, high = (100 * value for value in paired_interval(scores, others))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def checks(rows: Rows) -> str:
    """The bars that were set beforehand, and what was measured."""
    exact = [row["reload_exact"] for row in rows.values() if "reload_exact" in row]
    reloaded = ["reloaded outputs equal those before saving", f"all {len(exact)}", str(sum(exact)), _met(all(exact))]
    found = [*_accuracy_checks(rows), *_perplexity_checks(rows), *_phoneme_checks(rows), reloaded]
    return markdown(["check", "bar", "measured", "met"], found)


def _met(passed: bool) -> str:
    return "yes" if passed else "**no**"


def _accuracy_checks(rows: Rows) -> Iterator[list[str]]:
    for bits, bar in ACCURACY_BARS.items():
        if row := find(rows, "sst2", f"w{bits}a8e{BITS[bits]}-row-mse"):
            name, value = f"SST-2 accuracy, W{bits}A8E{BITS[bits]}", row["accuracy"]
            yield [name, f"≥ {100 * bar:.1f}", percent(value), _met(value >= bar)]


def _perplexity_checks(rows: Rows) -> Iterator[list[str]]:
    for task, rounding in ROUNDING.items():
        reference = find(rows, task, "float")
        bars = {8: reference and 1.01 * reference["perplexity"], 4: 1.01 * rounding}
        for bits, embeddings in ((8, "f"), (8, "8"), (4, "f"), (4, "8"), (4, "4")):
            if bars[bits] and (row := find(rows, task, f"w{bits}a8e{embeddings}-row-mse")):
                name, value = f"{TITLES[task]} perplexity, W{bits}A8 {_tables(embeddings)}", row["perplexity"]
                yield [name, f"≤ {bars[bits]:.3f}", f"{value:.3f}", _met(value <= bars[bits])]


def _phoneme_checks(rows: Rows) -> Iterator[list[str]]:
    reference = find(rows, "g2p", "float")
    for embeddings in ("f", "8"):
        if reference and (row := find(rows, "g2p", f"w8a8e{embeddings}-row-mse")):
            name, value, bar = (
                f"phoneme error, W8A8 {_tables(embeddings)}",
                row["error_rate"],
                reference["error_rate"] + 0.003,
            )
            yield [name, f"≤ {percent(bar)} %", f"{percent(value)} %", _met(value <= bar)]


def _tables(embedding_bits: str) -> str:
    return "with float embeddings" if embedding_bits == "f" else f"with E{embedding_bits}"


def sst2(rows: Rows) -> str:
    """Bits x granularity x outliers."""
    reference = find(rows, "sst2", "float")
    if reference is None:
        return ""
    found = [["float32", "", "", percent(reference["accuracy"]), "", "", "", f"{mebibytes(reference)} (float16)"]]
    for bits, table_bits in SCHEMES:
        for granularity in ("tensor", "row", "group"):
            for ending in ("", OUTLIERS):
                if row := find(rows, "sst2", f"w{bits}a8e{table_bits}-{granularity}-mse{ending}"):
                    name = "group of 64" if granularity == "group" else granularity
                    difference = interval(right(row), right(reference))
                    kept = "0.5 %" if ending else "–"
                    found.append(
                        [f"W{bits}A8E{table_bits}", name, kept, percent(row["accuracy"]), difference, *_on_test(row)]
                    )
    header = ["scheme", "granularity", "outliers", "accuracy", "− float [95 %]", "KL on test", "agreement on test", "MiB"]
    return markdown(header, found)


def _on_test(row: dict[str, Any]) -> list[str]:
    return [f"{row['test_kl']:.4f}", percent(row["test_agreement"]), mebibytes(row)]


def outliers(rows: Rows) -> str:
    """What the outliers change, each row with and without them."""
    found = []
    for bits, table_bits in SCHEMES:
        for granularity in ("tensor", "row", "group"):
            scheme = f"w{bits}a8e{table_bits}-{granularity}-mse"
            without, kept = find(rows, "sst2", scheme), find(rows, "sst2", scheme + OUTLIERS)
            if without and kept:
                difference = interval(right(kept), right(without))
                change = (
                    f"{without['test_kl']:.4f} → {kept['test_kl']:.4f} ({kept['test_kl'] / without['test_kl'] - 1:+.0%})"
                )
                size = f"+{100 * (kept['bytes'] / without['bytes'] - 1):.1f} %"
                name = "group of 64" if granularity == "group" else granularity
                found.append([f"W{bits}A8E{table_bits}", name, change, difference, size])
    return markdown(["scheme", "granularity", "KL on test", "accuracy, with − without [95 %]", "bytes"], found)


def criteria(rows: Rows) -> str:
    """KL of the ways to choose 0.5 % outliers, per row."""
    found = []
    endings = ["", OUTLIERS, *(f"{OUTLIERS}-by-{name}" for name in ("error", "row", "chance"))]
    for bits in (4, 3, 2):
        cells = [find(rows, "sst2", f"w{bits}a8e{BITS[bits]}-row-mse{ending}") for ending in endings]
        found.append([f"W{bits}A8E{BITS[bits]}", *(f"{row['test_kl']:.4f}" if row else "" for row in cells)])
    kinds = ["largest magnitude", "largest rounding error", "largest magnitude / row's deviation", "by chance"]
    return markdown(["scheme", "none", *kinds], found)


def ranges(rows: Rows) -> str:
    """Range methods, per row, without outliers."""
    found = []
    for bits, table_bits in BITS.items():
        for method in ("minmax", "mse", "lsq", "ternary"):
            if row := find(rows, "sst2", f"w{bits}a8e{table_bits}-row-{method}"):
                found.append([f"W{bits}A8E{table_bits}", method, percent(row["accuracy"]), *_on_test(row)[:2]])
    return markdown(["scheme", "ranges", "accuracy", "KL on test", "agreement on test"], found)


def inputs(rows: Rows) -> str:
    """Dynamic and static input ranges, per row."""
    found = []
    for bits in (8, 4):
        scheme = f"w{bits}a8e{bits}-row-mse"
        kinds = {"dynamic, a range a token": ""}
        kinds |= {"static, 128 sentences of tuning.tsv": "-static-tuning", "static, sampled tokens": "-static-sampled"}
        for name, ending in kinds.items():
            seeds = [row for seed in range(3) if (row := find(rows, "sst2", scheme + ending, seed))]
            if seeds:
                figures = [("accuracy", 100, 2), ("test_kl", 1, 4), ("test_agreement", 100, 2)]
                values = [_mean([factor * row[key] for row in seeds], digits) for key, factor, digits in figures]
                found.append([f"W{bits}A8E{bits}", name, *values])
    return markdown(["scheme", "input ranges", "accuracy", "KL on test", "agreement on test"], found)


def _mean(values: list[float], digits: int) -> str:
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


def writers(rows: Rows) -> str:
    """The language models and the spelling-to-phonemes model, per row."""
    found = []
    pairs = [(bits, e) for bits in BITS for e in ("f", *(t for b, t in SCHEMES if b == bits))]
    schemes = [f"w{bits}a8e{e}-row-mse{ending}" for bits, e in pairs for ending in ("", OUTLIERS)]
    for scheme in ["float", *schemes]:
        cells = [find(rows, task, scheme) for task in TITLES]
        if any(cells):
            name = scheme.partition("-")[0].upper().removesuffix("EF") if scheme != "float" else "float32"
            kept = "0.5 %" if OUTLIERS in scheme else "–"
            figures = [text for task, cell in zip(TITLES, cells, strict=True) for text in _writer(rows, task, cell)]
            found.append([name, kept, *figures])
    header = ["scheme", "outliers"]
    for task, title in TITLES.items():
        header += [f"{title}: {'phoneme error, % (− float [95 %])' if task == 'g2p' else 'perplexity'}", "KL", "MiB"]
    return markdown(header, found)


def _writer(rows: Rows, task: str, row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    kl = f"{row['kl']:.4f}" if "kl" in row else ""
    if task != "g2p":
        return [f"{row['perplexity']:.3f}", kl, mebibytes(row)]
    reference = find(rows, task, "float")
    difference = f" ({interval(edit_rates(row), edit_rates(reference))})" if reference not in (None, row) else ""
    return [percent(row["error_rate"]) + difference, kl, mebibytes(row)]


def circumstances(rows: Rows) -> str:
    """Where and with what the cells ran; more than one line if they ran in different places."""
    seen: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows.values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        machine = f"{row['machine']['cpu']}, {row['machine']['threads']} thread(s) a cell"
        commit, _, dirty = (row["commit"] or "none").partition("-")
        seen.setdefault((machine, versions, commit[:12] + (" and changes" if dirty else "")), []).append(row)
    found = []
    for key, group in seen.items():
        dates = sorted(row["date"][:10] for row in group)
        hours = sum(row["seconds"] for row in group) / 3600
        found.append(
            [*key, dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}", str(len(group)), f"{hours:.1f}"]
        )
    return markdown(["machine", "versions", "commit", "date", "cells", "hours of one core"], found)
