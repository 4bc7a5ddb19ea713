"""Moving the size of input channels into weights, before anything is rounded (smoothing).

Where channel j of a layer's input is made by a norm, or by a Linear layer whose outputs pass on channel by channel, what
makes it can be divided by s_j, and column j of the layer multiplied: the product is the same, and its input is easier to
quantize: SmoothQuant, https://huggingface.co/papers/2211.10438. Ours is that s_j is a power of the root mean square of the
channel, which needs less text than its largest magnitude, and that of the weights does not count
(docs/methods/language_models.md); and that which channels can be divided is found by trying, not known of any architecture.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..kinds import kind_of
from ..layers import PackedTransposedLinear
from ..surgery import blocks
from .replay import Call, run


_OFFSETS = (0.0, 1.0)  # a norm multiplies by its weight, or by 1 + weight
_SMALLEST = 1e-4  # of the mean energy: channels that carry less are treated alike
_SEED = 0


@dataclass(frozen=True)
class Link:
    """Layers that read one input, and what makes its channels; all names are those of the model.

    Args:
        source (`str`): a norm, or a Linear layer.
        layers (`tuple[str]`): the Linear layers that read it.
        offset (`float`): a norm multiplies by `offset + weight`; 0 for a Linear layer.
    """

    source: str
    layers: tuple[str, ...]
    offset: float = 0.0


@torch.no_grad()
def find_links(model: nn.Module, batch: Mapping[str, Any]) -> list[Link]:
    """What can be smoothed in a float model's blocks, in the order in which the blocks run.

    Powers of two are moved from the source into the layers of a block, which is run on what it was called with: the input
    must be divided by just these, and the block must return what it returned before. Blocks that run more than once a
    pass, and parameters that several modules share, are left alone.

    Args:
        model (`nn.Module`): in evaluation mode, float.
        batch (`Mapping[str, Any]`): what it is called with; a few tokens are enough.
    """
    found, calls = blocks(model), {}
    names = {id(block): name for name, block in found.items()}

    def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(names[id(block)], []).append((args, kwargs))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in found.values()]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {p for p, count in uses.items() if count > 1}
    links = []
    for name, block_calls in calls.items():
        if len(block_calls) == 1:
            links += _block_links(model, name, block_calls[0], shared)
    return links


def _block_links(model: nn.Module, name: str, call: Call, shared: set[int]) -> list[Link]:
    block = model.get_submodule(name)
    inputs, outputs, returned = _watch(block, call)
    groups: dict[int, list[str]] = {}
    for layer, (x, _) in inputs.items():
        groups.setdefault(id(x), []).append(layer)
    links = []
    for group in groups.values():
        x, began = inputs[group[0]]
        layers = [block.get_submodule(layer) for layer in group]
        if any(id(p) in shared for layer in layers for p in layer.parameters(recurse=False)) or not x.any():
            continue
        for source, made in outputs.items():
            module = block.get_submodule(source)
            norm = kind_of(module) is None
            fits = made.output is x if norm else made.ended <= began and made.output.shape[-1] == x.shape[-1]
            if not fits or any(id(p) in shared for p in module.parameters(recurse=False)):
                continue
            offset = _fitting_offset(block, call, source, group, x, returned, _OFFSETS if norm else _OFFSETS[:1])
            if offset is not None:
                links.append(Link(f"{name}.{source}", tuple(f"{name}.{layer}" for layer in group), offset))
                break
    return links


@dataclass(frozen=True)
class _Made:
    output: Tensor
    ended: int  # how many modules had run by then


def _watch(block: nn.Module, call: Call) -> tuple[dict[str, tuple[Tensor, int]], dict[str, _Made], list[Tensor]]:
    """The input of each Linear layer that ran once and when; what norms and these layers gave; what the block returned."""
    inputs: dict[str, tuple[Tensor, int]] = {}
    outputs: dict[str, _Made] = {}
    times: Counter[str] = Counter()

    def before(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[name] = (args[0] if args else kwargs["input"], len(outputs))

        return hook

    def after(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            times[name] += 1
            if isinstance(output, Tensor):
                outputs[name] = _Made(output, len(outputs) + 1)

        return hook

    hooks = []
    for name, module in block.named_modules():
        if _is_linear(module):
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        if _is_linear(module) or _is_norm(module):
            hooks.append(module.register_forward_hook(after(name)))
    try:
        returned = _tensors(run(block, [call]))
    finally:
        for hook in hooks:
            hook.remove()
    once = {name for name, count in times.items() if count == 1}
    return {n: x for n, x in inputs.items() if n in once}, {n: o for n, o in outputs.items() if n in once}, returned


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and not kind.table


def _is_norm(module: nn.Module) -> bool:
    """By structure: a module without parts, with one weight a channel and perhaps a bias."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    return weight is not None and weight.dim() == 1 and set(own) <= {"weight", "bias"} and not list(module.children())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _fitting_offset(
    block: nn.Module,
    call: Call,
    source: str,
    group: Sequence[str],
    x: Tensor,
    returned: list[Tensor],
    offsets: Iterable[float],
) -> float | None:
    """The offset with which moving factors from the source to the layers changes nothing but their input; None: no such."""
    exponents = torch.randint(-2, 3, x.shape[-1:], generator=torch.Generator().manual_seed(_SEED))
    factors = torch.exp2(exponents.float()).to(x.device)
    for offset in offsets:
        with _moved(block, Link(source, tuple(group), offset), factors):
            inputs, _, again = _watch(block, call)
        same_input = group[0] in inputs and _close(inputs[group[0]][0] * factors.to(x.dtype), x)
        if same_input and len(again) == len(returned) and all(map(_close, again, returned)):
            return offset
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to float32 rounding; powers of two leave products and their sums as they are."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).abs().max() <= 1e-6 * wanted.abs().max()) if wanted.numel() else True


