"""Measuring models that predict tokens: perplexity of a text, and what an encoder-decoder model writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .measuring import Evaluation, Sample, batches, kl, measuring, same_width


@dataclass
class _TokenCounts:
    """What is counted of each sample's predicted tokens, (n,) float64 each."""

    tokens: np.ndarray
    nats: np.ndarray
    wrong: np.ndarray
    kl: np.ndarray
    equal: np.ndarray

    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())


def _count_tokens(
    models: list[PreTrainedModel],
    samples: Sequence[Sample],
    targets: Sequence[Sequence[int]],
    batch_size: int,
    title: str,
) -> list[_TokenCounts]:
    """Each model's counts of the teacher-forced predictions of `targets`, "kl" and "equal" against the last model.

    The i-th output of a sample predicts its i-th target.
    """
    counts = [_TokenCounts(*np.zeros((5, len(samples)))) for _ in models]
    for places, batch in batches(models[0], samples, batch_size, title):
        outputs = [model(**batch).logits for model in models]
        same_width(outputs)
        for row, place in enumerate(places):
            target = torch.tensor(targets[place], device=outputs[0].device)
            logits = [output[row, : len(target)].float() for output in outputs]
            predicted = [part.argmax(dim=-1) for part in logits]
            for found, part, tokens in zip(counts, logits, predicted, strict=True):
                found.tokens[place] = len(target)
                found.nats[place] = cross_entropy(part, target, reduction="sum").item()
                found.wrong[place] = (tokens != target).sum().item()
                found.kl[place] = kl(logits[-1], part).sum().item() if len(models) > 1 else 0.0
                found.equal[place] = (tokens == predicted[-1]).sum().item()
    return counts


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
        tokens (`Sequence[int]`): the text, see `measuring.encode_text`.
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
    with measuring(samples, model, reference) as models:
        targets = [sample["input_ids"][1:] for sample in samples]
        counts = _count_tokens(models, samples, targets, batch_size, "measuring text-generation")
    figures = []
    for found in counts:
        loss, accuracy = found.loss(), float(1.0 - found.wrong.sum() / found.tokens.sum())
        figures.append({"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "token_accuracy": accuracy})
    return Evaluation(
        figures[0],
        counts[0].nats / counts[0].tokens,
        tokens=int(counts[0].tokens.sum()),
        reference_metrics=figures[1] if reference is not None else {},
        comparison=_compare_tokens(counts),
    )


def perplexity(model: PreTrainedModel, tokens: Sequence[int], window: int = 256) -> float:
    """Perplexity alone, see `measure_perplexity`."""
    return measure_perplexity(model, tokens, window).metrics["perplexity"]


def measure_text2text(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    targets: Sequence[Sequence[int]],
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
    decode: Callable[[list[int]], Sequence[Any]] | None = None,
) -> Evaluation:
    """Teacher-forced loss and exact match of an encoder-decoder model; with `decode` also the error rate of its text.

    A target is an exact match when each of its tokens is the likeliest one, which is when greedy decoding writes it. The
    error rate is the edit distance between what greedy decoding writes and the targets, over the targets' length.

    Args:
        model (`PreTrainedModel`): an encoder-decoder model.
        samples (`Sequence[Sample]`): what it reads, see `measuring.encode`.
        targets (`Sequence[Sequence[int]]`): what it shall write, with the token that ends it.
        reference (`PreTrainedModel`, *optional*): the float model, with the same tokens.
        batch_size (`int`): samples run together.
        decode (`Callable`, *optional*): token ids -> the sequence (a string, say) whose elements are compared.

    Raises:
        ValueError: not one target a sample, or an empty one; no samples.
    """
    if len(targets) != len(samples) or not all(targets):
        raise ValueError(f"{len(samples)} samples have {sum(map(bool, targets))} targets; give one, not empty, a sample")
    start = _first_token(model)
    forced = [{**s, "decoder_input_ids": [start, *t[:-1]]} for s, t in zip(samples, targets, strict=True)]
    with measuring(samples, model, reference) as models:
        counts = _count_tokens(models, forced, targets, batch_size, "measuring text2text-generation")
    figures = [{"exact_match": float((c.wrong == 0).mean()), "loss": float(c.nats.sum() / c.tokens.sum())} for c in counts]
    found = Evaluation(figures[0], (counts[0].wrong == 0).astype(np.float64), tokens=int(counts[0].tokens.sum()))
    found.comparison = _compare_tokens(counts)
    if decode is not None:
        for each, figure in reversed(list(zip(models, figures, strict=True))):
            written = generate(each, samples, 2 * max(map(len, targets)), batch_size)
            found.predictions = [decode(ids) for ids in written]
            figure["error_rate"], found.scores = _error_rate(found.predictions, [decode(list(t)) for t in targets])
    found.reference_metrics = figures[1] if reference is not None else {}
    return found


def _error_rate(written: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> tuple[float, np.ndarray]:
    """All edits over all that was wanted, and each sample's edits (n,)."""
    edits = np.array([edit_distance(*pair) for pair in zip(written, wanted, strict=True)], dtype=np.float64)
    return float(edits.sum() / max(1, sum(map(len, wanted)))), edits


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
    """What an encoder-decoder model writes greedily, at most `length` tokens: ids without start, end and padding."""
    written: list[list[int]] = [[] for _ in samples]
    with measuring(samples, model):
        start = _first_token(model)
        end = model.generation_config.eos_token_id
        dropped = {start, model.config.pad_token_id, *(end if isinstance(end, list) else [end])}
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
