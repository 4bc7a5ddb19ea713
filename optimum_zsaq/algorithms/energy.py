"""How much each input channel of a layer carries: what the error of a weight is multiplied with."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_energies(model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean square of each input channel of some layers, by name; layers that no batch reached are not in it.

    Args:
        model (`nn.Module`): is put in evaluation mode.
        names (`Iterable[str]`): of its Linear layers.
        batches (`Iterable[Mapping[str, Tensor]]`): what the model is called with, `model(**batch)`; padded positions are
            seen like any other.

    Shapes: -> name -> (I,) float32.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, layer: nn.Module):
        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            x = x.reshape(-1, x.shape[-1]).float()
            sums[name] = sums.get(name, 0.0) + x.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + len(x)

        return layer.register_forward_pre_hook(see, with_kwargs=True)

    hooks = [watch(name, model.get_submodule(name)) for name in names]
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
