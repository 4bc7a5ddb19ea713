"""What sharpness- and quantization-aware training (SQuAT) wins over plain quantization-aware training, on two GLUE tasks.

Methods: "lsq" (plain training with learned step sizes), "sam" (sharpness-aware, no alternation), "squat" (every step is of
both objectives, every fifth climbs and the others reuse that climb), "float" (the float model that all start from). All get
the same number of gradient evaluations, those of two plain epochs: a step of "squat" takes 1.2, one of "sam" 2.
"lsq-steps" and "sam-steps" get as many steps as "squat". Tasks: "sst2", a fixed subset of 8,000 training sentences, and
"cola", whole. Seeds decide the order of batches and dropout, of the float model too. Dev is measured once; what was tuned,
was on a slice of the training set (`tuning` in a cell's settings; methods with a "+" are that search). DATA has
`glue/SST-2`, `glue/CoLA` and `models/all-MiniLM-L6-v2`.
"""

import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from runner import Cell
from squat_tables import SCHEMES, SEARCH, SEEDS, all_tables
from squat_torchao import fake_quantized, peer_cells
from squat_writers import TASKS as WRITERS
from squat_writers import run_writer, writer_cells
from zsaq import fields


MODEL = "models/all-MiniLM-L6-v2"
TASKS = ("sst2", "cola")
SUBSET, HELD_OUT, LONGEST = 8000, 1000, 64  # sentences of SST-2, of a training set to tune on, tokens of a sentence
FLOAT = {"sst2": (1e-4, 1.0), "cola": (5e-5, 3.0)}  # learning rate and epochs of the float model; tuned, as all here
RECIPE = {"learning_rate": 1e-4, "scale_learning_rate": 1e-4}
SQUAT = {"alternate": "step", "climb_every": 5}
METHODS: dict[str, dict[str, Any]] = {
    "lsq": {"rho": 0.0, "num_train_epochs": 2.0},
    "sam": {"alternate": "none", "num_train_epochs": 1.0},
    "squat": {**SQUAT, "num_train_epochs": 5 / 3},
    "lsq-steps": {"rho": 0.0, "num_train_epochs": 5 / 3},
    "sam-steps": {"alternate": "none", "num_train_epochs": 5 / 3},
}
RHO = 0.01
_SHARP = 96  # dev sentences that sharpness is measured on


def cells() -> list[Cell]:
    """The deciding cells first: two schemes, one seed; then the other schemes and seeds, then equal steps."""
    found = []
    for schemes, seeds in ((SCHEMES[:2], SEEDS[:1]), (SCHEMES[2:], SEEDS[:1]), (SCHEMES, SEEDS[1:])):
        found += [Cell(m, s, t, n) for n in seeds for t in TASKS for s in schemes for m in ("lsq", "squat", "sam")]
    found += [*writer_cells(), *peer_cells()]
    found += [_searched(method, options) for method, options in SEARCH.items()]
    found += [Cell("float", "float", task, seed) for seed in SEEDS for task in TASKS]
    return found + [Cell(m, s, t) for s in SCHEMES for t in TASKS for m in ("lsq-steps", "sam-steps")]


def _searched(method: str, options: dict[str, Any]) -> Cell:
    return Cell(method, SCHEMES[0], TASKS[0], 0, {"tuning": True, **options})


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Train and measure. `settings` may have "tuning" (measure on a slice of the training set), fields of the arguments,
    "config" (fields of the config) and "start" ("float" or "pretrained")."""
    if cell.task in WRITERS:
        return run_writer(cell, data, {**RECIPE, "rho": RHO, **SQUAT})
    settings = dict(cell.settings)
    tuning = settings.pop("tuning", False)
    train, dev = sentences(cell.task, data, tuning)
    start = time.process_time()
    folder = float_model(cell.task, cell.seed, data, tuning)
    if cell.method == "float":
        return {**_measured(load(folder), dev, data), "cpu_seconds": round(time.process_time() - start, 1)}
    start = time.process_time()
    if settings.pop("start", "float") == "pretrained":
        folder = data / MODEL
    if cell.method.startswith("torchao"):
        return _peer(cell, folder, train, dev, data)
    model = load(folder, **{**fields(cell.scheme), **settings.pop("config", {})})
    settings = {**RECIPE, "rho": RHO, **METHODS[cell.method.split("+")[0]], **settings}
    run = trainer(model, train, data, seed=cell.seed, **settings)
    run.train()
    last = next((entry for entry in reversed(run.state.log_history) if "loss" in entry), {})
    found = {
        "steps": run.state.global_step,
        "evaluations": run.state.global_step + run.climbs,
        "cpu_seconds": round(time.process_time() - start, 1),
        **{name: last[name] for name in ("loss", "sharpness", "scale_drift", "clipped") if name in last},
    }
    return {**_measured(run.model, dev, data), **found, "radii": sharpness(run.model, dev[:_SHARP], data)}


def _peer(cell: Cell, folder: Path, train: list[dict], dev: list[dict], data: Path) -> dict[str, Any]:
    """torchao's training, with as many steps as "lsq"."""
    import transformers

    from optimum_zsaq import SQuATConfig

    start = time.process_time()
    model = fake_quantized(load(folder), SQuATConfig(**fields(cell.scheme)), cell.method == "torchao-range")
    settings = {"learning_rate": RECIPE["learning_rate"], "num_train_epochs": METHODS["lsq"]["num_train_epochs"]}
    run = _make_trainer(transformers.Trainer, transformers.TrainingArguments, model, train, data, cell.seed, settings)
    run.train()
    found = {"steps": run.state.global_step, "evaluations": run.state.global_step}
    return {**_measured(run.model, dev, data), **found, "cpu_seconds": round(time.process_time() - start, 1)}


