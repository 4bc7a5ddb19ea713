"""ZSAQ for transformers' models: its config, and training while a model loads."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.generators import NoiseGenerator, SequenceForm, token_prior
from ..algorithms.minimax import Minimax, MinimaxSettings
from ..algorithms.sharpness import SharpnessSettings
from ..surgery import pack, prepare
from .configs import ALGORITHMS, LowBitConfig
from .data import complete_batch, find_tokenizer, special_tokens
from .recipe import calibrate_on_load


_SHORTEST = 5  # tokens of the shortest sequence, special ones included
_SETTINGS = {
    "steps": 300,
    "batch_size": 32,
    "sequence_length": 24,
    "learning_rate": 3e-4,
    "scale_learning_rate": 3e-4,
    "rho": 0.0,
    "adaptive": False,
    "perturb": "quantized",
    "generator_every": 0,
    "generator_learning_rate": 1e-3,
    "entropy": 0.1,
    "output_weight": 0.0,
    "hidden_weight": 1.0,
}


class ZSAQConfig(LowBitConfig):
    """Zero-shot quantization: training without data, against the float model, on inputs that a generator makes.

    Args:
        steps (`int`), batch_size (`int`), sequence_length (`int`): student steps, sequences a step, tokens of the longest.
        learning_rate, scale_learning_rate (`float`): of the weights and of their step sizes.
        rho (`float`), adaptive (`bool`), perturb (`str`): SAM, see `SharpnessSettings`; rho=0.0 is AdamW.
        generator_every (`int`), generator_learning_rate (`float`), entropy (`float`): ascent of the generator, see
            `MinimaxSettings`; generator_every=0 leaves it as the prior over tokens that it starts as.
        output_weight, hidden_weight (`float`): what the discrepancy consists of.
        seed (`int`): of the generator.
        **fields: those of `LowBitConfig`.

    Raises:
        ValueError: see `LowBitConfig`, `MinimaxSettings` and `SharpnessSettings`.

    Source: https://huggingface.co/papers/2310.13315; every default is our choice, the paper's are unknown to us.
    """

    algorithm = "zsaq"
    trains_on_load = True

    def __init__(self, **fields: Any):
        for name, default in _SETTINGS.items():
            setattr(self, name, fields.pop(name, default))
        super().__init__(**fields)

    @classmethod
    def _fields(cls) -> list[str]:
        return [*_SETTINGS, *super()._fields()]

    def _check_values(self) -> None:
        super()._check_values()
        self.settings()
        if not isinstance(self.sequence_length, int) or self.sequence_length < _SHORTEST:
            raise ValueError(
                f"sequence_length={self.sequence_length!r} is too short; use an integer of at least {_SHORTEST}"
            )

    def settings(self) -> MinimaxSettings:
        """What `algorithms/minimax.py` is given."""
        own = {name: getattr(self, name) for name in _SETTINGS}
        del own["sequence_length"]
        sharpness = SharpnessSettings(own.pop("rho"), own.pop("adaptive"), own.pop("perturb"))
        return MinimaxSettings(sharpness=sharpness, **own)


ALGORITHMS[ZSAQConfig.algorithm] = ZSAQConfig


@torch.enable_grad()
def train_on_load(model: PreTrainedModel, config: ZSAQConfig) -> dict[str, Any]:
    """Make a float model that was just loaded into a trained low-bit one, in place.

    Returns:
        `dict`: what the data was: kind, count, seed and the losses of the first and the last steps.

    Raises:
        ValueError: weights that were not in the checkpoint: an untrained head has no answers to learn.
    """
    _check_all_read(model)
    packed = config.packed  # `prepare` notes in the config what the model is now
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.data.float()
    teacher = copy.deepcopy(model)
    prepare(model, config.scheme(), config.ranges)
    calibrate_on_load(model, config)
    generator = _generator(teacher, config)
    settings = replace(config.settings(), output="mse" if _is_regression(model) else "kl")
    run = Minimax(teacher, model, generator, settings, _embed, lambda batch: complete_batch(model, batch))
    losses = []
    with tqdm(total=config.steps, desc="Training without data", unit="step", leave=False) as bar:
        for _ in range(config.steps):
            losses.append(run.step()["loss"])
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    model.zero_grad(set_to_none=True)
    if packed:
        pack(model)
    for name, p in model.named_parameters():
        if p.is_floating_point() and name in dtypes and not name.endswith("_scale"):
            p.data = p.data.to(dtypes[name])
    tenth = max(1, config.steps // 10)
    return {
        "kind": "generated token sequences",
        "count": config.steps * config.batch_size,
        "seed": config.seed,
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
    }


def _check_all_read(model: PreTrainedModel) -> None:
    new = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    if new:
        raise ValueError(
            f"the checkpoint has no {new[:3]}: ZSAQ trains against the float model's answers, which an untrained head does "
            "not have; fine-tune the float model first, or load it without that head (AutoModel)"
        )


def _is_regression(model: PreTrainedModel) -> bool:
    one = type(model).__name__.endswith("SequenceClassification") and model.config.num_labels == 1
    return one or model.config.problem_type == "regression"


def _generator(teacher: PreTrainedModel, config: ZSAQConfig) -> NoiseGenerator:
    try:
        tokenizer = find_tokenizer(teacher)
    except ValueError:
        tokenizer = None
    first, last, special, padding = special_tokens(teacher, tokenizer)
    shortest = min(config.sequence_length, max(_SHORTEST, len(first) + len(last) + 1))
    form = SequenceForm(first, last, shortest, config.sequence_length, padding)
    table = teacher.get_input_embeddings().weight
    return NoiseGenerator(table, token_prior(table, special), form, seed=config.seed)


def _embed(model: nn.Module, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)
