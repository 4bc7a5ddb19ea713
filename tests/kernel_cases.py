"""Packed weights of random codes, and the comparison of a kernel with the reference, for the tests of `kernels/`."""

from dataclasses import replace

import torch
from conformance import DYNAMIC, STATIC
from tolerances import KERNEL, relative_error
from torch import Tensor

from optimum_zsaq.kernels import KERNELS, PackedTensors
from optimum_zsaq.ops import pack_codes, scale_dtype
from optimum_zsaq.spec import LayerSpec, QuantSpec


INPUTS = {
    "float": None,
    "dynamic-8": DYNAMIC,
    "dynamic-4": QuantSpec(4, "token", symmetric=False),
    "static-8": STATIC,
    "static-4": QuantSpec(4, "tensor", symmetric=False),
}


def packed_weight(
    rows: int, columns: int, spec: LayerSpec | QuantSpec, seed: int = 0, unit: bool = False, **fields
) -> PackedTensors:
    """A weight (rows, columns) of random codes, which use their whole width, and zero points or minima, extremes included.

    With `unit` all scales are 1. `fields` are those of `PackedTensors`.
    """
    spec = spec if isinstance(spec, LayerSpec) else LayerSpec(spec)
    weight, inputs = spec.weight, spec.inputs
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    shape = weight.scale_shape(rows, columns)
    codes = draw(weight.lowest + weight.offset, weight.highest + weight.offset, rows, columns).to(torch.uint8)
    scale = torch.ones(shape) if unit else 10 ** (-2 * torch.rand(shape, generator=generator))
    tensors = {"codes": pack_codes(codes, weight.bits), "scale": scale.to(scale_dtype(weight))}
    if not weight.symmetric:
        shift = draw(0, weight.highest, *shape)
        shift.view(-1)[:2] = torch.tensor([0, weight.highest])[: shift.numel()]
        tensors["shift"] = (-scale * shift).to(scale_dtype(weight)) if weight.minimum else shift.to(torch.uint8)
    if count := spec.outlier_count(rows, columns):
        positions = torch.randperm(rows * columns, generator=generator)[:count].sort().values
        tensors["outlier_positions"] = positions.to(torch.int32)
        tensors["outlier_values"] = 10 * torch.randn(count, generator=generator)
    if inputs is not None and inputs.granularity == "tensor":
        tensors["input_scale"] = torch.full((1, 1), 1.0 if unit else 5.0 / inputs.highest)
        tensors["input_zero_point"] = torch.full((1, 1), inputs.highest // 3, dtype=torch.uint8)
    return PackedTensors(spec, columns, **{**tensors, **fields})


def compare(
    name: str, x: Tensor, packed: PackedTensors, bias: Tensor | None = None, tolerance: float | None = None
) -> Tensor:
    """The result of a kernel, which must be that of the reference on the same codes: dtype, shape, numbers."""
    kernel = KERNELS[name]
    assert kernel.serves(x, packed)
    with torch.no_grad():
        found, expected = kernel(x, packed, bias), KERNELS["reference"](x, packed, bias)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.isfinite(found).all()
    case = (packed.spec, packed.runtime, x.dtype, tuple(x.shape), packed.rows)
    assert relative_error(found, expected) <= (tolerance or KERNEL[x.dtype]), case
    return found


def with_runtime(packed: PackedTensors, runtime: str) -> PackedTensors:
    """The same tensors under another runtime."""
    return replace(packed, runtime=runtime)


def on_device(packed: PackedTensors, device: str) -> PackedTensors:
    """The same tensors on a device."""
    tensors = {name: value for name in PackedTensors.__slots__ if isinstance(value := getattr(packed, name), Tensor)}
    return replace(packed, **{name: value.to(device) for name, value in tensors.items()})
