"""How low-bit weights hold on language models: SmolLM2-135M-Instruct, and a small one.

Methods: "rounding" with each of the range methods, without data; "zsaq" without data; "mrem" with 256 paragraphs of
WikiText-2's train text. Tables have 8 bits, inputs are float unless a scheme names their bits; what a scheme does not
say is as it comes. Measured: perplexity of the first 4,096 tokens of WikiText-2's test text in windows of 512 (256 where
the model has no more positions), KL to the float model and agreement with its likeliest token there, bits per weight of
the Linear layers with scales and minima as they lie on the disk; of trained models the perplexity of the first 40,000
tokens too. What was tried was tried on the validation text. The data folder holds `wikitext-2/test.txt` and `train.txt`,
`models/wikitext-opt` and `models/smollm2`.
"""

import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prequant_tables import circumstances, markdown
from runner import Cell


MODELS = {"smollm2": ("models/smollm2", 512), "wikitext": ("models/wikitext-opt", 256)}
TOKENS, MANY_TOKENS = 4096, 40_000
PARAGRAPHS, WORDS = 256, 60  # of the train text: the first ones with more words than that
RANGES = ("mse", "minmax", "energy")
SCHEMES: dict[str, dict[str, Any]] = {
    "w4": {"weight_bits": 4},
    "w4a8": {"weight_bits": 4, "activation_bits": 8},
    "w4-integer-zeros": {"weight_bits": 4, "minimum": False},
    "w4-symmetric": {"weight_bits": 4, "symmetric": True},
    "w4-row": {"weight_bits": 4, "granularity": "row"},
    "w3": {"weight_bits": 3},
    "w3-symmetric": {"weight_bits": 3, "symmetric": True},
    "w2": {"weight_bits": 2},
    "w8": {"weight_bits": 8},
    "w8a8": {"weight_bits": 8, "activation_bits": 8, "smoothing": 0.0},
}
_STATIC = {"activation_bits": 8, "activations": "static"}
INPUTS: dict[str, dict[str, Any]] = {  # what 8-bit inputs cost, with the ranges of "energy" alone
    "w8a8-smoothed": {"weight_bits": 8, "activation_bits": 8, "smoothing": 0.7},
    "w8a8-static": {"weight_bits": 8, **_STATIC, "smoothing": 0.0},
    "w8a8-static-smoothed": {"weight_bits": 8, **_STATIC, "smoothing": 0.7},
    "w4a8-smoothed": {"weight_bits": 4, "activation_bits": 8, "smoothing": 0.7},
    "w4a8-static": {"weight_bits": 4, **_STATIC, "smoothing": 0.0},
    "w4a8-static-smoothed": {"weight_bits": 4, **_STATIC, "smoothing": 0.7},
}
TRAINED = {"mrem": ("w4", "w3", "w2"), "zsaq": ("w4a8", "w3", "w2")}  # of SmolLM2
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "wikitext": "wikitext-opt, 8.5 M weights"}


def cells() -> list[Cell]:
    """The float models, then scheme by scheme."""
    found = [Cell("float", "float32", task) for task in MODELS]
    found += [Cell(f"rounding-{r}", scheme, task) for scheme in SCHEMES for task in MODELS for r in RANGES]
    found += [Cell("rounding-energy", scheme, task) for scheme in INPUTS for task in MODELS]
    return found + [Cell(method, scheme, "smollm2") for method, schemes in TRAINED.items() for scheme in schemes]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_zsaq.integrations.data import read_file
    from optimum_zsaq.report import evaluation as ev

    folder, window = MODELS[cell.task]
    reference = AutoModelForCausalLM.from_pretrained(data / folder, dtype=torch.float32).eval()
    text = "\n".join(read_file(data / "wikitext-2/test.txt")["text"])
    tokens, many = (ev.encode_text(ev.load_tokenizer(data / folder), text, count) for count in (TOKENS, MANY_TOKENS))
    if cell.method == "float":
        found = ev.measure_perplexity(reference, tokens, window).metrics
        long = ev.measure_perplexity(reference, many, window).metrics["perplexity"]
        return {**found, "long_perplexity": long, "tokens": TOKENS}
    fields = {"activation_bits": None, **{**SCHEMES, **INPUTS}[cell.scheme], "seed": cell.seed}
    config = _config(cell.method, fields, data)
    start = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(data / folder, dtype=torch.float32, quantization_config=config).eval()
    seconds = round(time.process_time() - start, 1)
    bits = _bits_a_weight(model)
    if fields["activation_bits"] is None:
        model = model.dequantize().eval()  # the same model, and faster
    found = ev.measure_perplexity(model, tokens, window, reference)
    row = {**found.metrics, **found.comparison, "bits": bits, "cpu_seconds": seconds, "tokens": TOKENS}
    if cell.method in TRAINED:
        row["long_perplexity"] = ev.measure_perplexity(model, many, window).metrics["perplexity"]
        row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def _config(method: str, fields: dict[str, Any], data: Path) -> Any:
    from optimum_zsaq import MREMConfig, PreQuantConfig, ZSAQConfig
    from optimum_zsaq.integrations.data import read_file

    if method == "zsaq":
        return ZSAQConfig(**fields)
    if method == "mrem":
        lines = read_file(data / "wikitext-2/train.txt")["text"]
        texts = [line for line in lines if len(line.split()) > WORDS][:PARAGRAPHS]
        return MREMConfig(**fields, calibration_data=texts)
    return PreQuantConfig(**fields, ranges=method.removeprefix("rounding-"))


