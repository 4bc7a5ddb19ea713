"""Zero-shot training (ZSAQ) by transformers' Trainer: several processes, logging, checkpoints, schedules."""

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..algorithms.generators import Generator
from ..algorithms.minimax import Execution, MinimaxSettings, keep_signs
from ..algorithms.sharpness import SharpnessSettings
from ..integrations.zero_shot import make_generator, make_minimax
from ..integrations.zsaq import ZSAQConfig
from ..surgery import low_bit_layers
from .common import check_trainable, make_optimizer, not_followed
from .packed_saving import PackedSaving


logger = logging.getLogger(__name__)

_DEFAULTS = ZSAQConfig()
_STATE = "minimax.pt"
_UNUSED = ("train_dataset", "compute_loss_func", "model_init")


@dataclass
class ZSAQArguments(TrainingArguments):
    """`TrainingArguments` and what zero-shot training adds; defaults as in `ZSAQConfig`, whose rates for encoders at 3
    bits these are; it takes 2e-4 at 2 bits, and gentler ones from 4 bits on and for decoders.

    A step takes per_device_train_batch_size * gradient_accumulation_steps sequences a process, which are drawn anew for
    each step: there are no epochs, max_steps is the length. Weights are float32; bf16 is the dtype of matmuls.

    Args:
        rho (`float`), adaptive (`bool`), perturb (`str`): SAM, see `SharpnessSettings`; rho=0.0: none.
        sharp_from (`float`): share of the steps that are made before SAM begins.
        scale_learning_rate (`float`): of the step sizes; learning_rate is the weights'.
        generator_every (`int`), generator_learning_rate (`float`), entropy (`float`): ascent of the generator, see
            `MinimaxSettings`; generator_every=0 leaves it as it starts.
        output_weight, hidden_weight (`float`): what the discrepancy consists of.
        sequence_length (`int`, *optional*), written_sequences (`int`, *optional*): of the generator, see `ZSAQConfig`.

    Raises:
        ValueError: a value out of range (see `ZSAQConfig`, `MinimaxSettings`, `SharpnessSettings`); max_steps is below 1.

    Source: https://huggingface.co/papers/2310.13315; the numbers are our choice.
    """

    max_steps: int = field(default=_DEFAULTS.steps, metadata={"help": "Student steps."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the weights (ZSAQConfig at 2 bits: 2e-4)."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences drawn for a step and a device."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of both learning rates."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or below 1 their share of all."})
    rho: float = field(default=_DEFAULTS.rho, metadata={"help": "Radius of sharpness-aware training; 0: none."})
    adaptive: bool = field(default=_DEFAULTS.adaptive, metadata={"help": "ASAM instead of SAM."})
    perturb: str = field(default=_DEFAULTS.perturb, metadata={"help": "'quantized' or 'latent' weights are perturbed."})
    sharp_from: float = field(default=_DEFAULTS.sharp_from, metadata={"help": "Share of the steps before SAM begins."})
    scale_learning_rate: float = field(default=1e-4, metadata={"help": "Of the step sizes."})
    generator_every: int = field(
        default=_DEFAULTS.generator_every, metadata={"help": "Student steps for a step of the generator; 0: none."}
    )
    generator_learning_rate: float = field(
        default=_DEFAULTS.generator_learning_rate, metadata={"help": "Of the generator."}
    )
    entropy: float = field(
        default=_DEFAULTS.entropy, metadata={"help": "Weight of the entropy of the generator's choices."}
    )
    output_weight: float = field(
        default=MinimaxSettings.output_weight,
        metadata={"help": "Weight of the outputs in the discrepancy (ZSAQConfig for decoders: 1)."},
    )
    hidden_weight: float = field(
        default=MinimaxSettings.hidden_weight,
        metadata={"help": "Weight of the hidden states in the discrepancy (ZSAQConfig for decoders: 0)."},
    )
    sequence_length: int | None = field(
        default=_DEFAULTS.sequence_length, metadata={"help": "Tokens of the longest sequence."}
    )
    written_sequences: int | None = field(
        default=_DEFAULTS.written_sequences, metadata={"help": "Sequences that the generator's model writes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={self.max_steps!r} is no count, and data that is generated has no epochs; "
                f"use max_steps={_DEFAULTS.steps}"
            )
        self.settings()
        self.generator_config("auto")

    def settings(self) -> MinimaxSettings:
        """What `algorithms/minimax.py` is given."""
        names = ("learning_rate", "scale_learning_rate", "generator_every", "generator_learning_rate", "entropy")
        names += ("output_weight", "hidden_weight", "sharp_from")
        clip = {"max_norm": self.max_grad_norm} if self.max_grad_norm else {}
        return MinimaxSettings(
            steps=self.max_steps,
            batch_size=self.train_batch_size,
            sharpness=SharpnessSettings(self.rho, self.adaptive, self.perturb),
            autocast=torch.bfloat16 if self.bf16 else None,
            **{name: getattr(self, name) for name in names},
            **clip,
        )

    def generator_config(self, generator: Any) -> ZSAQConfig:
        """What `make_generator` is given."""
        length, count = self.sequence_length, self.written_sequences
        return ZSAQConfig(generator=generator, sequence_length=length, written_sequences=count, seed=self.seed)


class ZSAQTrainer(PackedSaving, Trainer):
    """Trains a fake-quantized student to answer as its float teacher, without data; see `algorithms/minimax.py`.

    The student is trained without dropout. `train`, checkpoints, `resume_from_checkpoint` (bit for bit), logging, callbacks
    and `evaluate` are the Trainer's; `save_model` and `push_to_hub` write the packed model (`PackedSaving`). Logs have
    "loss", D at the weights; with SAM "sharp_loss", D at the perturbed ones; "ascent", D before the generator's steps.

    Args:
        model (`PreTrainedModel`): the student: `prepare(model, scheme)`, or loaded with `PreQuantConfig(packed=False)`.
        args (`ZSAQArguments`, *optional*): how to train.
        teacher (`PreTrainedModel`): the float model, which is frozen.
        generator: as in `ZSAQConfig`, or a `Generator`, made of the teacher's table.
        **options: the Trainer's, but for a train_dataset and what goes with it.

    Raises:
        ValueError: the student has no fake-quantized layer, is packed, shares weights with the teacher or is not float32;
            the teacher is in low bits; an option that this training cannot follow: DeepSpeed, FSDP, sharded models, fp16,
            activation checkpointing, auto_find_batch_size, optimizers with parameter groups of their own, training data.
        TypeError: args are no `ZSAQArguments`.
        FloatingPointError: by `train`, the discrepancy became NaN; checkpoints written before stay.

    Source: https://huggingface.co/papers/2310.13315.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ZSAQArguments | None = None,
        *,
        teacher: PreTrainedModel,
        generator: PreTrainedModel | Generator | str | Path = "auto",
        **options: Any,
    ):
        args = ZSAQArguments("tmp_trainer") if args is None else args
        _check_arguments(args, options)
        _check_models(model, teacher)
        super().__init__(model, args, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(_not_followed("DeepSpeed or FSDP, asked for by the launcher,"))
        teacher.to(args.device)
        if not isinstance(generator, Generator):
            generator = make_generator(teacher, args.generator_config(generator))
        self.minimax = make_minimax(teacher, model, generator, args.settings())
        self._figures: dict[str, list[float]] = defaultdict(list)
        if self.optimizer is not None:
            keep_signs(self.optimizer, self.minimax.scales)

    def get_train_dataloader(self) -> DataLoader:
        """As many empty batches as there are to make: the data is drawn within a step."""
        count = self.args.max_steps * self.args.gradient_accumulation_steps * self._train_batch_size
        return DataLoader(range(count), batch_size=self._train_batch_size, collate_fn=_nothing)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with a group for the step sizes, which stay positive and do not decay.

        Raises:
            ValueError: it makes groups of its own.
        """
        if self.optimizer is not None:
            return self.optimizer
        run = self.minimax
        self.optimizer = make_optimizer(self, run.weights, run.scales, self.args.scale_learning_rate)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The gradients of a whole step at its last micro-batch, nothing at those before.

        Returns:
            `Tensor`: D of the step, the mean over all processes, or 0.

        Raises:
            FloatingPointError: see `Minimax.step`.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.eval()
        run = self.minimax
        run.execution, run.done = self._execution(model), self.state.global_step
        figures = run.step()
        for name, value in figures.items():
            self._figures[name].append(value)
        return torch.tensor(figures["loss"], device=self.args.device)

    def _execution(self, model: nn.Module) -> Execution:
        def average(tensor: Tensor) -> None:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.args.world_size)

        return Execution(
            student=model,
            backward=self.accelerator.backward,  # the Trainer's Accelerator does not divide by the micro-batches
            parts=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
            unsynced=lambda: self.accelerator.no_sync(model),
            **({"average": average} if self.args.world_size > 1 else {}),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the means of the figures beside "loss" since the last time."""
        if "loss" in logs:
            means = {name: sum(values) / len(values) for name, values in self._figures.items() if name != "loss"}
            logs = {**logs, **means}
            self._figures.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: batches are made within a step."""
        return 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.minimax.alternation_state(), Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _STATE
        if path.is_file():
            self.minimax.load_alternation_state(torch.load(path, map_location="cpu", weights_only=True))
        else:
            logger.warning("%s has no %s: the generator starts anew", checkpoint, _STATE)


def _nothing(_: list[int]) -> dict[str, Tensor]:
    return {}


def _not_followed(what: str, instead: str = "leave it out") -> str:
    return not_followed(ZSAQTrainer, what, instead)


def _check_arguments(args: ZSAQArguments, options: dict[str, Any]) -> None:
    if not isinstance(args, ZSAQArguments):
        raise TypeError(f"args is a {type(args).__name__}; use ZSAQArguments, which takes the same and more")
    for name in _UNUSED:
        if options.get(name) is not None:
            raise ValueError(_not_followed(f"{name}=", "leave it out: the data is generated"))
    for name in ("deepspeed", "fsdp", "auto_find_batch_size", "activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name):
            raise ValueError(_not_followed(f"{name}={getattr(args, name)!r}"))
    if args.fp16:
        raise ValueError(_not_followed("fp16=True", "use bf16=True"))


def _check_models(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    check_trainable(model, "the student")
    if any(True for _ in low_bit_layers(teacher)):
        raise ValueError("the teacher is in low bits; use the float model that the student was made of")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(_not_followed("a student that is sharded", "load it without distributed_config"))
