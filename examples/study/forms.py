"""Whether training without data (`ZSAQConfig` as it comes) holds on inputs of every form, on six tasks of one model.

Tasks: see `forms_tasks.py`. KL, agreement and accuracy are those of dev inputs, the KL to the float model needs no labels.
Methods: "rounding" (with the ranges that ZSAQ starts from), "zsaq", and what the guard must survive: "one-token" (a source
that writes one token again and again), "single" (no pairs are written), "rate" (at least ten times the learning rate). What
the closing lines claim of every form is kept too. Tuned on "part", "same", "more" and "sst2", seed 0.
DATA as for the study `squat`.
"""

import time
from pathlib import Path
from typing import Any

from forms_tables import SCHEMES, all_tables
from forms_tasks import PAIRS, SINGLES, TASKS, float_model, logits, samples
from runner import Cell
from zsaq import fields


SEEDS = (0, 1, 2)
ZSAQ: dict[str, dict[str, Any]] = {"zsaq": {}, "one-token": {"generator": "one token"}, "rate": {"learning_rate": 2e-3}}


def cells() -> list[Cell]:
    """Rounding, then the first seed of the pair tasks, the bad sources, the other tasks, the other seeds."""
    found = [Cell("float", "float32", task) for task in TASKS]
    found += [Cell("rounding", scheme, task) for task in TASKS for scheme in SCHEMES]
    found += [Cell("zsaq", scheme, task) for task in PAIRS for scheme in SCHEMES]
    found += [Cell(method, scheme, "part") for method in ("one-token", "single", "rate") for scheme in SCHEMES[::2]]
    found += [Cell("zsaq", scheme, task) for task in SINGLES for scheme in SCHEMES]
    return found + [Cell("zsaq", scheme, task, seed) for seed in SEEDS[1:] for task in TASKS for scheme in SCHEMES]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder, rows = float_model(cell.task, data), samples(cell.task, "dev", data)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    labels, wanted = torch.tensor([row["labels"] for row in rows]), logits(reference, rows, data)
    if cell.method == "float":
        return {"accuracy": (wanted.argmax(-1) == labels).float().mean().item(), "count": len(rows)}
    if cell.method == "single":
        from optimum_zsaq.integrations import forms

        forms._PAIRS = 0.0  # what a generator that knows no pairs would do; a worker process runs one cell
    start = time.process_time()
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=_config(cell, reference)).eval()
    seconds = round(time.process_time() - start, 1)
    found = logits(model, rows, data)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    figures = {
        "kl": kl.mean().item(),
        "kl_error": kl.std().item() / len(rows) ** 0.5,
        "agreement": (found.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        "accuracy": (found.argmax(-1) == labels).float().mean().item(),
        "count": len(rows),
        "cpu_seconds": seconds,
    }
    data_of = model.config.quantization_config.recipe["calibration"] or {}
    return {**figures, **{name: data_of[name] for name in ("kept", "won", "worse", "inputs") if name in data_of}}


def _config(cell: Cell, reference: Any) -> Any:
    from optimum_zsaq import PreQuantConfig, ZSAQConfig

    if cell.method == "rounding":
        ranges = "lsq" if cell.scheme == "w2a8e4-tensor" else "mse"
        return PreQuantConfig(**fields(cell.scheme), ranges=ranges)
    settings = dict(ZSAQ.get(cell.method, {}))
    if settings.get("generator") == "one token":
        settings["generator"] = _one_token(reference)
    return ZSAQConfig(**fields(cell.scheme), seed=cell.seed, **settings)


def _prior(model: Any) -> Any:
    from optimum_zsaq.integrations.data import find_tokenizer
    from optimum_zsaq.integrations.forms import vocabulary_prior

    return vocabulary_prior(model, find_tokenizer(model))


def _one_token(model: Any) -> Any:
    """A source that always writes the likeliest token."""
    import torch

    from optimum_zsaq.algorithms.generators import PriorSource

    prior = _prior(model)
    return PriorSource(torch.zeros_like(prior).index_fill(0, prior.argmax(), 1.0))


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/zsaq_forms.md, by name."""
    return all_tables(rows)
