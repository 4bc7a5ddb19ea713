"""Timing a model under several contestants, interleaved: one process each, one of them working at a time, round by round.

A round runs every workload once on every contestant, in an order that is shuffled for each; ratios to the baseline pair
the times of a round. Contestants are in `contestants.py`, what is timed in `workloads.py`, processes in `bench_worker.py`.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .bench_process import WorkerError, WorkerProcess
from .bench_statistics import median_interval, paired_ratio
from .contestants import Contestant, default_contestants, find_contestant, why_skipped
from .machine import describe_machine, load_average, too_little_memory
from .workloads import DEFAULT_BATCHES, DEFAULT_NEW_TOKENS, SHAPES, Workload, workloads


FORMAT = 1
BASELINE = "torch-ao"


@dataclass(frozen=True)
class BenchSettings:
    """What is timed and how; `source` is one of `shape` and `model`.

    Args:
        shape (`str`, *optional*): a model of random weights, see `workloads.SHAPES`.
        model (`str`, *optional*): folder or Hub id of a float model.
        batches (`tuple[str, ...]`): "rows x tokens"; empty: those of `workloads.DEFAULT_BATCHES`.
        new_tokens (`int`, *optional*): tokens decoded; None: those of `workloads.DEFAULT_NEW_TOKENS`.
        contestants (`tuple[str, ...]`): names; empty: all that run by default.
        baseline (`str`, *optional*): the contestant that ratios are taken to; None: torch-ao, or the first one.
        threads (`int`): processor threads. With 1, times are processor time, otherwise wall time.
        rounds (`int`): samples of each contestant and workload.
        min_seconds (`float`): a sample repeats its call for so long.
        seed (`int`): of random weights, token ids and orders.
        timeout (`float`): seconds that loading, or a sample, may take.

    Raises:
        ValueError: an illegal value.
    """

    shape: str | None = None
    model: str | None = None
    batches: tuple[str, ...] = ()
    new_tokens: int | None = None
    contestants: tuple[str, ...] = ()
    baseline: str | None = None
    threads: int = 1
    rounds: int = 15
    min_seconds: float = 0.2
    seed: int = 0
    timeout: float = 900.0

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.model is None):
            raise ValueError(f"give one of --model and --shape; shapes are {', '.join(SHAPES)}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"--shape {self.shape} is unknown; use one of {', '.join(SHAPES)}, or --model with a folder")
        for name in ("threads", "rounds", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is no count; use 1 or more")
        for name, lowest in (("min_seconds", 0.0), ("timeout", 1.0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is too short; use {lowest:g} or more")
        workloads("encoder", self.batches, 1)
        for name in self.names:
            find_contestant(name)
        if self.baseline is not None and self.baseline not in self.names:
            raise ValueError(f"--baseline {self.baseline} takes no part; use one of {', '.join(self.names)}")

    @property
    def names(self) -> list[str]:
        """The contestants, each once."""
        return list(dict.fromkeys(self.contestants or default_contestants()))

    @property
    def baseline_name(self) -> str:
        """The contestant that ratios are taken to."""
        return self.baseline or (BASELINE if BASELINE in self.names else self.names[0])

    @property
    def clock(self) -> str:
        """Which of a sample's times counts: "cpu" or "wall"."""
        return "cpu" if self.threads == 1 else "wall"


@dataclass
class Entry:
    """What is found of one contestant."""

    title: str
    quantizes_on_load: bool = False
    status: str = "ok"
    reason: str | None = None
    traceback: str | None = None
    prepare_seconds: float | None = None
    disk_bytes: int | None = None
    load_seconds: dict[str, float] | None = None
    memory: dict[str, Any] | None = None
    error: float | None = None
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fail(self, status: str, reason: str, traceback: str | None = None) -> None:
        """Note why it is not measured."""
        self.status, self.reason, self.traceback = status, reason, traceback


