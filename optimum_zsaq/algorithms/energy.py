"""How much each input channel of a layer carries: what the error of a weight is multiplied with."""

from collections.abc import Iterable, Mapping
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
    known: list[Tensor] = []

    def watch(name: str, layer: nn.Module):
        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = counted((args[0] if args else kwargs["input"]).detach(), known).float()
            sums[name] = sums.get(name, 0.0) + x.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + len(x)

        return layer.register_forward_pre_hook(see, with_kwargs=True)

    hooks = [watch(name, model.get_submodule(name)) for name in names]
    model.eval()
    try:
        for batch in batches:
            known[:] = masks(batch)
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
