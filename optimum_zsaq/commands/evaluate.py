"""`optimum-cli zsaq evaluate`: measure a model, low-bit or float, on a task."""

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import Command, add_common_arguments, table


TASKS = ("text-classification", "text-regression", "text-generation", "text2text-generation")
_SENTENCES, _TOKENS, _PAIRS = TASKS[:2], TASKS[2:3], TASKS[3:]
_TEXT_COLUMNS = ("text", "sentence")
_LABEL_COLUMNS = ("label", "labels", "score")
_TARGET_COLUMNS = ("target", "summary", "translation")
_ONLY_FOR = {
    "text_pair_column": (*_SENTENCES, *_PAIRS),
    "label_column": _SENTENCES,
    "target_column": _PAIRS,
    "generate": _PAIRS,
    "metric": (*_SENTENCES, *_PAIRS),
    "max_length": (*_SENTENCES, *_PAIRS),
    "max_samples": (*_SENTENCES, *_PAIRS),
    "window": _TOKENS,
    "max_tokens": _TOKENS,
}

_EXAMPLES = """metrics:
  text-classification   accuracy, F1 (of class 1 of two; else the mean over the classes), Matthews' correlation
  text-regression       Pearson's and Spearman's correlation
  text-generation       perplexity in windows that do not overlap; rows are joined with line ends
  text2text-generation  exact match and teacher-forced loss; with --generate the character error rate of what is written
With --reference also mean KL(reference || model) in nats and the share of equal predictions; labels may be missing then.

examples:
  optimum-cli zsaq evaluate --model out --task text-classification --data dev.tsv --reference ./float-model
  optimum-cli zsaq evaluate --model out --task text-generation --data test.txt --max-tokens 40000
"""


