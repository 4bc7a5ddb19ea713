"""Rounding whose errors are made up for by the weights that are not rounded yet (GPTQ), unit by unit.

A layer's codes are to give (W X_float) from the inputs X that the low-bit layers before it leave:

    min over codes of |W' X - Q X|^2 + damping,    W' = W + alpha * W (X_float - X) X^T (X X^T)^-1

Column after column is rounded, and its error is spread over the columns to come by the inverse of X X^T: GPTQ,
https://huggingface.co/papers/2210.17323. W' corrects for what the layers before have changed (as GPTAQ does,
https://huggingface.co/papers/2504.02692); alpha = 1 is the whole correction, and less is better where inputs are few or
unlike real ones; how much is our choice.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import LowBitLayer
from ..ops import fake_quantize, stored_scale
from ..ops.affine import expand_slices
from .energy import counted, masks
from .refinement import can_refine, refine
from .replay import Call, Replay, layer_inputs, linear_layers, run, units


_ROUNDS = 2  # our choice, measured in docs/methods/language_models.md


@dataclass(frozen=True)
class CompensationSettings:
    """How errors are compensated.

    Args:
        alpha (`float`): share of the correction for changed inputs, 0 to 1.
        damping (`float`): added to the diagonal of X X^T, as a share of its mean.
        block (`int`): columns whose errors are spread among themselves before the rest of the matrix is touched.
        ranges (`str`, *optional*): "energy": each layer's ranges are found anew, for the energies of the inputs that it has
            here (`ops/ranges.py`); None: they stay as they are.
        rounds (`int`, *optional*): how often codes and ranges are made better for each other afterwards
            (`refinement.py`); None: twice where ranges are found anew, else not at all.

    Raises:
        ValueError: a value out of range.
    """

    alpha: float = 0.25
    damping: float = 0.01
    block: int = 128
    ranges: str | None = None
    rounds: int | None = None

    def __post_init__(self):
        if not (isinstance(self.alpha, int | float) and 0.0 <= self.alpha <= 1.0):
            raise ValueError(f"alpha={self.alpha!r} is no share; use a number from 0 to 1, such as 0.25")
        if not (isinstance(self.damping, int | float) and 0.0 < self.damping < math.inf):
            raise ValueError(f"damping={self.damping!r} is not allowed; use a number above 0, such as 0.01")
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block={self.block!r} is no count of columns; use at least 1, such as 128")
        if self.ranges not in (None, "energy"):
            raise ValueError(f"ranges={self.ranges!r} is not allowed; use 'energy', or None to leave ranges as they are")
        if self.rounds is None:
            object.__setattr__(self, "rounds", 0 if self.ranges is None else _ROUNDS)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise ValueError(f"rounds={self.rounds!r} is no count; use 0 or more, such as 2, or None")


@torch.no_grad()
def compensate(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    settings: CompensationSettings | None = None,
    watch: Callable[[str, float], None] = lambda unit, done: None,
) -> nn.Module:
    """Move the float weights of a student so that they round to codes whose errors make up for each other, in place.

    Layers that no batch reaches, and tables, are left as they were rounded.

    Args:
        teacher (`nn.Module`): the float model.
        student (`nn.Module`): its fake-quantized copy.
        batches (`Sequence[dict]`): what both are called with; positions where a mask of their shape is 0 do not count
            ("attention_mask", "decoder_attention_mask").
        settings (`CompensationSettings`, *optional*): how.
        watch (`Callable`): told each unit and the share of all that is done, before it is worked on.

    Returns:
        `nn.Module`: the student.

    Raises:
        ValueError: no batch; a ternary weight, whose levels do not follow each weight alone; see `replay.units`.
    """
    settings = settings or CompensationSettings()
    if not batches:
        raise ValueError("no batch to compensate errors on; give at least one")
    check_compensable(student)
    replays = Replay(teacher, batches), Replay(student, batches)
    compensate_units(replays, units(student, lambda: student(**batches[0])), settings, watch)
    return student


def check_compensable(student: nn.Module) -> None:
    """Refuse a student whose errors cannot be compensated.

    Raises:
        ValueError: a ternary weight, whose levels do not follow each weight alone.
    """
    for name, layer in linear_layers(student).items():
        if layer.spec.weight.ternary:
            raise ValueError(
                f"{name} is ternary, and its errors cannot be compensated; use ranges='mse' or start='rounding'"
            )


@torch.no_grad()
def compensate_units(
    replays: tuple[Replay, Replay],
    order: Sequence[str],
    settings: CompensationSettings,
    watch: Callable[[str, float], None] = lambda unit, done: None,
) -> None:
    """`compensate` for some units that follow one another, in place.

    Args:
        replays (`tuple[Replay, Replay]`): of teacher and student, on the same batches; the units before are finished.
        order (`Sequence[str]`): the units.
        settings (`CompensationSettings`): how.
        watch (`Callable`): told each unit and the share of all that is done, before it is worked on.
    """
    known = [masks(batch) for batch in replays[0].batches]
    for i, unit in enumerate(order):
        watch(unit, i / len(order))
        calls = [replay.inputs(unit) for replay in replays]
        modules = [replay.model.get_submodule(unit) for replay in replays]
        outputs = _compensate_unit(*modules, *calls, known, settings)
        for replay, returned in zip(replays, outputs, strict=True):
            replay.finish(unit, returned)


def _compensate_unit(
    teacher: nn.Module,
    student: nn.Module,
    teacher_calls: list[Call],
    student_calls: list[Call],
    known: list[list[Tensor]],
    settings: CompensationSettings,
) -> tuple[list, list]:
    """Layers that share an input together, the groups in the order in which they run; gives both units' outputs."""
    groups = input_groups(student, student_calls[0])
    first = [teacher.get_submodule(group[0]) for group in groups]
    wanted, outputs = layer_inputs(teacher, teacher_calls, first)
    for group, float_inputs in zip(groups, wanted, strict=True):
        layers = [student.get_submodule(name) for name in group]
        once = all(len(inputs) == 1 for inputs in float_inputs)
        (found,), _ = layer_inputs(student, student_calls, layers[:1], stop=once)
        if _shapes(found) != _shapes(float_inputs):  # a routed layer saw other tokens
            continue
        found = [[layers[0].quantize_inputs(x) for x in inputs] for inputs in found]
        moments = _moments(found, float_inputs, known)
        for layer in layers:
            compensate_layer(layer, *moments, settings)
    return outputs, run(student, student_calls)


