"""How a checkpoint was made: measured on load, and written down. Provenance: nothing here is needed to read a model."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .. import __version__
from ..algorithms.calibration import calibrate, float_inputs
from ..algorithms.hard_inputs import free_hard_inputs
from ..surgery import low_bit_layers
from .configs import LowBitConfig
from .data import Batch, describe_data, text_batches
from .forms import sampled_batches


logger = logging.getLogger(__name__)

_LOOKED_AT = 2  # batches on which hard inputs are found


def calibration_batches(model: PreTrainedModel, config: LowBitConfig) -> tuple[list[Batch], dict[str, Any]]:
    """What static input ranges are measured on: the config's data, else sampled sequences, best by a float model.

    Returns:
        `tuple`: the batches, and what they are (kind, count, hash or seed).
    """
    data, count = config.calibration_data, config.calibration_samples
    if data is None:
        sampled = {"kind": "sampled token sequences", "count": count, "seed": config.seed}
        return list(sampled_batches(model, count, config.seed)), sampled
    return list(text_batches(model, data, count)), describe_data(data, count)


def calibrate_on_load(
    model: PreTrainedModel, config: LowBitConfig, batches: list[Batch] | None = None
) -> dict[str, Any] | None:
    """Find the static input ranges of a model that was just quantized.

    Args:
        model (`PreTrainedModel`): fake-quantized or packed.
        config (`LowBitConfig`): how.
        batches (`list[dict]`, *optional*): what to measure on; None: see `calibration_batches`.

    Returns:
        `dict`, *optional*: what the data was; None where no layer has a static range, or the batches were given.
    """
    static = (layer.spec.inputs for _, layer in low_bit_layers(model))
    if not any(inputs is not None and inputs.granularity == "tensor" for inputs in static):
        return None
    data = None
    if batches is None:
        with float_inputs(model):
            batches, data = calibration_batches(model, config)
    watched = tqdm(batches, desc="Calibrating input ranges", unit="batch", leave=False)
    find_input_ranges(model, config, watched, batches)
    return data


def find_input_ranges(
    model: PreTrainedModel, config: LowBitConfig, batches: Iterable[Batch], again: Sequence[Batch]
) -> None:
    """Store static input ranges, and give layers whose inputs 8 bits cannot hold so a range a token, which is logged."""
    calibrate(model, batches, ranges="minmax" if config.ranges == "minmax" else "mse")
    freed = free_hard_inputs(model, again[:: max(1, len(again) // _LOOKED_AT)][:_LOOKED_AT])
    if freed:
        logger.info("Inputs that one range of 8 bits cannot hold have a range a token: %s", ", ".join(freed))


def write_recipe(model: PreTrainedModel, config: LowBitConfig, data: dict[str, Any] | None) -> None:
    """Write into the config how the model was made."""
    source = model.config.name_or_path
    config.recipe = {
        "base_model": Path(source).resolve().name if os.path.isdir(source) else source,
        "ranges": config.ranges_for(model),
        "smoothing": config.smoothing_for(model),
        "calibration": data,
        "versions": {
            "optimum_zsaq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
