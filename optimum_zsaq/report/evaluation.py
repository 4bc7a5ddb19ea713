"""Measuring a model on a task, alone or against a reference model: what quantization cost it.

Classification (accuracy, F1, Matthews' correlation), regression (Pearson, Spearman), text generation (perplexity) and
text2text (exact match, loss, edit distance). Each sample's score is kept, in the order given, for paired tests. Samples and
models come from `samples.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .samples import Sample, batches, pad


@dataclass
class Evaluation:
    """What was measured of a model.

    Args:
        metrics (`dict[str, float]`): the task's metrics of the model.
        scores (`np.ndarray`): (n,) float64, one a sample: 1 right or 0 wrong (classification, text2text without `decode`),
            squared error (regression), mean nats a token (a window of a text), edits (text2text with `decode`).
        predictions (`list`): each sample's class, value or generated sequence.
        tokens (`int`, *optional*): how many tokens were predicted.
        reference_metrics (`dict[str, float]`): the same metrics of the reference model.
        comparison (`dict[str, float]`): model against reference: "kl", mean KL(reference || model) in nats, and
            "agreement", the share of equal predictions, over samples or predicted tokens; for regression
            "mean_difference", the mean absolute difference of the values.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    predictions: list[Any] = field(default_factory=list)
    tokens: int | None = None
    reference_metrics: dict[str, float] = field(default_factory=dict)
    comparison: dict[str, float] = field(default_factory=dict)


@contextmanager
def _measuring(samples: Sequence[Any], *models: PreTrainedModel | None) -> Iterator[list[PreTrainedModel]]:
    """The models that are there, without dropout and gradients for as long as the context lasts."""
    if not len(samples):
        raise ValueError("there is nothing to measure on; give at least one sample")
    present = [model for model in models if model is not None]
    training = [model.training for model in present]
    try:
        with torch.inference_mode():
            yield [model.eval() for model in present]
    finally:
        for model, was in zip(present, training, strict=True):
            model.train(was)


def _same_width(logits: Sequence[Tensor]) -> None:
    widths = [part.shape[-1] for part in logits]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the model has {widths[0]} outputs and the reference {widths[1]}; give the float model that it was made from"
        )


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats: (..., C), (..., C) -> (...)."""
    log_p, log_q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


# Classification and regression ---------------------------------------------------------------------------------------


def measure_classification(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    labels: Sequence[int] | None = None,
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Accuracy, F1 and Matthews' correlation; against a reference KL and agreement.

    Args:
        model (`PreTrainedModel`): a sequence classifier.
        samples (`Sequence[Sample]`): see `samples.encode`.
        labels (`Sequence[int]`, *optional*): a class a sample; without them only the comparison is measured.
        reference (`PreTrainedModel`, *optional*): the float model, with the same classes and tokens.
        batch_size (`int`): samples run together.

    Raises:
        ValueError: no samples; neither labels nor reference; a label that is no class; models with different classes.
    """
    logits = _sentence_logits([model, reference], samples, labels, batch_size, "measuring text-classification")
    classes = [part.argmax(dim=1).tolist() for part in logits]
    count = logits[0].shape[1]
    found = Evaluation(predictions=classes[0])
    if labels is not None:
        wrong = sorted({label for label in labels if not 0 <= label < count})
        if wrong:
            raise ValueError(f"labels {wrong[:5]} are no classes of the model; use 0 to {count - 1}")
        found.scores = (np.array(classes[0]) == np.array(labels)).astype(np.float64)
        found.metrics = _classification_metrics(labels, classes[0], count)
    if reference is not None:
        found.reference_metrics = {} if labels is None else _classification_metrics(labels, classes[1], count)
        agreement = float((np.array(classes[0]) == np.array(classes[1])).mean())
        found.comparison = {"kl": _kl(logits[1], logits[0]).mean().item(), "agreement": agreement}
    return found