@contextmanager
def _moved(model: nn.Module, link: Link, factors: Tensor):
    modules = [model.get_submodule(name) for name in (link.source, *link.layers)]
    before = [{n: p.detach().clone() for n, p in m.named_parameters(recurse=False)} for m in modules]
    try:
        _move(model, link, factors)
        yield
    finally:
        for module, tensors in zip(modules, before, strict=True):
            for name, tensor in tensors.items():
                module.get_parameter(name).copy_(tensor)


def _move(model: nn.Module, link: Link, factors: Tensor) -> None:
    """Divide what the source gives by the factors, and multiply the layers' columns, in place. Shapes: factors (I,)."""
    source = model.get_submodule(link.source)
    for p in source.parameters(recurse=False):
        offset, out = (link.offset, _rows(source)) if p is source.weight else (0.0, p)
        by = factors.to(p.device).view(-1, *[1] * (p.dim() - 1))
        out.copy_(((out.float() + offset) / by - offset).to(p.dtype))
    for name in link.layers:
        weight = _rows(model.get_submodule(name))
        weight.copy_((weight.float() * factors.to(weight.device)).to(weight.dtype))


def _rows(module: nn.Module) -> Tensor:
    """A module's weight, one row for each channel that it gives."""
    kind = kind_of(module)
    return module.weight.t() if kind and issubclass(kind.packed, PackedTransposedLinear) else module.weight


@torch.no_grad()
def smooth(model: nn.Module, links: Iterable[Link], energies: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Move the size of input channels into the weights, in place.

    Args:
        model (`nn.Module`): float; what it computes stays the same, up to one rounding of its dtype for each weight.
        links (`Iterable[Link]`): see `find_links`.
        energies (`Mapping[str, Tensor]`): layer -> the mean square of each input channel; those of the first layer of a
            link count, and a link without any is left as it is.
        power (`float`): s_j = root mean square ** power, their geometric mean 1. 0: nothing moves, 1: all become equal.

    Returns:
        `dict[str, Tensor]`: the energies as they are now.

    Shapes: (I,) float32 each.
    """
    found = dict(energies)
    for link in links:
        if link.layers[0] not in energies:
            continue
        energy = energies[link.layers[0]].float()
        logs = power / 2 * energy.clamp(min=_SMALLEST * energy.mean().item() + 1e-12).log()
        factors = (logs - logs.mean()).exp()
        _move(model, link, factors)
        found |= {name: energies[name] / factors.square() for name in link.layers if name in energies}
    return found
