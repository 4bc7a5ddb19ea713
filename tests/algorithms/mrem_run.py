"""A reconstruction of a tiny student, for tests and as a script under torch.distributed: mrem_run.py OUT OPTIONS.

Options, as JSON: settings, and "kind", "model", "timeout"; "stop" = [rank, step] ends that process there; "pause" =
[rank, step, seconds] lets it stand still.
"""

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import make, token_ids

from optimum_zsaq import PreQuantConfig, prepare
from optimum_zsaq.algorithms.parallel import ParallelReconstruction
from optimum_zsaq.algorithms.pipeline import PipelineReconstruction
from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings
from optimum_zsaq.integrations.data import uncached_batch


QUICK = {"steps": 12, "learning_rate": 1e-3, "scale_learning_rate": 1e-3, "stages": 2, "queue": 3, "start_batches": 2}


def parts(name: str = "bert-cls") -> tuple:
    """Teacher, student, batches."""
    teacher = make(name, **({"num_layers": 3} if name.startswith("t5") else {"num_hidden_layers": 4}))
    for p in teacher.parameters():
        if p.dim() > 1 and not name.startswith("t5"):
            p.data *= 6
    scheme = PreQuantConfig(weight_bits=2, embedding_bits=4).scheme()
    batches = [uncached_batch(teacher, {"input_ids": token_ids(seed=seed, length=9 + seed)}) for seed in range(5)]
    return teacher, prepare(copy.deepcopy(teacher), scheme, "minmax"), batches


def reconstruct(timeout: float = 60.0, **options: Any) -> ParallelReconstruction:
    """A whole run, on the processes of torch.distributed if there are several."""
    stop, pause = options.pop("stop", (-1, 0)), options.pop("pause", (-1, 0, 0))
    several = dist.is_initialized() and dist.get_world_size() > 1
    models = parts(options.pop("model", "bert-cls"))
    settings = ReconstructionSettings(**{**QUICK, **options})
    run = PipelineReconstruction(*models, settings, timeout) if several else ParallelReconstruction(*models, settings)
    rank = dist.get_rank() if several else 0
    for stage, _ in run.steps():
        done = run.workers[0].training.done
        if stage is run.workers[-1].stage and [rank, done] == list(stop):
            os._exit(1)
        if stage is run.workers[-1].stage and [rank, done] == list(pause[:2]):
            time.sleep(pause[2])
    run.finish()
    return run


if __name__ == "__main__":
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        run = reconstruct(**options)
        found = {"student": run.student.state_dict(), "losses": run.losses, "waited": run.waited, "world": world}
    except ConnectionError as error:
        found = {"error": str(error), "world": world}
    torch.save(found, out / f"rank-{rank}.pt")
    if "error" in found:
        os._exit(3)
    dist.destroy_process_group()
