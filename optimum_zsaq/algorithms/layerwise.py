"""Layer-wise reconstruction: every Linear layer learns what its float layer returns, one layer at a time.

The baseline that MREM is compared with: a layer is given what the quantized layers before it leave, and sees no other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import LowBitLayer
from .compensation import input_groups
from .reconstruction import (
    Batch,
    ReconstructionSettings,
    batch_order,
    check_models,
    make_optimizer,
    reconstruction_error,
)
from .replay import Call, Replay, layer_inputs, run, units


def reconstruct_layers(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    settings: ReconstructionSettings,
    watch: Callable[[str, float], None] = lambda layer, error: None,
) -> nn.Module:
    """Train the Linear layers of a student one after the other, in place; tables stay as they were rounded.

    Args:
        teacher (`nn.Module`): the float model.
        student (`nn.Module`): its fake-quantized copy.
        batches (`Sequence[dict]`): what both are called with.
        settings (`ReconstructionSettings`): `steps` of each layer, learning rates, `max_norm`, `seed`.
        watch (`Callable`): told each layer and its last error.

    Raises:
        ValueError: see `reconstruction.check_models` and `replay.units`.
    """
    check_models(teacher, student, batches, settings)
    replays = Replay(teacher, batches), Replay(student, batches)
    for unit in units(student, lambda: student(**batches[0])):
        calls = [replay.inputs(unit) for replay in replays]
        modules = [replay.model.get_submodule(unit) for replay in replays]

        def told(name: str, error: float, unit: str = unit) -> None:
            watch(f"{unit}.{name}" if name else unit, error)

        returned = _train_unit(*modules, *calls, batches, settings, told)
        for replay, outputs in zip(replays, returned, strict=True):
            replay.finish(unit, outputs)
    return student


def _train_unit(
    teacher: nn.Module,
    student: nn.Module,
    teacher_calls: list[Call],
    student_calls: list[Call],
    batches: Sequence[Batch],
    settings: ReconstructionSettings,
    watch: Callable[[str, float], None],
) -> tuple[list, list]:
    """The layers of a unit in the order in which they run; gives both units' outputs."""
    names = [name for group in input_groups(student, student_calls[0]) for name in group]
    float_inputs, outputs = layer_inputs(teacher, teacher_calls, [teacher.get_submodule(name) for name in names])
    for name, wanted in zip(names, float_inputs, strict=True):
        layer, float_layer = student.get_submodule(name), teacher.get_submodule(name)
        (found,), _ = layer_inputs(student, student_calls, [layer])
        pairs = [list(zip(x, y, strict=False)) for x, y in zip(found, wanted, strict=True)]
        if all(part and all(x.shape == y.shape for x, y in part) for part in pairs):  # a routed layer saw other tokens
            watch(name, _train_layer(layer, float_layer, pairs, batches, settings))
    return outputs, run(student, student_calls)


@torch.enable_grad()
def _train_layer(
    layer: LowBitLayer,
    float_layer: nn.Module,
    pairs: list[list[tuple[Tensor, Tensor]]],
    batches: Sequence[Batch],
    settings: ReconstructionSettings,
) -> float:
    """Train one layer on pairs of its input and the float layer's; gives its last error."""
    scales = [p for p in (layer.weight_scale, layer.input_scale) if p is not None]
    weights = [p for p in (layer.weight, layer.bias) if p is not None]
    optimizer, schedule = make_optimizer(weights, scales, settings)
    for p in (*weights, *scales):
        p.requires_grad_(True)
    for _, i in zip(range(settings.steps), batch_order(len(batches), settings.seed), strict=False):
        optimizer.zero_grad()
        states = {n: layer(x) for n, (x, _) in enumerate(pairs[i])}
        wanted = {n: float_layer(y).detach() for n, (_, y) in enumerate(pairs[i])}
        error = reconstruction_error(states, wanted, batches[i], 1.0)
        error.backward()
        nn.utils.clip_grad_norm_([*weights, *scales], settings.max_norm)
        optimizer.step()
        schedule.step()
    for p in (*weights, *scales):
        p.grad = None
        p.requires_grad_(False)
    return error.item()
