"""What module-wise reconstruction (`MREMConfig`) wins over rounding and over layer-wise reconstruction, and what it costs.

Methods: "rounding" (data-free; "lsq" for 2 bits per tensor, else "mse"), "layerwise" (one Linear layer at a time, from
rounding, as many steps a layer), "layerwise-start" (the same from compensated codes), "start" (compensated codes alone),
"mrem-s", "mrem-p" (stage after stage, all at once), "qat" (LSQ with labels, one epoch, all the rows that the float model
was fine-tuned on), and what follows a "+" is a setting that differs. Calibration: 1,024 of those rows, drawn by the seed,
without labels; of a language model 256 passages of 100 words. Tuned on `glue/SST-2/tuning.tsv`; dev and test are measured
once. Task "memory" is `mrem_memory.py`, and its method "offload" `mrem_offload.py`. The data folder is that of the study
`prequant`, with `glue/SST-2/train.tsv` and `wikitext-2/train.txt`.
"""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mrem_tables import FORCING, MAIN, MEMORY, SAMPLES, SEEDS, SHORTEST, STAGES, WRITERS, all_tables, short_run
from prequant import _MEASURES, MODELS
from runner import Cell
from zsaq import fields


SETTINGS = {"stages": 3, "steps": 120}
QAT = {"learning_rate": 1e-4, "scale_learning_rate": 1e-4}
_OFFLOADED = 64  # blocks
_PASSAGE, _PASSAGES = 100, 256  # words, and how many, for a language model


def cells() -> list[Cell]:
    """The deciding cells first; what comes last is the least important."""
    found = []
    for scheme in MAIN:
        found += [Cell(method, scheme, "sst2") for method in ("rounding", "mrem-s", "layerwise", "mrem-p", "qat")]
    found += [Cell(f"stages={count}", "w2a8e4-row", "memory") for count in MEMORY]
    found.append(Cell("offload", "w3a8e8-row", "memory"))
    for scheme in WRITERS:
        found += [Cell(method, scheme, "wikitext") for method in ("rounding", "mrem-s", "layerwise")]
    found += [Cell(method, scheme, "sst2") for scheme in MAIN[:2] for method in ("start", "layerwise-start")]
    found += [Cell(f"mrem-p+steps=30+forcing={share}", MAIN[0], "sst2") for share in FORCING]
    found += [Cell(f"mrem-s+{name}={n}", MAIN[0], "sst2") for name, n in _curves()]
    found += [Cell(short_run(scheme), scheme, "sst2") for scheme in MAIN]
    for seed in SEEDS[1:]:
        found += [Cell(method, scheme, "sst2", seed) for scheme in MAIN for method in ("mrem-s", "layerwise", "mrem-p")]
        found += [Cell(f"mrem-p+steps=30+forcing={share}", MAIN[0], "sst2", seed) for share in FORCING]
        found += [Cell(f"mrem-s+{name}={n}", MAIN[0], "sst2", seed) for name, n in _curves()]
        found += [Cell(short_run(scheme), scheme, "sst2", seed) for scheme in MAIN]
        found += [Cell("qat", scheme, "sst2", seed) for scheme in MAIN]
    found += [Cell(f"mrem-s+steps={SHORTEST}", scheme, "sst2", seed) for scheme in (MAIN[0], MAIN[2]) for seed in SEEDS]
    return found


def _curves() -> list[tuple[str, int]]:
    return [*(("stages", count) for count in STAGES), *(("samples", count) for count in SAMPLES)]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure."""
    if cell.task == "memory":  # the peak of a process that does nothing else
        if cell.method == "offload":
            from mrem_offload import measure

            return measure(_OFFLOADED)
        command = [sys.executable, str(Path(__file__).with_name("mrem_memory.py")), cell.method.removeprefix("stages=")]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    import torch
    import transformers

    path, class_name = MODELS[cell.task]
    model_class = getattr(transformers, class_name)
    reference = model_class.from_pretrained(data / path, dtype=torch.float32).eval()
    method, *options = cell.method.split("+")
    start = time.process_time()
    if method in ("qat", "layerwise", "layerwise-start", "start"):
        model = copy.deepcopy(reference)
        found = _by_hand(method, model, reference, cell, data)
    else:
        config = _config(method, dict(option.split("=") for option in options), cell, data)
        model = model_class.from_pretrained(data / path, quantization_config=config, dtype=torch.float32).eval()
        calibration = model.config.quantization_config.recipe["calibration"]
        found = {"won": calibration["won"]} if calibration else {}
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    return {**_MEASURES[cell.task](model, reference, data), **found}


def _config(method: str, options: dict[str, str], cell: Cell, data: Path) -> Any:
    from optimum_zsaq import MREMConfig, PreQuantConfig

    scheme = fields(cell.scheme)
    if method == "rounding":
        lsq = (scheme["weight_bits"], scheme["granularity"]) == (2, "tensor")
        return PreQuantConfig(**scheme, ranges="lsq" if lsq else "mse")
    samples = int(options.pop("samples", 1024))
    settings = {**SETTINGS, **{name: float(v) if "." in v else int(v) for name, v in options.items()}}
    texts = calibration_texts(cell, data, samples)
    batch = {} if cell.task == "sst2" else {"batch_size": 16, "start_samples": 64}
    given = {
        "calibration_data": texts,
        "calibration_samples": len(texts),
        "seed": cell.seed,
        "parallel": method == "mrem-p",
    }
    return MREMConfig(**scheme, **settings, **given, **batch)


def fine_tuning_rows(data: Path) -> Any:
    """The rows of SST-2's training set that the float model was fine-tuned on."""
    from optimum_zsaq.integrations.data import read_file

    numbers = (data / MODELS["sst2"][0] / "train_rows.txt").read_text().split()
    return read_file(data / "glue/SST-2/train.tsv").select([int(number) - 1 for number in numbers])


