"""How many bytes a model's tensors take, term by term."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .surgery import low_bit_layers


PARTS = ("codes", "scales", "outliers", "markers", "float")
_PART_OF = {
    "weight_codes": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "scales",
    "weight_minimum": "scales",
    "input_scale": "scales",
    "input_zero_point": "scales",
    "weight_outlier_positions": "outliers",
    "weight_outlier_values": "outliers",
    "weight": "markers",
}


@dataclass
class ModelSize:
    """Bytes, weights and layers by part: "codes", "scales" (zero points and minima too), "outliers", "markers" and "float".

    `parameters` counts every weight of the float model once. Markers are counted as on disk, one byte a row.
    """

    bytes: Counter = field(default_factory=Counter)
    weights: Counter = field(default_factory=Counter)
    layers: Counter = field(default_factory=Counter)
    parameters: int = 0


def measure_size(model: nn.Module) -> ModelSize:
    """The size of a float, fake-quantized or packed model; tied tensors count once. Works on the "meta" device."""
    size, seen = ModelSize(), set()
    packed = {name: layer for name, layer in low_bit_layers(model) if hasattr(layer, "rows")}
    for layer in packed.values():
        if layer.owner is layer:
            size.parameters += layer.rows * layer.columns
            size.weights["codes"] += layer.rows * layer.columns
            size.weights["outliers"] += layer.spec.outlier_count(layer.rows, layer.columns)
    for module_name, module in model.named_modules():
        parts = set()
        for tensor_name, tensor in [*module._parameters.items(), *_persistent_buffers(module)]:
            tied = module_name in packed and packed[module_name].owner is not module
            if tensor is None or id(tensor) in seen or (tied and tensor_name == "weight"):
                continue
            seen.add(id(tensor))
            part = _PART_OF.get(tensor_name, "float") if module_name in packed else "float"
            parts.add(part)
            if part == "float":
                size.parameters += tensor.numel()
                size.weights[part] += tensor.numel()
            size.bytes[part] += tensor.numel() * (1 if part == "markers" else tensor.element_size())
        size.layers.update(parts)
    return size


def _persistent_buffers(module: nn.Module):
    return ((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)
