"""Weights alone at 4, 3 and 2 bits, a scale and a zero point for 32 of them: MREM-S beside AutoRound, on the same texts.

Methods: "rounding", "mrem-s" (as in the study `mrem`), "autoround" (its defaults: 200 steps a block on 8 texts each), and
"autoround+equal", with so many steps that it takes about as long as MREM-S. Linear layers of the blocks have codes;
inputs, tables, pooler and heads stay float, as AutoRound leaves them. All texts of AutoRound are padded to the longest,
which it needs. It runs in this process, on bfloat16 weights as it wants, without torch.compile.
The data folder is that of the study `mrem`.
"""

import time
from pathlib import Path
from typing import Any

from mrem import SETTINGS, calibration_texts
from prequant import _MEASURES, MODELS
from prequant_tables import Rows, circumstances, markdown, percent
from runner import Cell


BITS, GROUP, LENGTH, SAMPLES = (2, 3, 4), 32, 128, 1024
ITERS = 200  # AutoRound's default
EQUAL = {"wikitext": 150, "sst2": 400}  # steps of AutoRound in the time of MREM-S
METHODS = ("rounding", "mrem-s", "autoround", "autoround+equal")
TITLES = {
    "rounding": "rounding",
    "mrem-s": "**MREM-S**",
    "autoround": f"AutoRound, {ITERS} steps a block",
    "autoround+equal": "AutoRound, as long as MREM-S",
}


def cells() -> list[Cell]:
    """The widths with the largest differences first; what takes as long as MREM-S once that time is known."""
    found = [Cell(method, f"w{bits}", task) for bits in BITS for task in EQUAL for method in METHODS[:-1]]
    return found + [Cell(METHODS[-1], f"w{bits}", task) for bits in BITS for task in EQUAL]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure."""
    import torch
    import transformers

    path, class_name = MODELS[cell.task]
    model_class = getattr(transformers, class_name)

    def load(**options: Any) -> Any:
        return model_class.from_pretrained(data / path, dtype=torch.float32, **options).eval()

    bits, texts = int(cell.scheme[1:]), calibration_texts(cell, data, SAMPLES)
    start = time.process_time()
    found: dict[str, Any] = {"texts": len(texts)}
    if cell.method.startswith("autoround"):
        found["iters"] = EQUAL[cell.task] if cell.method.endswith("equal") else ITERS
        model = load()
        autoround(model, texts, bits, found["iters"])
    else:
        model = load(quantization_config=_config(cell, bits, texts))
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    return {**_MEASURES[cell.task](model, load(), data), **found}


def _config(cell: Cell, bits: int, texts: list[str]) -> Any:
    from optimum_zsaq import MREMConfig, PreQuantConfig

    scheme: dict[str, Any] = {"weight_bits": bits, "activation_bits": None, "embedding_bits": None, "symmetric": False}
    scheme |= {"granularity": "group", "group_size": GROUP}
    if cell.task == "sst2":
        scheme["modules_to_not_convert"] = ["pooler"]
    if cell.method == "rounding":
        return PreQuantConfig(**scheme)
    batch = {} if cell.task == "sst2" else {"batch_size": 16, "start_samples": 64}
    given = {"calibration_data": texts, "calibration_samples": len(texts), "sequence_length": LENGTH, "seed": cell.seed}
    return MREMConfig(**scheme, **SETTINGS, **given, **batch)


def autoround(model: Any, texts: list[str], bits: int, iters: int) -> None:
    """AutoRound's asymmetric codes, in place, as float weights.

    Raises:
        ImportError: it is not installed.
    """
    import torch

    from optimum_zsaq.integrations.data import find_tokenizer

    try:
        from auto_round import AutoRound
    except ImportError as error:
        raise ImportError("the study's peer is not installed; pip install auto-round==0.16.1") from error
    tokenizer, dtype = find_tokenizer(model), model.dtype
    tokens = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    samples = [{name: tokens[name][i : i + 1] for name in ("input_ids", "attention_mask")} for i in range(len(texts))]
    scheme = {"bits": bits, "group_size": GROUP, "sym": False}
    run = {"iters": iters, "nsamples": len(samples), "seqlen": tokens["input_ids"].shape[1], "dataset": samples}
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}  # it casts all of them
    with torch.enable_grad():
        _, layers = AutoRound(model, tokenizer, device_map="cpu", enable_torch_compile=False, **scheme, **run).quantize()
    model.to(dtype).eval()
    coded = {f"{name}.weight" for name, layer in layers.items() if layer["bits"] == bits}
    for name, p in model.named_parameters():
        if name not in coded:
            p.data = kept[name]


# Tables: a cell that is not finished is an empty place ----------------------------------------------------------------


def tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    return {maker.__name__: maker(rows) for maker in (sst2, wikitext, circumstances)}


def sst2(rows: Rows) -> str:
    """The classifier."""
    figures = [("test_kl", "{:.4f}".format), ("test_agreement", percent), ("accuracy", percent)]
    return _table(rows, "sst2", ["KL on test", "agreement on test, %", "dev accuracy, %"], figures)


def wikitext(rows: Rows) -> str:
    """The language model."""
    return _table(rows, "wikitext", ["perplexity", "KL"], [("perplexity", "{:.3f}".format), ("kl", "{:.4f}".format)])


def _table(rows: Rows, task: str, names: list[str], figures: list[tuple[str, Any]]) -> str:
    found = []
    for bits in BITS:
        for method in METHODS:
            if row := rows.get(f"{task}/{method}/w{bits}/0"):
                texts = [form(row[key]) for key, form in figures]
                found.append([f"W{bits}", TITLES[method], *texts, f"{row['cpu_seconds']:.0f}"])
    return markdown(["weights", "method", *names, "CPU s"], found)
