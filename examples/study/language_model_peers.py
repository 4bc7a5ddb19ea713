"""Other packages beside this one on a real language model, SmolLM2-135M-Instruct, with the measure of `language_models`.

Weights of the blocks alone: inputs, embeddings and head stay float. "nf4" is bitsandbytes (blocks of 64), "hqq" and "sinq"
those packages, in groups of 64; "llama.cpp" its own quantizer, "-imatrix" with an importance matrix; "gptq" is that of
GPTQModel; "autoround" trains 200 iterations a block, its default, and "autoround-equal" as many as take about the CPU time
of "mrem", which is ours as it comes. What reads texts reads the same 256 paragraphs, packed into sequences of 256 tokens.
What a peer stores is put into the float32 model, which is what is measured; bits a weight are what it stores. "cpu_seconds"
are those of loading and quantizing, "peak_gib" the most memory meanwhile.

    pip install bitsandbytes hqq sinq auto-round gguf
    pip install gptqmodel  # in an environment of its own: it wants numpy 2.2

Each cell needs its own package alone; llama.cpp is explained in `language_model_gguf.py`. Set SINQ_AUTO_PATCH=0: sinq 0.2.0
changes transformers in every process of its environment. The data folder is that of `language_models`.
"""

import time
from pathlib import Path
from typing import Any

from language_model_quantizers import GROUPED, TASK, TRAINED, load, quantized, tokenizer
from language_models import MANY_TOKENS, MODELS, TOKENS
from prequant_tables import circumstances, markdown
from runner import Cell


BAR = 0.95  # KL of "mrem" over that of "autoround-equal", set beforehand
TITLES = {
    "rounding": "`PreQuantConfig`",
    "mrem": "**`MREMConfig`**",
    "nf4": "bitsandbytes nf4",
    "nf4-double": "bitsandbytes nf4, double quantization",
    "hqq": "HQQ",
    "sinq": "SINQ",
    "llama.cpp": "llama.cpp",
    "llama.cpp-imatrix": "llama.cpp, importance matrix",
    "gptq": "GPTQ",
    "autoround-equal": "AutoRound, about that time",
    "autoround": "AutoRound, 200 iterations",
}
LONG = ("float", "mrem", "gptq", "autoround", "autoround-equal")  # measured on many tokens too, which takes two minutes
PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a cat that sleeps in the sun.",
)
ANSWERS = 60  # tokens
ANSWERED = {
    "float/float32": "float",
    "rounding/w4-g64": "`PreQuantConfig`, 4 bits",
    "nf4/w4-b64": "bitsandbytes nf4",
    "mrem/w3-g64": "`MREMConfig`, 3 bits",
}
SCHEMES = ("w4-b64", "w4-g64", "w4-g128", "q4_0", "q4_k_m", "q3_k_m", "q2_k", "w3-g64", "w2-g64")


