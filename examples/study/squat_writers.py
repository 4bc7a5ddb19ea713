"""Cells of the study `squat` for models that write: a decoder and an encoder-decoder model, fine-tuned on their own data.

`wikitext-opt` on WikiText-2's training text, windows of 256 tokens. Of `bart-g2p-en-us` only the words that are measured
are there, so it is trained on other words, those of WikiText-2's training text, as the float model speaks them. Both start
from the float model. Methods: "rounding", "lsq", "squat", the latter two with `EVALUATIONS` gradient evaluations. Nothing
is tuned here.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from prequant import _MEASURES, MODELS
from runner import Cell
from zsaq import fields


SCHEME = "w3a8e8-row"
TASKS = ("wikitext", "g2p")
METHODS = ("rounding", "lsq", "squat")
EVALUATIONS = 300
BATCH = {"wikitext": 4, "g2p": 64}
STEPS = {"lsq": EVALUATIONS, "squat": EVALUATIONS * 5 // 6}  # a climb in every fifth step
_WINDOW, _WORDS = 256, 6400


def writer_cells() -> list[Cell]:
    """One seed."""
    return [Cell(method, SCHEME, task) for task in TASKS for method in METHODS]


def run_writer(cell: Cell, data: Path, recipe: dict[str, float]) -> dict[str, Any]:
    """Fine-tune by a recipe of `SQuATArguments`, and measure as `prequant.py` does."""
    import torch
    import transformers

    from optimum_zsaq import PreQuantConfig, SQuATConfig

    path, class_name = MODELS[cell.task]
    model_class = getattr(transformers, class_name)
    reference = model_class.from_pretrained(data / path, dtype=torch.float32).eval()
    kind = PreQuantConfig if cell.method == "rounding" else SQuATConfig
    config = kind(**fields(cell.scheme))
    model = model_class.from_pretrained(data / path, quantization_config=config, dtype=torch.float32)
    start = time.process_time()
    figures = {} if cell.method == "rounding" else _train(model, cell, data, recipe)
    figures["cpu_seconds"] = round(time.process_time() - start, 1)
    return {**_MEASURES[cell.task](model.eval(), reference, data), **figures}


def _train(model: Any, cell: Cell, data: Path, recipe: dict[str, float]) -> dict[str, Any]:
    from optimum_zsaq import SQuATArguments, SQuATTrainer

    args = SQuATArguments(
        tempfile.mkdtemp(prefix="squat-"),
        **{**recipe, **({"rho": 0.0} if cell.method == "lsq" else {})},
        max_steps=STEPS[cell.method],
        per_device_train_batch_size=BATCH[cell.task],
        warmup_steps=0.1,
        bf16=True,
        use_cpu=True,
        seed=cell.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = passages(data) if cell.task == "wikitext" else spoken_words(data)
    SQuATTrainer(model, args, train_dataset=rows, data_collator=collate).train()
    return {"steps": STEPS[cell.method]}


def passages(data: Path) -> list[dict[str, list[int]]]:
    """Windows of WikiText-2's training text."""
    from optimum_zsaq.integrations.data import read_file
    from optimum_zsaq.report import evaluation as ev

    text = "\n".join(read_file(data / "wikitext-2/train.txt")["text"])
    need = EVALUATIONS * BATCH["wikitext"] * _WINDOW
    tokens = ev.encode_text(ev.load_tokenizer(data / MODELS["wikitext"][0]), text, need)
    windows = [list(tokens[i : i + _WINDOW]) for i in range(0, len(tokens) - _WINDOW + 1, _WINDOW)]
    return [{"input_ids": window, "labels": window} for window in windows]


def spoken_words(data: Path) -> list[dict[str, list[int]]]:
    """Words that are not measured, and what the float model makes of them, greedily."""
    import torch
    import transformers

    path, class_name = MODELS["g2p"]
    model = getattr(transformers, class_name).from_pretrained(data / path, dtype=torch.float32).eval()
    letters = json.loads((data / path / "source_config.json").read_text(encoding="utf-8"))["grapheme_chars"]
    measured = {line.split("\t")[0] for line in (data / path / "eval_words.tsv").read_text(encoding="utf-8").splitlines()}
    text = (data / "wikitext-2/train.txt").read_text(encoding="utf-8").split()
    words = sorted({word for word in text if len(word) > 2 and word.isalpha() and set(word) <= set(letters)} - measured)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))[:_WORDS].tolist()
    sources = [[1, *(letters.index(c) for c in words[i]), 2] for i in order]
    found = []
    for start in range(0, len(sources), 256):
        part = [{"input_ids": ids, "labels": [2]} for ids in sources[start : start + 256]]
        batch = collate(part)
        del batch["labels"]
        spoken = model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=48)[:, 1:].tolist()
        for row, answer in zip(part, spoken, strict=True):
            answer = answer[: answer.index(2) + 1] if 2 in answer else answer
            found.append({"input_ids": row["input_ids"], "labels": answer})
    return found


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Padded; labels are -100 there, and masked ids the pad token's, 0."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
