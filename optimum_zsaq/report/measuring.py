"""What all measurements share: a model that fits its task, its tokenizer, samples in padded batches, and the result.

A sample is a dict of token ids, so that models without a tokenizer can be measured too. Never loads a model whose
weights the checkpoint lacks; does not read data files (`commands/evaluate.py` does).
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..integrations.tasks import load_config, model_class


TASKS = ("text-classification", "text-regression", "text-generation", "text2text-generation")
Sample = dict[str, list[int]]


@dataclass
class Evaluation:
    """What was measured of a model.

    Args:
        metrics (`dict[str, float]`): the task's metrics of the model.
        scores (`np.ndarray`): (n,) float64, one a sample: 1 right or 0 wrong (classification, and text2text without
            `decode`), squared error (regression), nats a token (a window of a text), edits (text2text with `decode`).
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


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, task: str) -> PreTrainedModel:
    """A model for a task, float or low-bit; a float16 checkpoint is loaded as float32 (CPUs are slow at float16).

    Raises:
        ValueError: an unknown task; no model there; one of another task, or whose checkpoint lacks weights of this one.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} cannot be measured; use one of {TASKS}")
    config = load_config(str(path))
    cls = model_class(config, task)
    if type(config) not in cls._model_mapping:
        raise ValueError(f"{path} is a {config.model_type} model, which cannot do {task}; {_hint(config)}")
    dtype = torch.float32 if config.dtype == torch.float16 else "auto"
    model, info = cls.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{path} has no weights for {task}: it lacks {sorted(info['missing_keys'])[:3]}; {_hint(config)}")
    outputs, sentences = model.config.num_labels, task in ("text-classification", "text-regression")
    if sentences and (task == "text-regression") != (outputs == 1):
        other = "text-classification" if task == "text-regression" else "text-regression"
        raise ValueError(f"{path} has {outputs} output(s), so it does not do {task}; use task {other}")
    return model


def _hint(config: Any) -> str:
    return f"use the task that it was trained for (it was saved as {', '.join(config.architectures or ['?'])})"


# Text to samples -----------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[Sample]:
    """Texts, or pairs of texts, as samples, with the tokenizer's special tokens; cut at `max_length` tokens."""
    if not texts:
        return []
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    encoded = tokenizer(list(texts), None if pairs is None else list(pairs), verbose=False, **limit)
    return [{name: list(values[i]) for name, values in encoded.items()} for i in range(len(texts))]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> list[int]:
    """A long text as token ids; special tokens where the tokenizer puts them, once for the whole text."""
    return tokenizer(text, verbose=False)["input_ids"][:max_tokens]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Texts that a text2text model shall write, as token ids."""
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    return tokenizer(text_target=list(texts), verbose=False, **limit)["input_ids"]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor: n rows -> (n, longest) int64, filled with `value` on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def batches(
    model: PreTrainedModel, samples: Sequence[Sample], batch_size: int, title: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of samples, the longest first: (places in `samples`, padded tensors on the model's device).

    Inputs that `forward` does not name, as DistilBERT's token types, are left out; a wrapper that names none gets all.
    """
    accepted = inspect.signature(model.forward).parameters
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        places = order[start : start + batch_size]
        masked = [{"attention_mask": [1] * len(samples[i]["input_ids"]), **samples[i]} for i in places]
        padding = {"input_ids": model.config.pad_token_id or 0}
        names = [name for name in masked[0] if name in accepted or "input_ids" not in accepted]
        yield places, {n: pad([s[n] for s in masked], padding.get(n, 0)).to(model.device) for n in names}


@contextmanager
def measuring(samples: Sequence[Any], *models: PreTrainedModel | None) -> Iterator[list[PreTrainedModel]]:
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


def same_width(logits: Sequence[Tensor]) -> None:
    """Raise a ValueError unless a model and its reference have as many outputs."""
    widths = [part.shape[-1] for part in logits]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the model has {widths[0]} outputs and the reference {widths[1]}; give the float model it was made from"
        )


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats: (..., C), (..., C) -> (...)."""
    log_p, log_q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
