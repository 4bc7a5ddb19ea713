"""Cells of the study `adapters` for models that write: a decoder and an encoder-decoder model, tuned on their own data.

Their data and measures are those of `squat_writers.py`. The base stores 0.5 % outliers at W4A8E4. Methods: "base" (as it
is), "outliers" and "random" (as many positions), with the search for a rate that all adapters have.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_training import loss, search, train, trainable
from prequant import _MEASURES, MODELS
from runner import Cell
from squat_writers import BATCH, collate, passages, spoken_words


SCHEME = "w4a8e4"
SHARE = 0.005
TASKS = ("wikitext", "g2p")
METHODS: dict[str, dict[str, Any]] = {"base": {}, "outliers": {}, "random": {"criterion": "random", "fraction": SHARE}}
RATES = (5e-4, 1e-3, 2.5e-3)  # a trained model wants lower ones than a new head does
STEPS, SEARCH_STEPS = 300, 60
HELD_OUT = {"wikitext": 32, "g2p": 512}


def writer_cells() -> list[Cell]:
    """One seed."""
    return [Cell(method, SCHEME, task) for task in TASKS for method in METHODS]


@dataclass
class Rows:
    """Token ids and labels of samples."""

    rows: list[dict[str, list[int]]]

    def batches(self, size: int, generator: Any = None) -> Iterator[dict[str, Any]]:
        """Padded batches; with a generator in random order."""
        import torch

        count = len(self.rows)
        order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, size):
            yield collate([self.rows[i] for i in order[start : start + size]])


def run_writer(cell: Cell, data: Path) -> dict[str, Any]:
    """Search, train, and measure as `prequant.py` does."""
    import torch
    import transformers
    from peft import get_peft_model

    from optimum_zsaq import OutlierConfig, PreQuantConfig

    path, class_name = MODELS[cell.task]
    model_class = getattr(transformers, class_name)
    reference = model_class.from_pretrained(data / path, dtype=torch.float32).eval()
    config = PreQuantConfig(weight_bits=4, embedding_bits=4, outliers=SHARE)
    base = model_class.from_pretrained(data / path, quantization_config=config, dtype=torch.float32).eval()
    if cell.method == "base":
        return _MEASURES[cell.task](base, reference, data)
    rows = passages(data) if cell.task == "wikitext" else spoken_words(data)
    parts = Rows(rows[HELD_OUT[cell.task] :]), Rows(rows[: HELD_OUT[cell.task]])
    model, size = get_peft_model(base, OutlierConfig(**METHODS[cell.method])), BATCH[cell.task]
    before = loss(model, parts[1], size)
    found = search(model, RATES, parts, SEARCH_STEPS, cell.seed, size)
    rate = float(min(found, key=lambda key: found[key]))
    seconds = train(model, parts[0], rate, STEPS, cell.seed, size)
    figures = {"rate": rate, "search": {"0": before, **found}, "steps": STEPS, "train_cpu_seconds": round(seconds, 1)}
    figures["trained"] = sum(parameter.numel() for parameter in trainable(model))
    return {**_MEASURES[cell.task](model.get_base_model(), reference, data), **figures}
