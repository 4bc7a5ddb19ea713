"""What all sub-commands share: errors become one line and an exit code, results are shown as text or as JSON.

Exit codes: 0 done, 1 an error that is explained on stderr, 2 wrong arguments (argparse), 130 interrupted.
"""

import json
import sys
from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand


class Command(BaseOptimumCLICommand):
    """A sub-command: `execute` does the work and returns a JSON-able result, `show` prints it for people."""

    args: Namespace

    def run(self) -> None:
        """Run the command; ends the process with an exit code unless all went well."""
        try:
            result = self.execute(self.args)
            if self.args.json:
                print(json.dumps(result, indent=2))
            else:
                self.show(result)
        except KeyboardInterrupt:
            print(f"interrupted; {self.left(self.args)}", file=sys.stderr)
            sys.exit(130)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, KeyError) as error:
            if self.args.debug:
                raise
            print(f"error: {_message(error)}", file=sys.stderr)
            sys.exit(1)

    def left(self, args: Namespace) -> str:
        """What an interrupted command leaves behind, for people."""
        return "nothing was written"

    @abstractmethod
    def execute(self, args: Namespace) -> dict[str, Any]:
        """Do the work."""

    @abstractmethod
    def show(self, result: dict[str, Any]) -> None:
        """Print the result for people."""


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError | TypeError | OSError) else f"{type(error).__name__}: {text}"


def add_common_arguments(parser: ArgumentParser) -> None:
    """The arguments that every sub-command has."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as aligned columns of text; numbers are right-aligned."""
    cells = [list(header), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def size_text(count: float) -> str:
    """Bytes for people: "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
