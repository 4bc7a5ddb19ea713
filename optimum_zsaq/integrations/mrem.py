"""MREM's config; `reconstruct.py` has what it asks for."""

import copy
import math
from typing import Any

from torch import nn

from ..algorithms.reconstruction import STARTS, ReconstructionSettings
from .configs import ALGORITHMS, RANGE_METHODS, LowBitConfig
from .zsaq import AUTOCASTS, SHORTEST


ZERO_SHOT = "zero-shot"
_SETTINGS = {
    "steps": None,
    "learning_rate": None,
    "scale_learning_rate": None,
    "targets": "all",
    "output_weight": None,
    "relative_to": None,
    "start": "auto",
    "queue": 8,
    "forcing": 0.5,
}
_OWN = {
    "stages": None,
    "parallel": False,
    "batch_size": None,
    "sequence_length": None,
    "start_samples": None,
    "autocast": "auto",
    "state": None,
    "cache_limit": None,
    "offload": False,
    "timeout": 600.0,
}
# What None stands for. Decoders: long sequences without padding, and gently; ours, docs/methods/language_models.md
_DEFAULTS = {
    False: {
        "steps": 120,
        "batch_size": 32,
        "sequence_length": 128,
        "start_samples": 256,
        "output_weight": 1.0,
        "relative_to": "all",
    },
    True: {
        "steps": 60,
        "batch_size": 8,
        "sequence_length": 256,
        "start_samples": 64,
        "output_weight": 0.0,  # logits at every position take many times the memory of a state
        "cache_limit": 0.25,
        "relative_to": "position",  # the first token's state is some hundred times as large as the others
        "scale_learning_rate": 1e-6,  # groups have step sizes of some 0.01
    },
}
_RATES = {False: {2: 3e-4, 3: 3e-4}, True: {2: 1e-3, 3: 3e-4}}  # by the bits of a weight; more is to be won at few
_USUAL_RATE = 1e-4
_NOT_STORED = ("state", "cache_limit", "offload", "timeout")