def _bits_a_weight(model: Any) -> float:
    """Of the Linear layers that own their weight: codes, scales, minima and outliers, as they are stored."""
    from optimum_zsaq.layers import PackedEmbedding
    from optimum_zsaq.surgery import low_bit_layers

    size = count = 0
    for _, layer in low_bit_layers(model):
        if layer.owner is layer and not isinstance(layer, PackedEmbedding):
            stored = (p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight_"))
            size += sum(p.numel() * p.element_size() for p in stored)
            rows, columns = layer.shape
            count += rows * columns
    return round(8 * size / count, 3)


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/methods/language_models.md, by name."""
    schemes = ["w8a8", *[s for s in INPUTS if s.startswith("w8")], "w4a8", *[s for s in INPUTS if s.startswith("w4")]]
    found = {task: _table(rows, task, SCHEMES, RANGES) for task in MODELS}
    found |= {f"{task}-inputs": _table(rows, task, schemes, ("energy",)) for task in MODELS}
    return {**found, "trained": _trained_table(rows), "circumstances": circumstances(rows)}


def _trained_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["scheme", "method", "bits a weight", "perplexity", "of the float model's", "on 40,000 tokens", "KL"]
    header += ["equal tokens, %", "CPU s", "peak, GiB"]
    float_row, lines = rows.get("smollm2/float/float32/0"), []
    for scheme in ("w4", "w4a8", "w3", "w2"):
        for method in TRAINED:
            row = rows.get(f"smollm2/{method}/{scheme}/0")
            if row and float_row:
                ratios = [f"{row[name] / float_row[name]:.3f}" for name in ("perplexity", "long_perplexity")]
                figures = [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", *ratios, f"{row['kl']:.4f}"]
                costs = [f"{row['cpu_seconds']:.0f}", f"{row['peak_gib']:.1f}"]
                lines.append([scheme, method.upper(), *figures, f"{100 * row['agreement']:.1f}", *costs])
    return markdown(header, lines)


def _table(rows: dict[str, dict[str, Any]], task: str, schemes: Iterable[str], methods: Iterable[str]) -> str:
    header = ["scheme", "ranges", "bits a weight", "perplexity", "of the float model's", "KL", "equal tokens, %", "CPU s"]
    float_row = rows.get(f"{task}/float/float32/0")
    lines = []
    if float_row:
        lines.append([f"float, {TITLES[task]}", "", "32", f"{float_row['perplexity']:.2f}", "1.000", "", "", ""])
    for scheme in schemes:
        for ranges in methods:
            row = rows.get(f"{task}/rounding-{ranges}/{scheme}/0")
            if row and float_row:
                ratio = row["perplexity"] / float_row["perplexity"]
                figures = [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", f"{ratio:.3f}", f"{row['kl']:.4f}"]
                lines.append([scheme, ranges, *figures, f"{100 * row['agreement']:.1f}", f"{row['cpu_seconds']:.0f}"])
    return markdown(header, lines)
