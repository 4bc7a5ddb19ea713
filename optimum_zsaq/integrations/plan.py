"""What a zero-shot training would take, measured on its first steps, without doing it."""

import copy
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..algorithms.minimax import Minimax
from ..algorithms.probes import Guard
from .zero_shot import CHECKED, chosen_start, find_start, sized, start_run
from .zsaq import ZSAQConfig


_TRIAL = 64  # sequences written and compensated on, to see how long it takes
_STEPS = 3  # timed, after one that is not


def plan_training(model: PreTrainedModel, config: ZSAQConfig) -> dict[str, Any]:
    """Try the parts of a training on a float model and tell what all of it would take. The model is used up.

    Returns:
        `dict`: seconds of "writing", "starting", "training" and "all"; "peak_bytes" of this process so far, which the
        whole run hardly exceeds; and what was asked for: "generator", "sequences" to write, "start", "steps".

    Raises:
        ValueError: see `make_generator`.
    """
    config = sized(config, model)
    trial = copy.copy(config)
    trial.written_sequences = min(_TRIAL, config.written_sequences)
    started = time.perf_counter()
    run, guard = start_run(model, trial)
    writes = hasattr(run.generator.source, "written") or hasattr(run.generator.source, "groups")
    each = (time.perf_counter() - started) / trial.written_sequences if writes else 0.0
    seconds = {"writing": each * config.written_sequences, "starting": _starting(run, guard, config)}
    run.step()
    run.update()
    seconds["training"] = config.steps * _timed(lambda: (run.step(), run.update()), _STEPS) / _STEPS
    seconds["training"] += CHECKED * _timed(lambda: guard.measure("trial"), 1)
    return {
        "generator": type(run.generator.source).__name__,
        "sequences": config.written_sequences if writes else 0,
        "start": chosen_start(run, config),
        "steps": config.steps,
        "seconds": {**seconds, "all": sum(seconds.values())},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def _starting(run: Minimax, guard: Guard, config: ZSAQConfig) -> float:
    """Part of it does not depend on the number of sequences: seen on one batch and on two."""
    found = []
    for batches in (1, 2):
        trial = copy.copy(config)
        trial.start_sequences = min(_TRIAL, config.start_sequences) * batches
        found.append(_timed(lambda trial=trial: find_start(run, guard, trial), 1))
    each = max(0.0, found[1] - found[0]) if chosen_start(run, config) == "compensated" else 0.0
    return found[0] + each * max(0.0, config.start_sequences / _TRIAL - 1.0)


def _timed(work: Callable[[], Any], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - started
