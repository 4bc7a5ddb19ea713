"""Measuring a model on a task, alone or against a reference model: what quantization cost it.

Here classification (accuracy, F1, Matthews' correlation), regression (Pearson, Spearman) and any metric of `evaluate`; the
tasks that predict tokens are in `generation.py`, what all share is in `measuring.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor
from transformers import PreTrainedModel

from ..integrations.tasks import load_tokenizer
from .generation import edit_distance, generate, measure_perplexity, measure_text2text, perplexity
from .measuring import (
    TASKS,
    Evaluation,
    Sample,
    batches,
    encode,
    encode_targets,
    encode_text,
    kl,
    load_model,
    measuring,
    same_width,
)


__all__ = [
    "TASKS",
    "Evaluation",
    "Sample",
    "edit_distance",
    "encode",
    "encode_targets",
    "encode_text",
    "extra_metric",
    "generate",
    "load_model",
    "load_tokenizer",
    "measure_classification",
    "measure_perplexity",
    "measure_regression",
    "measure_text2text",
    "perplexity",
]


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
        samples (`Sequence[Sample]`): see `measuring.encode`.
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
        found.comparison = {"kl": kl(logits[1], logits[0]).mean().item(), "agreement": agreement}
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
    with measuring(samples, *models) as present:
        if any(model.config.pad_token_id is None for model in present):
            batch_size = 1
        found: list[dict[int, Tensor]] = [{} for _ in present]
        for places, batch in batches(present[0], samples, batch_size, title):
            for rows, model in zip(found, present, strict=True):
                rows.update(zip(places, model(**batch).logits.double().cpu(), strict=True))
    logits = [torch.stack([rows[i] for i in range(len(samples))]) for rows in found]
    same_width(logits)
    return logits


def _classification_metrics(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, float]:
    """F1 is that of class 1 if there are two classes, and the mean over the classes (macro) if there are more."""
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
        raise ValueError(f"metric={name!r} was not found; without a network give the path of a metric script") from error
    return {key: float(v) for key, v in metric.compute(predictions=predictions, references=references).items()}
