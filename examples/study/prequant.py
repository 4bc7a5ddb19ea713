"""What data-free quantization (`PreQuantConfig`) costs four real models.

A sentence classifier, two language models and a spelling-to-phonemes model. Every low-bit model is saved, loaded again
with plain `from_pretrained`, and that one is measured. Nothing is tuned here: dev and test are measured once, `tuning.tsv`
calibrates static input ranges. The data folder holds `models/{minilm-sst2,wikitext-opt,stories260K,bart-g2p-en-us}`,
`glue/SST-2/{dev,test,tuning}.tsv`, `wikitext-2/test.txt` and `tinystories/tinystories_valid_sample_30k.txt`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from bootstrap import to_bitmap
from prequant_tables import BITS, all_tables
from runner import Cell


OUTLIERS = 0.005
CRITERIA = ("error", "row", "chance")  # of choosing outliers, beside the package's own
CALIBRATION = "glue/SST-2/tuning.tsv"
MODELS = {
    "sst2": ("models/minilm-sst2", "AutoModelForSequenceClassification"),
    "wikitext": ("models/wikitext-opt", "AutoModelForCausalLM"),
    "stories": ("models/stories260K", "AutoModelForCausalLM"),
    "g2p": ("models/bart-g2p-en-us", "AutoModelForSeq2SeqLM"),
}
TEXTS = {
    "wikitext": ("wikitext-2/test.txt", 40_000),
    "stories": ("tinystories/tinystories_valid_sample_30k.txt", None),
}


def cell(task: str, bits: int, embedding_bits: int | None, seed: int = 0, **options: Any) -> Cell:
    """A cell of `PreQuantConfig`, named after what differs from row-wise MSE with dynamic 8-bit inputs."""
    granularity, ranges = options.get("granularity", "row"), options.get("ranges", "mse")
    parts = [f"w{bits}a8e{embedding_bits or 'f'}", granularity, ranges]
    parts += [f"outliers{options['outliers']}"] if "outliers" in options else []
    parts += [f"by-{options['criterion']}"] if "criterion" in options else []
    if "activations" in options:
        parts.append("static-tuning" if "calibration_data" in options else "static-sampled")
    settings = {"weight_bits": bits, "embedding_bits": embedding_bits, "activation_bits": 8, "seed": seed, **options}
    return Cell("prequant", "-".join(parts), task, seed, settings)


def cells() -> list[Cell]:
    """All cells: the float models, then SST-2, then the models that write."""
    found = [Cell("float", "float32", task) for task in MODELS]
    with_outliers: tuple[dict[str, Any], ...] = ({}, {"outliers": OUTLIERS})
    for bits, table_bits in BITS.items():
        for outliers in with_outliers:
            found.append(cell("sst2", bits, table_bits, **outliers))
            found.append(cell("sst2", bits, table_bits, granularity="tensor", **outliers))
            found.append(cell("sst2", bits, table_bits, granularity="group", group_size=64, **outliers))
        found += [cell("sst2", bits, table_bits, ranges=ranges) for ranges in ("minmax", "lsq")]
    found += [cell(task, 4, 8, **outliers) for task in MODELS for outliers in with_outliers]  # the default widths
    found.append(cell("sst2", 2, BITS[2], ranges="ternary"))
    for bits in (4, 3, 2):
        found += [cell("sst2", bits, BITS[bits], outliers=OUTLIERS, criterion=name) for name in CRITERIA]
    for bits in (8, 4):
        found.append(cell("sst2", bits, bits, activations="static", calibration_data=CALIBRATION))
        found += [cell("sst2", bits, bits, seed=seed, activations="static") for seed in range(3)]
    for task in ("wikitext", "stories", "g2p"):
        for bits, table_bits in BITS.items():
            for embedding_bits in (None, table_bits):
                found += [cell(task, bits, embedding_bits, **outliers) for outliers in with_outliers]
    return found


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize, save, reload and measure; the float model is measured as it is, in float32."""
    import torch
    import transformers

    from optimum_zsaq import PreQuantConfig

    path, class_name = MODELS[cell.task]
    model_class = getattr(transformers, class_name)
    reference = model_class.from_pretrained(data / path, dtype=torch.float32).eval()
    if cell.method == "float":
        return {**_MEASURES[cell.task](reference, None, data), **_file_size(data / path)}
    settings = {"granularity": "row", "symmetric": True, "ranges": "mse", **cell.settings}
    criterion = settings.pop("criterion", None)
    if "calibration_data" in settings:
        settings["calibration_data"] = str(data / settings["calibration_data"])
    config = PreQuantConfig(**settings)
    if criterion is None:
        model = model_class.from_pretrained(data / path, quantization_config=config)
    else:
        from criteria import quantize_by

        model = quantize_by(model_class.from_pretrained(data / path, dtype=torch.float32), config.scheme(), criterion)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = model_class.from_pretrained(folder).eval()
        figures = {**_file_size(Path(folder)), "reload_exact": _equal(model, reloaded)}
    return {**_MEASURES[cell.task](reloaded, reference, data), **figures}


