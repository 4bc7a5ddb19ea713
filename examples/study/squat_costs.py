"""What a step of quantization-aware training costs, plain and sharpness-aware, against one of float fine-tuning.

    python examples/study/squat_costs.py --model MODEL --output docs/results/squat_costs.json

One thread, batches of 32 x 32 random tokens, W2A8E2 a row, matrix products in bfloat16. The kinds take turns, some steps
each, several times; seconds are those of the CPU, a kind's figure the median over its turns.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


TURNS, STEPS, BATCH, LENGTH = 5, 10, 32, 32
KINDS: dict[str, dict[str, Any]] = {
    "LSQ-QAT": {"rho": 0.0},
    'alternate="batch"': {"alternate": "batch"},
    'alternate="step"': {"alternate": "step"},
    'alternate="step", climb_every=5': {"alternate": "step", "climb_every": 5},
    'alternate="none" (SAM)': {"alternate": "none"},
}
FLOAT = "float fine-tuning"


def trainer(kind: str, folder: Path) -> Any:
    """A trainer that makes `STEPS` steps whenever it is told to train."""
    import torch
    import transformers

    from optimum_zsaq import SQuATArguments, SQuATConfig, SQuATTrainer

    low_bit = {"quantization_config": SQuATConfig(weight_bits=2, embedding_bits=2)} if kind in KINDS else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **low_bit)
    ids = torch.randint(1000, model.config.vocab_size, (STEPS * BATCH, LENGTH)).tolist()
    rows = [{"input_ids": i, "attention_mask": [1] * LENGTH, "labels": n % 2} for n, i in enumerate(ids)]
    common = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-5,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    plain = (transformers.Trainer, transformers.TrainingArguments)
    made, arguments = (SQuATTrainer, SQuATArguments) if kind in KINDS else plain
    args = arguments(tempfile.mkdtemp(prefix="squat-costs-"), **common, **KINDS.get(kind, {}))
    return made(model, args, train_dataset=rows)


def measure(folder: Path) -> dict[str, Any]:
    """CPU seconds a step of each kind, and ratios, turn by turn."""
    trainers = {kind: trainer(kind, folder) for kind in (FLOAT, *KINDS)}
    times: dict[str, list[float]] = {kind: [] for kind in trainers}
    for turn in range(TURNS + 1):
        for kind, run in trainers.items():
            begun = time.process_time()
            run.train()
            if turn:  # the first one warms up
                times[kind].append((time.process_time() - begun) / STEPS)
    found = {kind: {"seconds": sorted(values)[TURNS // 2]} for kind, values in times.items()}
    for kind in KINDS:
        for name, other in (("of_float", FLOAT), ("of_lsq", "LSQ-QAT")):
            ratios = sorted(a / b for a, b in zip(times[kind], times[other], strict=True))
            found[kind][name] = [ratios[TURNS // 2], ratios[0], ratios[-1]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)
    found = measure(args.model)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kind, figures in found.items():
        beside = "".join(
            f", {title} {figures[name][0]:.2f} ({figures[name][1]:.2f} to {figures[name][2]:.2f}) times"
            for name, title in (("of_float", "of float"), ("of_lsq", "of LSQ-QAT"))
            if name in figures
        )
        print(f"{kind}: {figures['seconds']:.3f} s a step{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
