"""SQuAT's config: a model that is loaded to be trained on a task in low bits (`trainers/squat.py`)."""

from typing import Any

from .configs import ALGORITHMS, LowBitConfig


class SQuATConfig(LowBitConfig):
    """Load a float model fake-quantized, with float master weights and learnable step sizes, for `SQuATTrainer`.

    What `from_pretrained` returns trains, evaluates and saves as it is; every step size (of weights, of embedding tables,
    and with `activations="static"` of inputs) has its start value and is trainable before an optimizer is made. What
    `SQuATTrainer.save_model` writes is packed.

    Args:
        ranges (`str`): start values of the weights' step sizes: as in `LowBitConfig`.
        activations (`str`): "dynamic": a range a token, found as it runs, nothing to learn; "static": one a layer, whose
            step size is learned from where `calibration_data`, best of the task's training texts, put it.
        packed (`bool`): False by default: to be trained.
        **fields: the other fields of `LowBitConfig`.

    Raises:
        ValueError: see `LowBitConfig`.

    Source: https://huggingface.co/papers/2210.07171, with learned step sizes (LSQ,
    https://huggingface.co/papers/1902.08153); bits of inputs, granularity and every default are our choice
    (docs/methods/squat.md), the paper's are unknown to us.
    """

    algorithm = "squat"
    learns_step_sizes = True

    def __init__(self, **fields: Any):
        super().__init__(**{"packed": False, **fields})


ALGORITHMS[SQuATConfig.algorithm] = SQuATConfig
