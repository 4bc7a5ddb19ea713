"""What a bench was run on: processor, memory, versions."""

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


_PACKAGES = (
    "optimum-zsaq torch transformers torchao bitsandbytes optimum-quanto onnxruntime onnx onnxscript openvino nncf numpy"
).split()
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm")
_LOAD_FACTOR = 2.2  # what loading a contestant may need at most, in float32 sizes of the model


def available_memory() -> int | None:
    """Bytes that processes may still take, None where /proc is missing."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def too_little_memory(parameters: int, available: Callable[[], int | None] = available_memory) -> str | None:
    """Why a contestant is not even started: the system would end processes, ours or others. None: there is enough."""
    free, needed = available(), _LOAD_FACTOR * 4 * parameters
    if free is None or free >= needed:
        return None
    gib = 2**30
    return (
        f"not started: loading may take {needed / gib:.1f} GiB and {free / gib:.1f} GiB are free; "
        "compare fewer at a time with --contestants"
    )


def describe_machine() -> dict[str, Any]:
    """Processor, memory, load and versions of what is compared."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(facts),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_available": available_memory(),
        "load_average_before": load_average(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor(facts: dict[str, str]) -> str:
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return " ".join([name, *numbers])


def load_average() -> float | None:
    """Processes that wanted to run during the last minute, None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
