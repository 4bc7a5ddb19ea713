"""How a checkpoint was made: measured on load, and written down. Provenance: nothing here is needed to read a model."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .. import __version__
from ..algorithms.calibration import calibrate, float_inputs
from ..surgery import low_bit_layers
from .configs import LowBitConfig
from .data import describe_data, text_batches
from .forms import sampled_batches


def calibrate_on_load(model: PreTrainedModel, config: LowBitConfig) -> dict[str, Any] | None:
    """Find the static input ranges of a model that was just quantized.

    Returns:
        `dict`, *optional*: what the data was (kind, count, hash); None where no layer has a static range.
    """
    static = (layer.spec.inputs for _, layer in low_bit_layers(model))
    if not any(inputs is not None and inputs.granularity == "tensor" for inputs in static):
        return None
    if config.calibration_data is None:
        with float_inputs(model):
            batches = list(sampled_batches(model, config.calibration_samples, config.seed))
        data = {"kind": "sampled token sequences", "count": config.calibration_samples, "seed": config.seed}
    else:
        batches = list(text_batches(model, config.calibration_data, config.calibration_samples))
        data = describe_data(config.calibration_data, config.calibration_samples)
    batches = tqdm(batches, desc="Calibrating input ranges", unit="batch", leave=False)
    calibrate(model, batches, ranges="minmax" if config.ranges == "minmax" else "mse")
    return data


def write_recipe(model: PreTrainedModel, config: LowBitConfig, data: dict[str, Any] | None) -> None:
    """Write into the config how the model was made."""
    source = model.config.name_or_path
    config.recipe = {
        "base_model": Path(source).resolve().name if os.path.isdir(source) else source,
        "ranges": config.ranges_for(model),
        "calibration": data,
        "versions": {
            "optimum_zsaq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
