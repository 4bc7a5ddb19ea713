"""`optimum-cli zsaq demo`: quantize the small language model that comes with the package, and compare."""

import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .common import Command, add_common_arguments, table


_SCHEMES = ((8, None), (4, None), (3, None), (3, 0.005), (2, None), (2, 0.005))


class DemoCommand(Command):
    """Quantize a small language model and compare."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--text", type=Path, help="measure on this text file (default: text that the model wrote)")
        parser.add_argument("--tokens", type=int, default=20_000, help="tokens to measure on (default: 20000)")
        add_common_arguments(parser)

    def execute(self, args: Namespace) -> dict[str, Any]:
        """Measure the float model, then each scheme after saving and reloading it."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from ..integrations.registration import register
        from ..report.evaluation import perplexity

        register()
        disable_progress_bar()
        source = Path(__file__).parent.parent / "demo" / "model"
        tokenizer = AutoTokenizer.from_pretrained(source)
        text = (args.text or source / "sample.txt").read_text(encoding="utf-8")
        tokens = tokenizer(text, verbose=False)["input_ids"][: args.tokens]
        float_model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
        rows = [_measure("float16", float_model, tokens, (source / "model.safetensors").stat().st_size, perplexity)]
        for bits, outliers in _SCHEMES:
            rows.append(_quantize_and_measure(source, bits, outliers, tokens, perplexity))
        return {"text": str(args.text or "text that it wrote itself"), "tokens": len(tokens), "rows": rows}

    def show(self, result: dict[str, Any]) -> None:
        """A table, and what to type next."""
        print(f"A small language model on {result['tokens']:,} tokens of {result['text']}; no data is used to quantize:\n")
        header = ("scheme", "perplexity", "bytes on disk", "quantize + save s", "measure s")
        rows = (
            (r["scheme"], f"{r['perplexity']:.2f}", r["bytes"], f"{r['quantize_seconds']:.1f}", f"{r['seconds']:.1f}")
            for r in result["rows"]
        )
        print(table(header, rows))
        print("\nYour own model: optimum-cli zsaq quantize --model MODEL --output OUT --weight-bits 4")


def _quantize_and_measure(
    source: Path, bits: int, outliers: float | None, tokens: list[int], perplexity: Any
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from ..integrations.prequant import PreQuantConfig

    start = time.perf_counter()
    config = PreQuantConfig(weight_bits=bits, embedding_bits=max(bits, 4), activation_bits=8, outliers=outliers)
    folder = Path(tempfile.mkdtemp(prefix="zsaq-demo-"))
    try:
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder)
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(folder)
        name = f"W{bits} A8 E{max(bits, 4)}" + (f" + {100 * outliers:g} % outliers" if outliers else "")
        size = (folder / "model.safetensors").stat().st_size
        return _measure(name, model, tokens, size, perplexity, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    scheme: str, model: Any, tokens: list[int], size: int, perplexity: Any, quantize_seconds: float = 0.0
) -> dict[str, Any]:
    start = time.perf_counter()
    value = perplexity(model, tokens)
    seconds = time.perf_counter() - start
    return {
        "scheme": scheme,
        "perplexity": value,
        "bytes": size,
        "quantize_seconds": quantize_seconds,
        "seconds": seconds,
    }
