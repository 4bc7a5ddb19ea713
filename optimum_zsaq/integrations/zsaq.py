"""ZSAQ's config; `zero_shot.py` has what it asks for."""

import copy
from typing import Any

from torch import nn

from ..algorithms.minimax import MinimaxSettings
from ..algorithms.sharpness import SharpnessSettings
from .configs import ALGORITHMS, RANGE_METHODS, LowBitConfig
from .forms import SHORTEST
from .writing import describe_generator


STARTS = ("auto", "compensated", "rounding")
AUTOCASTS = ("auto", "bfloat16", "float32")
_MINIMAX = {
    "steps": 200,
    "batch_size": None,
    "learning_rate": None,
    "scale_learning_rate": None,
    "generator_every": 0,
    "generator_learning_rate": 1e-3,
    "entropy": 0.1,
    "output_weight": None,
    "hidden_weight": None,
    "sharp_from": 0.0,
}
_TOKENS = {"batch_size": 2**10, "written_sequences": 2**16, "start_sequences": 2**14}  # what None stands for, in tokens
_RATES = {2: (2e-4, 1e-4), 3: (1e-4, 1e-4)}  # of weights and of step sizes, by the bits of a weight
_ONE_SCALE = (3e-4, 1e-4)  # at 2 bits with one scale a matrix
_GENTLE = (3e-5, 3e-5)  # from 4 bits on, where there is little to be won; with coarser inputs as at 3 bits
_COARSE_INPUTS = 4  # bits
_USUAL = {"output_weight": 0.0, "hidden_weight": 1.0}
# Of decoders, whose groups have step sizes of some 0.01: our choice, measured in docs/methods/language_models.md
_OF_DECODERS = {"output_weight": 1.0, "hidden_weight": 0.0, "scale_learning_rate": 1e-6}
_SHARPNESS = {"rho": 0.0, "adaptive": False, "perturb": "quantized"}
_OWN = {
    "sequence_length": None,
    "generator": "auto",
    "written_sequences": None,
    "start": "auto",
    "start_sequences": None,
    "autocast": "auto",
    "guard": True,
    "state": None,
}


