"""Tuning a quantized base for a task: outlier weights, controls of the same size, and full tuning of the float model.

One base a scheme, all-MiniLM-L6-v2 quantized once with 0.5 % stored outliers, the largest of each matrix ("outliers-row":
another one, with those of each row); on it SST-2 and CoLA, of each 8,000 training
sentences that a fixed seed draws, in batches of 32: two epochs of SST-2, three of CoLA, which is learned later. All methods
have the same search for a learning rate: `SEARCH_STEPS` steps with each of three, judged by the loss on held-out training
sentences. A new head learns at `adapters_training.HEAD_RATE` in every row but those of full tuning and of the head alone,
whose rate is searched. Dev sentences are measured once, at the end.
The data folder holds `models/all-MiniLM-L6-v2` and `glue/{SST-2,CoLA}/{train,dev}.tsv`, and for `adapters_writers.py`
what `squat_writers.py` needs.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_tables import all_tables
from adapters_training import search, train, trainable
from adapters_writers import TASKS as WRITERS
from adapters_writers import run_writer, writer_cells
from bootstrap import to_bitmap
from runner import Cell


MODEL = "models/all-MiniLM-L6-v2"
SHARE = 0.005
BATCH, HELD_OUT, LENGTH, TRAIN = 32, 512, 128, 8000
SEARCH_STEPS = {"sst2": 60, "cola": 90}
EPOCHS = {"sst2": 2, "cola": 3}
_POOL = 16  # batches whose sentences are sorted by length together
SCHEMES = {"w4a8e4": (4, 4), "w3a8e3": (3, 3)}
TASKS = ("sst2", "cola")
SEEDS = (0, 1, 2)
LORA_RANK = 6  # on query and value: 55,296 values, those of 0.5 % of the Linear weights are 53,822
RATES = {  # kept low, as short runs like rates at which whole trainings of CoLA fail; tuned by hand in part
    "outlier": (2.5e-3, 5e-3, 1e-2),
    "lora": (2.5e-4, 5e-4, 1e-3),
    "bitfit": (1.5e-3, 5e-3, 1.5e-2),
    "head": (1.5e-3, 5e-3, 1.5e-2),
    "full": (2.5e-5, 5e-5, 1e-4),
}
DECIDING = ("outliers", "random", "full", "lora")
METHODS = ("outliers", "outliers-row", "random", "lora", "full", "bitfit", "outliers-zero", "head")
CRITERIA = ("magnitude", "deviation", "error", "random")
SHARES = (0.001, 0.0025, 0.01, 0.02)


def cell(task: str, method: str, scheme: str, seed: int, **settings: Any) -> Cell:
    """A cell; full tuning has no scheme, it is of the float model."""
    kind = method.split("-")[0]
    kind = kind if kind in RATES else "outlier"
    scheme = "float32" if kind == "full" else scheme
    return Cell(method, scheme, task, seed, {"kind": kind, **settings})


def outlier_cell(task: str, method: str, scheme: str, seed: int) -> Cell:
    """A cell of `METHODS`."""
    options = {"outliers-zero": {"start": "zero"}, "random": {"criterion": "random", "fraction": SHARE}}
    scope = "row" if method == "outliers-row" else "matrix"
    return cell(task, method, scheme, seed, options=options.get(method, {}), scope=scope)


def cells() -> list[Cell]:
    """The deciding cells first, then the other methods and W3, then criteria, shares and seeds."""
    found = [outlier_cell(task, method, "w4a8e4", 0) for task in TASKS for method in DECIDING]
    for scheme in SCHEMES:
        found += [outlier_cell(task, method, scheme, 0) for task in TASKS for method in METHODS]
    for scheme in SCHEMES:
        for name in CRITERIA:  # on a base that stores none, so that only the places differ
            options = {"criterion": name, "fraction": SHARE}
            found += [cell(task, f"by-{name}", scheme, 0, options=options, stored=None) for task in TASKS]
        for share in SHARES:
            options = {"criterion": "magnitude", "fraction": share}
            found += [cell(task, f"share-{share}", scheme, 0, options=options) for task in TASKS]
        for ranges in ("minmax", "lsq"):
            found += [cell(task, f"outliers-{ranges}", scheme, 0, options={}, ranges=ranges) for task in TASKS]
        found += [outlier_cell(task, method, scheme, seed) for seed in SEEDS[1:] for task in TASKS for method in METHODS]
    return list({one.id: one for one in [*found, *writer_cells()]}.values())


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass
class Sentences:
    """Encoded sentences (token ids) and their labels."""

    samples: list[dict[str, list[int]]]
    labels: list[int]

    def batches(self, size: int, generator: Any = None) -> Iterator[dict[str, Any]]:
        """Padded batches; with a generator in random order, sentences of about the same length together."""
        import torch

        order = list(range(len(self.labels)))
        if generator is not None:
            order = torch.randperm(len(order), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), size * _POOL):
            pool = sorted(order[start : start + size * _POOL], key=lambda i: len(self.samples[i]["input_ids"]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        if generator is not None:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        for places in batches:
            rows = [torch.tensor(self.samples[i]["input_ids"]) for i in places]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            yield {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[i] for i in places])}

    def part(self, places: list[int]) -> "Sentences":
        """Some of them."""
        return Sentences([self.samples[i] for i in places], [self.labels[i] for i in places])


def read(task: str, split: str, data: Path, tokenizer: Any) -> Sentences:
    """All sentences of a file."""
    from optimum_zsaq.report.evaluation import encode

    if task == "sst2":
        from optimum_zsaq.integrations.data import read_file

        rows = read_file(data / "glue/SST-2" / f"{split}.tsv")
        texts, labels = list(rows["sentence"]), list(rows["label"])
    else:
        lines = (data / "glue/CoLA" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        fields = [line.split("\t") for line in lines]
        texts, labels = [row[3] for row in fields], [int(row[1]) for row in fields]
    samples = [{"input_ids": sample["input_ids"][:LENGTH]} for sample in encode(tokenizer, texts)]
    return Sentences(samples, labels)


def training_parts(task: str, data: Path, tokenizer: Any) -> tuple[Sentences, Sentences]:
    """The sentences that are trained on and those that choose the learning rate; the same for every cell."""
    import torch

    everything = read(task, "train", data, tokenizer)
    order = torch.randperm(len(everything.labels), generator=torch.Generator().manual_seed(0)).tolist()
    return everything.part(order[HELD_OUT : HELD_OUT + TRAIN]), everything.part(order[:HELD_OUT])


# Models --------------------------------------------------------------------------------------------------------------


def quantized_base(cell: Cell, data: Path, packed: bool = True) -> Any:
    """The base of a scheme, with a new head that the seed draws."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from optimum_zsaq import PreQuantConfig

    bits, table_bits = SCHEMES[cell.scheme]
    options = {"outliers": cell.settings.get("stored", SHARE), "ranges": cell.settings.get("ranges", "mse")}
    options["outlier_scope"] = cell.settings.get("scope", "matrix")
    config = PreQuantConfig(weight_bits=bits, embedding_bits=table_bits, packed=packed, **options)
    torch.manual_seed(cell.seed)
    return AutoModelForSequenceClassification.from_pretrained(data / MODEL, quantization_config=config, dtype=torch.float32)


