"""A resumable runner: a study is a list of cells, each finished cell is one line of a JSONL file.

A cell is method x scheme x task x seed. Cells run in worker processes of one thread each; the parent alone writes, one
whole line at a time, and flushes it to the disk, so a run that is interrupted or killed loses the cells that were running
and nothing else. Started again, it skips what is there. A cell that fails is reported and tried again at the next start.

A study is a module with `cells() -> list[Cell]`, `run_cell(cell, data) -> dict` and `tables(rows) -> dict[str, str]`.
"""

import importlib
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


# What a worker sets before torch and transformers are imported, which read it then.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class Cell:
    """One measurement; `settings` is what `run_cell` needs beyond the names, and no part of the id."""

    method: str
    scheme: str
    task: str
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """The name under which a result is stored."""
        return f"{self.task}/{self.method}/{self.scheme}/{self.seed}"


# Results on disk -----------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by id; a last line that was not written whole is ignored.

    Raises:
        ValueError: a whole line is no result.
    """
    rows: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no result: {line[:60]!r}; delete that line") from error
    return rows


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that was not written whole, so that the next one starts a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Write one line, whole and on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def circumstances() -> dict[str, Any]:
    """What a figure may depend on: machine, threads, versions and commit; asked when a worker has loaded its code."""
    packages = ("torch", "transformers", "optimum-zsaq")
    versions = {name.replace("-", "_"): metadata.version(name) for name in packages}
    return {
        "machine": {"cpu": _cpu_model(), "threads": int(os.environ["OMP_NUM_THREADS"])},
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit, with "-dirty" where the package's or the study's files differ from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        changed = git("status", "--porcelain", "--", str(root / "optimum_zsaq"), str(Path(__file__).parent))
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# Workers -------------------------------------------------------------------------------------------------------------


def _work(study: str, data: Path, pipe: Connection) -> None:
    """A worker: gets cells, sends (row, None) or (None, traceback) back; ends at None, or when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("optimum_zsaq").setLevel(logging.ERROR)
    module, around = importlib.import_module(study), circumstances()
    with suppress(EOFError, BrokenPipeError):
        while (cell := pipe.recv()) is not None:
            pipe.send(_run(module, cell, data, around))


def _run(module: Any, cell: Cell, data: Path, around: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    start = time.perf_counter()
    try:
        figures = module.run_cell(cell, data)
    except Exception:  # whatever a cell does, the others go on
        return None, traceback.format_exc()
    names = {"cell": cell.id, "task": cell.task, "method": cell.method, "scheme": cell.scheme, "seed": cell.seed}
    ended = {"seconds": round(time.perf_counter() - start, 1), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return {**names, **figures, **around, **ended}, None


class _Worker:
    """A process and what it is doing; replaced when it dies."""

    def __init__(self, study: str, data: Path):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(study, data, other), daemon=True)
        self.process.start()
        other.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell | None) -> None:
        self.cell = cell
        self.pipe.send(cell)

    def take(self) -> tuple[dict[str, Any] | None, str | None]:
        """The row or the error of the cell that was given."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return None, f"the worker process ended with exit code {self.process.exitcode} (out of memory?)"


def _finished(study: str, data: Path, cells: list[Cell], workers: int) -> Iterator[tuple[Cell, dict | None, str | None]]:
    """Run cells side by side; yields (cell, row, error) as each ends."""
    waiting = list(reversed(cells))
    pool = [_Worker(study, data) for _ in range(min(workers, len(cells)))]
    try:
        for worker in pool:
            worker.give(waiting.pop())
        while pool:
            ready = wait([worker.pipe for worker in pool])
            for worker in [w for w in pool if w.pipe in ready]:
                cell, (row, error) = worker.cell, worker.take()
                pool.remove(worker)
                if waiting:
                    pool.append(worker if worker.process.is_alive() else _Worker(study, data))
                    pool[-1].give(waiting.pop())
                elif worker.process.is_alive():
                    worker.give(None)
                    worker.process.join()
                yield cell, row, error
    finally:
        for worker in pool:
            worker.process.terminate()


def run_study(study: str, data: Path, results: Path, workers: int = 2) -> int:
    """Run the cells of a study that are not finished yet.

    Args:
        study (`str`): the name of its module, importable.
        data (`Path`): handed to `run_cell`.
        results (`Path`): the JSONL file.
        workers (`int`): processes side by side, one thread each.

    Returns:
        `int`: how many cells failed.

    Raises:
        ValueError: two cells have one id; see `read_results`.
    """
    cells = importlib.import_module(study).cells()
    if len({cell.id for cell in cells}) < len(cells):
        raise ValueError(f"study {study!r} has two cells with the same id; give them different schemes or seeds")
    done = read_results(results)
    drop_torn_line(results)
    todo = [cell for cell in cells if cell.id not in done]
    print(f"{study}: {len(cells)} cells, {len(cells) - len(todo)} finished, {len(todo)} to run", flush=True)
    failed, start = 0, time.perf_counter()
    for number, (cell, row, error) in enumerate(_finished(study, data, todo, workers), 1):
        if row is None:
            failed += 1
            print(f"[{number}/{len(todo)}] FAILED {cell.id}\n{error}", flush=True)
            continue
        append_result(results, row)
        left = (time.perf_counter() - start) / number * (len(todo) - number)
        print(f"[{number}/{len(todo)}] {cell.id} {row['seconds']} s, {left / 60:.0f} min left", flush=True)
    return failed