class ZSAQConfig(LowBitConfig):
    """Zero-shot quantization: training without data, against the float model, on inputs that a generator makes.

    Args:
        steps (`int`): student steps.
        batch_size (`int`, *optional*): sequences a step; None: as many as make 1,024 tokens, if all were the longest, of a
            model that writes, and 2,048 of another, whose sequences are of all lengths.
        sequence_length (`int`, *optional*): tokens of the longest sequence; None: 32 for encoder-decoder models that write,
            else 128, or what the model has positions for.
        learning_rate, scale_learning_rate (`float`, *optional*): of the weights, and of the step sizes of weights and
            static inputs; None: 2e-4 and 1e-4 at 2 bits (3e-4 with one scale a matrix), both 1e-4 at 3 bits or with inputs
            of at most 4, else 3e-5; step sizes of decoders 1e-6.
        generator: "noise": tokens drawn from a guess of how frequent each is; "teacher": what the model itself writes (a
            decoder), or answers to noise (an encoder-decoder model); the path or Hub id of a causal language model, or one
            in memory, which writes text; "auto": "teacher" where the model can write, else "noise"; or
            a `Source` of your own. Its name is stored.
        written_sequences (`int`, *optional*): how many sequences are written, before training, and drawn from; None:
            65,536 tokens.
        start (`str`): "compensated": the codes from which training starts make up for each other's errors, see
            `algorithms/compensation.py`; "rounding": each weight is rounded on its own; "auto": compensated where a model
            wrote the inputs, rounding where they are drawn from a prior, to which compensation is fitted too closely.
        start_sequences (`int`, *optional*): generated sequences that "compensated" looks at; None: 16,384 tokens.
        rho (`float`), adaptive (`bool`), perturb (`str`): SAM, see `SharpnessSettings`; rho=0.0 is AdamW.
        sharp_from (`float`): share of the steps that are made before SAM begins.
        generator_every (`int`), generator_learning_rate (`float`), entropy (`float`): ascent of the generator, see
            `MinimaxSettings`; generator_every=0 leaves it as it starts.
        output_weight, hidden_weight (`float`, *optional*): what the discrepancy consists of; None: hidden states alone
            (0 and 1), of decoders outputs alone (1 and 0).
        autocast (`str`): dtype of the matmuls while training: "bfloat16", "float32", or "auto": bfloat16 where the
            processor multiplies it. Weights are float32.
        guard (`bool`): give back the best state that is no worse than rounding on inputs of every kind (`Guard`), in the
            worst case rounding; False: what training ends with.
        state (`str`, *optional*): file that the state of training is kept in; a run that was interrupted and is started
            again with it goes on, bit for bit. It is removed at the end. Not stored.
        seed (`int`): of the generator.
        **fields: those of `LowBitConfig`.

    Raises:
        ValueError: see `LowBitConfig`, `MinimaxSettings` and `SharpnessSettings`.

    Source: https://huggingface.co/papers/2310.13315; every default is our choice (docs/methods/zsaq.md), the
    paper's are unknown to us.
    """

    algorithm = "zsaq"
    knows_energies = True
    range_methods = (*RANGE_METHODS, "energy")

    def __init__(self, **fields: Any):
        for name, default in (_MINIMAX | _SHARPNESS | _OWN).items():
            setattr(self, name, fields.pop(name, default))
        super().__init__(**fields)

    @classmethod
    def _fields(cls) -> list[str]:
        return [*_MINIMAX, *_SHARPNESS, *_OWN, *super()._fields()]

    def runs_float_model(self, model: nn.Module) -> bool:
        """Always."""
        return True

    def _check_values(self) -> None:
        super()._check_values()
        self.settings()
        length = self.sequence_length
        if length is not None and (not isinstance(length, int) or length < SHORTEST):
            raise ValueError(f"sequence_length={length!r} is too short; use an integer of at least {SHORTEST}, or None")
        for name in ("written_sequences", "start_sequences"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}={count!r} is no count; use an integer of at least 1, or None")
        for name, allowed in (("start", STARTS), ("autocast", AUTOCASTS), ("guard", (True, False))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use one of {allowed}")
        if self.start == "compensated" and self.ranges == "ternary":
            raise ValueError("start='compensated' does not go with ranges='ternary'; use start='rounding' or ranges='mse'")
        if not self.generator or self.generator is True:
            raise ValueError(f"generator={self.generator!r} is none; use 'auto', 'noise', 'teacher', a path or a model")

    def settings(self) -> MinimaxSettings:
        """What `algorithms/minimax.py` is given."""
        sharpness = SharpnessSettings(**{name: getattr(self, name) for name in _SHARPNESS})
        given = {name: getattr(self, name) for name in _MINIMAX}
        rate, scale_rate = self._usual_rates()
        usual = {**_USUAL, "batch_size": MinimaxSettings.batch_size}
        usual |= {"learning_rate": rate, "scale_learning_rate": scale_rate}
        given |= {name: value for name, value in usual.items() if given[name] is None}
        return MinimaxSettings(sharpness=sharpness, **given)

    def _usual_rates(self) -> tuple[float, float]:
        """Of weights and of step sizes, where nobody gave them: our choice, measured in docs/methods/zsaq_forms.md."""
        if (self.weight_bits, self.granularity) == (2, "tensor"):
            return _ONE_SCALE
        coarse_inputs = self.activation_bits is not None and self.activation_bits <= _COARSE_INPUTS
        return _RATES.get(self.weight_bits, _RATES[3] if coarse_inputs else _GENTLE)

    def sized(self, longest: int, batch_tokens: int = _TOKENS["batch_size"], decoder: bool = False) -> "ZSAQConfig":
        """A copy whose values are set where they depend on the model.

        Args:
            longest (`int`): tokens of the longest sequence.
            batch_tokens (`int`): tokens of a step, if all sequences were the longest.
            decoder (`bool`): whether the model is a causal language model.
        """
        found = copy.copy(self)
        for name, tokens in {**_TOKENS, "batch_size": batch_tokens}.items():
            if getattr(self, name) is None:
                setattr(found, name, max(1, tokens // longest))
        for name, value in _OF_DECODERS.items() if decoder else ():
            if getattr(self, name) is None:
                setattr(found, name, value)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The JSON that is stored: of the generator only its name."""
        plain = copy.copy(self)
        plain.generator = describe_generator(self.generator)
        stored = super(ZSAQConfig, plain).to_dict()
        del stored["state"]
        return stored


ALGORITHMS[ZSAQConfig.algorithm] = ZSAQConfig
