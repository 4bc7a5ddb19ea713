"""MREM-P on two processes of one thread against one process of one thread, taking turns; prints JSON.

    python examples/study/mrem_processes.py --model MODEL --texts TEXTS --rounds 2

MODEL is a float model, TEXTS a file of calibration texts. Seconds are those of the whole reconstruction without loading;
"idle" is the share of its training that each process waited for another one.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from optimum_zsaq import MREMConfig
from optimum_zsaq.integrations.tasks import load_config, model_class


STAGES = 2


def reconstruct(model: str, texts: Path, steps: int) -> dict[str, Any]:
    """One run, in as many processes as were launched."""
    config = MREMConfig(weight_bits=2, embedding_bits=4, calibration_data=texts, stages=STAGES, steps=steps, parallel=True)
    quantized = model_class(load_config(model)).from_pretrained(model, quantization_config=config)
    calibration = quantized.config.quantization_config.recipe["calibration"]
    return {name: calibration[name] for name in ("seconds", "idle") if name in calibration}


def launch(count: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run on `count` processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    options = ["--model", args.model, "--texts", str(args.texts), "--steps", str(args.steps), "--inside"]
    command = [sys.executable, *launcher, __file__, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a float model")
    parser.add_argument("--texts", required=True, type=Path, help="file of calibration texts")
    parser.add_argument("--steps", type=int, default=120, help="of each stage (default: 120)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is run (default: 2)")
    parser.add_argument("--inside", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.inside:
        found = reconstruct(args.model, args.texts, args.steps)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    runs = {count: [] for count in (1, 2)}
    for _ in range(args.rounds):
        for count, found in runs.items():
            found.append(launch(count, args))
    seconds = {count: [run["seconds"] for run in found] for count, found in runs.items()}
    ratio = median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    print(json.dumps({"seconds": seconds, "idle": [run["idle"] for run in runs[2]], "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
