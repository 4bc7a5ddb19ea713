"""What an outlier adapter costs at BERT-base's shape: forward with against without, a training step against full tuning.

    python examples/study/adapter_costs.py --output docs/results/adapter_costs.json

One thread, random weights, W4A8E4. Forward passes with and without the adapter take turns on the same model, once with a
base that stores outliers where the adapter's are and once with one that stores none; training steps of the adapter and of
the whole float model take turns too. Seconds are those of the CPU; peak memory is that of a process that makes a few steps
of one kind, less what it had before the model was made.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


SHARE, PAIRS, TRAIN_PAIRS, MEMORY_STEPS = 0.005, {(8, 128): 5, (1, 1): 40}, 3, 2
KINDS = ("adapter", "full")


def base(outliers: float | None) -> Any:
    """A packed BERT-base with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from optimum_zsaq import PreQuantConfig, pack, prepare

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    if outliers == 0.0:
        return model
    settings = PreQuantConfig(weight_bits=4, embedding_bits=4, outliers=outliers, ranges="minmax")
    return pack(prepare(model, settings.scheme(), "minmax"))


def with_adapter(outliers: float | None) -> Any:
    """The same with an adapter, whose values are as if trained."""
    from peft import get_peft_model

    from optimum_zsaq import OutlierConfig

    model = get_peft_model(base(outliers), OutlierConfig(fraction=SHARE, modules_to_save=["classifier"]))
    for name, parameter in model.named_parameters():
        if "optimum_zsaq" in name:
            parameter.data.normal_(std=0.01)
    return model


def batch(shape: tuple[int, int]) -> dict[str, Any]:
    """Random token ids."""
    import torch

    ids = torch.randint(5, 30000, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def time_forward(outliers: float | None) -> list[dict[str, Any]]:
    """With and without the adapter in turns, at each shape."""
    import torch

    model, found = with_adapter(outliers).eval(), []
    for shape, pairs in PAIRS.items():
        inputs, times = batch(shape), {"with": [], "without": []}
        with torch.inference_mode():
            for _ in range(pairs + 2):
                times["with"].append(seconds(lambda inputs=inputs: model(**inputs)))
                with model.disable_adapter():
                    times["without"].append(seconds(lambda inputs=inputs: model(**inputs)))
        times = {name: values[2:] for name, values in times.items()}
        ratio = median([a / b for a, b in zip(times["with"], times["without"], strict=True)])
        medians = {name: median(values) for name, values in times.items()}
        found.append({"stored": outliers is not None, "shape": shape, "ratio": ratio, **medians})
    return found


def count_floor() -> dict[str, float]:
    """The adapter's products against those of the Linear layers: what no arithmetic can save, were both as fast."""
    model = with_adapter(None)
    sizes = [(m.in_features * m.out_features) for m in model.modules() if type(m).__name__ == "OutlierLinear"]
    values = sum(p.numel() for n, p in model.named_parameters() if "optimum_zsaq_values" in n)
    return {"weights": sum(sizes), "values": values, "share_of_products": values / sum(sizes)}


def trainer(kind: str) -> Callable[[], None]:
    """A training step with AdamW at 8 x 128: of the adapter on the packed model, or of the whole float model."""
    model = (with_adapter(SHARE) if kind == "adapter" else base(0.0)).train()
    return _step(model)


def _step(model: Any) -> Callable[[], None]:
    """A step of AdamW on what is trainable."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs = {**batch((8, 128)), "labels": torch.arange(8) % 2}

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def time_training() -> dict[str, Any]:
    """Both kinds of step in turns."""
    steps = {kind: trainer(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(TRAIN_PAIRS + 1):
        for kind, step in steps.items():
            times[kind].append(seconds(step))
    medians = {kind: median(values[1:]) for kind, values in times.items()}
    return {**medians, "ratio": median([a / b for a, b in zip(times["adapter"][1:], times["full"][1:], strict=True)])}


def peak(kind: str) -> int:
    """Bytes that a few training steps of a kind take at their peak beyond those of the imports."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import optimum_zsaq.integrations.peft  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = trainer(kind) if kind == "full" else packed_trainer()
    for _ in range(MEMORY_STEPS):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def packed_trainer() -> Callable[[], None]:
    """The adapter's step, on a base that is loaded packed, so that no float model counts."""
    import tempfile

    from peft import get_peft_model
    from transformers import BertForSequenceClassification

    from optimum_zsaq import OutlierConfig

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--save", folder], check=True, capture_output=True)
        model = BertForSequenceClassification.from_pretrained(folder)
    model = get_peft_model(model, OutlierConfig(modules_to_save=["classifier"])).train()
    return _step(model)


def peak_in_a_process(kind: str) -> int:
    """`peak`, in a fresh process."""
    command = [sys.executable, __file__, "--peak", kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure() -> dict[str, Any]:
    """Everything."""
    forward = [row for outliers in (SHARE, None) for row in time_forward(outliers)]
    memory = {kind: peak_in_a_process(kind) for kind in KINDS}
    memory["ratio"] = memory["adapter"] / memory["full"]
    return {"floor": count_floor(), "forward": forward, "training": time_training(), "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--peak", choices=KINDS, help="only print the peak memory of a few steps of a kind")
    parser.add_argument("--save", type=Path, help="only save the packed base")
    args = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)
    if args.peak is not None:
        print(peak(args.peak))
        return 0
    if args.save is not None:
        base(SHARE).save_pretrained(args.save)
        return 0
    found = measure()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in found["forward"]:
        where = "a base that stores the same outliers" if row["stored"] else "a base that stores none"
        print(f"forward {row['shape']}, on {where}: {row['ratio']:.2f} times")
    print(f"training step: {found['training']['ratio']:.2f} times; peak memory: {found['memory']['ratio']:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
