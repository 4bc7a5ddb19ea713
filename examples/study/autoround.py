"""MREM-S beside AutoRound: weights alone, 2, 3 and 4 bits, groups of 32, symmetric; the same layers and the same texts.

Methods: "rounding" (`PreQuantConfig`; "rounding-signed" with the ranges of that name), "mrem-s" (`OURS`), "autoround" (its
200 iterations a block) and "autoround-equal" (as many iterations as take about the CPU time of "mrem-s"). AutoRound
stacks its samples, so all have one length: shorter ones are padded (and masked), longer ones cut. Needs
`pip install auto-round`. Seconds are those of loading and quantizing. The data folder is that of the study `mrem`.
"""

import time
from pathlib import Path
from typing import Any

from mrem import SETTINGS, calibration_texts
from prequant import _MEASURES, MODELS
from prequant_tables import circumstances, markdown, percent
from runner import Cell
from zsaq_tables import FLOAT_PERPLEXITY


BITS, GROUP = (2, 4, 3), 32
TASKS = ("wikitext", "sst2")
LENGTH = {"wikitext": 128, "sst2": 32}  # tokens of AutoRound's samples
BATCH = {"wikitext": 8, "sst2": 32}  # of AutoRound: 1,024 tokens
ITERATIONS = 200  # AutoRound's default
EQUAL = {"wikitext": 310, "sst2": 80}  # iterations: about the time of "mrem-s"
OURS = {  # of the language model one block a stage, tried on validation text
    "wikitext": {"stages": 8, "steps": 240, "batch_size": 8, "start_samples": 64},
    "sst2": SETTINGS,
}
FLOAT = {"wikitext": None, "sst2": ["pooler", "classifier"]}  # AutoRound takes blocks alone
METHODS = {
    "rounding": "rounding",
    "rounding-signed": "rounding, scales of either sign",
    "mrem-s": "**MREM-S**",
    "autoround-equal": "AutoRound, about that time",
    "autoround": "AutoRound, 200 iterations",
}


def cells() -> list[Cell]:
    """What decides at equal time first."""
    parts = (("mrem-s", "autoround-equal"), ("rounding", "rounding-signed"), ("autoround",))
    return [Cell(method, f"w{bits}-sym", task) for part in parts for bits in BITS for task in TASKS for method in part]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure, in float32."""
    import torch
    import transformers

    path, class_name = MODELS[cell.task]

    def load(**options: Any) -> Any:
        return getattr(transformers, class_name).from_pretrained(data / path, dtype=torch.float32, **options).eval()

    reference, config = load(), _config(cell, data)
    wall, cpu = time.perf_counter(), time.process_time()
    if cell.method.startswith("autoround"):
        model, figures = _autoround(load(), config, cell, data)
    else:
        model, figures = load(quantization_config=config), {}
    figures["quantizing_seconds"] = round(time.perf_counter() - wall, 1)
    figures["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return {**_MEASURES[cell.task](model, reference, data), **figures}


def _config(cell: Cell, data: Path) -> Any:
    from optimum_zsaq import MREMConfig, PreQuantConfig

    scheme = {
        "weight_bits": int(cell.scheme[1]),
        "granularity": "group",
        "group_size": GROUP,
        "symmetric": True,
        "activation_bits": None,
        "embedding_bits": None,
        "modules_to_not_convert": FLOAT[cell.task],
    }
    if cell.method != "mrem-s":
        return PreQuantConfig(**scheme, ranges="signed" if cell.method == "rounding-signed" else "mse")
    texts = calibration_texts(cell, data, 1024)
    given = {"calibration_data": texts, "calibration_samples": len(texts), "seed": cell.seed}
    return MREMConfig(**scheme, **OURS[cell.task], **given)


def _autoround(model: Any, config: Any, cell: Cell, data: Path) -> tuple[Any, dict[str, Any]]:
    """The model with AutoRound's values in the layers that `config` quantizes, all else as it was.

    Raises:
        ImportError: no AutoRound. ValueError: it quantized other layers.
    """
    import torch

    from optimum_zsaq.surgery import select

    auto_round()  # before texts are read
    samples, tokenizer = _samples(cell, data)
    names = set(select(model, config.scheme()))
    iterations = EQUAL[cell.task] if cell.method == "autoround-equal" else ITERATIONS
    rounder, layers = rounded_layers(
        model,
        tokenizer,
        samples,
        bits=config.weight_bits,
        group_size=GROUP,
        sym=True,
        iters=iterations,
        seqlen=LENGTH[cell.task],
        batch_size=BATCH[cell.task],
        seed=cell.seed,
    )
    if set(layers) != names:
        raise ValueError(
            f"AutoRound quantized other layers than the config, {sorted(set(layers) ^ names)[:5]}; compare the same"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            model.get_submodule(name).weight.copy_(exact_values(layer, GROUP))
    return model, {"iterations": iterations, "dtype": str(rounder.amp_dtype) if rounder.amp else "torch.float32"}


def auto_round() -> Any:
    """AutoRound's class. Raises ImportError where it is not installed."""
    try:
        from auto_round import AutoRound
    except ImportError as error:
        raise ImportError("this study needs AutoRound; pip install auto-round") from error
    return AutoRound


