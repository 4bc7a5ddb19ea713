"""What training without data (`ZSAQConfig`) wins over rounding, on four real models, and what each part of it wins.

Methods: "rounding-mse" and "rounding-lsq" (data-free range methods), "noise" (the default of models that do not write: a
prior over tokens, compensated start, AdamW), "text" (the same on what a small language model writes), "teacher" (on what
the model itself writes), "random" (uniformly random tokens, from rounding, as long), "random-start" (with the compensated
start), "start" (compensation alone), "sga" (the generator climbs), "sam" (each step is one of SAM), "sam-late".
Every step count gives about the same time. Tuned on `glue/SST-2/tuning.tsv` (learning rates, start, source); dev and test
are measured once. The data folder is that of the study `prequant`, with `models/all-MiniLM-L6-v2`.
"""

import time
from pathlib import Path
from typing import Any

from prequant import _MEASURES, MODELS
from runner import Cell
from zsaq_tables import INPUTS_ALONE, MAIN, RATES, SEEDS, all_tables


STEPS = 200
GENERATOR = "models/wikitext-opt"
MODELS_HERE = {**MODELS, "encoder": ("models/all-MiniLM-L6-v2", "AutoModel")}
METHODS: dict[str, dict[str, Any]] = {
    "noise": {"generator": "noise"},
    "text": {"generator": GENERATOR},
    "teacher": {"generator": "teacher"},
    "start": {"generator": "noise", "steps": 1},
    "random": {"generator": "random", "start": "rounding", "steps": 260, **RATES},
    "random-start": {"generator": "random"},
    "sga": {"generator": "noise", "generator_every": 8, "steps": 170},
    "sam": {"generator": "noise", "rho": 0.02, "steps": 100},
    "sam-late": {"generator": "noise", "rho": 0.02, "sharp_from": 0.7, "steps": 155},
}
_HELD_OUT = 256  # sentences that sharpness, and the hidden states of the encoder, are measured on


def cells() -> list[Cell]:
    """The deciding cells first; what comes last is the least important."""
    found = [Cell(f"rounding-{ranges}", scheme, "sst2") for scheme in MAIN for ranges in ("mse", "lsq")]
    found.append(Cell("rounding-mse", INPUTS_ALONE, "sst2"))
    found += [Cell(method, scheme, "sst2") for method in ("text", "noise", "random") for scheme in MAIN[:4]]
    found += [*_writers(), *_others(), *(Cell(method, "w4a8e4-row", "sst2") for method in ("text", "noise"))]
    found += [Cell(method, scheme, "sst2") for method in ("sam", "sga") for scheme in MAIN[:2]]
    for seed in SEEDS[1:]:
        found += [Cell(method, scheme, "sst2", seed) for method in ("text", "noise", "random") for scheme in MAIN[:2]]
    found += [Cell(method, scheme, "sst2") for method in ("start", "random-start", "sam-late") for scheme in MAIN[:2]]
    for seed in SEEDS[1:]:
        found += [Cell(method, scheme, "sst2", seed) for method in ("sam", "sga") for scheme in MAIN[:2]]
        found += [Cell(method, scheme, "sst2", seed) for method in ("text", "noise") for scheme in MAIN[2:4]]
    return found


def _writers() -> list[Cell]:
    """Decoders, on what they write."""
    found = []
    for task in ("wikitext", "stories"):
        for scheme in ("w4a8e8-row", "w3a8e8-row"):
            found += [Cell("rounding-mse", scheme, task), Cell("teacher", scheme, task)]
    return found


def _others() -> list[Cell]:
    """An encoder-decoder model, and an encoder without a head."""
    found = [Cell(method, "w3a8e8-row", "g2p") for method in ("rounding-mse", "teacher")]
    return found + [Cell(method, "w3a8e4-row", "encoder") for method in ("rounding-mse", "noise")]