def build(cell: Cell, data: Path) -> Any:
    """The model of a cell, its trainable parameters marked."""
    import torch
    from transformers import AutoModelForSequenceClassification

    kind = cell.settings["kind"]
    if kind == "full":
        torch.manual_seed(cell.seed)
        return AutoModelForSequenceClassification.from_pretrained(data / MODEL, dtype=torch.float32)
    if kind in ("bitfit", "head"):
        model = quantized_base(cell, data)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier") or (kind == "bitfit" and name.endswith(".bias")))
        return model
    return _with_adapter(cell, data)


def _with_adapter(cell: Cell, data: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    from optimum_zsaq import OutlierConfig

    if cell.settings["kind"] == "lora":
        modules = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        return get_peft_model(quantized_base(cell, data), LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, **modules))
    config = OutlierConfig(**cell.settings["options"], modules_to_save=["classifier"], seed=cell.seed)
    if config.criterion != "error":
        return get_peft_model(quantized_base(cell, data), config)
    with tempfile.TemporaryDirectory() as folder:  # |W - Q(W)| needs float weights; the packed base takes the adapter over
        get_peft_model(quantized_base(cell, data, packed=False), config).save_pretrained(folder)
        return PeftModel.from_pretrained(quantized_base(cell, data), folder, is_trainable=True)


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Search, train, measure."""
    if cell.task in WRITERS:
        return run_writer(cell, data)
    from optimum_zsaq.report import evaluation as ev

    tokenizer = ev.load_tokenizer(data / MODEL)
    parts, dev = training_parts(cell.task, data, tokenizer), read(cell.task, "dev", data, tokenizer)
    model = build(cell, data)
    found = search(model, RATES[cell.settings["kind"]], parts, SEARCH_STEPS[cell.task], cell.seed, BATCH)
    rate = float(min(found, key=lambda key: found[key]))
    steps = EPOCHS[cell.task] * -(-len(parts[0].labels) // BATCH)
    seconds = train(model, parts[0], rate, steps, cell.seed, BATCH)
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    measured = ev.measure_classification(classifier, dev.samples, dev.labels)
    head = sum(p.numel() for n, p in model.named_parameters() if "classifier" in n and p.requires_grad)
    figures = {**measured.metrics, "samples": len(measured.scores), "right": to_bitmap(measured.scores)}
    figures |= {"rate": rate, "search": found, "steps": steps, "train_cpu_seconds": round(seconds, 1)}
    figures |= {"trained": sum(p.numel() for p in trainable(model)) - head, "head": head}
    return {**figures, **_file(model)}


def _file(model: Any) -> dict[str, Any]:
    """The size of an adapter's file, and which base it is of."""
    if not hasattr(model, "get_base_model"):
        return {}
    base = getattr(model.peft_config["default"], "base_fingerprint", None) or {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {"bytes": (Path(folder) / "adapter_model.safetensors").stat().st_size, "base": base.get("weights")}


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/prequant_adapters.md, by name."""
    return all_tables(rows)
