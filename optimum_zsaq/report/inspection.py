"""What a checkpoint holds and what it will need, from its config and file headers: no weight is read."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from ..integrations.checkpoint import read_header
from ..integrations.configs import LowBitConfig
from ..integrations.tasks import load_config, model_class
from ..kernels import choose_kernel
from ..layers import LowBitLayer, PackedEmbedding, PackedLinear
from ..size import measure_size
from ..surgery import low_bit_layers, skeleton


@dataclass(frozen=True)
class LayerReport:
    """One layer with a weight matrix: `bits` None is float; `kernel` None is a lookup; bytes are those of its tensors."""

    name: str
    type: str
    shape: tuple[int, int]
    bits: int | None
    granularity: str | None
    inputs: str | None
    outliers: int
    kernel: str | None
    bytes: int
    tied: bool


def inspect_checkpoint(path: str) -> dict[str, Any]:
    """Layers, bytes on disk term by term, and memory before loading, of a low-bit or float checkpoint.

    Args:
        path (`str`): folder or Hub id.

    Returns:
        `dict`: "model", "architecture", "packed", "layers" (of `LayerReport` fields), "bytes" (of each part, of the files,
        and the ratio of the files to the parts), "memory" (bytes that the weights take by runtime), "dynamic" (share of
        the multiply-adds of layers with quantized inputs whose ranges are found a token), "recipe".

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    config = load_config(path)
    stored = getattr(config, "quantization_config", None)
    low_bit = LowBitConfig.from_dict(stored) if isinstance(stored, dict) and stored.get("quant_method") == "zsaq" else None
    files = _weight_files(path)
    with torch.device("meta"):
        model = model_class(config)(config)
    if low_bit is not None:
        skeleton(model, low_bit.table(model), low_bit.packed)
    on_disk = sum(file.stat().st_size for file in files)
    tensors = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for file in files for entry in _entries(file))
    parts = _parts(model, files) if low_bit else {"float": tensors}
    return {
        "model": path,
        "architecture": type(model).__name__,
        "algorithm": low_bit.algorithm if low_bit else None,
        "packed": low_bit.packed if low_bit else None,
        "layers": [asdict(layer) for layer in _layers(model)],
        "bytes": {**parts, "headers": on_disk - tensors, "on_disk": on_disk, "ratio": on_disk / _needed(parts)},
        "memory": _memory(model),
        "dynamic": _dynamic_share(model),
        "recipe": low_bit.recipe if low_bit else None,
    }


def _needed(parts: dict[str, int]) -> int:
    return sum(count for name, count in parts.items() if name != "markers")


def _weight_files(path: str) -> list[Path]:
    for name in ("model.safetensors.index.json", "model.safetensors"):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if name.endswith(".json"):
            return sorted(Path(found).parent.glob("model-*-of-*.safetensors"))
        return [Path(found)]
    raise ValueError(f"{path!r} has no model.safetensors; give a folder that save_pretrained wrote, or a Hub id")


def _entries(file: Path) -> list[dict[str, Any]]:
    return [entry for name, entry in read_header(file)[1].items() if name != "__metadata__"]


def _parts(model: nn.Module, files: list[Path]) -> dict[str, int]:
    """Bytes on disk of each part; what stays float is counted as it is stored."""
    size = measure_size(model)
    parts = {part: count for part, count in size.bytes.items() if part != "float" and count}
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for file in files for entry in _entries(file))
    return {**parts, "float": total - sum(parts.values())}


def _layers(model: nn.Module) -> list[LayerReport]:
    kinds = (LowBitLayer, nn.Linear, nn.Embedding)
    return [_layer(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _layer(name: str, module: nn.Module) -> LayerReport:
    own = [p for key, p in module.named_parameters(recurse=False) if key != "weight" or not _is_packed(module)]
    count = sum(p.numel() * p.element_size() for p in own)
    if not isinstance(module, LowBitLayer):
        rows, columns = module.weight.shape
        return LayerReport(name, type(module).__name__, (rows, columns), None, None, None, 0, None, count, False)
    spec = module.spec
    rows, columns = module.shape
    group = f"/{spec.weight.group_size}" if spec.weight.group_size else ""
    modes = {"token": "dynamic", "tensor": "static"}
    inputs = f"A{spec.inputs.bits} {modes[spec.inputs.granularity]}" if spec.inputs else None
    return LayerReport(
        name=name,
        type=type(module).__name__,
        shape=(rows, columns),
        bits=spec.weight.bits,
        granularity=f"{spec.weight.granularity}{group}",
        inputs=inputs,
        outliers=spec.outlier_count(rows, columns),
        kernel=_kernel(module),
        bytes=count,
        tied=module.owner is not module,
    )


def _dynamic_share(model: nn.Module) -> float | None:
    """Of multiply-adds, as far as inputs are quantized; None: no input is."""
    sizes: dict[str, int] = {}
    for _, layer in low_bit_layers(model):
        if layer.spec.inputs is not None:
            kind = layer.spec.inputs.granularity
            sizes[kind] = sizes.get(kind, 0) + layer.shape[0] * layer.shape[1]
    return sizes.get("token", 0) / sum(sizes.values()) if sizes else None


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear | PackedEmbedding)


def _kernel(module: nn.Module) -> str | None:
    if not isinstance(module, PackedLinear):
        return None
    x = torch.empty(1, module.in_features, dtype=module.weight.dtype)
    return choose_kernel(x, module.packed()).name


def _memory(model: nn.Module) -> dict[str, int]:
    """Bytes of the loaded weights, by runtime, at most, and of the largest dense weight of the reference kernel."""
    size = measure_size(model)
    small = sum(count for part, count in size.bytes.items() if part != "markers")
    owners = (m for m in model.modules() if _is_packed(m) and m.owner is m)
    small += sum(m.weight.numel() * m.weight.element_size() for m in owners)
    linear = [m for m in model.modules() if isinstance(m, PackedLinear)]
    owners = {id(m.owner): m.owner for m in linear}
    prepacked = sum(owner.rows * owner.columns for owner in owners.values())
    largest = max((4 * m.rows * m.columns for m in linear), default=0)
    return {"small": small, "fast": small + prepacked, "largest_call": largest}


def group_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ only in the numbers of their names, as one row with their count."""
    groups: dict[tuple, dict[str, Any]] = {}
    for layer in layers:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", layer["name"])
        rest = tuple(value for key, value in layer.items() if key not in ("name", "bytes"))
        row = groups.setdefault((name, rest), {**layer, "name": name, "count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += layer["bytes"]
    return list(groups.values())
