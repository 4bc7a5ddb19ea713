"""Classification tasks whose inputs have different forms, made of two GLUE tasks, and MiniLM fine-tuned on each.

Pairs of SST-2 sentences: "same" (do both have the same sentiment?), "more" (is the first one more positive?), "part" (was
the second copied out of the first, without a change?). One text: "length" (sentiment, trained on up to 8 words, measured on
20 and more), "four" (which of SST-2 and CoLA a sentence is from, and its label there), "sst2" (the model that is at hand).
Training texts are from the training sets, what is measured is from dev (with labels) and test (without).
"""

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


MODEL, SENTIMENT = "models/all-MiniLM-L6-v2", "models/minilm-sst2"
PAIRS, SINGLES = ("same", "more", "part"), ("length", "four", "sst2")
TASKS = (*PAIRS, *SINGLES)
LONGEST = 128  # tokens
_SHORT, _LONG = 8, 20  # words of "length"
_TRAIN = 12_000
_RECIPES = {"same": (1e-4, 2.0), "more": (1e-4, 1.0), "part": (1e-4, 1.0), "length": (1e-4, 1.0), "four": (1e-4, 1.0)}

Sample = dict[str, Any]


def samples(task: str, part: str, data: Path) -> list[Sample]:
    """Texts of a task: "text", for pairs "text_pair", and but for part "test" their "labels"."""
    rng = random.Random(f"{task}/{part}")
    if task == "four":
        found = [*_sst2(part, data), *({**s, "labels": 2 + s["labels"]} for s in _cola(part, data))]
    else:
        found = _sst2(part, data)
    rng.shuffle(found)
    if task == "length":
        count = (lambda n: n <= _SHORT) if part == "train" else (lambda n: n >= _LONG)
        found = [s for s in found if count(len(s["text"].split()))]
    if task == "part":
        found = _parts(found, rng)
    elif task in PAIRS:
        found = _paired(task, found, rng, part)
    return found[:_TRAIN] if part == "train" else found


def _sst2(part: str, data: Path) -> list[Sample]:
    rows = [line.split("\t") for line in _lines(data, "SST-2", part)[1:]]
    if part == "test":
        return [{"text": row[1].strip(), "labels": 0} for row in rows]
    return [{"text": row[0].strip(), "labels": int(row[1])} for row in rows]


def _cola(part: str, data: Path) -> list[Sample]:
    rows = [line.split("\t") for line in _lines(data, "CoLA", part)]
    if part == "test":
        return [{"text": row[1], "labels": 0} for row in rows[1:]]
    return [{"text": row[3], "labels": int(row[1])} for row in rows]


def _lines(data: Path, folder: str, part: str) -> list[str]:
    return [line for line in (data / "glue" / folder / f"{part}.tsv").read_text(encoding="utf-8").splitlines() if line]


def _paired(task: str, found: list[Sample], rng: random.Random, part: str) -> list[Sample]:
    """Each sentence with another one, in training two; "more" has no pairs of equal sentiment, where that is known."""
    pairs = []
    for _ in range(2 if part == "train" else 1):
        other = rng.sample(found, len(found))
        for a, b in zip(found, other, strict=True):
            if task == "same":
                pairs.append((a, b, int(a["labels"] == b["labels"])))
            elif a["labels"] != b["labels"] or part == "test":
                pairs.append((a, b, int(a["labels"] > b["labels"])))
    return [{"text": a["text"], "text_pair": b["text"], "labels": label} for a, b, label in pairs]


def _parts(found: list[Sample], rng: random.Random) -> list[Sample]:
    """A span of 4 to 12 words of each sentence; in half of them one to three words come from another sentence."""
    pairs = []
    for a, b in zip(found, rng.sample(found, len(found)), strict=True):
        words, other = a["text"].split(), b["text"].split()
        if len(words) < 6:
            continue
        size = rng.randint(4, min(12, len(words) - 1))
        start = rng.randint(0, len(words) - size)
        span, label = words[start : start + size], rng.randint(0, 1)
        if not label:
            for place in rng.sample(range(size), rng.randint(1, 3)):
                span[place] = rng.choice(other)
            label = int(span == words[start : start + size])
        pairs.append({"text": a["text"], "text_pair": " ".join(span), "labels": label})
    return pairs


@cache
def tokenizer(data: Path) -> Any:
    """That of all these models."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data / MODEL)


def encode(rows: list[Sample], data: Path, **options: Any) -> Any:
    """What the tokenizer makes of samples."""
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    return tokenizer(data)([row["text"] for row in rows], pairs, truncation=True, max_length=LONGEST, **options)


def float_model(task: str, data: Path) -> Path:
    """The folder of a task's fine-tuned model, which is made where it is missing (minutes of one core)."""
    if task == "sst2":
        return data / SENTIMENT
    folder = Path(tempfile.gettempdir()) / "forms-study" / task
    if not (folder / "config.json").exists():
        _fine_tune(task, data, folder)
    return folder


def _fine_tune(task: str, data: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

    torch.manual_seed(0)
    start = MODEL if task in ("part", "four", "length") else SENTIMENT
    model = AutoModelForSequenceClassification.from_pretrained(
        data / start, dtype=torch.float32, num_labels=4 if task == "four" else 2
    )
    rows = samples(task, "train", data)
    encoded = encode(rows, data)
    features = [{**{name: encoded[name][i] for name in encoded}, "labels": row["labels"]} for i, row in enumerate(rows)]
    rate, epochs = _RECIPES[task]
    args = TrainingArguments(
        tempfile.mkdtemp(prefix="forms-"),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=True,
        seed=0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, args, data_collator=DataCollatorWithPadding(tokenizer(data)), train_dataset=features).train()
    model.save_pretrained(folder)
    tokenizer(data).save_pretrained(folder)


def logits(model: Any, rows: list[Sample], data: Path, size: int = 64) -> Any:
    """Of a classifier, in the order of the rows. Shapes: -> (N, C) float32."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]) + len(rows[i].get("text_pair", "")))
    found = torch.empty(len(rows), model.config.num_labels)
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            part = order[start : start + size]
            batch = encode([rows[i] for i in part], data, padding=True, return_tensors="pt")
            found[part] = model(**batch).logits.float()
    return found
