"""The command of a study's figure: results in, a PNG file out."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner import read_results


def figure_command(study: str, description: str, draw: Callable[[dict[str, dict[str, Any]], Any], Any]) -> None:
    """Read the finished cells of `study` and save what `draw(rows, pyplot)` makes of them, a matplotlib Figure."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, type=Path, help="folder of the JSONL files")
    parser.add_argument("--plot", required=True, type=Path, help="PNG file to write; needs matplotlib")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure = draw(read_results(args.results / f"{study}.jsonl"), pyplot)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)
