"""optimum-zsaq: pre-trained language models at 8, 4, 3 and 2 bits when training data is missing or scarce.

Importing this package is light: a name is loaded when it is first used, and with it registration with transformers. A
process that never uses a name of it loads low-bit checkpoints all the same (`autoload.py`).
"""

import importlib as _importlib


__version__ = "0.1.0"

_EXPORTS = {
    "LayerSpec": "spec",
    "LowBitConfig": "integrations.configs",
    "MREMConfig": "integrations.mrem",
    "OutlierConfig": "integrations.peft",
    "PreQuantConfig": "integrations.prequant",
    "QuantScheme": "spec",
    "QuantSpec": "spec",
    "SQuATArguments": "trainers.squat",
    "SQuATConfig": "integrations.squat",
    "SQuATSeq2SeqArguments": "trainers.squat",
    "SQuATSeq2SeqTrainer": "trainers.squat",
    "SQuATTrainer": "trainers.squat",
    "ZSAQArguments": "trainers.zsaq",
    "ZSAQConfig": "integrations.zsaq",
    "ZSAQTrainer": "trainers.zsaq",
    "calibrate": "algorithms.calibration",
    "pack": "surgery",
    "prepare": "surgery",
    "register": "integrations.registration",
    "set_runtime": "surgery",
    "unpack": "surgery",
}

__all__ = [  # noqa: F822 -- loaded on first use
    "LayerSpec",
    "LowBitConfig",
    "MREMConfig",
    "OutlierConfig",
    "PreQuantConfig",
    "QuantScheme",
    "QuantSpec",
    "SQuATArguments",
    "SQuATConfig",
    "SQuATSeq2SeqArguments",
    "SQuATSeq2SeqTrainer",
    "SQuATTrainer",
    "ZSAQArguments",
    "ZSAQConfig",
    "ZSAQTrainer",
    "calibrate",
    "pack",
    "prepare",
    "register",
    "set_runtime",
    "unpack",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    _importlib.import_module(f"{__name__}.integrations.registration").register()
    value = getattr(_importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _arm() -> None:
    """`import optimum_zsaq` alone is enough to load checkpoints, whenever transformers is imported."""
    try:
        _importlib.import_module(f"{__name__}.autoload").install()
    except Exception as error:  # this module is loaded at the end of `import torch`, which must never break
        import warnings

        warnings.warn(f"optimum-zsaq could not arm its autoload: {error!r}", stacklevel=2)


_arm()