def fields(scheme: str) -> dict[str, Any]:
    """The config of "w2a8e4-tensor"; "ef": embeddings stay float."""
    widths, granularity = scheme.split("-")
    weight, rest = widths[1:].split("a")
    activation, embedding = rest.split("e")
    bits = {"weight_bits": int(weight), "activation_bits": int(activation)}
    bits["embedding_bits"] = None if embedding == "f" else int(embedding)
    return {**bits, "granularity": granularity}


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure."""
    import torch
    import transformers

    from optimum_zsaq import PreQuantConfig, ZSAQConfig

    path, class_name = MODELS_HERE[cell.task]
    model_class = getattr(transformers, class_name)
    reference = model_class.from_pretrained(data / path, dtype=torch.float32).eval()
    if cell.method.startswith("rounding"):
        config = PreQuantConfig(**fields(cell.scheme), ranges=cell.method.removeprefix("rounding-"))
    else:
        config = ZSAQConfig(**fields(cell.scheme), seed=cell.seed, **_settings(cell, data, reference))
    start = time.process_time()
    model = model_class.from_pretrained(data / path, quantization_config=config).eval()
    recipe = model.config.quantization_config.recipe
    found = {"ranges": recipe["ranges"], "cpu_seconds": round(time.process_time() - start, 1)}
    found |= {"won": recipe["calibration"]["won"]} if recipe["calibration"] else {}
    if cell.task == "encoder":
        return {**_measure_encoder(model, reference, data), **found}
    figures = _MEASURES[cell.task](model, reference, data)
    if (
        cell.task == "sst2"
        and cell.method in ("noise", "sam", "sam-late")
        and cell.seed == 0
        and cell.scheme.startswith("w2")
    ):
        figures["sharpness"] = _sharpness(model, reference, data)
    return {**figures, **found}


def _settings(cell: Cell, data: Path, reference: Any) -> dict[str, Any]:
    settings = {"steps": STEPS, **METHODS[cell.method]}
    if settings["generator"] == GENERATOR:
        settings["generator"] = str(data / GENERATOR)
    if settings["generator"] == "random":
        settings["generator"] = _uniform(reference)
    return settings


def _uniform(model: Any) -> Any:
    """Every token that is not special is equally likely."""
    import torch

    from optimum_zsaq.algorithms.generators import PriorSource
    from optimum_zsaq.integrations.data import find_tokenizer, plain_tokens

    allowed = plain_tokens(model, find_tokenizer(model))
    prior = torch.zeros(model.get_input_embeddings().weight.shape[0])
    prior[allowed] = 1.0 / len(allowed)
    return PriorSource(prior)


def _sentences(data: Path) -> list[str]:
    from optimum_zsaq.integrations.data import read_file

    return read_file(data / "glue/SST-2/test.tsv")["sentence"][:_HELD_OUT]


def _batches(data: Path, folder: str, size: int = 32) -> list[dict[str, Any]]:
    from optimum_zsaq.report.evaluation import load_tokenizer

    tokenizer, sentences = load_tokenizer(data / folder), _sentences(data)
    parts = [sentences[i : i + size] for i in range(0, len(sentences), size)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def _measure_encoder(model: Any, reference: Any, data: Path) -> dict[str, Any]:
    """Mean relative squared error of the last hidden states on real sentences."""
    import torch

    errors = []
    with torch.inference_mode():
        for batch in _batches(data, MODELS_HERE["encoder"][0]):
            states = [m(**batch).last_hidden_state[batch["attention_mask"].bool()] for m in (reference, model)]
            errors += ((states[1] - states[0]).square().sum(-1) / states[0].square().sum(-1)).tolist()
    return {"hidden_error": sum(errors) / len(errors)}


def _sharpness(model: Any, reference: Any, data: Path) -> dict[str, float]:
    """Rise of the KL to the float model on real sentences, at 1 % of the weights' norm."""
    from dataclasses import asdict

    import torch

    from optimum_zsaq.report.sharpness import measure_sharpness

    def loss(student: Any, batch: dict[str, Any]) -> tuple[Any, int]:
        with torch.no_grad():
            wanted = reference(**batch).logits.double().log_softmax(-1)
        found = student(**batch).logits.double().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean(), len(wanted)

    return asdict(measure_sharpness(model, _batches(data, MODELS["sst2"][0])[:2], loss, radius=0.01, steps=3, draws=3))


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/zsaq.md, by name."""
    return all_tables(rows)
