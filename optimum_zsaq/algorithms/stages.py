"""Cutting a model into stages of consecutive blocks, and running one stage on inputs from memory.

A stage is a run of blocks (`surgery.blocks`) in the order in which they run. What lies outside all blocks goes with the
stage during which it first runs: embeddings with the first, a head or pooler with the last, what stands between an encoder
and a decoder with the blocks after it. To run a stage the whole model is called, with every earlier block answering from
memory and the pass ending after the stage's last block, so no architecture's wiring has to be known: masks, positions and
what a decoder reads of an encoder are those of a whole pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..layers import LowBitLayer
from ..surgery import blocks, low_bit_layers
from .replay import answering


Memory = dict[str, Any]  # block -> what it returned for one batch
OUTPUTS = ("output", "logits", "last_hidden_state", "pooler_output")  # of a model; with logits, the others do not count


class _Reached(Exception):
    """The pass has come to where it was to end."""


@dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive blocks that are trained together; all names are those of the model.

    Args:
        index, count (`int`): which stage this is, of how many.
        blocks (`tuple[str]`): in the order in which they run.
        parameters (`tuple[str]`): what is trained with them; a Parameter that several layers share goes with the first.
        answers (`Mapping[str, str]`): each block of earlier stages -> the block with whose output it answers: the last of
            a row of blocks that hand their state straight to the next, so that only that one's is kept.
        kept (`tuple[str]`): the blocks whose output later stages need once this one is done.
        outputs (`bool`): whether the last stage learns the model's own outputs.
    """

    index: int
    count: int
    blocks: tuple[str, ...]
    parameters: tuple[str, ...]
    answers: Mapping[str, str]
    kept: tuple[str, ...]
    outputs: bool = True

    @property
    def last(self) -> bool:
        """Whether no stage comes after this one."""
        return self.index == self.count - 1

    @property
    def ends(self) -> bool:
        """Whether the pass goes on to the model's own outputs."""
        return self.last and self.outputs

    @property
    def title(self) -> str:
        """For people: "stage 2 of 4"."""
        return f"stage {self.index + 1} of {self.count}"


def cut(
    model: nn.Module, batch: dict[str, Any], count: int, runs: nn.Module | None = None, outputs: bool = True
) -> list[Stage]:
    """Cut a model into stages of nearly equal numbers of blocks, the longer ones first.

    Args:
        model (`nn.Module`): in any state.
        batch (`dict`): what it is called with, once, to see what runs when.
        count (`int`): of stages.
        runs (`nn.Module`, *optional*): the same model in another state, to be called instead.
        outputs (`bool`): whether the last stage learns the model's own outputs.

    Raises:
        ValueError: more stages than blocks; a block that runs more than once a pass; a low-bit layer that belongs to no
            stage because the pass does not reach it.
    """
    order, straight, reached = _trace(runs or model, batch)
    if not 1 <= count <= len(order):
        raise ValueError(
            f"stages={count} is not possible: {type(model).__name__} has {len(order)} blocks that run one after the other; "
            f"use 1 to {len(order)}"
        )
    sizes = [len(order) // count + (i < len(order) % count) for i in range(count)]
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    owned = _parameters(model, order, reached, ends)
    stages, start = [], 0
    for index, end in enumerate(ends):
        kept = tuple(dict.fromkeys(_answers(order, straight, end).values())) if end < len(order) else ()
        answers = _answers(order, straight, start)
        stages.append(Stage(index, count, tuple(order[start:end]), tuple(owned[index]), answers, kept, outputs))
        start = end
    return stages


def _trace(model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[bool], dict[str, int]]:
    """The blocks as they run; whether each is given the very state that the one before returned and stands beside it; and
    modules outside all blocks -> how many blocks had begun when they first ran."""
    found = blocks(model)
    names = {block: name for name, block in found.items()}
    inside = {m for block in found.values() for m in block.modules()}
    order: list[str] = []
    straight: list[bool] = []
    returned: list[Any] = [None]
    reached: dict[str, int] = {}

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        beside = bool(order) and order[-1].rpartition(".")[0] == names[block].rpartition(".")[0]
        straight.append(beside and any(value is returned[-1] for value in (*args, *kwargs.values())))
        order.append(names[block])

    def note(name: str) -> Callable:
        def hook(*_: Any) -> None:
            reached.setdefault(name, len(order))

        return hook

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in names]
    hooks += [block.register_forward_hook(lambda _, __, out: returned.append(state_of(out))) for block in names]
    hooks += [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if m not in inside]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    again = sorted({name for name in order if order.count(name) > 1})
    if again:
        raise ValueError(f"{again[:3]} run more than once in a forward pass, so they belong to no single stage")
    return order, straight, reached


