"""The tables of the study `zsaq`."""

from typing import Any


Rows = dict[str, dict[str, Any]]
MAIN = ("w2a8e4-tensor", "w2a8e4-row", "w3a8e4-tensor", "w4a4e4-row", "w4a8e4-row")
SEEDS = (0, 1, 2)
RATES = {"learning_rate": 3e-4, "scale_learning_rate": 3e-4}  # of the random tokens, from their own search


def all_tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    return {}
