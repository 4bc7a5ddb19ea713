"""Static input ranges: run batches through the model with float inputs and store what each layer needs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers import LowBitLayer
from ..ops import RANGES, find_input_range
from ..surgery import low_bit_layers


_KEPT_VALUES = 2**14  # of each layer's input, from each batch: our choice; the extremes are always exact


class _Seen:
    """What was seen of one layer's input: the extremes of all values, and a sample of them."""

    def __init__(self, seed: int):
        self.low, self.high = torch.inf, -torch.inf
        self.finite = True
        self.values: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def hook(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self.see(args[0] if args else kwargs["input"])

    def see(self, x: Tensor) -> None:
        flat = x.detach().float().cpu().reshape(-1)
        if not flat.numel():
            return
        self.finite = self.finite and bool(torch.isfinite(flat).all())
        self.low, self.high = min(self.low, flat.min().item()), max(self.high, flat.max().item())
        index = torch.randint(flat.numel(), (min(_KEPT_VALUES, flat.numel()),), generator=self.generator)
        self.values.append(flat[index])


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], ranges: str = "mse", seed: int = 0) -> nn.Module:
    """Find and store the static input range of every layer that has one, in place.

    The inputs are measured on the model as it is, weights in low bits, inputs not yet quantized. Codes are asymmetric: the
    zero point follows the values, so that a one-sided input (after a ReLU or GELU) uses all its codes.

    Args:
        model (`nn.Module`): a fake-quantized or packed model.
        batches (`Iterable[Mapping[str, Tensor]]`): what the model is called with, `model(**batch)`; padded positions are
            seen like any other.
        ranges (`str`): "mse": least squared error on a sample of 16,384 values a batch; "minmax": the extremes.
        seed (`int`): of the sample.

    Returns:
        `nn.Module`: the same model.

    Raises:
        ValueError: an unknown method; no layer has a static input range; no batch; a layer that no batch reached; an input
            that is NaN or infinite.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges={ranges!r} is unknown; use one of {sorted(RANGES)}")
    layers = {n: m for n, m in low_bit_layers(model) if m.spec.inputs and m.spec.inputs.granularity == "tensor"}
    if not layers:
        raise ValueError("no layer has a static input range to calibrate; quantize with activations='static'")
    seen = {name: _Seen(seed) for name in layers}
    _observe(model, layers, seen, batches)
    missed = [name for name, record in seen.items() if not record.values]
    if missed:
        raise ValueError(
            f"no calibration batch reached {missed}; give at least one batch that runs them, "
            "or name them in modules_to_not_convert"
        )
    for name, record in seen.items():
        if not record.finite:
            raise ValueError(f"{name}: an input is NaN or infinite and has no range; check the model and the batches")
    for name, layer in layers.items():
        record = seen[name]
        scale, zero_point = find_input_range(torch.cat(record.values), record.low, record.high, layer.spec.inputs, ranges)
        layer.set_input_range(scale, zero_point)
    return model


def _observe(
    model: nn.Module, layers: dict[str, LowBitLayer], seen: dict[str, _Seen], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Run the batches in evaluation mode with float inputs; the model is left as it was, whatever happens."""
    modes, hooks = {module: module.training for module in model.modules()}, []
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(seen[name].hook, with_kwargs=True))
        with float_inputs(model.eval()):
            for batch in batches:
                model(**batch)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()


@contextmanager
def float_inputs(model: nn.Module) -> Iterator[nn.Module]:
    """Leave the inputs of all layers float for as long as the context lasts."""
    specs = {layer: layer.spec for _, layer in low_bit_layers(model)}
    try:
        for layer, spec in specs.items():
            layer.spec = replace(spec, inputs=None)
        yield model
    finally:
        for layer, spec in specs.items():
            layer.spec = spec
