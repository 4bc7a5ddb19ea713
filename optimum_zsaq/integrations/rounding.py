"""What looks at the inputs of a float model's layers first: ranges ("energy") and smoothing; and rounding on load."""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.energy import input_energies
from ..algorithms.smoothing import find_links, smooth
from ..kinds import kind_of
from ..ops import NOT_FINITE
from ..spec import QuantScheme
from ..surgery import pack, prepare, select
from .checkpoint import is_read
from .configs import LowBitConfig
from .data import Batch
from .forms import sampled_batches
from .prequant import PreQuantConfig
from .recipe import calibrate_on_load, calibration_batches


logger = logging.getLogger(__name__)

SEQUENCES = 16  # of at most 64 tokens, where they are sampled: our choice, measured in docs/methods/language_models.md
SMOOTHED = 64  # where sizes of channels are moved, which needs more of them: our choice too
_TRIED = 16  # tokens that show what can be smoothed


def look_at_inputs(
    model: PreTrainedModel,
    scheme: QuantScheme,
    config: LowBitConfig,
    batches: Iterable[Batch],
    total: int = SEQUENCES,
) -> dict[str, Tensor] | None:
    """What `surgery.prepare` is to know of the inputs of a float model's layers, which is smoothed, in place, if its config
    says so; with a progress bar.

    Args:
        model (`PreTrainedModel`): a float model.
        scheme (`QuantScheme`): what shall become of it.
        config (`LowBitConfig`): asks for ranges and smoothing.
        batches (`Iterable[Mapping[str, Tensor]]`): what the model is called with; not looked at where nothing asks for it.
        total (`int`): how many sequences they hold.

    Returns:
        `dict[str, Tensor]`, *optional*: the energies of inputs by layer, of the model as it is then; None: the ranges need
        none.

    Raises:
        ValueError: see `surgery.select`; a weight or an input that is not finite.
    """
    wanted, power = config.ranges_for(model) == "energy", config.smoothing_for(model)
    if not (wanted or power):
        return None
    check_finite(model)
    names = [name for name in select(model, scheme) if not kind_of(model.get_submodule(name)).table]
    first: list[Batch] = []
    with tqdm(total=total, desc="Measuring layers' inputs", unit="sequence", leave=False) as bar:

        def watched():
            for batch in batches:
                first[:] = first or [_start_of(batch)]
                yield batch
                bar.update(len(next(iter(batch.values()))))

        energies = input_energies(model, names, watched())
    if power and first:
        links = [link for link in find_links(model, first[0]) if set(link.layers) <= set(names)]
        energies = smooth(model, links, energies, power)
    unreached = [name for name in names if name not in energies]
    if unreached and wanted:
        logger.warning("No sequence reached these layers, whose ranges are those of 'mse': %s", ", ".join(unreached))
    return energies if wanted else None


def _start_of(batch: Batch) -> Batch:
    """The first tokens of the first sequence, without padding."""
    found = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    for mask, ids in (("attention_mask", "input_ids"), ("decoder_attention_mask", "decoder_input_ids")):
        if ids not in found:
            continue
        kept = found[mask][0].bool() if mask in found else slice(None)
        side = [name for name in found if name.startswith("decoder_") == ids.startswith("decoder_")]
        same = [n for n in side if isinstance(found[n], Tensor) and found[n].shape == found[ids].shape and n != mask]
        found |= {name: found[name][:, kept][:, :_TRIED] for name in (*same, *[mask] * (mask in found))}
    return found


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
        `dict`: what energies and static input ranges were measured on (kind, count, hash or seed); how long it took.

    Raises:
        ValueError: see `surgery.select`; an input that is not finite.
    """
    started, scheme = time.perf_counter(), config.scheme(model)
    layers = {name: model.get_submodule(name) for name in select(model, scheme)}
    new = tuple(name for name, layer in layers.items() if not is_read(layer.weight))
    packed = config.packed  # `prepare` notes in the config what the model is now
    scheme = replace(scheme, skip=(*scheme.skip, *new))
    static = config.activations == "static"
    if static:
        batches, data = calibration_batches(model, config)
    else:
        count = SMOOTHED if config.smoothing_for(model) else SEQUENCES
        batches = sampled_batches(model, count, config.seed)
        data = {"kind": "sampled token sequences", "count": count, "seed": config.seed}
    energies = look_at_inputs(model, scheme, config, batches, data["count"])
    prepare(model, scheme, config.ranges_for(model), energies)
    if static:
        calibrate_on_load(model, config, batches)
    if packed:
        pack(model)
    seconds = round(time.perf_counter() - started, 1)
    return {**data, "seconds": seconds}
