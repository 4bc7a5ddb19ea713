"""The process of one contestant of `bench`: reads requests from stdin, answers on stdout, one line of JSON each.

A contestant has a process of its own so that its memory is its own. What libraries print goes to stderr. It works only
when it is asked, and ends when its stdin does.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contestants import find_contestant
from .peers import Job
from .workloads import Runner, Workload, check_outputs, kind_of_model, save_shape


REFERENCE = "reference.pt"


# Memory --------------------------------------------------------------------------------------------------------------


def trim() -> None:
    """Collect garbage and give freed memory back to the system, where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def memory() -> dict[str, int] | None:
    """Bytes of this process: "resident" now (VmRSS), its part without files ("anonymous"), and "peak" (VmHWM).

    None where /proc is missing.
    """
    names = {"VmRSS:": "resident", "RssAnon:": "anonymous", "VmHWM:": "peak"}
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return {names[parts[0]]: 1024 * int(parts[1]) for parts in lines if parts and parts[0] in names}


def reset_peak() -> None:
    """Make what is resident now the peak, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def disk_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files but for its tokenizer's and texts."""
    others = ("tokenizer", "vocab", "merges", "special_tokens", "spiece", "README")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.name.startswith(others))


# Requests ------------------------------------------------------------------------------------------------------------


class Worker:
    """What a process holds between requests; each public method answers one."""

    def __init__(self) -> None:
        self.model: Any = None
        self.config: Any = None
        self.job: Job | None = None
        self.runners: list[Runner] = []

    def build(self, shape: str, folder: str, seed: int) -> dict[str, Any]:
        """Save a model of random weights."""
        save_shape(shape, Path(folder), seed)
        return {}

    def describe(self, model: str) -> dict[str, Any]:
        """The kind of a model, the most tokens that it reads, if that is known, and whether it is quantized."""
        from ..integrations.tasks import load_config

        config = load_config(model)
        return {
            "kind": kind_of_model(config),
            "longest": getattr(config, "max_position_embeddings", None),
            "quantized": getattr(config, "quantization_config", None) is not None,
        }

    def fetch(self, model: str, folder: str) -> dict[str, Any]:
        """Save a model of the Hub as a folder, in the type it is stored in."""
        from ..integrations.tasks import load_config, model_class

        model_class(load_config(model)).from_pretrained(model, dtype="auto").save_pretrained(folder)
        return {}

    def reference(self, source: str, folder: str, seed: int) -> dict[str, Any]:
        """The float model's outputs on fixed inputs, saved, and what the model is."""
        import torch

        from ..integrations.tasks import load_config
        from .peers import from_folder

        config, model = load_config(source), from_folder(Path(source), "float32")
        with torch.no_grad():
            torch.save(check_outputs(model, kind_of_model(config), config, seed), Path(folder) / REFERENCE)
        return {"parameters": sum(p.numel() for p in model.parameters()), "architecture": type(model).__name__}

    def prepare(self, contestant: str, source: str, folder: str, job: dict[str, int]) -> dict[str, Any]:
        """Save the checkpoint that the contestant loads."""
        self._set_up(job)
        start = time.perf_counter()
        find_contestant(contestant).prepare(Path(source), Path(folder), self.job)
        return {"seconds": time.perf_counter() - start}

    def load(self, contestant: str, folder: str, source: str, job: dict[str, int]) -> dict[str, Any]:
        """Load the model; imports are done before memory and time are measured."""
        from ..integrations.tasks import load_config, model_class

        self._set_up(job)
        found = find_contestant(contestant)
        self.config = load_config(source)
        model_class(self.config)
        for package in found.packages:
            importlib.import_module(package)
        trim()
        reset_peak()
        before = memory()
        wall, cpu = time.perf_counter(), time.process_time()
        self.model = found.load(Path(folder), self.job)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        peak = memory()
        trim()
        return {
            "disk_bytes": disk_bytes(Path(folder)),
            "load_seconds": seconds,
            "memory": before and {"before": before, "loaded": memory(), "load_peak": peak["peak"]},
        }

    def warm(self, workloads: list[dict[str, Any]], folder: str) -> dict[str, Any]:
        """Run everything once: distance to the float model's outputs, memory afterwards."""
        import torch

        expected = torch.load(Path(folder) / REFERENCE)
        with torch.no_grad():
            outputs = check_outputs(self.model, kind_of_model(self.config), self.config, self.job.seed)
            if outputs.shape != expected.shape:
                raise ValueError(f"its outputs have {outputs.numel()} numbers, the float model's {expected.numel()}")
            error = float((outputs - expected).norm() / expected.norm())
            self.runners = [Runner(self.model, Workload(**fields), self.config, self.job.seed) for fields in workloads]
            for runner in self.runners:
                runner.reset()
                runner.run()
        peak = memory()
        trim()
        return {"error": error, "memory": peak and {"warm": memory(), "peak": peak["peak"]}}

    def sample(self, workload: int, seconds: float) -> dict[str, Any]:
        """Run a workload for at least so many seconds: calls, and processor and wall seconds of all of them together."""
        import torch

        runner, calls, cpu, wall = self.runners[workload], 0, 0.0, 0.0
        with torch.no_grad():
            while not calls or wall < seconds:
                runner.reset()
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                runner.run()
                cpu += time.process_time() - cpu_start
                wall += time.perf_counter() - wall_start
                calls += 1
        return {"calls": calls, "cpu": cpu, "wall": wall}

    def _set_up(self, job: dict[str, int]) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from ..integrations.registration import register

        self.job = Job(**job)
        register()
        torch.set_num_threads(self.job.threads)
        set_verbosity_error()
        disable_progress_bar()


def answer(worker: Worker, line: str) -> dict[str, Any]:
    """The answer to a request {"do": method, ...}; an error is an answer too."""
    request = json.loads(line)
    handler: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
    try:
        return handler(**request)
    except Exception as error:
        text = " ".join(str(error).split())
        return {"failed": f"{type(error).__name__}: {text}".removesuffix(": "), "traceback": _places(error)}


def _places(error: BaseException) -> str:
    """Where an error arose, a line each, the innermost last; paths start at the package."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)


def _short(path: str) -> str:
    for root in (*sys.path, str(Path(__file__).parents[2])):
        if root and path.startswith(f"{root}{os.sep}"):
            return path[len(root) + 1 :]
    return Path(path).name


def main() -> None:
    """Answer until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        channel.write(json.dumps(answer(worker, line)) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
