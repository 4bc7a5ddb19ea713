"""Ranges that look at the layers' inputs first (`ranges="energy"`), and rounding by them when a model is loaded."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.energy import input_energies
from ..kinds import kind_of
from ..ops import NOT_FINITE
from ..spec import QuantScheme
from ..surgery import pack, prepare, select
from .checkpoint import is_read
from .forms import sampled_batches
from .prequant import PreQuantConfig
from .recipe import calibrate_on_load


logger = logging.getLogger(__name__)

SEQUENCES = 16  # of at most 64 tokens, where they are sampled: our choice, measured in docs/methods/language_models.md


def prepare_for(
    model: PreTrainedModel,
    scheme: QuantScheme,
    ranges: str,
    batches: Iterable[Mapping[str, Tensor]],
    total: int = SEQUENCES,
) -> PreTrainedModel:
    """`surgery.prepare`, with the energies that batches show if the ranges need them; with a progress bar.

    Args:
        model (`PreTrainedModel`): a float model.
        scheme (`QuantScheme`): what shall become of it.
        ranges (`str`): see `surgery.prepare`.
        batches (`Iterable[Mapping[str, Tensor]]`): what the model is called with; not looked at for other ranges.
        total (`int`): how many sequences they hold.

    Raises:
        ValueError: see `surgery.prepare`; a weight or an input that is not finite.
    """
    if ranges != "energy":
        return prepare(model, scheme, ranges)
    check_finite(model)
    names = [name for name in select(model, scheme) if not kind_of(model.get_submodule(name)).table]
    with tqdm(total=total, desc="Measuring layers' inputs", unit="sequence", leave=False) as bar:

        def watched():
            for batch in batches:
                yield batch
                bar.update(len(next(iter(batch.values()))))

        energies = input_energies(model, names, watched())
    unreached = [name for name in names if name not in energies]
    if unreached:
        logger.warning("No sequence reached these layers, whose ranges are those of 'mse': %s", ", ".join(unreached))
    return prepare(model, scheme, "energy", energies)


def check_finite(model: PreTrainedModel) -> None:
    """Refuse a model that would write nothing, or nonsense, because of one weight.

    Raises:
        ValueError: a weight that is NaN or infinite.
    """
    for name, p in model.named_parameters():
        if not p.is_meta and not torch.isfinite(p).all():
            raise ValueError(f"{name}: {NOT_FINITE}")


@torch.no_grad()
def round_on_load(model: PreTrainedModel, config: PreQuantConfig) -> dict[str, Any]:
    """Round a float model that was just loaded, in place, with ranges for what its layers read.

    The inputs are sequences that a causal language model writes itself, or tokens sampled from a prior over the vocabulary.
    Layers that were not in the checkpoint stay float.

    Returns:
        `dict`: what static input ranges were measured on, if there are any (see `calibrate_on_load`), else what the
            energies were (kind, count, seed); of how many sequences the energies are; how long it took.

    Raises:
        ValueError: see `surgery.select`; an input that is not finite.
    """
    started, scheme = time.perf_counter(), config.scheme(model)
    layers = {name: model.get_submodule(name) for name in select(model, scheme)}
    new = tuple(name for name, layer in layers.items() if not is_read(layer.weight))
    packed = config.packed  # `prepare` notes in the config what the model is now
    scheme = replace(scheme, skip=(*scheme.skip, *new))
    prepare_for(model, scheme, "energy", sampled_batches(model, SEQUENCES, config.seed))
    sampled = {"kind": "sampled token sequences", "count": SEQUENCES, "seed": config.seed}
    data = calibrate_on_load(model, config) or sampled
    if packed:
        pack(model)
    seconds = round(time.perf_counter() - started, 1)
    return {**data, "energy_sequences": SEQUENCES, "seconds": seconds}
