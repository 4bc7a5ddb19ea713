"""Sharpness- and quantization-aware training on task data, in transformers' Trainers (`algorithms/alternation.py`)."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.distributed.fsdp import is_fsdp_managed_module

from ..algorithms.alternation import Alternation, AlternationSettings
from ..algorithms.distance import discrepancy
from ..algorithms.minimax import MinimaxSettings, keep_signs
from ..algorithms.sharpness import SharpnessSettings
from ..integrations.zero_shot import is_regression
from ..surgery import low_bit_layers
from .common import check_trainable, make_optimizer, not_followed, warn_of_other_inputs
from .packed_saving import PackedSaving


_STATE = "squat.pt"


@dataclass
class _Fields:
    """What sharpness-aware training adds to a Trainer's arguments."""

    rho: float = field(default=0.01, metadata={"help": "Radius of the perturbation; 0: plain LSQ training."})
    adaptive: bool = field(default=False, metadata={"help": "ASAM instead of SAM."})
    perturb: str = field(default="quantized", metadata={"help": "'quantized' or 'latent' weights are perturbed."})
    alternate: str = field(
        default="step", metadata={"help": "How the objectives alternate: 'batch', 'step', 'epoch' or 'none'."}
    )
    climb_every: int = field(default=1, metadata={"help": "Which sharpness-aware steps climb; others reuse the last."})
    reuse_weight: float = field(default=0.2, metadata={"help": "How much steps in between take of the last climb."})
    scale_learning_rate: float = field(default=1e-4, metadata={"help": "Of the step sizes."})
    distillation: float = field(default=0.5, metadata={"help": "Share of the loss that a teacher has, if there is one."})

    def __post_init__(self):
        super().__post_init__()
        self.settings()
        if not (isinstance(self.scale_learning_rate, int | float) and 0.0 < self.scale_learning_rate < math.inf):
            raise ValueError(f"scale_learning_rate={self.scale_learning_rate!r} is not allowed; use a number above 0")
        if not (isinstance(self.distillation, int | float) and 0.0 <= self.distillation <= 1.0):
            raise ValueError(f"distillation={self.distillation!r} is no share of the loss; use a number from 0 to 1")

    def settings(self) -> AlternationSettings:
        """What `algorithms/alternation.py` is given."""
        sharpness = SharpnessSettings(self.rho, self.adaptive, self.perturb)
        return AlternationSettings(self.alternate, sharpness, self.climb_every, self.reuse_weight)


@dataclass
class SQuATArguments(_Fields, TrainingArguments):
    """`TrainingArguments` and what sharpness- and quantization-aware training adds; every default is our choice.

    Args:
        rho (`float`), adaptive (`bool`), perturb (`str`): SAM, see `SharpnessSettings`; 0.01 is our choice, measured in
            docs/methods/squat.md. rho=0.0 is plain quantization-aware training with learned step sizes (LSQ).
        alternate (`str`): how the objective of the weights and that of the step sizes share the steps, and what that costs:
            see `AlternationSettings`.
        climb_every (`int`), reuse_weight (`float`): cheaper sharpness (LookSAM), see `AlternationSettings`; 1: none.
        scale_learning_rate (`float`): of the step sizes, which do not decay; learning_rate is the weights'.
        distillation (`float`): with a teacher, the loss is (1 - distillation) * the model's own + distillation * the KL
            divergence of its outputs from the teacher's (the mean squared error of numbers).

    Raises:
        ValueError: a value out of range.

    Source: https://huggingface.co/papers/2210.07171.
    """


@dataclass
class SQuATSeq2SeqArguments(_Fields, Seq2SeqTrainingArguments):
    """As `SQuATArguments`, with those of `Seq2SeqTrainingArguments`."""


@dataclass
class _MicroBatch:
    """A part of a step and what its replay needs: the state of the random numbers before it, and the teacher's answer."""

    inputs: dict[str, Any]
    count: Tensor | int | None
    random: list[Tensor]
    answer: Any
    loss: Tensor | float = 0.0


