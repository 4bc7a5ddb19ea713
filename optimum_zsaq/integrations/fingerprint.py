"""Which base an adapter was trained on: its scheme in words, and a checksum of what its weights are.

A low-bit model is known by the codes, scales and outliers of all its low-bit layers, the same for a fake-quantized and a
packed one; a float model by the weights that the adapter sits on. Float heads, norms and biases are not part of it: those a
task may bring its own of.
"""

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

from ..layers import LowBitLayer, PackedEmbedding, PackedLinear
from ..layers.packed import packed_tensors
from ..spec import QuantSpec
from ..surgery import low_bit_layers
from .checkpoint import tensor_crc
from .configs import body_name


_OF_A_PACKED_LAYER = (
    "weight_codes",
    "weight_scale",
    "weight_zero_point",
    "weight_minimum",
    "weight_outlier_positions",
    "weight_outlier_values",
)
_OF_INPUTS = ("input_scale", "input_zero_point")


def fingerprint(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """Scheme and checksum of a model, which may hold adapters already.

    Args:
        model (`nn.Module`): the base model.
        targets (`Mapping[str, nn.Module]`): the layers that an adapter sits on, by name.

    Returns:
        `dict[str, str]`: {"scheme": "36 x W4 row, A8 dynamic; 1 x W4 row", "weights": "1f0c3a5e"}.
    """
    layers = {
        _plain(model, name): layer
        for name, layer in low_bit_layers(model)
        if layer.owner is layer and ".modules_to_save." not in name
    }
    if layers:
        texts = [layer.spec.text() for layer in layers.values()]
        sums = {name: _low_bit_crc(layer) for name, layer in layers.items()}
    else:
        texts = [f"float, {str(layer.weight.dtype).removeprefix('torch.')}" for layer in targets.values()]
        sums = {_plain(model, name): tensor_crc(layer.weight) for name, layer in targets.items()}
    scheme = "; ".join(f"{count} x {text}" for text, count in Counter(texts).most_common())
    return {"scheme": scheme, "weights": f"{zlib.crc32(repr(sorted(sums.items())).encode()):08x}"}


def _plain(model: nn.Module, name: str) -> str:
    return body_name(model, name.replace(".base_layer", "").replace(".original_module", ""))


def _low_bit_crc(layer: LowBitLayer) -> int:
    tensors = dict(layer.named_parameters(recurse=False))
    kept = {name: tensors[name] for name in _OF_INPUTS if name in tensors}
    if isinstance(layer, PackedLinear | PackedEmbedding):
        kept |= {name: tensors[name] for name in _OF_A_PACKED_LAYER if name in tensors}
    else:
        kept |= packed_tensors(layer)
    sums = sorted((name, tensor_crc(tensor)) for name, tensor in kept.items())
    return zlib.crc32(f"({_spec_text(layer.spec.weight)}, {_spec_text(layer.spec.inputs)}, {sums})".encode())


def _spec_text(spec: QuantSpec | None) -> str:
    """A spec without what format 1 did not have, where it is as it was then: adapters carry checksums from that time."""
    if spec is None:
        return "None"
    later = {"minimum": False, "scale_bits": 32}
    fields = {name: value for name, value in asdict(spec).items() if name not in later or value != later[name]}
    return f"QuantSpec({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def check_fingerprint(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Compare a model's fingerprint with the one that an adapter carries.

    Raises:
        ValueError: they differ.
    """
    if found == wanted:
        return
    if found["scheme"] != wanted.get("scheme"):
        why = f"it was trained on one of {wanted.get('scheme')!r}, and this model is {found['scheme']!r}"
    else:
        why = f"the scheme is the same, the weights are not (checksums {wanted.get('weights')} and {found['weights']})"
    raise ValueError(
        f"the adapter belongs to another base: {why}. Load the base that its adapter_config.json names. If you know that "
        "it goes with this one, set config.check_base=False on PeftConfig.from_pretrained(adapter) and pass that as config="
    )