def calibration_texts(cell: Cell, data: Path, samples: int) -> list[str]:
    """Texts without labels, drawn by the cell's seed."""
    import torch

    generator = torch.Generator().manual_seed(cell.seed)
    if cell.task == "sst2":
        rows = fine_tuning_rows(data)
        return rows.select(torch.randperm(len(rows), generator=generator)[:samples].tolist())["sentence"][:]
    words = (data / "wikitext-2/train.txt").read_text(encoding="utf-8").split(" ")
    starts = torch.randint(len(words) - _PASSAGE, (_PASSAGES,), generator=generator).tolist()
    return [" ".join(words[start : start + _PASSAGE]) for start in starts]


def _by_hand(method: str, model: Any, reference: Any, cell: Cell, data: Path) -> dict[str, Any]:
    """The baselines, in place: what is prepared as MREM does it, trained in another way, and packed."""
    from dataclasses import replace

    from optimum_zsaq import pack, prepare
    from optimum_zsaq.algorithms.compensation import compensate
    from optimum_zsaq.algorithms.layerwise import reconstruct_layers
    from optimum_zsaq.integrations.reconstruct import calibration_batches

    config = _config("mrem-s", {}, cell, data)
    batches, _ = calibration_batches(reference, config)
    prepare(model, config.scheme(), config.ranges)
    settings = config.settings(1)
    if method in ("start", "layerwise-start"):
        chosen = range(0, len(batches), max(1, len(batches) // settings.start_batches))
        compensate(reference, model, [batches[i] for i in chosen])
    losses: dict[str, Any] = {}
    if method == "qat":
        losses["loss"] = _train_on_labels(model, cell, data)
    elif method != "start":
        reconstruct_layers(reference, model, batches, replace(settings, start="rounding"))
    pack(model)
    return losses


def _train_on_labels(model: Any, cell: Cell, data: Path) -> list[float]:
    """One epoch of LSQ: cross entropy, batches of sentences of about the same length; the loss every 25 steps."""
    import torch

    from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings, make_optimizer
    from optimum_zsaq.integrations.data import find_tokenizer
    from optimum_zsaq.integrations.zero_shot import autocast_dtype
    from optimum_zsaq.surgery import low_bit_layers

    rows = sorted(fine_tuning_rows(data), key=lambda row: len(row["sentence"]))
    batches, tokenizer = [rows[i : i + 32] for i in range(0, len(rows), 32)], find_tokenizer(model)
    settings = ReconstructionSettings(steps=len(batches), **QAT)
    scales = [layer.weight_scale for _, layer in low_bit_layers(model) if layer.owner is layer]
    names = {id(scale) for scale in scales}
    weights = [p for p in model.parameters() if p.is_floating_point() and id(p) not in names]
    for p in (*weights, *scales):
        p.requires_grad_(True)
    optimizer, schedule = make_optimizer(weights, scales, settings)
    dtype, losses = autocast_dtype("auto", model.device) or torch.float32, []
    for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(cell.seed)).tolist():
        inputs = tokenizer([row["sentence"] for row in batches[i]], padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**inputs, labels=torch.tensor([row["label"] for row in batches[i]])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*weights, *scales], settings.max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return [round(sum(losses[j : j + 25]) / len(losses[j : j + 25]), 4) for j in range(0, len(losses), 25)]


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/mrem.md, by name."""
    return all_tables(rows)