class _SharpnessAware(PackedSaving):
    """For a subclass of `Trainer`; see `SQuATTrainer`."""

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        teacher: PreTrainedModel | None = None,
        **options: Any,
    ):
        args = self._arguments_class("tmp_trainer") if args is None else args
        self._check(model, args, teacher, options)
        super().__init__(model, args, *others, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(not_followed(type(self), "DeepSpeed or FSDP, asked for by the launcher,"))
        if self.is_distributed_loading_by_transformers and self.optimizer is not None:
            instead = "let it make one: use args.optim and args.learning_rate"
            raise ValueError(not_followed(type(self), "an optimizer for a model that is sharded", instead))
        if self.is_distributed_loading_by_transformers and args.load_best_model_at_end:
            instead = "transformers cannot load a checkpoint into it; load the best one yourself after training"
            raise ValueError(not_followed(type(self), "load_best_model_at_end=True with a model that is sharded", instead))
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(not_followed(type(self), "fp16, asked for by the launcher,", "use bf16=True"))
        self.teacher = teacher and teacher.eval().requires_grad_(False).to(args.device)
        self.alternation = Alternation(self.model, args.settings())
        self._window: list[_MicroBatch] = []
        self._answer: Any = None
        self._counting: bool | None = None
        self._figures: dict[str, list[float]] = defaultdict(list)
        if self.optimizer is not None:
            keep_signs(self.optimizer, self.alternation.step_sizes.parameters)

    def _check(self, model: Any, args: Any, teacher: Any, options: dict[str, Any]) -> None:
        refuse = partial(not_followed, type(self))
        if not isinstance(args, self._arguments_class):
            names = (type(args).__name__, self._arguments_class.__name__)
            raise TypeError("args is a {}; use {}, which takes the same and more".format(*names))
        if model is None or options.get("model_init") is not None:
            raise ValueError(refuse("model_init=", "give the model, loaded with quantization_config=SQuATConfig(...)"))
        if args.deepspeed:
            raise ValueError(refuse(f"deepspeed={args.deepspeed!r}", "its gradients are never whole; use DDP"))
        if args.fsdp:
            how = "load the model with distributed_config=DistributedConfig(fsdp_size=N)"
            raise ValueError(refuse(f"fsdp={args.fsdp!r}", how))
        if args.fp16:
            raise ValueError(refuse("fp16=True", "use bf16=True"))
        if args.n_gpu > 1:
            raise ValueError(refuse(f"one process for {args.n_gpu} GPUs", "start one process a GPU, with torchrun"))
        check_trainable(model, "the model", adapters=True)
        if teacher is not None and any(True for _ in low_bit_layers(teacher)):
            raise ValueError("the teacher is in low bits; use the float model that was fine-tuned on this task")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with a group for the step sizes, which stay positive and do not decay.

        Raises:
            ValueError: it makes groups of its own.
        """
        if self.optimizer is None:
            run = self.alternation
            self.optimizer = make_optimizer(self, run.weights, run.step_sizes.parameters, self.args.scale_learning_rate)
        return self.optimizer

    def train(self, *args: Any, **options: Any) -> Any:
        """The Trainer's; no climb of a training before is reused. Warns of inputs that only evaluation has."""
        self.alternation.restart()
        warn_of_other_inputs(self)
        return super().train(*args, **options)

    # A step ----------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list, Tensor | int | None]:
        """The Trainer's: the micro-batches of one step. A step that was not finished before is forgotten."""
        if self._window:
            self._window = []
            self.model.zero_grad()
        return super().get_batch_samples(*args, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's; at the last micro-batch of a step, the gradients become those of the step's objective.

        Raises:
            FloatingPointError: the loss is NaN or infinite. Nothing was changed by this step; nor is it by one whose
                gradient is not finite, which is found before the optimizer's step.
        """
        self._use_counts_that_count(inputs)
        part = _MicroBatch(inputs, num_items_in_batch, _random_state(self.args.device), self._ask_teacher(inputs))
        self._window.append(part)
        loss = part.loss = self._run(model, part)
        if self.accelerator.sync_gradients:
            self._finish(model)
        return loss

    def _run(self, model: nn.Module, part: _MicroBatch) -> Tensor:
        self._answer = part.answer
        try:
            return super().training_step(model, part.inputs, part.count)
        finally:
            self._answer = None

    def _finish(self, model: nn.Module) -> None:
        window, self._window = self._window, []
        loss = self._checked(sum(part.loss for part in window))

        def replay() -> None:
            found = []
            for number, part in enumerate(window, 1):
                last = number == len(window)
                with nullcontext() if last else self._unsynced(model), _replayed(part.random, self.args.device):
                    found.append(self._run(model, part))
            sharp = self._checked(sum(found))
            self._figures["sharp_loss"].append(sharp)
            self._figures["sharpness"].append(sharp - loss)

        self.alternation.finish(self.state.global_step, int(self.state.epoch or 0), replay)

    def _unsynced(self, model: nn.Module) -> Any:
        """A context in which gradients are not exchanged, as the Trainer makes it."""
        sharded = self.is_distributed_loading_by_transformers and is_fsdp_managed_module(self.model)
        return self._defer_fsdp_gradient_reduction() if sharded else self.accelerator.no_sync(model)

    def _checked(self, loss: Tensor) -> float:
        """The mean of all processes."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
        return self._finite(loss.item() / self.args.world_size, "loss")

    def _finite(self, value: float, what: str) -> float:
        if not math.isfinite(value):
            self.model.zero_grad()
            step, args = self.state.global_step, self.args
            raise FloatingPointError(
                f"the {what} became {value} at step {step + 1} of {self.state.max_steps}; the weights are those of step "
                f"{step}, and checkpoints stay as they are. Try a smaller learning_rate (now {args.learning_rate}) or "
                f"scale_learning_rate (now {args.scale_learning_rate})"
            )
        return value

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The Trainer's, which it asks for before each step of the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite(float(norm), "norm of the gradient")
        return norm

    def _use_counts_that_count(self, inputs: dict[str, Any]) -> None:
        """Many models take `num_items_in_batch` and ignore it; the Trainer then divides their loss by nothing.

        Source: https://github.com/huggingface/transformers/issues/47688.
        """
        several = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        own_loss = own_loss or type(self).compute_loss is not _SharpnessAware.compute_loss
        if self._counting is not None or not (several and self.model_accepts_loss_kwargs) or own_loss:
            return
        inputs = self._prepare_inputs(inputs)
        self.model.eval()  # the step puts it back
        with torch.no_grad():
            outputs = [self.model(**inputs, num_items_in_batch=count) for count in (1, 2)]
        one, two = (found["loss"] if isinstance(found, dict) else found[0] for found in outputs)
        telling = torch.isfinite(one) & (one != 0.0)  # a batch without targets tells nothing
        found = telling * (1 + (one != two).int())
        if self.args.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if found:
            self.model_accepts_loss_kwargs = self._counting = found.item() == 2

    # The loss --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any]) -> Any:
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            found = self.teacher(**self._prepare_inputs(inputs))
        if getattr(found, "logits", None) is None:
            raise ValueError(not_followed(type(self), f"a teacher that returns {type(found).__name__} without logits"))
        return found.logits

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's; while training with a teacher, mixed with the distance from its outputs."""
        mask = self._mask(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._answer is not None:
            scaled = self.loss_is_scaled_for_ga
            if scaled is None:
                counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = counted or self.compute_loss_func is not None
            parts = self.current_gradient_accumulation_steps if scaled else 1
            share = self.args.distillation
            loss = (1.0 - share) * loss + share / parts * self._distance(outputs, mask)
        return (loss, outputs) if return_outputs else loss

    def _mask(self, inputs: dict[str, Any]) -> Tensor | None:
        """Which positions of outputs a teacher is followed at: those that are no padding."""
        if self.model.config.is_encoder_decoder and "labels" in inputs:
            return inputs["labels"] != -100
        return inputs.get("attention_mask")

    def _distance(self, outputs: Any, mask: Tensor | None) -> Tensor:
        kind = "mse" if is_regression(self.model) else "kl"
        settings = MinimaxSettings(output=kind, output_weight=1.0, hidden_weight=0.0)
        answers = (self._answer, outputs["logits"])
        if self.model.config.problem_type == "multi_label_classification":  # each logit is of a choice of its own: z or 0
            answers, mask = tuple(torch.stack([z, torch.zeros_like(z)], dim=-1) for z in answers), None
        batch = {"input_ids": answers[1], **({} if mask is None else {"attention_mask": mask})}
        return discrepancy(*(SimpleNamespace(logits=found) for found in answers), batch, settings)

    # Logs and checkpoints --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with sharpness, the step sizes' drift and the share of clipped weights beside "loss"."""
        if "loss" in logs:
            means = {name: sum(values) / len(values) for name, values in self._figures.items() if values}
            sizes = self.alternation.step_sizes
            logs = {**logs, **means, **({"scale_drift": sizes.drift(), "clipped": sizes.clipped()} if sizes.all else {})}
            self._figures.clear()
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.alternation.state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = checkpoint and Path(checkpoint) / _STATE
        if path and path.is_file():
            self.alternation.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


class SQuATTrainer(_SharpnessAware, Trainer):
    """Trains a fake-quantized model on a task: weights towards flat minima (SAM), and their step sizes (LSQ).

    All that the Trainer does it does here too: `resume_from_checkpoint` (bit for bit), callbacks, `compute_metrics`,
    `load_best_model_at_end`, several processes (DDP). `save_model` and `push_to_hub` write the packed model, `checkpoint-*`
    keep the float weights (`PackedSaving`). Beside "loss" logs have "sharp_loss", the loss at the perturbed weights, and
    "sharpness", how much higher it is, both of the steps that climbed; "scale_drift", how far step sizes are from their
    start; "clipped", the share of weights outside the range of their codes.

    A low-bit model, packed or not, with an adapter of PEFT (`OutlierConfig`, LoRA) is trained too: of the adapter's values,
    which are what is perturbed. It has no step sizes to train, and what is saved is the adapter.

    A step's micro-batches (`gradient_accumulation_steps`) and processes are one batch: it is climbed on, and replayed at
    the perturbed weights with the same dropout, as a whole.

    Args:
        model (`PreTrainedModel` or `PeftModel`): loaded with `SQuATConfig`, or `prepare(model, scheme)`. What is frozen
            stays frozen, and so do the step sizes of a frozen weight; freeze before the trainer is made.
        args (`SQuATArguments`, *optional*): how to train.
        *others, **options: the Trainer's, but for `model_init`.
        teacher (`PreTrainedModel`, *optional*): a float model, fine-tuned on the task, whose outputs are followed too (see
            `SQuATArguments.distillation`); it is frozen.

    Raises:
        ValueError: the model has no fake-quantized layer to train, is packed or not float32, or a range has no start value;
            the teacher is in low bits or returns no logits; an option that this training cannot follow: DeepSpeed, `fsdp=`,
            fp16, several GPUs in one process, optimizers with parameter groups of their own, an optimizer or
            `load_best_model_at_end` for a model that is sharded.
        TypeError: args are no `SQuATArguments`.
        FloatingPointError: by `train`, the loss or a gradient became NaN or infinite; checkpoints written before stay.

    Source: https://huggingface.co/papers/2210.07171.
    """

    _arguments_class: type[TrainingArguments] = SQuATArguments


class SQuATSeq2SeqTrainer(_SharpnessAware, Seq2SeqTrainer):
    """As `SQuATTrainer`, on `Seq2SeqTrainer`: with `predict_with_generate=True` it is evaluated on what it writes."""

    _arguments_class: type[TrainingArguments] = SQuATSeq2SeqArguments


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU, and of the device."""
    devices = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *devices]


@contextmanager
def _replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """The random numbers that there were, for as long as the context lasts."""
    before = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for found in state[1:]:
        torch.get_device_module(device).set_rng_state(found, device)
