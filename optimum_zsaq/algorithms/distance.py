"""How far a student is from its teacher: D of outputs and hidden states, of a batch or of each sequence."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .forms import Batch


OUTPUTS = ("kl", "mse", "none")


class DistanceSettings(Protocol):
    """What D is made of, see `MinimaxSettings`."""

    output: str
    output_weight: float
    hidden_weight: float


def discrepancy(teacher: Any, student: Any, batch: Batch, settings: DistanceSettings) -> Tensor:
    """D of two models' outputs on one batch, the mean over its sequences.

    Args:
        teacher, student: what the models returned with `output_hidden_states=True`.
        batch (`dict`): what they were called with; positions where "attention_mask" ("decoder_attention_mask" for what a
            decoder gives) is 0 are left out.

    Shapes: -> () float32.

    Raises:
        ValueError: outputs count, and the model has none.
    """
    total = torch.zeros((), device=batch["input_ids"].device)
    if settings.output_weight and settings.output != "none":
        if getattr(student, "logits", None) is None:
            raise ValueError(
                f"output_weight={settings.output_weight!r} needs a model that returns logits, and this one returns "
                f"{type(student).__name__} without; use output_weight=0.0"
            )
        error, mask = _output_errors(teacher, student, batch, settings)
        total = total + settings.output_weight * _mean(error, mask)
    if settings.hidden_weight:
        errors = [_mean(*pair) for pair in _hidden_errors(teacher, student, batch)]
        total = total + settings.hidden_weight * torch.stack(errors).mean()
    return total


def sequence_discrepancies(
    teacher: Any, student: Any, batch: Batch, settings: DistanceSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """D of each sequence, D of its outputs alone, and the share of its answers that are equal.

    Args: as `discrepancy`'s.

    Shapes: -> 3 x (B,) float32; without logits the last two are empty, for regression the last.
    """
    size = len(batch["input_ids"])
    output = agreement = torch.empty(0, device=batch["input_ids"].device)
    total = torch.zeros(size, device=batch["input_ids"].device)
    if settings.output != "none" and getattr(student, "logits", None) is not None:
        error, mask = _output_errors(teacher, student, batch, settings)
        output = _row_means(error, mask)
        total = total + settings.output_weight * output
        if settings.output == "kl":
            agreement = _row_means((teacher.logits.argmax(dim=-1) == student.logits.argmax(dim=-1)).float(), mask)
    if settings.hidden_weight:
        errors = [_row_means(*pair) for pair in _hidden_errors(teacher, student, batch)]
        total = total + settings.hidden_weight * torch.stack(errors).mean(dim=0)
    return total, output, agreement


def _output_errors(teacher: Any, student: Any, batch: Batch, settings: DistanceSettings) -> tuple[Tensor, Tensor | None]:
    """D of each sequence or position, and which positions count."""
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if teacher.logits.dim() < 3:
        return _output_discrepancy(teacher.logits, student.logits, settings.output), None
    # a vocabulary is large: one sequence at a time, and its softmax anew for the backward pass
    pairs = zip(teacher.logits, student.logits, strict=True)
    errors = [checkpoint(_output_discrepancy, *pair, settings.output, use_reentrant=False) for pair in pairs]
    return torch.stack(errors), mask


def _hidden_errors(teacher: Any, student: Any, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """Relative errors of the positions of each hidden state, and which positions count."""
    encoder, decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    errors = []
    for name, mask in (("hidden_states", encoder), ("encoder_hidden_states", encoder), ("decoder_hidden_states", decoder)):
        if getattr(student, name, None) is not None:
            pairs = zip(getattr(teacher, name), getattr(student, name), strict=True)
            errors += [(_relative_error(t.float(), s.float()), mask) for t, s in pairs]
    return errors


def _row_means(error: Tensor, mask: Tensor | None) -> Tensor:
    """Shapes: (B,) or (B, L, ...) -> (B,)."""
    if error.dim() == 1:
        return error
    if mask is None:
        return error.flatten(1).mean(dim=1)
    return (error * mask).sum(dim=1) / mask.sum(dim=1)


def _output_discrepancy(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    """Shapes: (N, C) -> (N,) float32."""
    teacher, student = teacher.float(), student.float()
    if kind == "mse":
        return (student - teacher).square().mean(dim=-1)
    log_t, log_s = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=-1)


def _relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2, each position on its own. Shapes: (B, L, D) -> (B, L)."""
    return (student - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1).clamp(min=1e-12)


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()