# Data ----------------------------------------------------------------------------------------------------------------


def sentences(task: str, data: Path, tuning: bool = False) -> tuple[list[dict], list[dict]]:
    """Training and dev sentences; with `tuning` dev is a slice of the training set, which is left out of it."""
    train, dev = (_read(task, data, part) for part in ("train", "dev"))
    if task == "sst2" or tuning:
        train = _shuffled(train)
    if task == "sst2":
        train = train[: SUBSET + HELD_OUT] if tuning else train[:SUBSET]
    return (train[:-HELD_OUT], train[-HELD_OUT:]) if tuning else (train, dev)


def _read(task: str, data: Path, part: str) -> list[dict]:
    folder = {"sst2": "SST-2", "cola": "CoLA"}[task]
    lines = (data / "glue" / folder / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line]
    if task == "sst2":
        return [{"text": text, "labels": int(label)} for text, label in rows[1:]]
    return [{"text": row[3], "labels": int(row[1])} for row in rows]


def _shuffled(rows: list[dict]) -> list[dict]:
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


@cache
def tokenizer(data: Path) -> Any:
    """The model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data / MODEL)


def tokenized(rows: list[dict], data: Path) -> list[dict]:
    """What the Trainer is given."""
    ids = tokenizer(data)([row["text"] for row in rows], truncation=True, max_length=LONGEST)["input_ids"]
    return [{"input_ids": i, "labels": row["labels"]} for i, row in zip(ids, rows, strict=True)]


# Models --------------------------------------------------------------------------------------------------------------


def load(folder: Path, **config: Any) -> Any:
    """A classifier: in float, or prepared by `SQuATConfig(**config)`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from optimum_zsaq import SQuATConfig

    options = {"quantization_config": SQuATConfig(**config)} if config else {}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=2, **options)


def float_model(task: str, seed: int, data: Path, tuning: bool = False) -> Path:
    """The folder of the fine-tuned float model, which is made where it is missing, on the same sentences."""
    import transformers

    folder = Path(tempfile.gettempdir()) / "squat-study" / f"{task}-{seed}{'-tuning' if tuning else ''}"
    if not (folder / "config.json").exists():
        train, _ = sentences(task, data, tuning)
        model = load(data / MODEL)
        rates = dict(zip(("learning_rate", "num_train_epochs"), FLOAT[task], strict=True))
        _make_trainer(transformers.Trainer, transformers.TrainingArguments, model, train, data, seed, rates).train()
        model.save_pretrained(folder)
    return folder


def trainer(model: Any, train: list[dict], data: Path, seed: int = 0, **settings: Any) -> Any:
    """A `SQuATTrainer` of a study's cell; it counts its climbs."""
    from optimum_zsaq import SQuATArguments, SQuATTrainer

    run = _make_trainer(SQuATTrainer, SQuATArguments, model, train, data, seed, settings)
    apply, run.climbs = run.alternation.perturbation.apply, 0

    def counted() -> float:
        run.climbs += 1
        return apply()

    run.alternation.perturbation.apply = counted
    return run


def _make_trainer(
    kind: type, arguments: type, model: Any, train: list[dict], data: Path, seed: int, settings: dict[str, Any]
) -> Any:
    """Batches of 32 sentences of about the same length, linear warm-up and decay, matrix products in bfloat16."""
    from transformers import DataCollatorWithPadding

    defaults = {
        "per_device_train_batch_size": 32,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "bf16": True,
        "use_cpu": True,
        "seed": seed,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = arguments(tempfile.mkdtemp(prefix="squat-"), **{**defaults, **settings})
    collator = DataCollatorWithPadding(tokenizer(data))
    return kind(model, args, data_collator=collator, train_dataset=tokenized(train, data))


# Measures ------------------------------------------------------------------------------------------------------------


def batches(rows: list[dict], data: Path, size: int = 64) -> list[dict[str, Any]]:
    """In the order of the rows."""
    import torch

    found = []
    for start in range(0, len(rows), size):
        part = tokenized(rows[start : start + size], data)
        labels = torch.tensor([row["labels"] for row in part])
        batch = tokenizer(data).pad([{"input_ids": row["input_ids"]} for row in part], return_tensors="pt")
        found.append({**batch, "labels": labels})
    return found


def _measured(model: Any, dev: list[dict], data: Path) -> dict[str, Any]:
    """Accuracy, Matthews correlation, loss, and the answers and labels, for the bootstrap; in float32."""
    import torch
    from bootstrap import to_bitmap
    from sklearn.metrics import matthews_corrcoef

    model.eval()
    logits, labels = [], []
    with torch.inference_mode():
        for batch in batches(dev, data):
            labels.append(batch.pop("labels"))
            logits.append(torch.nn.Module.__call__(model, **batch).logits.float())
    logits, labels = torch.cat(logits), torch.cat(labels)
    answers = logits.argmax(-1)
    return {
        "accuracy": (answers == labels).float().mean().item(),
        "mcc": float(matthews_corrcoef(labels, answers)),
        "dev_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "count": len(dev),
        "answers": to_bitmap(answers.tolist()),
        "labels": to_bitmap(labels.tolist()),
    }


def sharpness(model: Any, dev: list[dict], data: Path) -> dict[str, float]:
    """The three rises of the task's loss on dev sentences, at 1 % of the weights' norm."""
    from optimum_zsaq.report.sharpness import measure_sharpness

    def loss(model: Any, batch: dict[str, Any]) -> tuple[Any, int]:
        return model(**batch).loss, len(batch["labels"])

    return asdict(measure_sharpness(model, batches(dev, data, 48), loss, radius=0.01, steps=3, draws=3))


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/squat.md, by name."""
    return all_tables(rows)
