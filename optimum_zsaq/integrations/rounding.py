"""Rounding that looks at the layers' inputs first: what `PreQuantConfig(ranges="energy")` does when a model is loaded."""

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.energy import input_energies
from ..kinds import kind_of
from ..surgery import pack, prepare, select
from .checkpoint import is_read
from .configs import LowBitConfig
from .forms import sampled_batches
from .recipe import calibrate_on_load


logger = logging.getLogger(__name__)

_SEQUENCES = 16  # sampled, of at most 64 tokens: our choice, measured in docs/methods/language_models.md


@torch.no_grad()
def round_on_load(model: PreTrainedModel, config: LowBitConfig) -> dict[str, Any]:
    """Round a float model that was just loaded, in place, with ranges for what its layers read.

    The inputs are sequences that a causal language model writes itself, or tokens sampled from a prior over the vocabulary.
    Layers that were not in the checkpoint stay float.

    Returns:
        `dict`: what static input ranges were measured on, if there are any (see `calibrate_on_load`), else what the
            energies were (kind, count, seed); of how many sequences the energies are; how long it took.

    Raises:
        ValueError: see `surgery.select`; an input that is not finite.
    """
    started = time.perf_counter()
    scheme = config.scheme()
    table = {name: model.get_submodule(name) for name in select(model, scheme)}
    new = tuple(name for name, layer in table.items() if not is_read(layer.weight))
    names = [name for name, layer in table.items() if name not in new and not kind_of(layer).table]
    packed = config.packed  # `prepare` notes in the config what the model is now
    with tqdm(total=_SEQUENCES, desc="Measuring layers' inputs", unit="sequence", leave=False) as bar:

        def batches():
            for batch in sampled_batches(model, _SEQUENCES, config.seed):
                yield batch
                bar.update(len(next(iter(batch.values()))))

        energies = input_energies(model, names, batches())
    unreached = [name for name in names if name not in energies]
    if unreached:
        logger.warning("No sequence reached these layers, whose ranges are those of 'mse': %s", ", ".join(unreached))
    prepare(model, replace(scheme, skip=(*scheme.skip, *new)), "energy", energies)
    sampled = {"kind": "sampled token sequences", "count": _SEQUENCES, "seed": config.seed}
    data = calibrate_on_load(model, config) or sampled
    if packed:
        pack(model)
    seconds = round(time.perf_counter() - started, 1)
    return {**data, "energy_sequences": _SEQUENCES, "seconds": seconds}