class EvaluateCommand(Command):
    """Measure a model, low-bit or float, on a task."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.epilog, parser.formatter_class = _EXAMPLES, RawDescriptionHelpFormatter
        parser.add_argument("--model", required=True, help="folder or Hub id of a low-bit or float model")
        parser.add_argument("--task", required=True, choices=TASKS, help="what to measure, see below")
        parser.add_argument("--data", required=True, type=Path, help="TSV, CSV, JSON(L), parquet or plain text file")
        parser.add_argument("--text-column", help="default: text or sentence")
        parser.add_argument("--text-pair-column", help="second text of a pair (default: none)")
        parser.add_argument("--label-column", help="default: label, labels or score")
        parser.add_argument("--target-column", help="text to write (default: target, summary or translation)")
        parser.add_argument("--reference", metavar="MODEL", help="the float model, to compare with")
        parser.add_argument("--metric", help="one more metric: an id or a script of the `evaluate` library")
        parser.add_argument("--generate", action="store_true", help="also measure what the model writes by itself")
        parser.add_argument("--batch-size", type=int, help="samples run together (default: 32, windows: 4)")
        parser.add_argument("--max-length", type=int, help="cut inputs at so many tokens (default: what the model reads)")
        parser.add_argument("--window", type=int, help="tokens a window of text-generation (default: 256)")
        parser.add_argument("--max-samples", type=int, help="use the first rows only")
        parser.add_argument("--max-tokens", type=int, help="use the text's first tokens only")
        parser.add_argument("--runtime", default="fast", help="how a packed model runs: fast or small (default: fast)")
        parser.add_argument("--kernel", help="the only kernel allowed, such as reference (default: the fastest)")
        parser.add_argument("--threads", type=int, help="processor threads (default: torch's choice)")
        add_common_arguments(parser)

    def execute(self, args: Namespace) -> dict[str, Any]:
        """Read the data, load the models, measure."""
        _check_arguments(args)
        rows = _read(args.data)
        rows = rows.select(range(min(args.max_samples or len(rows), len(rows))))
        text = _column(rows, args.data, "text", args.text_column, _TEXT_COLUMNS)

        import torch
        from transformers.utils.logging import set_verbosity_error

        from ..integrations.registration import register
        from ..report import evaluation as ev
        from ..surgery import set_runtime

        register()
        set_verbosity_error()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model = set_runtime(ev.load_model(args.model, args.task), args.runtime, args.kernel)
        tokenizer = ev.load_tokenizer(args.model)
        reference = None if args.reference is None else ev.load_model(args.reference, args.task)
        measure = _measure_text if args.task in _TOKENS else _measure_pairs if args.task in _PAIRS else _measure_sentences
        start = time.perf_counter()
        found, references = measure(args, rows, text, (tokenizer, model, reference))
        if args.metric is not None:
            found.metrics.update(ev.extra_metric(args.metric, found.predictions, references))
        return {
            "model": args.model,
            "task": args.task,
            "data": str(args.data),
            "reference": args.reference,
            "samples": len(found.predictions) or len(found.scores),
            "tokens": found.tokens,
            "metrics": found.metrics,
            "reference_metrics": found.reference_metrics,
            "comparison": found.comparison,
            "seconds": time.perf_counter() - start,
        }

    def show(self, result: dict[str, Any]) -> None:
        """A row a metric, the reference beside it."""
        tokens = f", {result['tokens']:,} tokens" if result["tokens"] else ""
        unit = "windows" if result["task"] in _TOKENS else "samples"
        print(f"{result['model']}: {result['samples']:,} {unit}{tokens}, {result['seconds']:.1f} s")
        rows = [[name, value, result["reference_metrics"].get(name)] for name, value in result["metrics"].items()]
        rows += [[_COMPARISONS[name], value, None] for name, value in result["comparison"].items()]
        header = ["metric", "model", "reference"]
        width = 3 if result["reference_metrics"] else 2
        print(table(header[:width], [row[:width] for row in rows]))


_COMPARISONS = {
    "kl": "KL(reference || model), nats",
    "agreement": "equal predictions",
    "mean_difference": "mean |difference|",
}


# Data ----------------------------------------------------------------------------------------------------------------


def _check_arguments(args: Namespace) -> None:
    for name, tasks in _ONLY_FOR.items():
        if getattr(args, name) and args.task not in tasks:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} means nothing for {args.task}, only for {', '.join(tasks)}; leave it out")
    for name in ("batch_size", "max_length", "max_samples", "max_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is no count; use 1 or more")
    if args.metric and args.task in _PAIRS and not args.generate:
        raise ValueError(f"--metric {args.metric} needs what the model writes; add --generate")


def _read(path: Path) -> Any:
    """The rows of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is empty, or not what its name says.
    """
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty; give a file with data")

    from datasets.exceptions import DatasetGenerationError

    from ..integrations.data import read_file

    try:
        return read_file(path)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error.__cause__}; check the file") from error
    except ValueError as error:
        if "no data" in str(error):  # datasets says so of a file that holds column names alone
            raise ValueError(f"{path} has no rows; give a file with data") from error
        raise


def _column(rows: Any, path: Path, what: str, name: str | None, guesses: Sequence[str]) -> str:
    """The column that a user named, or the first of the usual names that is there.

    Raises:
        ValueError: there is no such column.
    """
    for candidate in guesses if name is None else [name]:
        if candidate in rows.column_names:
            return candidate
    asked = f"column {name!r}" if name else f"{what} column ({' or '.join(guesses)})"
    raise ValueError(
        f"{path} has no {asked}; its columns are {rows.column_names}: name one with --{what.replace(' ', '-')}-column. "
        "A CSV or TSV file starts with a line of column names"
    )


def _texts(rows: Any, column: str) -> list[str]:
    values = rows[column][:]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise ValueError(
                f"row {number} has {value!r} in column {column!r}, which is no text; mend the row or choose a column"
            )
    return values


def _labels(rows: Any, args: Namespace, convert: Any) -> list[Any] | None:
    """A label a row; None if there are none and a reference is there to compare with."""
    if args.label_column is None and args.reference is not None and not set(_LABEL_COLUMNS) & set(rows.column_names):
        return None
    column = _column(rows, args.data, "label", args.label_column, _LABEL_COLUMNS)
    return [convert(value, f"row {number} of column {column!r}") for number, value in enumerate(rows[column][:], 1)]


def class_of(value: Any, place: str, names: dict[str, int]) -> int:
    """A label of a file as the model's class number: a number, or one of the model's names for its classes.

    Raises:
        ValueError: it is neither; the message names `place`.
    """
    if isinstance(value, str):
        value = names.get(value, int(value) if value.strip().isdecimal() else value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise ValueError(
            f"{value!r} in {place} is no class of the model; use 0 to {len(names) - 1} or one of {list(names)}"
        )
    return int(value)


def _number_of(value: Any, place: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} in {place} is no number; text-regression needs numbers") from None


# Measuring -----------------------------------------------------------------------------------------------------------


def _measure_sentences(args: Namespace, rows: Any, text: str, models: tuple) -> tuple[Any, Any]:
    from ..report import evaluation as ev

    tokenizer, model, reference = models
    if args.task == "text-regression":
        labels, measure = _labels(rows, args, _number_of), ev.measure_regression
    else:
        names = model.config.label2id
        labels, measure = _labels(rows, args, lambda *value: class_of(*value, names)), ev.measure_classification
    if args.metric is not None and labels is None:
        raise ValueError(f"--metric {args.metric} needs labels, and {args.data} has none; name them with --label-column")
    samples = _encode(args, rows, text, tokenizer, model)
    return measure(model, samples, labels, reference, args.batch_size or 32), labels


def _encode(args: Namespace, rows: Any, text: str, tokenizer: Any, model: Any) -> list[Any]:
    from ..report import evaluation as ev

    pair = args.text_pair_column
    if pair is not None:
        pair = _texts(rows, _column(rows, args.data, "text pair", pair, ()))
    return ev.encode(tokenizer, _texts(rows, text), pair, args.max_length or _longest(tokenizer, model))


def _longest(tokenizer: Any, model: Any) -> int | None:
    """How many tokens the model reads, as far as it or its tokenizer says."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return limit if limit < 10**9 else None  # tokenizers without a limit say 10**30


def _measure_text(args: Namespace, rows: Any, text: str, models: tuple) -> tuple[Any, None]:
    from ..report import evaluation as ev

    tokenizer, model, reference = models
    tokens = ev.encode_text(tokenizer, "\n".join(_texts(rows, text)), args.max_tokens)
    return ev.measure_perplexity(model, tokens, args.window or 256, reference, args.batch_size or 4), None


def _measure_pairs(args: Namespace, rows: Any, text: str, models: tuple) -> tuple[Any, list[str]]:
    from ..report import evaluation as ev

    tokenizer, model, reference = models
    wanted = _texts(rows, _column(rows, args.data, "target", args.target_column, _TARGET_COLUMNS))
    samples = _encode(args, rows, text, tokenizer, model)
    targets = ev.encode_targets(tokenizer, wanted, args.max_length or _longest(tokenizer, model))

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    found = ev.measure_text2text(
        model, samples, targets, reference, args.batch_size or 32, decode if args.generate else None
    )
    return found, wanted
