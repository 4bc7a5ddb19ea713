"""PreQuant's config; `rounding.py` has what it asks for where the float model is run first."""

from torch import nn

from .configs import ALGORITHMS, RANGE_METHODS, LowBitConfig


class PreQuantConfig(LowBitConfig):
    """PreQuant's first stage: task-agnostic, data-free quantization of a pre-trained model.

    Each weight matrix gets its codes from its own values alone, with the range strategies that the paper names (min-max,
    MSE, row-wise). `outliers=0.005` also stores, for each matrix, where its outlier weights are and their float residuals:
    the start of PreQuant's second stage, and a better model by itself. See `LowBitConfig` for the fields.

    `ranges="energy"`, which is ours, runs the float model first, on a few sequences that it writes itself, and counts the
    error of a weight by the energy of the input it is multiplied with: for language models, whose inputs have a few strong
    channels. It takes the memory of the float model, and some time (docs/methods/language_models.md). "auto" is "energy"
    for decoders, else see `surgery.range_method`.

    Source: https://huggingface.co/papers/2306.00014; bits, symmetry and outlier criterion are our choice
    (docs/methods/prequant.md), the paper's are unknown to us.
    """

    algorithm = "prequant"
    knows_energies = True
    range_methods = (*RANGE_METHODS, "energy")

    def runs_float_model(self, model: nn.Module) -> bool:
        """Whether the float model is run before it is quantized."""
        return self.ranges_for(model) == "energy" or self.smoothing_for(model) > 0.0


ALGORITHMS[PreQuantConfig.algorithm] = PreQuantConfig
