"""Fine-tune a text classifier in low bits, sharpness-aware (SQuAT), in the style of transformers' run_glue.py.

    python examples/finetune_squat.py --model bert-base-uncased --train-file train.tsv --validation-file dev.tsv \
        --weight-bits 2 --embedding-bits 2 --output-dir out --num-train-epochs 3 --rho 0.01

Files are TSV, CSV, JSON(L) or parquet with a header; `--dataset nyu-mll/glue --subset sst2` takes a dataset instead. Labels
are classes, by number or by name, or floats (regression); names that the model's config has keep their numbers. `--rho 0`
is plain training with learned step sizes.
OUTPUT_DIR gets the packed model and `metrics.json`; its `checkpoint-*` keep float weights (`--resume-from-checkpoint`). All
fields of `SQuATArguments` are options. `--landscape figure.png --beside OTHER` draws the loss around this model and around
OTHER, such as one that was trained with `--rho 0`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
)

from optimum_zsaq import SQuATArguments, SQuATConfig, SQuATTrainer
from optimum_zsaq.integrations.data import read_file


@dataclass
class Task:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of a float model: pre-trained, or fine-tuned on the task."})
    train_file: str | None = field(default=None, metadata={"help": "Training data."})
    validation_file: str | None = field(default=None, metadata={"help": "What is evaluated on."})
    dataset: str | None = field(default=None, metadata={"help": "Instead of files: a dataset with the split 'train'."})
    subset: str | None = field(default=None, metadata={"help": "Its configuration."})
    validation_split: str = field(default="validation", metadata={"help": "Its split that is evaluated on."})
    text_column: str = field(default="sentence", metadata={"help": "Column of the text."})
    pair_column: str | None = field(default=None, metadata={"help": "Column of a second text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_length: int = field(default=128, metadata={"help": "Tokens of the longest input."})
    teacher: str | None = field(default=None, metadata={"help": "A float model, fine-tuned on the task, to follow."})
    landscape: str | None = field(default=None, metadata={"help": "PNG file of the loss around the trained model."})
    beside: str | None = field(default=None, metadata={"help": "Another low-bit model that --landscape shows beside it."})


@dataclass
class Quantization:
    """Fields of `SQuATConfig`."""

    weight_bits: int = field(default=4, metadata={"help": "Bits of the weights of Linear layers."})
    embedding_bits: int = field(default=8, metadata={"help": "Bits of embedding tables; 0: float."})
    activation_bits: int = field(default=8, metadata={"help": "Bits of the inputs of Linear layers; 0: float."})
    granularity: str = field(default="row", metadata={"help": "Which weights share a step size: row, tensor or group."})
    group_size: int | None = field(default=None, metadata={"help": "With --granularity group."})
    activations: str = field(default="dynamic", metadata={"help": "dynamic, or static with learned step sizes."})

    def config(self, texts: list[str]) -> SQuATConfig:
        """Static ranges start from the task's own texts."""
        data = {"calibration_data": texts} if self.activations == "static" else {}
        bits = {"embedding_bits": self.embedding_bits or None, "activation_bits": self.activation_bits or None}
        return SQuATConfig(**{**vars(self), **bits, **data})


def read(task: Task) -> tuple[Any, Any]:
    """Training and evaluation data."""
    if task.dataset:
        from datasets import load_dataset

        found = load_dataset(task.dataset, task.subset)
        return found["train"], found[task.validation_split]
    if not (task.train_file and task.validation_file):
        raise SystemExit("give --train-file and --validation-file, or --dataset")
    return read_file(task.train_file), read_file(task.validation_file)


def labels_of(train: Any, column: str, known: dict[str, int]) -> list[Any] | None:
    """The classes, in the order that the model knows them in, else sorted; None for numbers."""
    found = sorted(set(train[column]))
    if any(isinstance(label, float) for label in found):
        return None
    if all(isinstance(label, str) and label in known for label in found):
        return sorted(known, key=known.__getitem__)
    return found


def main() -> None:
    task, quantization, args = HfArgumentParser((Task, Quantization, SQuATArguments)).parse_args_into_dataclasses()
    train, dev = read(task)
    classes = labels_of(train, task.label_column, AutoConfig.from_pretrained(task.model).label2id)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    columns = [name for name in (task.text_column, task.pair_column) if name]

    def encode(rows: dict[str, list]) -> dict[str, list]:
        found = tokenizer(*(rows[name] for name in columns), truncation=True, max_length=task.max_length)
        labels = rows[task.label_column]
        return {**found, "labels": [float(label) if classes is None else classes.index(label) for label in labels]}

    texts = train[task.text_column][: SQuATConfig().calibration_samples]
    train, dev = (data.map(encode, batched=True, remove_columns=data.column_names) for data in (train, dev))
    options = {"dtype": torch.float32, "num_labels": 1 if classes is None else len(classes)}
    if classes is not None and isinstance(classes[0], str):
        options |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    load = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(args.seed)  # a new head
    model = load(task.model, quantization_config=quantization.config(texts), **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    teacher = load(task.teacher, **options) if task.teacher else None

    def metrics(found: Any) -> dict[str, float]:
        from scipy.stats import pearsonr
        from sklearn.metrics import matthews_corrcoef

        if classes is None:
            return {"pearson": float(pearsonr(found.predictions.reshape(-1), found.label_ids)[0])}
        answers = found.predictions.argmax(-1)
        accuracy = float((answers == found.label_ids).mean())
        return {"accuracy": accuracy, "matthews": float(matthews_corrcoef(found.label_ids, answers))}

    trainer = SQuATTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=dev,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics,
        teacher=teacher,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(args.output_dir) / "metrics.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(json.dumps(found))
        if task.landscape:
            draw(task, trainer)


def draw(task: Task, trainer: SQuATTrainer) -> None:
    """The loss around the trained model, and around another."""
    from optimum_zsaq.report.landscape import draw_landscapes, loss_landscape

    def loss(model: Any, batch: dict[str, Any]) -> tuple[Any, int]:
        return model(**batch).loss, len(batch["labels"])

    models = {"this model": trainer.model}
    if task.beside:
        beside = AutoModelForSequenceClassification.from_pretrained(task.beside, dtype=torch.float32)
        models[Path(task.beside).name] = beside.to(trainer.args.device)
    rows = [trainer.eval_dataset[i] for i in range(min(128, len(trainer.eval_dataset)))]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    draw_landscapes({title: loss_landscape(model, [batch], loss) for title, model in models.items()}, Path(task.landscape))


if __name__ == "__main__":
    main()
