"""`optimum-cli zsaq bench`: time this package's models against every other package that is installed."""

import json
import shlex
import shutil
import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..report.contestants import CONTESTANTS
from ..report.workloads import SHAPES
from .common import Command, add_common_arguments, size_text, table


MIB = 2**20

_TEXT = """what is timed, by kind of model:
  encoder           a forward of each --batch, ms
  decoder           greedy decoding of --new-tokens tokens at batch 1 with a KV cache after a prompt of 16, tokens/s;
                    a prefill of each --batch, ms
  encoder-decoder   an encoder pass of each --batch and --new-tokens decoding steps, ms

how: each contestant is loaded in a process of its own; round by round each runs each workload once, in shuffled order,
while the others wait. With --threads 1 the time is processor time of the process (other programs disturb it little), with
more threads wall time. A figure is the median over the rounds with a 95 % bootstrap interval; "x BASELINE" is the median
over the rounds of time / the baseline's time in the same round: below 1 is faster.

columns:
  disk         bytes of the checkpoint that is loaded
  load s       wall seconds to load it, imports excluded
  loaded       resident memory after loading, more than before; float weights are mapped and count when first read
  after run    the same after a first call of everything: what the model takes while it works
  load peak    the most while loading, more than before; with a * the contestant quantizes then, from the float checkpoint
  peak         the most while loading and in the first calls
  error        |outputs - float32 outputs| / |float32 outputs| on fixed random tokens: tells who computes something else

examples:
  optimum-cli zsaq bench --shape bert-base --output out
  optimum-cli zsaq bench --model ./my-model --batch 1x64 16x64 --contestants zsaq-w8a8 torch-ao torch-bf16
  optimum-cli zsaq bench --shape llama-450m --threads 2 --rounds 7

contestants (* only when named; a Contestant of your own is MODULE:NAME):
"""


class BenchCommand(Command):
    """Time low-bit models against other packages."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        width = max(map(len, CONTESTANTS))
        names = [f"  {name:{width}} {' ' if c.default else '*'} {c.title}" for name, c in CONTESTANTS.items()]
        parser.epilog, parser.formatter_class = _TEXT + "\n".join(names), RawDescriptionHelpFormatter
        parser.add_argument("--model", help="folder or Hub id of a float model")
        parser.add_argument("--shape", help=f"or a model of random weights: {', '.join(SHAPES)}")
        parser.add_argument(
            "--batch", nargs="+", default=[], metavar="RxT", help="rows x tokens (default: 1x128, encoders 8x128)"
        )
        parser.add_argument("--new-tokens", type=int, help="tokens decoded (default: 32, encoder-decoder 16)")
        parser.add_argument(
            "--contestants", nargs="+", default=[], metavar="NAME", help="see below (default: all but those with *)"
        )
        parser.add_argument("--baseline", metavar="NAME", help="ratios are to this one (default: torch-ao)")
        parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
        parser.add_argument("--rounds", type=int, default=15, help="samples of each (default: 15)")
        parser.add_argument(
            "--min-seconds", type=float, default=0.2, help="a sample repeats its call for so long (default: 0.2)"
        )
        parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and orders (default: 0)")
        parser.add_argument("--timeout", type=float, default=900, help="seconds that one step may take (default: 900)")
        parser.add_argument("--output", type=Path, help="folder for bench.json and bench.png; it must not exist yet")
        add_common_arguments(parser)

    def execute(self, args: Namespace) -> dict[str, Any]:
        """Measure, then write the folder at once."""
        _check_output(args.output)

        from ..report.bench import BenchSettings, run_bench
        from ..report.bench_process import WorkerError

        settings = BenchSettings(
            shape=args.shape,
            model=args.model,
            batches=tuple(args.batch),
            new_tokens=args.new_tokens,
            contestants=tuple(args.contestants),
            baseline=args.baseline,
            threads=args.threads,
            rounds=args.rounds,
            min_seconds=args.min_seconds,
            seed=args.seed,
            timeout=args.timeout,
        )
        try:
            with _ended_politely():
                result = {"command": _command(args), **run_bench(settings)}
        except WorkerError as error:
            if args.debug:
                print(error.traceback, file=sys.stderr)
            raise ValueError(f"the float model does not run: {error}") from error
        if args.output is not None:
            _write(result, args.output)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Times, then sizes, then who is missing and why."""
        print(_head(result))
        measured = {name: entry for name, entry in result["contestants"].items() if entry["results"]}
        if measured:
            print("\n" + _times(result, measured))
            print("\n" + _sizes(measured))
            if any(entry["quantizes_on_load"] for entry in measured.values()):
                print("* loads the float checkpoint")
        missing = [(name, e["status"], e["reason"]) for name, e in result["contestants"].items() if e["status"] != "ok"]
        if missing:
            print("\nnot measured:")
            for name, status, reason in missing:
                print(f"  {name}: {status}, {reason}")
                if self.args.debug and result["contestants"][name]["traceback"]:
                    print(result["contestants"][name]["traceback"], file=sys.stderr)
        if self.args.output is not None:
            print(f"\nsaved to {self.args.output}")


