"""Module-wise reconstruction (MREM): stages of a model learn to return what the float model's stages return.

    min over w_n, s_n of  sum over the blocks l of stage n of  |f^_l - f_l|^2 / |f_l|^2

over weights w and step sizes s, with straight-through gradients that never leave the stage: NeurIPS 2022, "Towards
Efficient Post-training Quantization of Pre-trained Language Models". `sequential.py` (MREM-S) trains one stage after the
other, each on the outputs of the quantized stages before it; `parallel.py` (MREM-P) all at once. The division by
|f_l|^2, the model's own outputs as one more term, and every number here are our choice; the paper's are unknown to us.
"""

import math
from collections.abc import Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.common import SCALES
from ..surgery import low_bit_layers
from .compensation import CompensationSettings, check_compensable, compensate_units
from .minimax import keep_signs, warm_cosine
from .replay import Replay, units
from .stages import OUTPUTS, Memory, Stage, run_stage


TARGETS = ("all", "last")
STARTS = ("compensated", "rounding")
SIZES = ("all", "position")
MASKS = ("attention_mask", "decoder_attention_mask")
_SMALLEST = 1e-12  # size of a state that an error is divided by

Batch = dict[str, Any]


@dataclass(frozen=True)
class ReconstructionSettings:
    """How to train.

    Args:
        stages (`int`): modules in the paper's sense.
        steps (`int`): of each stage, one batch a step.
        learning_rate (`float`): of the weights, AdamW without weight decay; linear warm-up over a tenth of the steps, then
            a cosine to zero.
        scale_learning_rate (`float`): of the step sizes of weights and static inputs.
        targets (`str`): "all": the state after each block of the stage is learned; "last": that after its last block.
        output_weight (`float`): of the error of the model's own outputs (logits, or pooler and last state), which the
            last stage learns too; 0: only block outputs are learned, and a head or pooler stays as its start made it.
        relative_to (`str`): what an error is divided by: "all": the size of the outputs at all positions together;
            "position": that at its own position, so that one huge state does not outweigh the others.
        max_norm (`float`): gradients are clipped to this 2-norm.
        autocast (`torch.dtype`, *optional*): of the matmuls, such as bfloat16; weights and optimizer stay float32.
        start (`str`): "compensated": before a stage is trained, its codes are made to make up for each other's errors
            (`compensation.py`); "rounding": each weight is rounded on its own.
        start_batches (`int`): batches that "compensated" looks at, spread evenly over all.
        start_ranges (`str`, *optional*): "energy": "compensated" finds ranges anew, see `CompensationSettings`.
        cache (`int`, *optional*): bytes of activations that MREM-S holds in memory, the rest lie on disk; None: all.
        seed (`int`): of the order of the batches.
        queue (`int`): MREM-P's t0: batches that fill each queue before training begins, and how many steps behind a stage's
            inputs are then.
        forcing (`float`): MREM-P's T0 as a share of the steps, 0 to 1: how long the float stages' outputs are mixed into a
            stage's inputs; 0: never.

    Raises:
        ValueError: a value out of range.
    """

    stages: int = 3
    steps: int = 240
    learning_rate: float = 3e-4
    scale_learning_rate: float = 3e-4
    targets: str = "all"
    output_weight: float = 1.0
    relative_to: str = "all"
    max_norm: float = 1.0
    autocast: torch.dtype | None = None
    start: str = "compensated"
    start_batches: int = 8
    start_ranges: str | None = None
    cache: int | None = None
    seed: int = 0
    queue: int = 8
    forcing: float = 0.5

    def __post_init__(self):
        for name in ("stages", "steps", "start_batches", "queue"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is no count; use an integer of at least 1")
        for name in ("learning_rate", "scale_learning_rate", "max_norm"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0.0 < value < math.inf):
                raise ValueError(f"{name}={value!r} is not allowed; use a number above 0")
        if self.cache is not None and (not isinstance(self.cache, int) or self.cache < 0):
            raise ValueError(f"cache={self.cache!r} is no number of bytes; use an integer of at least 0, or None for all")
        if not (isinstance(self.output_weight, int | float) and 0.0 <= self.output_weight < math.inf):
            raise ValueError(f"output_weight={self.output_weight!r} is not allowed; use a number of at least 0")
        if not (isinstance(self.forcing, int | float) and 0.0 <= self.forcing <= 1.0):
            raise ValueError(f"forcing={self.forcing!r} is no share of the steps; use a number from 0 to 1")
        for name, allowed in (("targets", TARGETS), ("start", STARTS), ("relative_to", SIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {allowed}")


def reconstruction_error(
    found: dict[str, Tensor], wanted: dict[str, Tensor], batch: Batch, output_weight: float, relative_to: str = "all"
) -> Tensor:
    """The sum over what is wanted of |found - wanted|^2 / |wanted|^2.

    Args:
        found, wanted (`dict[str, Tensor]`): see `stages.run_stage`; what is not wanted does not count.
        batch (`dict`): what the model was called with; positions where a mask of their shape is 0 are left out.
        output_weight (`float`): of the model's own outputs.
        relative_to (`str`): "all": both are taken over all positions together; "position": the mean over the positions.

    Shapes: (B, L, D) or (B, D) each -> () float32.
    """
    total = torch.zeros((), device=next(iter(wanted.values())).device)
    for name, target in wanted.items():
        target = target.float()
        error, size = (found[name].float() - target).square().sum(dim=-1), target.square().sum(dim=-1)
        masks = [batch[m] for m in MASKS if batch.get(m) is not None and batch[m].shape == error.shape]
        if masks:
            counts = torch.stack(masks).bool().all(dim=0)
            error, size = error[counts], size[counts]
        if relative_to == "position":
            relative = (error / size.clamp(min=_SMALLEST)).mean()
        else:
            relative = error.sum() / size.sum().clamp(min=_SMALLEST)
        total = total + (output_weight if name in OUTPUTS else 1.0) * relative
    return total


def wanted_states(states: dict[str, Tensor], stage: Stage, settings: ReconstructionSettings) -> dict[str, Tensor]:
    """What a stage is to learn, of what the float stage returned."""
    skipped = set(stage.blocks[:-1]) if settings.targets == "last" else set()
    return {name: state for name, state in states.items() if name not in skipped}


class StageTraining:
    """The training of one stage of a student.

    Args:
        student (`nn.Module`): fake-quantized, in evaluation mode, frozen.
        stage (`Stage`): whose Parameters are trained: weights, step sizes, scales of static inputs.
        settings (`ReconstructionSettings`): how.
        frozen (`Container[str]`): names of Parameters that are not trained all the same.
    """

    def __init__(self, student: nn.Module, stage: Stage, settings: ReconstructionSettings, frozen: Container[str] = ()):
        self.student, self.stage, self.settings = student, stage, settings
        layers = [layer for _, layer in low_bit_layers(student) if layer.owner is layer]
        kept = {id(m._parameters[n]) for m in layers for n in SCALES if m._parameters.get(n) is not None}
        scales = {id(p) for m in layers for p in (m.weight_scale, m.input_scale) if p is not None}
        own = [student.get_parameter(name) for name in stage.parameters if name not in frozen]
        self.scales = [p for p in own if id(p) in scales]
        self.weights = [p for p in own if p.is_floating_point() and id(p) not in kept]
        self.optimizer, self.schedule = make_optimizer(self.weights, self.scales, settings)
        self.done = 0

    @torch.enable_grad()
    def step(self, batch: Batch, memory: Memory, wanted: dict[str, Tensor]) -> tuple[float, Memory]:
        """One step on one batch.

        Args:
            batch (`dict`): what the model is called with.
            memory (`Memory`): what the blocks before the stage are to answer.
            wanted (`dict[str, Tensor]`): what the float stage returned.

        Returns:
            `tuple`: the error before the step; the memory for the next stage, as this stage was before the step.

        Raises:
            FloatingPointError: the error is NaN or infinite. Nothing was changed by this step.
        """
        trained, dtype = [*self.weights, *self.scales], self.settings.autocast
        try:
            for p in trained:
                p.requires_grad_(True)
            with torch.autocast(trained[0].device.type, dtype) if dtype else nullcontext():
                states, kept = run_stage(self.student, self.stage, batch, memory)
            settings = self.settings
            error = reconstruction_error(states, wanted, batch, settings.output_weight, settings.relative_to)
            value = error.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{self.stage.title}: the reconstruction error became {value} at step {self.done + 1} of "
                    f"{self.settings.steps}; try a smaller learning_rate (now {self.settings.learning_rate})"
                )
            error.backward()
            nn.utils.clip_grad_norm_(trained, self.settings.max_norm)
            self.optimizer.step()
        finally:
            for p in trained:
                p.grad = None
                p.requires_grad_(False)
        self.schedule.step()
        self.done += 1
        return value, kept

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "parameters": own_tensors(self.student, self.stage),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        load_tensors(self.student, state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done = state["done"]


def make_optimizer(
    weights: list[nn.Parameter], scales: list[nn.Parameter], settings: ReconstructionSettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimizer and schedule; step sizes have a rate of their own and keep their sign."""
    groups = [
        {"params": weights, "lr": settings.learning_rate},
        {"params": scales, "lr": settings.scale_learning_rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    keep_signs(optimizer, scales)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, settings.steps))


def own_tensors(student: nn.Module, stage: Stage) -> dict[str, Tensor]:
    """The tensors that go with a stage, by name."""
    return {name: student.get_parameter(name).detach() for name in stage.parameters}


@torch.no_grad()
def load_tensors(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a student, by name."""
    for name, tensor in tensors.items():
        student.get_parameter(name).copy_(tensor)


def batch_order(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end: pass after pass over all of them, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def start_batches(count: int, settings: ReconstructionSettings) -> list[int]:
    """The numbers of the batches that a start looks at, of `count`."""
    wanted = min(count, settings.start_batches)
    return [i * count // wanted for i in range(wanted)]


def compensate_stage(
    teacher: nn.Module,
    student: nn.Module,
    stage: Stage,
    batches: Sequence[Batch],
    known: Sequence[tuple[Memory, Memory]],
    ranges: str | None = None,
) -> None:
    """Compensate the rounding errors of one stage, in place.

    Args:
        teacher, student (`nn.Module`): the float model and its fake-quantized copy.
        stage (`Stage`): which.
        batches (`Sequence[dict]`): those to look at.
        known (`Sequence[tuple]`): for each of them, what the stage is given in the teacher and in the student.
        ranges (`str`, *optional*): see `CompensationSettings`.
    """
    whole = replace(stage, outputs=True)  # a head is compensated, learned or not
    order = units(student, lambda: run_stage(student, whole, batches[0], known[0][1]))
    order = [u for u in order if u in stage.blocks or f"{u}.weight" in stage.parameters]
    returned = ({name: [k[side][of] for k in known] for name, of in stage.answers.items()} for side in (0, 1))
    replays = [Replay(model, batches, answers) for model, answers in zip((teacher, student), returned, strict=True)]
    compensate_units(tuple(replays), order, CompensationSettings(ranges=ranges))


def check_models(
    teacher: nn.Module, student: nn.Module, batches: Sequence[Batch], settings: ReconstructionSettings
) -> None:
    """Freeze both models in evaluation mode.

    Raises:
        ValueError: no batch; a student without a fake-quantized layer, or one that cannot start as the settings say.
    """
    if not batches:
        raise ValueError("no batch to reconstruct outputs on; give at least one")
    if not any(True for _ in low_bit_layers(student)):
        raise ValueError("the student has no fake-quantized layer to train; call prepare(model, scheme) first")
    if settings.start == "compensated":
        check_compensable(student)
    for model in (teacher, student):
        model.eval().requires_grad_(False)