def run_bench(settings: BenchSettings, folder: Path | None = None) -> dict[str, Any]:
    """Time a model under several contestants.

    Args:
        settings (`BenchSettings`): what and how.
        folder (`Path`, *optional*): where the temporary folder of checkpoints is made; None: the system's place.

    Returns:
        `dict`: JSON-able: "model", "settings", "machine", "workloads", and "contestants": an `Entry` each. Their `memory`
        is in bytes more than before loading: "loaded", "warm" (after a first call of everything), "load_peak", "peak".
        `error` is |outputs - float outputs| / |float outputs|. Times of `samples` and `results` are seconds.

    Raises:
        ValueError: the model is not one that can be timed.
        WorkerError: the float model does not run.
    """
    start = time.time()
    with _temporary_folder(folder) as work:
        bench = _Bench(settings, work)
        bench.run()
    return {
        "format": FORMAT,
        "model": bench.facts,
        "settings": {**asdict(settings), "clock": settings.clock, "baseline": settings.baseline_name},
        "machine": bench.machine,
        "workloads": [asdict(each) | {"rate": each.rate} for each in bench.workloads],
        "contestants": {name: asdict(entry) for name, entry in bench.entries.items()},
        "seconds": time.time() - start,
    }


@contextmanager
def _temporary_folder(parent: Path | None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="zsaq-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class _Bench:
    """One run: settings, a temporary folder, and what is found."""

    def __init__(self, settings: BenchSettings, work: Path):
        self.settings, self.work = settings, work
        self.job = {"threads": settings.threads, "seed": settings.seed}
        self.entries: dict[str, Entry] = {}
        self.processes: dict[str, WorkerProcess] = {}
        self.checkpoints: dict[str, tuple[Path, float]] = {}
        self.facts: dict[str, Any] = {}
        self.workloads: list[Workload] = []
        self.machine = describe_machine()

    def run(self) -> None:
        from transformers.utils.logging import tqdm

        with ExitStack() as stack:
            with tqdm(total=2 + len(self.settings.names), unit="step") as bar:
                source = self._float_model(bar)
                for name in self.settings.names:
                    _say(bar, f"quantizing and loading {name}")
                    self._start(name, source, stack)
                    bar.update()
                _say(bar, "loaded")
            orders = shuffled_orders(self.processes, len(self.workloads), self.settings.rounds, self.settings.seed)
            with tqdm(total=self.settings.rounds * len(self.workloads) * len(self.processes), unit="sample") as bar:
                self._time(orders, bar)
            self.machine["load_average_after"] = load_average()
        summarize(self.entries, self.settings)

    def _float_model(self, bar: Any) -> Path:
        settings = self.settings
        source = self.work / "float" if settings.model is None else Path(settings.model)
        with self._process("float") as process:
            _say(bar, "making the float model")
            if settings.shape is not None:
                process.ask(do="build", shape=settings.shape, folder=str(source), seed=settings.seed)
            found = process.ask(do="describe", model=settings.model or str(source))
            if found["quantized"]:
                raise ValueError(f"{settings.model} is quantized already; give --model the float model it was made from")
            kind = found["kind"]
            steps = settings.new_tokens or DEFAULT_NEW_TOKENS[kind]
            self.workloads = workloads(kind, settings.batches or DEFAULT_BATCHES[kind], steps)
            _check_lengths(self.workloads, found["longest"])
            if not source.is_dir():
                source = self.work / "float"
                process.ask(do="fetch", model=settings.model, folder=str(source))
            bar.update()
            _say(bar, "running the float model")
            facts = process.ask(do="reference", source=str(source), folder=str(self.work), seed=settings.seed)
            bar.update()
        name = settings.shape or Path(settings.model).name
        self.facts = {"name": name, "kind": kind, "random_weights": settings.shape is not None, **facts}
        return source

    def _process(self, name: str) -> WorkerProcess:
        log = self.work / f"{name.replace(':', '.')}.log"
        return WorkerProcess(log, self.settings.threads, self.settings.timeout)

    def _start(self, name: str, source: Path, stack: ExitStack) -> None:
        """Save, load and warm up a contestant; a failure is noted."""
        contestant = find_contestant(name)
        entry = Entry(contestant.title, contestant.quantizes_on_load)
        self.entries[name] = entry
        reason = why_skipped(contestant, self.facts["kind"]) or too_little_memory(self.facts["parameters"])
        if reason is not None:
            return entry.fail("skipped", reason)
        folder = source
        process = None
        try:
            if contestant.prepare is not None:
                folder, entry.prepare_seconds = self._checkpoint(name, contestant, source)
            process = self._process(name)
            loaded = process.ask(do="load", contestant=name, folder=str(folder), source=str(source), job=self.job)
            warm = process.ask(do="warm", workloads=[asdict(each) for each in self.workloads], folder=str(self.work))
        except WorkerError as error:
            entry.fail("failed", self._plain(str(error)), self._plain(error.traceback))
            if process is not None:
                process.end()
            return None
        entry.disk_bytes, entry.load_seconds, entry.error = loaded["disk_bytes"], loaded["load_seconds"], warm["error"]
        entry.memory = _memory(loaded["memory"], warm["memory"])
        entry.samples = {each.name: [] for each in self.workloads}
        self.processes[name] = stack.enter_context(process)
        return None

    def _checkpoint(self, name: str, contestant: Contestant, source: Path) -> tuple[Path, float]:
        """The folder that a contestant loads and the seconds that making it took; contestants may share one."""
        key = contestant.checkpoint or name
        if key not in self.checkpoints:
            folder = self.work / f"checkpoint-{len(self.checkpoints)}"
            with self._process(name) as process:
                reply = process.ask(do="prepare", contestant=name, source=str(source), folder=str(folder), job=self.job)
            self.checkpoints[key] = folder, reply["seconds"]
        return self.checkpoints[key]

    def _time(self, orders: Sequence[Sequence[Sequence[str]]], bar: Any) -> None:
        """All rounds; a contestant that fails takes no further part."""
        for number, order in enumerate(orders):
            for place, names in enumerate(order):
                workload = self.workloads[place].name
                for position, name in enumerate(names):
                    entry = self.entries[name]
                    if entry.status == "ok":
                        _say(bar, f"round {number + 1} of {len(orders)}, {workload}: {name}")
                        try:
                            sample = self.processes[name].ask(
                                do="sample", workload=place, seconds=self.settings.min_seconds
                            )
                            entry.samples[workload].append({"round": number, "position": position, **sample})
                        except WorkerError as error:
                            entry.fail("failed", self._plain(str(error)), self._plain(error.traceback))
                            self.processes[name].end()
                    bar.update()

    def _plain(self, text: str) -> str:
        """A message without the machine's paths."""
        for path in (str(self.work), sys.prefix, str(Path(os.__file__).parent), str(Path.cwd()), str(Path.home())):
            text = text.replace(f"{path}/", "") if len(path) > 1 else text
        return text


def shuffled_orders(names: Sequence[str], count: int, rounds: int, seed: int) -> list[list[list[str]]]:
    """For each round and each of `count` workloads all names, in an order of its own."""
    generator, names = random.Random(seed), list(names)
    return [[generator.sample(names, len(names)) for _ in range(count)] for _ in range(rounds)]


def summarize(entries: dict[str, Entry], settings: BenchSettings) -> None:
    """Fill in the entries' `results`: seconds a call, their interval, and the ratio to the baseline where it has one."""
    baseline = entries.get(settings.baseline_name)
    for entry in entries.values():
        for workload, samples in entry.samples.items():
            if entry.status != "ok" or not samples:
                continue
            times = _times(samples, settings.clock)
            median, low, high = median_interval(list(times.values()), settings.seed)
            others = _times(baseline.samples[workload], settings.clock) if baseline and baseline.status == "ok" else {}
            ratio = paired_ratio(times, others, settings.seed)
            entry.results[workload] = {
                "seconds": median,
                "interval": [low, high],
                "ratio": ratio and ratio[0],
                "ratio_interval": ratio and list(ratio[1:]),
            }


def _times(samples: Sequence[dict[str, Any]], clock: str) -> dict[int, float]:
    return {sample["round"]: sample[clock] / sample["calls"] for sample in samples}


def _memory(loaded: dict[str, Any] | None, warm: dict[str, Any] | None) -> dict[str, Any] | None:
    if loaded is None or warm is None:
        return None
    before = loaded["before"]["resident"]
    return {
        "loaded": loaded["loaded"]["resident"] - before,
        "warm": warm["warm"]["resident"] - before,
        "load_peak": loaded["load_peak"] - before,
        "peak": warm["peak"] - before,
        "process": {"before": loaded["before"], "loaded": loaded["loaded"], "warm": warm["warm"]},
    }


def _check_lengths(wanted: Sequence[Workload], longest: int | None) -> None:
    for each in wanted:
        tokens = each.length + each.steps
        if longest is not None and each.action != "translate" and tokens > longest:
            option = (
                f"--new-tokens {each.steps} after {each.length}" if each.steps else f"--batch {each.rows}x{each.length}"
            )
            raise ValueError(f"{option} is more than the {longest} tokens that this model reads; use less")


def _say(bar: Any, text: str) -> None:
    bar.set_description(text, refresh=True)
