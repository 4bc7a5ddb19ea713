"""Making the package known to transformers: `register()` runs once in a process, however it is reached."""

from transformers.quantizers import auto

from .configs import QUANT_METHOD, LowBitConfig
from .models import register_models
from .quantizer import LowBitQuantizer
from .squat import SQuATConfig as SQuATConfig  # which puts itself on the list of algorithms


def register() -> None:
    """Register config, quantizer and model readers; does nothing when they are registered."""
    if QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(LowBitConfig)
    auto.register_quantizer(QUANT_METHOD)(LowBitQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (LowBitConfig,)
    register_models()