def _file_size(folder: Path) -> dict[str, int]:
    return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def _equal(model: Any, reloaded: Any) -> bool:
    """Whether two models give bit-equal outputs on a few tokens."""
    import torch

    inputs = {"input_ids": torch.arange(4, 36).view(2, 16)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        return torch.equal(model.eval()(**inputs).logits, reloaded(**inputs).logits)


def _measure_sentences(model: Any, reference: Any, data: Path) -> dict[str, Any]:
    from optimum_zsaq.integrations.data import read_file
    from optimum_zsaq.report import evaluation as ev

    tokenizer = ev.load_tokenizer(data / MODELS["sst2"][0])
    dev, test = (read_file(data / "glue/SST-2" / name) for name in ("dev.tsv", "test.tsv"))
    found = ev.measure_classification(model, ev.encode(tokenizer, dev["sentence"]), dev["label"])
    figures = {**found.metrics, "samples": len(found.scores), "right": to_bitmap(found.scores)}
    if reference is None:
        return figures
    comparison = ev.measure_classification(model, ev.encode(tokenizer, test["sentence"]), None, reference).comparison
    return {**figures, **{f"test_{name}": value for name, value in comparison.items()}}


def _measure_text(task: str, model: Any, reference: Any, data: Path) -> dict[str, Any]:
    from optimum_zsaq.integrations.data import read_file
    from optimum_zsaq.report import evaluation as ev

    file, limit = TEXTS[task]
    text = "\n".join(read_file(data / file)["text"])
    tokens = ev.encode_text(ev.load_tokenizer(data / MODELS[task][0]), text, limit)
    found = ev.measure_perplexity(model, tokens, 256, reference)
    windows = [round(float(score), 4) for score in found.scores]
    return {**found.metrics, **found.comparison, "tokens": found.tokens, "window_loss": windows}


def _measure_phonemes(model: Any, reference: Any, data: Path) -> dict[str, Any]:
    from optimum_zsaq.report import evaluation as ev

    folder = data / MODELS["g2p"][0]
    letters = json.loads((folder / "source_config.json").read_text(encoding="utf-8"))
    graphemes, phonemes = letters["grapheme_chars"], letters["phoneme_chars"]
    lines = (folder / "eval_words.tsv").read_text(encoding="utf-8").splitlines()[:1000]
    words = [line.split("\t") for line in lines]
    samples = [{"input_ids": [1, *(graphemes.index(c) for c in word if c in graphemes), 2]} for word, _ in words]
    targets = [[1, *(phonemes.index(c) for c in spoken), 2] for _, spoken in words]
    found = ev.measure_text2text(model, samples, targets, reference, decode=lambda ids: [i for i in ids if i > 3])
    edits = [int(score) for score in found.scores]
    lengths = [len(spoken) for _, spoken in words]
    return {**found.metrics, **found.comparison, "samples": len(words), "edits": edits, "lengths": lengths}


_MEASURES = {
    "sst2": _measure_sentences,
    "wikitext": lambda *arguments: _measure_text("wikitext", *arguments),
    "stories": lambda *arguments: _measure_text("stories", *arguments),
    "g2p": _measure_phonemes,
}


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/prequant.md, by name."""
    return all_tables(rows)
