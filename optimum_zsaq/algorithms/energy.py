"""How much each input channel of a layer carries: what the error of a weight is multiplied with."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


_MASKS = ("attention_mask", "decoder_attention_mask")


def masks(batch: Mapping[str, Any]) -> list[Tensor]:
    """What a batch says of its positions."""
    return [batch[name] for name in _MASKS if batch.get(name) is not None]


def counted(x: Tensor, known: Iterable[Tensor]) -> Tensor:
    """The positions that count: not those where a mask of their shape is 0. Shapes: x (..., I) -> (n, I)."""
    fitting = [mask.bool() for mask in known if mask.shape == x.shape[:-1]]
    return (x[torch.stack(fitting).all(dim=0)] if fitting else x).reshape(-1, x.shape[-1])


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Any]],
    see: Callable[[str, nn.Module, Tensor], None],
) -> None:
    """Call a model with batches, and `see` with a layer's name, the layer and its input (n, I) float32, whenever one runs.

    The model is as it was afterwards, whatever happens; see `counted`.
    """
    known: list[Tensor] = []

    def hook(name: str) -> Callable:
        def before(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            see(name, layer, counted((args[0] if args else kwargs["input"]).detach(), known).float())

        return before

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        for batch in batches:
            known[:] = masks(batch)
            model(**batch)
    finally:
        for handle in hooks:
            handle.remove()


def input_energies(model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean square of each input channel of some layers, by name; layers that no batch reached are not in it.

    Args:
        model (`nn.Module`): is put in evaluation mode.
        names (`Iterable[str]`): of its Linear layers.
        batches (`Iterable[Mapping[str, Tensor]]`): what the model is called with, `model(**batch)`; see `counted`.

    Shapes: -> name -> (I,) float32.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + x.square().sum(dim=0)
        counts[name] = counts.get(name, 0) + len(x)

    watch_inputs(model.eval(), names, batches, see)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