def cells() -> list[Cell]:
    """Float, what needs no training, then what decides at equal time."""
    found = [Cell("float", "float32", TASK)]
    found += [Cell(method, "w4-b64", TASK) for method in ("nf4", "nf4-double")]
    found += [Cell(method, scheme, TASK) for scheme in GROUPED for method in ("rounding", "hqq", "sinq")]
    found += [Cell("llama.cpp", scheme, TASK) for scheme in ("q4_0", "q4_k_m", "q3_k_m", "q2_k")]
    found += [Cell("llama.cpp-imatrix", scheme, TASK) for scheme in ("q4_0", "q4_k_m")]
    found += [Cell(method, scheme, TASK) for scheme in TRAINED for method in ("mrem", "autoround-equal")]
    return found + [Cell(method, scheme, TASK) for method in ("gptq", "autoround") for scheme in TRAINED]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize, then measure in float32 on one thread."""
    import torch

    from optimum_zsaq.report.bench_worker import memory, reset_peak, trim

    trim()
    reset_peak()
    start = time.process_time()
    model, bits, more = quantized(cell, data)
    seconds = round(time.process_time() - start, 1)
    used = memory() or {"peak": 0}
    torch.set_num_threads(1)
    row = {"bits": bits, "cpu_seconds": seconds, "peak_gib": round(used["peak"] / 2**30, 2), **more}
    if f"{cell.method}/{cell.scheme}" in ANSWERED:
        row["answers"] = _answers(model, data)
    return {**row, **_measure(cell, model, data)}


def _measure(cell: Cell, model: Any, data: Path) -> dict[str, Any]:
    """As `language_models` does."""
    from optimum_zsaq.integrations.data import read_file
    from optimum_zsaq.report import evaluation as ev

    window, reader = MODELS[TASK][1], tokenizer(data)
    text = "\n".join(read_file(data / "wikitext-2/test.txt")["text"])
    reference = None if cell.method == "float" else load(data)
    found = ev.measure_perplexity(model, ev.encode_text(reader, text, TOKENS), window, reference)
    row = {**found.metrics, **found.comparison, "tokens": TOKENS}
    if cell.method in LONG:
        many = ev.encode_text(reader, text, MANY_TOKENS)
        row["long_perplexity"] = ev.measure_perplexity(model, many, window).metrics["perplexity"]
    return row


def _answers(model: Any, data: Path) -> list[str]:
    """What the model answers to each prompt, greedily."""
    reader, found = tokenizer(data), []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        given = reader.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**given, max_new_tokens=ANSWERS, do_sample=False)
        found.append(reader.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


# Tables: a cell that is not finished is not listed --------------------------------------------------------------------


def tables(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Tables of docs/methods/language_models.md, by name."""
    found = {"": _peers(rows), "-equal-time": _equal_time(rows), "-answers": _written(rows)}
    return {f"peers{name}": table for name, table in {**found, "-circumstances": circumstances(rows)}.items()}


def _peers(rows: dict[str, dict[str, Any]]) -> str:
    header = ["scheme", "method", "bits a weight", "perplexity", "of the float model's", "on 40,000 tokens", "KL"]
    header += ["equal tokens, %", "CPU s", "peak, GiB"]
    float_row, lines = rows.get(f"{TASK}/float/float32/0"), []
    for scheme in SCHEMES if float_row else ():
        for method, title in TITLES.items():
            if row := rows.get(f"{TASK}/{method}/{scheme}/0"):
                figures = [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", _ratio(row, float_row, "perplexity")]
                figures += [_ratio(row, float_row, "long_perplexity"), f"{row['kl']:.4f}", f"{100 * row['agreement']:.1f}"]
                lines.append([scheme, title, *figures, f"{row['cpu_seconds']:.0f}", f"{row['peak_gib']:.1f}"])
    return markdown(header, lines)


def _ratio(row: dict[str, Any], float_row: dict[str, Any], name: str) -> str:
    return f"{row[name] / float_row[name]:.3f}" if name in row else ""


def _equal_time(rows: dict[str, dict[str, Any]]) -> str:
    """The bar: KL of "mrem" over that of "autoround-equal"."""
    header = ["scheme", "KL of MREM", "CPU s", "KL of AutoRound", "iterations a block", "CPU s", "ratio", f"≤ {BAR}"]
    lines = []
    for scheme in TRAINED:
        ours, peer = (rows.get(f"{TASK}/{method}/{scheme}/0") for method in ("mrem", "autoround-equal"))
        if ours and peer:
            ratio = ours["kl"] / peer["kl"]
            figures = [f"{ours['kl']:.4f}", f"{ours['cpu_seconds']:.0f}", f"{peer['kl']:.4f}", str(peer["iterations"])]
            met = "yes" if ratio <= BAR else "**no**"
            lines.append([scheme, *figures, f"{peer['cpu_seconds']:.0f}", f"{ratio:.2f}", met])
    return markdown(header, lines)


def _written(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for number, prompt in enumerate(PROMPTS):
        for name, title in ANSWERED.items():
            if row := rows.get(f"{TASK}/{name}/0"):
                answer = row["answers"][number].replace("\n", " / ").replace("|", "\\|")
                lines.append([prompt, title, answer])
    return markdown(["prompt", "model", "answer"], lines)
