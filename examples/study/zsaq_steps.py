"""What single steps of zero-shot training do and cost: the two losses of SAM-SGA, and SAM against a plain step.

    python examples/study/zsaq_steps.py --model MODEL --output zsaq_steps.json --plot zsaq_losses.png

MODEL is the folder of a fine-tuned float classifier. Plain and SAM steps are timed in turn, one thread; the peak memory of
each kind is that of a process that makes only such steps. Matplotlib draws the figure (extra `bench`).
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


PAIRS, MEMORY_STEPS, CURVE = 12, 4, 120
RHO, EVERY = 0.02, 8


def start(model: Path, rho: float, every: int = 0, steps: int = CURVE) -> Any:
    """A training at 2 bits, from rounding, on noise."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from optimum_zsaq import ZSAQConfig
    from optimum_zsaq.integrations.zero_shot import start_run

    student = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    options = {"generator": "noise", "rho": rho, "generator_every": every, "steps": steps}
    return start_run(student, ZSAQConfig(weight_bits=2, embedding_bits=4, **options))


def time_steps(model: Path) -> dict[str, Any]:
    """Seconds of plain and of SAM steps on the same batches, and the median of their ratios."""
    plain = start(model, 0.0)
    sharp = copy.deepcopy(plain)
    from optimum_zsaq.algorithms.minimax import Minimax
    from optimum_zsaq.algorithms.sharpness import SharpnessSettings

    settings = copy.copy(sharp.settings)
    object.__setattr__(settings, "sharpness", SharpnessSettings(RHO))
    sharp = Minimax(sharp.teacher, sharp.student, sharp.generator, settings, sharp.embed, sharp.complete)
    seconds: dict[str, list[float]] = {"plain": [], "sam": []}
    for _ in range(PAIRS + 1):
        for name, run in (("plain", plain), ("sam", sharp)):
            begun = time.process_time()
            run.step()
            run.update()
            seconds[name].append(time.process_time() - begun)
    ratios = sorted(s / p for s, p in zip(seconds["sam"][1:], seconds["plain"][1:], strict=True))
    return {"seconds": {name: sorted(found[1:]) for name, found in seconds.items()}, "ratio": ratios[len(ratios) // 2]}


def peak(model: Path, rho: float) -> dict[str, int]:
    """Peak memory of a process that makes a few steps, and what the trained weights take."""
    run = start(model, rho)
    for _ in range(MEMORY_STEPS):
        run.step()
        run.update()
    trained = sum(p.numel() * p.element_size() for p in run.trained)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "trained": trained}


def peak_in_a_process(model: Path, rho: float) -> dict[str, int]:
    """`peak`, in a fresh process."""
    command = [sys.executable, __file__, "--model", str(model), "--peak", str(rho)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def losses(model: Path) -> dict[str, list]:
    """D at the weights, at the perturbed weights, and on the generator's inputs before each of its steps."""
    run, found = start(model, RHO, EVERY), {"loss": [], "sharp_loss": [], "ascent": []}
    for step in range(CURVE):
        for name, value in run.step().items():
            found[name].append((step, value))
        run.update()
    return found


def draw(found: dict[str, list], path: Path) -> None:
    """Both losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    titles = {"loss": "student, at its weights", "sharp_loss": f"student, perturbed (SAM, rho = {RHO})"}
    for name, title in titles.items():
        steps, values = zip(*found[name], strict=True)
        axes.plot(steps, values, label=title, linewidth=1.2)
    steps, values = zip(*found["ascent"], strict=True)
    axes.plot(
        steps, values, "o", label=f"generator, before each of its steps (every {EVERY})", markersize=4, color="tab:red"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("discrepancy D")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a fine-tuned float classifier")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--peak", type=float, metavar="RHO", help="only print the peak memory of a few steps")
    args = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)
    if args.peak is not None:
        print(json.dumps(peak(args.model, args.peak)))
        return 0
    found = {"steps": time_steps(args.model), "memory": {}, "losses": losses(args.model)}
    for name, rho in (("plain", 0.0), ("sam", RHO)):
        found["memory"][name] = peak_in_a_process(args.model, rho)
    found["memory"]["copies"] = (found["memory"]["sam"]["peak"] - found["memory"]["plain"]["peak"]) / found["memory"][
        "sam"
    ]["trained"]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if args.plot:
        draw(found["losses"], args.plot)
    print(f"a SAM step takes {found['steps']['ratio']:.2f} times a plain one's time")
    print(f"and {found['memory']['copies']:.2f} copies of the trained weights more memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