def _check_output(output: Path | None) -> None:
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty; nothing is overwritten, choose another --output")


@contextmanager
def _ended_politely() -> Iterator[None]:
    """SIGTERM leaves neither processes nor folders behind, as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("ended by SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(args: Namespace) -> str:
    """The command that measures this again, without where its result went."""
    words = ["optimum-cli", "zsaq", "bench"]
    names = "model shape batch new_tokens contestants baseline threads rounds min_seconds seed timeout".split()
    for name in names:
        value = getattr(args, name)
        if value is not None and value != []:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _write(result: dict[str, Any], output: Path) -> None:
    """The folder, complete or not at all; without matplotlib it has no figure."""
    from ..report.bench_plot import draw

    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        complete = staging / output.name
        complete.mkdir()
        (complete / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        try:
            draw(result, complete / "bench.png")
        except (ImportError, ValueError) as error:
            print(f"no bench.png: {error}", file=sys.stderr)
        complete.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# Showing -------------------------------------------------------------------------------------------------------------


def _head(result: dict[str, Any]) -> str:
    from ..report.bench_plot import threads

    model, settings, machine = result["model"], result["settings"], result["machine"]
    clock = "processor time" if settings["clock"] == "cpu" else "wall time"
    weights = ", random weights" if model["random_weights"] else ""
    return (
        f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters{weights}\n"
        f"{machine['processor']}, {threads(settings)}, {clock}, {settings['rounds']} rounds, "
        f"{result['seconds']:.0f} s"
    )


def _times(result: dict[str, Any], measured: dict[str, Any]) -> str:
    from ..report.bench_plot import values

    header, rows = ["contestant"], [[name] for name in measured]
    for workload in result["workloads"]:
        header += [f"{workload['name']}, {'tokens/s' if workload['rate'] else 'ms'}", "95 %"]
        header += [f"x {result['settings']['baseline']}", "95 %"]
        for row, entry in zip(rows, measured.values(), strict=True):
            found = entry["results"][workload["name"]]
            median, low, high = (_digits(value) for value in values(found, workload))
            row += [median, f"{low}-{high}"]
            ratio = found["ratio_interval"]
            row += [f"{found['ratio']:.2f}", f"{ratio[0]:.2f}-{ratio[1]:.2f}"] if ratio else ["-", "-"]
    return table(header, rows)


def _sizes(measured: dict[str, Any]) -> str:
    header = ("contestant", "disk", "load s", "loaded", "after run", "load peak", "peak", "error")
    rows = []
    for name, entry in measured.items():
        star = "*" if entry["quantizes_on_load"] else ""
        memory = entry["memory"] or {}
        sizes = [_signed_size(memory.get(part)) for part in ("loaded", "warm", "load_peak", "peak")]
        seconds = f"{entry['load_seconds']['wall']:.1f}"
        rows.append((name + star, size_text(entry["disk_bytes"]), seconds, *sizes, f"{entry['error']:.4f}"))
    return table(header, rows)


def _signed_size(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:,.0f} MiB"


def _digits(value: float) -> str:
    """Three digits, and no fewer than all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