def _shapes(inputs: list[list[Tensor]]) -> list[list[torch.Size]]:
    return [[x.shape for x in part] for part in inputs]


def input_groups(unit: nn.Module, call: Call) -> list[list[str]]:
    """The names of a unit's layers as they run, those that are given the same tensor one after the other together.

    A layer that runs again, on other inputs too, is alone.
    """
    order: list[tuple[str, Tensor]] = []
    layers = linear_layers(unit)
    names = {id(layer): name for name, layer in layers.items()}

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        order.append((names[id(layer)], args[0] if args else kwargs["input"]))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        run(unit, [call])
    finally:
        for hook in hooks:
            hook.remove()
    counts = Counter(name for name, _ in order)
    groups: list[list[str]] = []
    for i, (name, x) in enumerate(order):
        last, before = order[i - 1] if i else ("", None)
        same = before is x and counts[name] == counts[last] == 1
        if same and layers[name].spec.inputs == layers[last].spec.inputs:
            groups[-1].append(name)
        elif [name] not in groups:
            groups.append([name])
    return groups


def _moments(found: list[list[Tensor]], wanted: list[list[Tensor]], masked: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """X X^T and (X_float - X) X^T, each over the number of tokens. Shapes: inputs (..., I) -> 2 x (I, I) float32."""
    first = next(x for inputs in found for x in inputs)
    size = first.shape[-1]
    own, change = (torch.zeros(size, size, device=first.device) for _ in range(2))
    count = 0
    for inputs, float_inputs, known in zip(found, wanted, masked, strict=True):
        for x, y in zip(inputs, float_inputs, strict=True):
            x, y = counted(x, known).float(), counted(y, known).float()
            own.addmm_(x.t(), x)
            change.addmm_((y - x).t(), x)
            count += len(x)
    return own / max(1, count), change / max(1, count)


@torch.no_grad()
def compensate_layer(layer: LowBitLayer, own: Tensor, change: Tensor, settings: CompensationSettings) -> None:
    """Set the float weight of one fake-quantized layer, in place, so that it rounds to the compensated codes.

    Shapes: own = X X^T, change = (X_float - X) X^T, both (I, I) float32.
    """
    weight = layer.master().float().clone()
    damped = own.clone()
    damped.diagonal().add_(settings.damping * own.diagonal().mean() + 1e-8)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    if settings.alpha:
        weight = weight + settings.alpha * (weight @ change) @ inverse
    if settings.ranges is not None:
        layer.master().copy_(weight)
        layer.find_ranges(settings.ranges, own.diagonal())
    order = torch.argsort(own.diagonal(), descending=True)  # the columns that count most are rounded first
    factor = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    rounded = _round_columns(weight[:, order], factor, _column_rounding(layer, order), settings.block)
    back = torch.empty_like(rounded)
    back[:, order] = rounded
    layer.master().copy_(back)
    if settings.rounds and can_refine(layer):
        refine(layer, weight, damped, settings.rounds)


def _column_rounding(layer: LowBitLayer, order: Tensor) -> Callable[[Tensor, int], Tensor]:
    """(column of weights (O,), its place in `order`) -> what its codes stand for (O,)."""
    spec, columns = layer.spec.weight, len(order)
    per_row = replace(spec, granularity="row", group_size=None)

    def spread(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else expand_slices(tensor, columns, spec).expand(layer.shape[0], columns)

    scale, shift = spread(stored_scale(layer.weight_scale, spec)), spread(layer.weight_shift)
    residual = None
    if layer.weight_outlier_positions is not None:
        residual = scale.new_zeros(layer.shape).flatten()
        residual = residual.index_copy(0, layer.weight_outlier_positions.long(), layer.weight_outlier_values).view(
            layer.shape
        )

    def rounded(column: Tensor, place: int) -> Tensor:
        j = order[place]
        of_column = None if shift is None else shift[:, j, None]
        value = fake_quantize(column[:, None], scale[:, j, None], of_column, per_row)[:, 0]
        return value if residual is None else value + residual[:, j]

    return rounded


def _round_columns(weight: Tensor, factor: Tensor, rounded: Callable[[Tensor, int], Tensor], block: int) -> Tensor:
    """The weights as they are when their turn to be rounded comes. Shapes: weight (O, I), factor (I, I) upper -> (O, I)."""
    weight, found = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        part, inner = weight[:, start : start + block], factor[start : start + block, start : start + block]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            column = part[:, j]
            found[:, start + j] = column
            errors[:, j] = (column - rounded(column, start + j)) / inner[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * inner[j, j + 1 :]
        weight[:, start + block :] -= errors @ factor[start : start + block, start + block :]
    return found