def rounded_layers(model: Any, tokenizer: Any, samples: list[dict[str, Any]], **options: Any) -> tuple[Any, dict[str, Any]]:
    """AutoRound after its work on a copy of the model, and the layers it quantized, by name. It keeps the threads.

    Raises:
        ImportError: no AutoRound.
    """
    import copy

    import torch

    threads, given = torch.get_num_threads(), {"dataset": samples, "nsamples": len(samples), **options}
    rounder = auto_round()(copy.deepcopy(model), tokenizer, **given, enable_torch_compile=False)
    torch.set_num_threads(threads)  # it takes all cores
    rounded, _ = rounder.quantize()
    return rounder, {name: layer for name, layer in rounded.named_modules() if getattr(layer, "scale", None) is not None}


def exact_values(layer: Any, group: int) -> Any:
    """What AutoRound's codes stand for, (O, I) float32: it casts the model to bfloat16, so scales are multiplied anew."""
    scale = layer.scale.float().reshape(len(layer.weight), -1).repeat_interleave(group, dim=1)[:, : layer.weight.shape[1]]
    return (layer.weight.detach().float() / scale).round() * scale


def _samples(cell: Cell, data: Path) -> tuple[list[dict[str, Any]], Any]:
    """The calibration texts of "mrem-s", one a sample, and the tokenizer."""
    from optimum_zsaq.report.evaluation import load_tokenizer

    tokenizer = load_tokenizer(data / MODELS[cell.task][0])
    options = {"truncation": True, "max_length": LENGTH[cell.task], "padding": "max_length", "return_tensors": "pt"}
    return [dict(tokenizer(text, **options)) for text in calibration_texts(cell, data, 1024)], tokenizer


# Tables: a cell that is not finished is not listed ----------------------------------------------------------------------


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/autoround.md, by name."""
    return {maker.__name__: maker(rows) for maker in (wikitext, paired, sst2, circumstances)}


def _table(rows: dict[str, dict[str, Any]], task: str, header: list[str], figures: Any) -> str:
    found = []
    for bits in sorted(BITS, reverse=True):
        for method, title in METHODS.items():
            if row := rows.get(f"{task}/{method}/w{bits}-sym/0"):
                iterations = str(row.get("iterations", ""))
                found.append([f"W{bits}", title, iterations, *figures(row), f"{row['cpu_seconds']:.0f}"])
    return markdown(["weights", "method", "iterations a block", *header, "CPU s"], found)


def wikitext(rows: dict[str, dict[str, Any]]) -> str:
    """The language model."""
    header = [f"perplexity (float: {FLOAT_PERPLEXITY['wikitext']})", "KL"]
    return _table(rows, "wikitext", header, lambda row: [f"{row['perplexity']:.3f}", f"{row['kl']:.4f}"])


def paired(rows: dict[str, dict[str, Any]]) -> str:
    """The language model's perplexity beside AutoRound's at equal time, window by window."""
    import math

    import numpy as np
    from bootstrap import paired_interval

    found = []
    for bits in sorted(BITS, reverse=True):
        pair = [rows.get(f"wikitext/{method}/w{bits}-sym/0") for method in ("mrem-s", "autoround-equal")]
        if all(pair):
            change = paired_interval(*(np.array(row["window_loss"]) for row in pair))
            mean, low, high = (100 * math.expm1(value) for value in change)
            found.append([f"W{bits}", f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"])
    return markdown(["weights", "perplexity of MREM-S beyond AutoRound's, % [95 %]"], found)


def sst2(rows: dict[str, dict[str, Any]]) -> str:
    """The classifier."""

    def figures(row: dict[str, Any]) -> list[str]:
        return [f"{row['test_kl']:.4f}", percent(row["test_agreement"]), percent(row["accuracy"])]

    return _table(rows, "sst2", ["KL on test", "agreement on test, %", "dev accuracy, %"], figures)