def _parameters(model: nn.Module, order: list[str], reached: dict[str, int], ends: list[int]) -> list[list[str]]:
    """The names of the Parameters of each stage.

    One that several layers share goes with the stage that first runs one of them; one that is read without its module
    being run, with what the module is part of.
    """
    left = {id(p): name for name, p in model.named_parameters()}
    owned: list[list[str]] = [[] for _ in ends]

    def take(stage: int, parameters: Iterable[nn.Parameter]) -> None:
        owned[stage].extend(left.pop(id(p)) for p in parameters if id(p) in left)

    for stage, end in enumerate(ends):
        start, last = ends[stage - 1] if stage else 0, end == len(order)
        outside = [model.get_submodule(n) for n, at in reached.items() if start <= at < end or (last and at == end)]
        take(stage, _own_parameters(outside))
        take(stage, _own_parameters(m for name in order[start:end] for m in model.get_submodule(name).modules()))
    lost = [name for name, layer in low_bit_layers(model) if id(layer.weight) in left]
    if lost:
        raise ValueError(
            f"no forward pass on the calibration data reaches {lost[:3]}, so they belong to no stage and could not be "
            "trained; load a class of model that uses them, or name them in modules_to_not_convert"
        )
    for name in list(left.values()):
        around = name
        while around and around not in reached:
            around = around.rpartition(".")[0]
        at = reached.get(around, 0)
        take(next((i for i, end in enumerate(ends) if at < end), len(ends) - 1), [model.get_parameter(name)])
    return owned


def _own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The Parameters that modules hold themselves, those of the layer that a tied one reads among them."""
    for module in modules:
        owners = [module.owner] if isinstance(module, LowBitLayer) and module.owner is not module else []
        for holder in (module, *owners):
            yield from (p for p in holder._parameters.values() if p is not None)


def _answers(order: list[str], straight: list[bool], end: int) -> dict[str, str]:
    """What the first `end` blocks answer with when all of them have run."""
    answers: dict[str, str] = {}
    for i in reversed(range(end)):
        handed_on = i + 1 < end and straight[i + 1]
        answers[order[i]] = answers[order[i + 1]] if handed_on else order[i]
    return answers


@torch.enable_grad()
def read_by_later(model: nn.Module, stages: Sequence[Stage], batch: dict[str, Any]) -> set[str]:
    """The Parameters of a stage that what a later stage is to learn depends on, by name, as gradients tell.

    Such as a table that a head shares, or a norm after an encoder that every stage of the decoder reads.

    Args:
        model (`nn.Module`): fake-quantized or float, all its Parameters frozen.
        stages (`Sequence[Stage]`): all of them.
        batch (`dict`): what the model is called with.
    """
    found: set[str] = set()
    memory: Memory = {}
    earlier: dict[str, nn.Parameter] = {}
    try:
        for stage in stages:
            states, memory = run_stage(model, stage, batch, memory)
            learned = [state.sum() for state in states.values() if state.requires_grad]
            if learned:
                gradients = torch.autograd.grad(sum(learned), list(earlier.values()), allow_unused=True)
                found |= {name for name, gradient in zip(earlier, gradients, strict=True) if gradient is not None}
            own = {name: model.get_parameter(name) for name in stage.parameters}
            earlier |= {name: p.requires_grad_(True) for name, p in own.items() if p.is_floating_point()}
    finally:
        for p in earlier.values():
            p.requires_grad_(False)
    return found


def run_stage(model: nn.Module, stage: Stage, batch: dict[str, Any], memory: Memory) -> tuple[dict[str, Tensor], Memory]:
    """Run one stage of a model.

    Args:
        model (`nn.Module`): of the stages before, only modules outside blocks are run.
        stage (`Stage`): which.
        batch (`dict`): what the model is called with.
        memory (`Memory`): what the blocks in `stage.answers.values()` returned.

    Returns:
        `tuple`: what is to be learned, (B, L, D) or another shape by name: the state after each block and, of the last
            stage, the model's own outputs; then the memory that the next stage needs, without gradients.
    """
    found: Memory = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, returned: Any) -> None:
            found[name] = returned
            if name == stage.blocks[-1] and not stage.ends:
                raise _Reached

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in stage.blocks]
    output = None
    try:
        answers = {model.get_submodule(name): memory[other] for name, other in stage.answers.items()}
        with answering(answers), suppress(_Reached):
            output = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    states = {name: state_of(returned) for name, returned in found.items()}
    if stage.ends:
        states |= _outputs(output, states)
    kept = {name: found[name] if name in found else memory[name] for name in stage.kept}
    return states, tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, kept)


def state_of(returned: Any) -> Any:
    """The hidden state among what a block returned."""
    return returned[0] if isinstance(returned, tuple | list) and returned else returned


def _outputs(output: Any, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model returned, but for states that are a block's."""
    if isinstance(output, Tensor):
        found = {OUTPUTS[0]: output}
    else:
        found = {name: getattr(output, name) for name in OUTPUTS if getattr(output, name, None) is not None}
    if "logits" in found:
        found = {"logits": found["logits"]}
    return {name: value for name, value in found.items() if all(value is not state for state in states.values())}
