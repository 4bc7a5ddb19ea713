"""What Trainers of fake-quantized models share: the checks of a model, and its optimizer."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..algorithms.minimax import keep_signs
from ..algorithms.step_sizes import has_adapter
from ..integrations.data import find_tokenizer
from ..integrations.forms import missing_forms
from ..layers import PackedEmbedding, PackedLinear
from ..surgery import low_bit_layers


logger = logging.getLogger(__name__)

_LOOKED_AT = 512  # samples


def check_trainable(model: PreTrainedModel, what: str, adapters: bool = False) -> None:
    """Refuse a model without float weights to train.

    Args:
        what (`str`): what the message calls it, such as "the student".
        adapters (`bool`): whether an adapter of PEFT, on any low-bit model, can be trained instead of its weights.

    Raises:
        ValueError: it is packed or has an adapter, has no fake-quantized layer, or weights that are not float32.
    """
    layers = [layer for _, layer in low_bit_layers(model)]
    adapted = has_adapter(model)
    if adapted and not adapters:
        raise ValueError(f"{what} has an adapter of PEFT, and its weights are frozen; train it without")
    if not adapted and any(isinstance(layer, PackedLinear | PackedEmbedding) for layer in layers):
        raise ValueError(f"{what} is packed and has no weights to train; load it with PreQuantConfig(packed=False)")
    if not layers:
        raise ValueError(f"{what} has no fake-quantized layer to train; call prepare(model, scheme) first")
    trained = [p for p in model.parameters() if p.is_floating_point() and (p.requires_grad or not adapted)]
    dtypes = {p.dtype for p in trained} - {torch.float32}
    if dtypes:
        raise ValueError(
            f"{what} has weights of {sorted(map(str, dtypes))}, in which small steps are lost; "
            "load it with dtype=torch.float32, and use bf16=True for fast matmuls"
        )


def not_followed(trainer: type, what: str, instead: str = "leave it out") -> str:
    """What is said of an option that a Trainer cannot follow."""
    return f"{what} does not go with {trainer.__name__}; {instead}"


def make_optimizer(
    trainer: Trainer, weights: Sequence[nn.Parameter], scales: Sequence[nn.Parameter], scale_learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a Trainer's `args`: the Trainer's two groups of weights, and one of step sizes.

    Step sizes have a learning rate of their own, do not decay, and keep their sign (see `keep_signs`).

    Raises:
        ValueError: it makes groups of its own.
    """
    args = trainer.args
    kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or {"params", "model"} & {*options}:
        raise ValueError(not_followed(type(trainer), f"optim={str(args.optim)!r}", "use optim='adamw_torch'"))
    names = set(trainer.get_decay_parameter_names(trainer.model))
    decaying = {id(p) for name, p in trainer.model.named_parameters() if name in names}

    def group(params: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
        return {"params": params, "lr": rate, "weight_decay": decay}

    groups = [
        group([p for p in weights if id(p) in decaying], args.learning_rate, args.weight_decay),
        group([p for p in weights if id(p) not in decaying], args.learning_rate, 0.0),
        group(list(scales), scale_learning_rate, 0.0),
    ]
    optimizer = kind(groups, **options)
    keep_signs(optimizer, list(scales))
    return optimizer


def warn_of_other_inputs(trainer: Trainer) -> None:
    """Warn of inputs that a Trainer evaluates on and does not train on: pairs of texts, other lengths."""
    rows = [_token_rows(data) for data in (trainer.train_dataset, trainer.eval_dataset)]
    if not all(rows):
        return
    tokenizer = trainer.processing_class
    if not hasattr(tokenizer, "pad_token_id"):
        try:
            tokenizer = find_tokenizer(trainer.model)
        except ValueError:
            return
    missing = missing_forms(trainer.model, tokenizer, rows[0], sys.maxsize, rows[1])
    if missing:
        logger.warning("train_dataset holds %s, unlike eval_dataset: there the model may get worse", " and ".join(missing))


def _token_rows(data: Any) -> list[list[int]]:
    """The first samples' token ids; none of data that has no length, or no ids."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, dict):
        return []
    found = []
    for i in range(min(_LOOKED_AT, len(data))):
        ids = data[i].get("input_ids") if hasattr(data[i], "get") else None
        if ids is None:
            return []
        found.append(ids.tolist() if hasattr(ids, "tolist") else list(ids))
    return found
