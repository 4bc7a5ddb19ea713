"""Running a model one unit after the other, on inputs that are exactly what a whole forward pass would give each.

A unit is a block (`surgery.blocks`) or a low-bit layer outside all blocks. To get the inputs of a unit the whole model is
called, with every earlier unit answering from memory and the pass ending where the unit would run, so no architecture's
wiring has to be known and a pass costs what lies between the units.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import kind_of
from ..layers import LowBitLayer
from ..surgery import blocks, low_bit_layers


Call = tuple[tuple, dict[str, Any]]  # what a module was called with


class _Reached(Exception):
    """The unit that was wanted is about to run."""


def units(student: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """The names of a model's units that hold a low-bit layer to train, in the order in which they run.

    Args:
        student (`nn.Module`): fake-quantized.
        forward (`Callable`): runs it, or a part of it, once, to see the order.

    Raises:
        ValueError: a unit runs more than once a pass, so that it has no single input.
    """
    found = {name: block for name, block in blocks(student).items() if linear_layers(block)}
    lone = {n: m for n, m in linear_layers(student).items() if not any(n.startswith(f"{block}.") for block in found)}
    names = {id(module): name for name, module in (found | lone).items()}
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: order.append(names[id(m)])) for m in (found | lone).values()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    again = sorted({name for name in order if order.count(name) > 1})
    if again:
        raise ValueError(
            f"{again[:3]} run more than once in a forward pass, so they cannot be run on their own; "
            "use start='rounding', which needs no pass"
        )
    return order


def linear_layers(module: nn.Module) -> dict[str, LowBitLayer]:
    """The fake-quantized Linear layers of a module that own their weight, by name."""
    layers = {name: layer for name, layer in low_bit_layers(module) if layer.owner is layer}
    return {n: m for n, m in layers.items() if not kind_of(m).table and type(m) is kind_of(m).fake}


class Replay:
    """One model, run unit by unit on the same batches.

    Call `inputs` for each unit in the order of `units`, and after it `finish` with what the unit returned for each batch.
    Of blocks that hand their state straight to the next only what the last returned is kept: the states between them are
    taken to be read by nobody else.

    Args:
        model (`nn.Module`): in any state.
        batches (`Sequence[dict]`): what it is called with.
        returned (`dict`, *optional*): units that are finished already -> what they returned, a batch each.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]], returned: dict[str, list[Any]] | None = None):
        self.model, self.batches = model, batches
        self._returned = dict(returned or {})  # finished unit -> what it answers, a batch each
        self._stack: list[str] = []  # the units finished last, each of which was given what the one before returned
        self._goes_on = False  # whether the unit whose inputs were found last is the next of that stack

    @torch.no_grad()
    def inputs(self, unit: str) -> list[Call]:
        """What the unit is called with, for each batch.

        Raises:
            ValueError: the model never calls it.
        """
        found: list[Call] = []

        def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append((args, kwargs))
            raise _Reached

        hook = self.model.get_submodule(unit).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for i, batch in enumerate(self.batches):
                with answering(self._answers(i)), suppress(_Reached):
                    self.model(**batch)
        finally:
            hook.remove()
        if len(found) < len(self.batches):
            raise ValueError(f"{unit} did not run for {len(self.batches) - len(found)} of {len(self.batches)} batches")
        self._goes_on = self._follows(unit, found)
        return found

    def finish(self, unit: str, returned: list[Any]) -> None:
        """Let the unit answer with what it returned from now on."""
        self._stack = [*self._stack, unit] if self._goes_on else [unit]
        self._goes_on = False
        self._returned |= dict.fromkeys(self._stack, returned)

    def _follows(self, unit: str, calls: list[Call]) -> bool:
        """Whether a unit stands beside the one finished last and was given the very tensors that it returned."""
        if not self._stack or self._stack[-1].rpartition(".")[0] != unit.rpartition(".")[0]:
            return False
        states = [r[0] if isinstance(r, tuple | list) and r else r for r in self._returned[self._stack[-1]]]
        given = [(*args, *kwargs.values()) for args, kwargs in calls]
        pairs = zip(states, given, strict=True)
        return all(isinstance(state, Tensor) and any(value is state for value in values) for state, values in pairs)

    def _answers(self, batch: int) -> dict[nn.Module, Any]:
        return {self.model.get_submodule(unit): returned[batch] for unit, returned in self._returned.items()}


@contextmanager
def answering(answers: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Modules answer from memory; a forward of its own that a module has (accelerate's) is given back."""
    own = {module: vars(module).get("forward") for module in answers}
    try:
        for module, answer in answers.items():
            module.forward = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@torch.no_grad()
def run(module: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """What a module returns for each of its recorded inputs."""
    return [module(*args, **kwargs) for args, kwargs in calls]


@torch.no_grad()
def layer_inputs(
    module: nn.Module, calls: Sequence[Call], layers: Sequence[nn.Module], stop: bool = False
) -> tuple[list[list[list[Tensor]]], list[Any]]:
    """The inputs of some layers inside a module, and what the module returns; `stop`: it ends where the first is reached.

    Returns:
        `tuple`: for each layer and each call, its inputs (none where it did not run, as a routed layer may not; several
            where it ran again); the outputs, None of a pass that was stopped.
    """
    found: list[list[list[Tensor]]] = [[[] for _ in calls] for _ in layers]
    outputs: list[Any] = []

    def recorder(place: int) -> Callable:
        def record(_: nn.Module, args: tuple, kwargs: dict) -> None:
            found[place][len(outputs)].append((args[0] if args else kwargs["input"]).detach())
            if stop:
                raise _Reached

        return record

    hooks = [m.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, m in enumerate(layers)]
    try:
        for args, kwargs in calls:
            returned = None
            with suppress(_Reached):
                returned = module(*args, **kwargs)
            outputs.append(returned)
        return found, outputs
    finally:
        for hook in hooks:
            hook.remove()