class MREMConfig(LowBitConfig):
    """Module-wise reconstruction: post-training quantization from some hundreds or thousands of unlabelled texts.

    The model is cut into stages of consecutive blocks, and each learns to return what the float stage returns.

    Args:
        calibration_data: a list of strings or of dicts with "text" and "text_pair", a `datasets.Dataset` with these
            columns, the path of a file that holds one; or "zero-shot": sequences from ZSAQ's generator, which needs no
            data. The model's own tokenizer reads it. Needed to quantize; never stored.
        calibration_samples (`int`): sequences used of it, from its beginning.
        stages (`int`, *optional*): into how many the model is cut; None: 4, or as many as it has blocks.
        steps (`int`, *optional*): of each stage; None: 120, of decoders 60.
        batch_size (`int`, *optional*): sequences a step; None: 32, of decoders 8. Batches are of texts of about the same
            length. A decoder's texts stand one behind the other, cut into sequences of one length.
        sequence_length (`int`, *optional*): tokens of a text that count, of a decoder those of a sequence; None: 128, of
            decoders 256.
        parallel (`bool`): False: one stage after the other, each on the outputs of the quantized stages before it (MREM-S).
            True: all stages at once, fed by queues (MREM-P); under torchrun each process trains one or more of them.
        learning_rate, scale_learning_rate (`float`, *optional*): of the weights, and of the step sizes of weights and
            static inputs; None: 3e-4 below 4 bits, where more is to be won, else 1e-4; of decoders 1e-3, 3e-4 and 1e-4
            at 2, 3 and more bits, and 1e-6 of step sizes.
        targets (`str`), output_weight (`float`, *optional*): which outputs are learned, see `ReconstructionSettings`; None:
            a weight of 1, of decoders 0.
        relative_to (`str`, *optional*): what their errors are relative to, see there; None: "all", of decoders "position".
        start (`str`): "compensated": the codes from which a stage's training starts make up for each other's errors;
            "rounding": each weight is rounded on its own; "auto": "rounding" for ternary weights and for 2 bits with one
            scale a matrix, where it is better, else "compensated".
        start_samples (`int`, *optional*): sequences that "compensated" looks at; None: 256, of decoders 64.
        queue (`int`), forcing (`float`): MREM-P's t0 in batches, and T0 as a share of the steps.
        autocast (`str`): dtype of the matmuls while training: "bfloat16", "float32", or "auto": bfloat16 where the
            processor multiplies it. Weights are float32.
        state (`str`, *optional*): file that finished stages (with `parallel`: all stages, every 25 steps) are kept in; a
            run that was interrupted and is started again with it goes on, bit for bit. It is removed at the end. Not
            stored.
        cache_limit (`float`, *optional*): GiB of activations that MREM-S keeps in memory, what is more lies in a temporary
            folder; None: all in memory, of decoders 0.25. Not stored.
        offload (`bool`): the float weights of all blocks lie in a temporary folder, and those of one stage at a time are
            in memory: for models that memory does not hold. A stage that is done is packed at once. Not with `parallel`,
            static activations or "zero-shot". Not stored.
        timeout (`float`): seconds that a process waits for another one before it gives up. Not stored.
        seed (`int`): of the order of the batches, and of the generator.
        **fields: those of `LowBitConfig`.

    Raises:
        ValueError: see `LowBitConfig` and `ReconstructionSettings`.

    Source: Bai et al., "Towards Efficient Post-training Quantization of Pre-trained Language Models", NeurIPS 2022;
    4 stages are the paper's, every other default is our choice (docs/methods/mrem.md).
    """

    algorithm = "mrem"
    knows_energies = True
    range_methods = (*RANGE_METHODS, "energy")

    def __init__(self, **fields: Any):
        for name, default in (_SETTINGS | _OWN).items():
            setattr(self, name, fields.pop(name, default))
        super().__init__(**{"calibration_samples": 1024, **fields})

    @classmethod
    def _fields(cls) -> list[str]:
        return [*_SETTINGS, *_OWN, *super()._fields()]

    def runs_float_model(self, model: nn.Module) -> bool:
        """Always."""
        return True

    def smoothing_for(self, model: nn.Module) -> float:
        """As in `LowBitConfig`; nothing moves in blocks that lie on disk."""
        return 0.0 if self.offload else super().smoothing_for(model)

    def _check_values(self) -> None:
        super()._check_values()
        for name in ("batch_size", "start_samples"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is no count; use an integer of at least 1")
        limit = self.cache_limit
        if limit is not None and not (isinstance(limit, int | float) and 0.0 <= limit < math.inf):
            raise ValueError(f"cache_limit={limit!r} is not allowed; use a number of GiB of at least 0, or None")
        if not (isinstance(self.timeout, int | float) and 0.0 < self.timeout < math.inf):
            raise ValueError(f"timeout={self.timeout!r} is not allowed; use a number of seconds above 0")
        self.settings(1 if self.stages is None else self.stages)
        length = self.sequence_length
        if length is not None and (not isinstance(length, int) or length < SHORTEST):
            raise ValueError(f"sequence_length={length!r} is too short; use an integer of at least {SHORTEST}, or None")
        switches = dict.fromkeys(("parallel", "offload"), (True, False))
        for name, allowed in {**switches, "autocast": AUTOCASTS, "start": ("auto", *STARTS)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use one of {allowed}")
        self._check_offload()
        if self.start == "compensated" and self.ranges == "ternary":
            raise ValueError("start='compensated' does not go with ranges='ternary'; use start='rounding' or ranges='mse'")

    def _check_offload(self) -> None:
        needs_all = {
            "parallel=True trains all stages at once": self.parallel,
            "activations='static' needs passes of the whole model": self.activations == "static",
            f"calibration_data={ZERO_SHOT!r} needs passes of the whole model": self.calibration_data == ZERO_SHOT,
            "packed=False keeps all float weights": not self.packed,
            f"smoothing={self.smoothing!r} needs a pass of the whole model": bool(self.smoothing),
        }
        found = [reason for reason, holds in needs_all.items() if holds]
        if self.offload and found:
            raise ValueError(f"offload=True does not go with this: {found[0]}; leave one of the two out")

    def _check_calibration_data(self) -> None:
        """It trains the model, whatever its inputs are."""

    def sized(self, decoder: bool) -> "MREMConfig":
        """A copy whose values are set where they depend on the model: a decoder or another one."""
        found = copy.copy(self)
        generated = isinstance(self.calibration_data, str) and self.calibration_data == ZERO_SHOT
        for name, value in _DEFAULTS[decoder].items():
            if getattr(self, name) is None and not (generated and name == "sequence_length"):  # as ZSAQ has it
                setattr(found, name, value)
        if found.learning_rate is None:
            found.learning_rate = _RATES[decoder].get(self.weight_bits, _USUAL_RATE)
        return found

    def settings(self, stages: int) -> ReconstructionSettings:
        """What `algorithms/reconstruction.py` is given, for a model cut into that many stages."""
        sizes = self.sized(False)
        batches = -(-sizes.start_samples // sizes.batch_size)
        own = {**{name: getattr(self, name) for name in _SETTINGS}, "start": self._start()}
        own |= {name: getattr(sizes, name) for name in _SETTINGS if name in _DEFAULTS[False]}
        for name in ("learning_rate", "scale_learning_rate"):
            own[name] = _RATES[False].get(self.weight_bits, _USUAL_RATE) if own[name] is None else own[name]
        cache = None if self.cache_limit is None else int(self.cache_limit * 2**30)
        return ReconstructionSettings(stages=stages, start_batches=batches, cache=cache, seed=self.seed, **own)

    def _start(self) -> str:
        coarse = self.ranges == "ternary" or (self.weight_bits, self.granularity) == (2, "tensor")
        return self.start if self.start != "auto" else "rounding" if coarse else "compensated"

    def to_dict(self) -> dict[str, Any]:
        """The JSON that is stored."""
        stored = super().to_dict()
        for name in _NOT_STORED:
            del stored[name]
        return stored


ALGORITHMS[MREMConfig.algorithm] = MREMConfig