def measure_regression(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    labels: Sequence[float] | None = None,
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Pearson's and Spearman's correlation with the labels; against a reference the mean absolute difference.

    Arguments as for `measure_classification`; the models have one output and labels are numbers.

    Raises:
        ValueError: no samples; neither labels nor reference.
    """
    outputs = _sentence_logits([model, reference], samples, labels, batch_size, "measuring text-regression")
    values = [part[:, 0].numpy() for part in outputs]
    found = Evaluation(predictions=values[0].tolist())
    if labels is not None:
        found.scores = (values[0] - np.asarray(labels, dtype=np.float64)) ** 2
        found.metrics = _correlations(labels, values[0])
    if reference is not None:
        found.reference_metrics = {} if labels is None else _correlations(labels, values[1])
        found.comparison = {"mean_difference": float(np.abs(values[0] - values[1]).mean())}
    return found


def _sentence_logits(
    models: Sequence[PreTrainedModel | None],
    samples: Sequence[Sample],
    labels: Sequence[Any] | None,
    batch_size: int,
    title: str,
) -> list[Tensor]:
    """Outputs (n, C) float64 of the models that are there. One without a padding token reads a sample at a time."""
    if labels is None and models[1] is None:
        raise ValueError("without labels there is only a reference to compare with; give labels or a reference model")
    if labels is not None and len(labels) != len(samples):
        raise ValueError(f"{len(samples)} samples have {len(labels)} labels; give one a sample")
    with _measuring(samples, *models) as present:
        if any(model.config.pad_token_id is None for model in present):
            batch_size = 1
        found: list[dict[int, Tensor]] = [{} for _ in present]
        for places, batch in batches(present[0], samples, batch_size, title):
            for rows, model in zip(found, present, strict=True):
                rows.update(zip(places, model(**batch).logits.double().cpu(), strict=True))
    logits = [torch.stack([rows[i] for i in range(len(samples))]) for rows in found]
    _same_width(logits)
    return logits


def _classification_metrics(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, float]:
    """F1 is that of class 1 where there are two classes, and the mean over the classes (macro) where there are more."""
    average = "binary" if classes == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        f"f1_{average}": float(metrics.f1_score(labels, predictions, average=average, zero_division=0.0)),
        "mcc": float(metrics.matthews_corrcoef(labels, predictions)),
    }


def _correlations(labels: Sequence[float], values: np.ndarray) -> dict[str, float]:
    return {
        "pearson": float(stats.pearsonr(labels, values).statistic),
        "spearman": float(stats.spearmanr(labels, values).statistic),
    }


# Text ----------------------------------------------------------------------------------------------------------------


@dataclass
class _TokenCounts:
    """What is counted of each sample's predicted tokens, (n,) float64 each."""

    tokens: np.ndarray
    nats: np.ndarray
    wrong: np.ndarray
    kl: np.ndarray
    equal: np.ndarray


def _count_tokens(
    models: list[PreTrainedModel],
    samples: Sequence[Sample],
    targets: Sequence[Sequence[int]],
    batch_size: int,
    title: str,
) -> tuple[list[_TokenCounts], list[list[int]]]:
    """Teacher-forced predictions of `targets`, for each model; the i-th output predicts the i-th target.

    Returns each model's counts, "kl" and "equal" against the last model, and the first model's predicted tokens.
    """
    counts = [_TokenCounts(*np.zeros((5, len(samples)))) for _ in models]
    predictions: list[list[int]] = [[] for _ in samples]
    for places, batch in batches(models[0], samples, batch_size, title):
        outputs = [model(**batch).logits for model in models]
        _same_width(outputs)
        for row, place in enumerate(places):
            target = torch.tensor(targets[place], device=outputs[0].device)
            logits = [output[row, : len(target)].float() for output in outputs]
            predicted = [part.argmax(dim=-1) for part in logits]
            predictions[place] = predicted[0].tolist()
            for found, part, tokens in zip(counts, logits, predicted, strict=True):
                found.tokens[place] = len(target)
                found.nats[place] = cross_entropy(part, target, reduction="sum").item()
                found.wrong[place] = (tokens != target).sum().item()
                found.kl[place] = _kl(logits[-1], part).sum().item() if len(models) > 1 else 0.0
                found.equal[place] = (tokens == predicted[-1]).sum().item()
    return counts, predictions


def _compare_tokens(counts: list[_TokenCounts]) -> dict[str, float]:
    if len(counts) == 1:
        return {}
    total = counts[0].tokens.sum()
    return {"kl": float(counts[0].kl.sum() / total), "agreement": float(counts[0].equal.sum() / total)}


def measure_perplexity(
    model: PreTrainedModel,
    tokens: Sequence[int],
    window: int = 256,
    reference: PreTrainedModel | None = None,
    batch_size: int = 4,
) -> Evaluation:
    """Perplexity of a text in windows that do not overlap; the first token of a window is read and not predicted.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokens (`Sequence[int]`): the text, see `samples.encode_text`.
        window (`int`): tokens a window; the last one may be shorter.
        reference (`PreTrainedModel`, *optional*): the float model, with the same tokens.
        batch_size (`int`): windows run together.

    Raises:
        ValueError: less than two tokens; a window of less than two tokens, or longer than the model's positions.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or window
    if not 2 <= window <= longest:
        raise ValueError(f"window={window!r} is no length that this model reads; use 2 to {longest} tokens")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} token(s), and none can be predicted; give a longer text")
    starts = range(0, len(tokens) - 1, window)
    samples = [{"input_ids": list(tokens[start : start + window])} for start in starts]
    with _measuring(samples, model, reference) as models:
        targets = [sample["input_ids"][1:] for sample in samples]
        counts, _ = _count_tokens(models, samples, targets, batch_size, "measuring text-generation")
    figures = []
    for found in counts:
        loss, right = found.nats.sum() / found.tokens.sum(), 1.0 - found.wrong.sum() / found.tokens.sum()
        figures.append({"perplexity": math.exp(min(loss, 700.0)), "loss": float(loss), "token_accuracy": float(right)})
    return Evaluation(
        figures[0],
        counts[0].nats / counts[0].tokens,
        tokens=int(counts[0].tokens.sum()),
        reference_metrics=figures[1] if reference is not None else {},
        comparison=_compare_tokens(counts),
    )


def measure_text2text(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    targets: Sequence[Sequence[int]],
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
    decode: Callable[[list[int]], Sequence[Any]] | None = None,
) -> Evaluation:
    """Teacher-forced loss and exact match of an encoder-decoder model; with `decode` also the error rate of what it writes.

    A target is an exact match when each of its tokens is the likeliest after those before it, which is when greedy
    decoding writes it. The error rate is the edit distance between what greedy decoding writes and the target, both
    decoded, divided by the targets' length.

    Args:
        model (`PreTrainedModel`): an encoder-decoder model.
        samples (`Sequence[Sample]`): what it reads, see `samples.encode`.
        targets (`Sequence[Sequence[int]]`): what it shall write, with the token that ends it.
        reference (`PreTrainedModel`, *optional*): the float model, with the same tokens.
        batch_size (`int`): samples run together.
        decode (`Callable`, *optional*): token ids -> the sequence (a string, say) whose elements are compared.

    Raises:
        ValueError: no samples; not one target a sample; an empty target.
    """
    if len(targets) != len(samples) or not all(targets):
        raise ValueError(
            f"{len(samples)} samples have {sum(map(bool, targets))} targets; give one, not empty, a sample"
        )
    start = _first_token(model)
    forced = [{**s, "decoder_input_ids": [start, *t[:-1]]} for s, t in zip(samples, targets, strict=True)]
    with _measuring(samples, model, reference) as models:
        counts, _ = _count_tokens(models, forced, targets, batch_size, "measuring text2text-generation")
        figures = [
            {"exact_match": float((c.wrong == 0).mean()), "loss": c.nats.sum() / c.tokens.sum()} for c in counts
        ]
        found = Evaluation(figures[0], (counts[0].wrong == 0).astype(np.float64), tokens=int(counts[0].tokens.sum()))
        found.comparison = _compare_tokens(counts)
        if decode is not None:
            wanted = [decode(list(target)) for target in targets]
            length = 2 * max(map(len, targets))
            for each, figure in reversed(list(zip(models, figures, strict=True))):
                found.predictions = [decode(ids) for ids in generate(each, samples, length, batch_size)]
                found.scores = np.array(
                    [edit_distance(*p) for p in zip(found.predictions, wanted, strict=True)], float
                )
                figure["error_rate"] = float(found.scores.sum() / max(1, sum(map(len, wanted))))
    found.reference_metrics = figures[1] if reference is not None else {}
    return found


def _first_token(model: PreTrainedModel) -> int:
    """What a decoder reads before it writes: its start token, or the padding token where it has none (as T5)."""
    start, padding = model.generation_config.decoder_start_token_id, model.config.pad_token_id
    start = padding if start is None else start
    if start is None:
        raise ValueError(
            f"{type(model).__name__} names no first token of its decoder; set generation_config.decoder_start_token_id"
        )
    return start


def generate(model: PreTrainedModel, samples: Sequence[Sample], length: int, batch_size: int = 32) -> list[list[int]]:
    """What an encoder-decoder model writes, greedily, of at most `length` tokens: ids without start, end and padding."""
    written: list[list[int]] = [[] for _ in samples]
    with _measuring(samples, model):
        start = _first_token(model)
        dropped = {start, model.generation_config.eos_token_id, model.config.pad_token_id}
        for places, batch in batches(model, samples, batch_size, "generating text"):
            rows = model.generate(**batch, max_new_tokens=length, do_sample=False, num_beams=1).tolist()
            for place, row in zip(places, rows, strict=True):
                written[place] = [token for token in row if token not in dropped]
    return written


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def extra_metric(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Any metric of the `evaluate` library, by its id on the Hub or the path of its script.

    Raises:
        ImportError: `evaluate` is not installed.
        ValueError: the metric is not found, or it does not take these predictions.
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("other metrics come from `evaluate`; run: pip install 'optimum-zsaq[evaluate]'") from error
    try:
        metric = evaluate.load(name)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"metric={name!r} was not found; without a network give the path of a metric script"
        ) from error
    return {key: float(v) for key, v in metric.compute(predictions=predictions, references=references).items()}
