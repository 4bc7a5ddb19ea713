"""Write docs/performance.md from saved results of `optimum-cli zsaq bench`: a section a result, in the order given.

    python examples/study/performance.py docs/results/bench-*.json --write docs/performance.md

Without `--write` the page is printed. `--check` changes nothing and fails if the page is not what the results say.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prequant_tables import markdown

from optimum_zsaq.report.bench_plot import MIB, threads, values


Result = dict[str, Any]

INTRODUCTION = """# Performance

Packed models of this package and other packages, timed in one run. Written by `examples/study/performance.py` from the
results named in each section; the command there measures them again.

All sections were measured before the `native` kernels, which now serve low-bit layers on processors with AVX-512 VNNI:
the figures of this package are those of the kernels of before.

- Each contestant is a process of its own. Round by round every one runs every workload once, in shuffled order, while the
  others wait.
- With one thread the time is processor time of the process, with more it is wall time. Figures are medians over the rounds
  with a 95 % bootstrap interval. The ratio is the median over the rounds of time / the baseline's time in the same round:
  below 1 is faster than the baseline.
- Memory is resident memory of the process, more than before loading: after a first call of everything, and the most until
  then. Contestants with * quantize while they load the float checkpoint, so their disk size is that one's.
- Error is |outputs - float32 outputs| / |float32 outputs| on fixed random tokens. On random weights it shows that a
  contestant computes what it should, and says nothing about accuracy.
"""


def page(results: dict[str, Result]) -> str:
    """The whole document; results by file name."""
    return INTRODUCTION + "".join(f"\n{section(name, result)}" for name, result in results.items())


def section(name: str, result: Result) -> str:
    """One model: what was run, times, sizes, who is missing."""
    model, settings, machine = result["model"], result["settings"], result["machine"]
    weights = " with random weights" if model["random_weights"] else ""
    clock = "processor time" if settings["clock"] == "cpu" else "wall time"
    flags = ", ".join(machine["flags"])
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    paragraphs = [
        f"## {model['name']}, {threads(settings)}",
        f"{model['architecture']}{weights}, {model['parameters'] / 1e6:,.1f} M parameters; {clock}, "
        f"{settings['rounds']} rounds, baseline `{settings['baseline']}`. {machine['processor']} ({flags}), "
        f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}; load average "
        f"{machine['load_average_before']} before and {machine['load_average_after']} after. {versions}. Result: `{name}`.",
        f"```bash\n{result['command']}\n```",
        *([result["remark"]] if "remark" in result else []),
        times(result),
        sizes(result),
    ]
    missing = [(each, entry) for each, entry in result["contestants"].items() if not entry["results"]]
    if missing:
        paragraphs.append(
            "Not measured:\n\n" + "\n".join(f"- `{n}`: {e['status']}, {_plain(e['reason'])}" for n, e in missing)
        )
    return "\n\n".join(paragraphs) + "\n"


def measured(result: Result) -> dict[str, Any]:
    """The contestants with results, the fastest at the first workload first."""
    first = result["workloads"][0]["name"]
    found = {name: entry for name, entry in result["contestants"].items() if entry["results"]}
    return dict(sorted(found.items(), key=lambda item: item[1]["results"][first]["seconds"]))


def times(result: Result) -> str:
    """A row a contestant, two columns a workload: time or rate, and ratio to the baseline, with intervals."""
    header = ["contestant"]
    for workload in result["workloads"]:
        header += [f"{workload['name']}, {'tokens/s' if workload['rate'] else 'ms'}", "ratio"]
    rows = []
    for name, entry in measured(result).items():
        row = [_name(name)]
        for workload in result["workloads"]:
            found = entry["results"][workload["name"]]
            row.append(_interval(*values(found, workload)))
            row.append(_interval(found["ratio"], *found["ratio_interval"], digits=2) if found["ratio_interval"] else "–")
        rows.append(row)
    return markdown(header, rows)


def sizes(result: Result) -> str:
    """A row a contestant: disk, load time, memory in MiB, error."""
    header = ["contestant", "what it is", "disk, MiB", "load, s", "memory, MiB", "peak, MiB", "error"]
    rows = []
    for name, entry in measured(result).items():
        memory = entry["memory"]
        found = [f"{memory[part] / MIB:,.0f}" for part in ("warm", "peak")] if memory else ["–", "–"]
        title = _name(name) + ("*" if entry["quantizes_on_load"] else "")
        disk, load = f"{entry['disk_bytes'] / MIB:,.1f}", f"{entry['load_seconds']['wall']:.1f}"
        rows.append([title, _plain(entry["title"]), disk, load, *found, f"{entry['error']:.3f}"])
    return markdown(header, rows)


def _name(name: str) -> str:
    return f"**{name}**" if name.startswith("zsaq") else name


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _interval(median: float, low: float, high: float, digits: int | None = None) -> str:
    if digits is None:
        digits = 0 if median >= 100 else 1
    return f"{median:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def read(path: Path) -> Result:
    """A saved result.

    Raises:
        ValueError: the file is none.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("format") != 1 or "contestants" not in result:
        raise ValueError(f"{path} is no result of `optimum-cli zsaq bench`; give the bench.json of its --output")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="bench.json files")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--check", action="store_true", help="only say whether --write's file is up to date")
    args = parser.parse_args()
    if len({path.name for path in args.results}) < len(args.results):
        parser.error("two results have one name; name them after their models, such as bench-bert-base.json")
    new = page({path.name: read(path) for path in args.results})
    if args.write is None:
        print(new, end="")
        return 0
    old = args.write.read_text(encoding="utf-8") if args.write.exists() else ""
    if args.check and new != old:
        print(f"{args.write} is not what the results say; run this without --check", file=sys.stderr)
        return 1
    if new != old:
        args.write.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
