"""Moving a model through its states, in place: float -> fake-quantized (`prepare`) -> packed (`pack`) -> float (`unpack`).

Does not know any library's models or layer types; what it must know of them is registered in `kinds.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .kinds import ModelFacts, kind_of, reader_of
from .layers import LowBitLayer, PackedEmbedding, PackedLinear
from .layers.packed import check_runtime, packed_tensors
from .ops import RANGES
from .spec import LayerSpec, QuantScheme


def matches(name: str, pattern: str) -> bool:
    """Whether a module name contains a pattern as whole dot-separated parts; parts may use `*` and `?`.

    "pooler" matches "bert.pooler.dense"; "layer.1" matches "encoder.layer.1.output" but not "encoder.layer.10.output".
    """
    parts, wanted = name.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(fnmatchcase(parts[s + i], w) for i, w in enumerate(wanted)) for s in starts)


def select(model: nn.Module, scheme: QuantScheme) -> dict[str, LayerSpec]:
    """Which layers a scheme quantizes, and how: name -> row, in the order of `model.named_modules()`.

    Linear layers of the body get `scheme.linear`, the input tables `scheme.embedding`; a layer that shares a selected
    table's weight gets that table's row. Layers in `scheme.skip`, heads and everything else stay float.

    Raises:
        ValueError: a skip pattern that matches no layer, or one of two layers that share a weight; no layer is selected.
        TypeError: the input table, or a layer tied to it, is of a type whose forward we do not know.
    """
    if kind_of(model) is not None:
        raise TypeError(
            f"a {type(model).__name__} is a layer, which cannot be replaced in itself; give the model that holds it"
        )
    facts = reader_of(model).facts(model)
    layers = {name: module for name, module in model.named_modules() if kind_of(module) is not None}
    _check_patterns(scheme.skip, layers)
    if scheme.embedding is not None:
        _check_tables(model, facts, scheme.skip)
    table: dict[str, LayerSpec] = {}
    for name, module in layers.items():
        row = scheme.embedding if kind_of(module).table else scheme.linear
        wanted = name in facts.tables if kind_of(module).table else name not in facts.heads
        if row is not None and wanted and name not in facts.tied and not _skipped(name, scheme.skip):
            table[name] = row
    for name, owner in facts.tied.items():
        if owner in table:
            _check_tied(model, name, owner, scheme.skip)
            table[name] = tied_row(model, name, owner, table[owner])
    if not table:
        raise ValueError(
            f"nothing to quantize in {type(model).__name__}: it has {len(layers)} Linear and embedding layers and all of "
            "them are heads or named in modules_to_not_convert; shorten that list or load another class of model"
        )
    return {name: table[name] for name in layers if name in table}


def tied_row(model: nn.Module, name: str, owner: str, row: LayerSpec) -> LayerSpec:
    """The row of a layer that shares the weight of `owner`; one that reads a table takes its input as it is."""
    table = kind_of(model.get_submodule(owner)).table or kind_of(model.get_submodule(name)).table
    return replace(row, inputs=None) if table else row


def _skipped(name: str, patterns: tuple[str, ...]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...], layers: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in layers):
            near = get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
            raise ValueError(
                f"modules_to_not_convert has {pattern!r}, which matches no Linear or embedding layer; "
                f"the nearest names are {near}. A pattern is a run of whole name parts, such as 'encoder.layer.0'"
            )


def _check_tables(model: nn.Module, facts: ModelFacts, skip: tuple[str, ...]) -> None:
    for name in facts.tables:
        module = model.get_submodule(name)
        unknown = kind_of(module) is None or getattr(module, "max_norm", None) is not None
        if unknown and not _skipped(name, skip):
            raise TypeError(
                f"the input embedding {name!r} is a {type(module).__name__}, whose forward we do not know how to keep; "
                "use embedding_bits=None or name it in modules_to_not_convert"
            )


def _check_tied(model: nn.Module, name: str, owner: str, skip: tuple[str, ...]) -> None:
    if _skipped(name, skip):
        raise ValueError(
            f"{name!r} shares its weight with the embedding {owner!r}, so one cannot stay float without the other; "
            f"use embedding_bits=None, or take it out of modules_to_not_convert={list(skip)}"
        )
    if kind_of(model.get_submodule(name)) is None:
        raise TypeError(
            f"{name!r} shares the weight of the embedding {owner!r} and is a {type(model.get_submodule(name)).__name__}, "
            "which we do not know how to quantize; use embedding_bits=None"
        )


def prepare(
    model: nn.Module, scheme: QuantScheme, ranges: str = "mse", energies: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Make the selected layers fake-quantized, in place, with ranges found from their weights.

    Layers that are fake-quantized already keep their ranges, so a second call changes nothing. Weights on the device "meta"
    have none: `find_layer_ranges` finds them when there are values.

    Args:
        model (`nn.Module`): a float model, or one that was prepared with the same scheme.
        scheme (`QuantScheme`): what shall become of it.
        ranges (`str`): "minmax", "mse", "signed", "energy", "lsq" or "ternary", see `ops/ranges.py`, or "auto", see
            `range_method`.
        energies (`Mapping[str, Tensor]`, *optional*): for "energy", of layers by name, see `algorithms/energy.py`.

    Returns:
        `nn.Module`: the same model.

    Raises:
        ValueError: see `select` and `ops.find_ranges`; the model is packed already; energies without "energy", or the other
            way round.
    """
    if any(isinstance(module, PackedLinear | PackedEmbedding) for module in model.modules()):
        raise ValueError("the model is packed and has no float weights to prepare; call unpack(model) first")
    if ranges not in (*RANGES, "auto"):
        raise ValueError(f"ranges={ranges!r} is unknown; use one of {sorted((*RANGES, 'auto'))}")
    if (ranges == "energy") != (energies is not None):
        raise ValueError(
            f"ranges={ranges!r} and energies={'None' if energies is None else 'given'} do not go together; use "
            "ranges='energy' with what algorithms.energy.input_energies(model, names, batches) finds, or neither"
        )
    if ranges == "ternary" and not scheme.weights.ternary:
        raise ValueError("ranges='ternary' needs ternary weights; use QuantSpec(bits=2, ternary=True)")
    table = {n: row for n, row in select(model, scheme).items() if not isinstance(model.get_submodule(n), LowBitLayer)}
    tied = reader_of(model).facts(model).tied
    float_layers = {name: model.get_submodule(name) for name in table}
    layers = {name: kind_of(old).fake.from_float(old, table[name]) for name, old in float_layers.items()}
    own = {name: layer for name, layer in layers.items() if tied.get(name) not in table and not layer.weight.is_meta}
    find_layer_ranges(own, ranges, energies)
    swap(model, {name: lambda _, __, new=layer: new for name, layer in layers.items()}, table)
    reader_of(model).changed(model)
    return model


def find_layer_ranges(layers: Mapping[str, LowBitLayer], ranges: str, energies: Mapping[str, Tensor] | None = None) -> None:
    """Set the scales of fake-quantized layers from their master weights, in place.

    With ranges="energy" a layer whose inputs have no energies, such as a table, takes "mse".

    Raises:
        ValueError: see `ops.find_ranges`; the message names the layer.
    """
    for name, layer in layers.items():
        try:
            known = (energies or {}).get(name) if ranges == "energy" else None
            method = "mse" if ranges == "energy" and known is None else range_method(layer.spec, ranges)
            layer.find_ranges(method, known)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def pack(model: nn.Module) -> nn.Module:
    """Turn fake-quantized layers into packed ones, in place; a model without any is left as it is.

    Returns:
        `nn.Module`: the same model.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowBitLayer) and type(m) is kind_of(m).fake}
    table = {name: layer.spec for name, layer in layers.items()}
    swap(model, {name: kind_of(layer).packed.skeleton for name, layer in layers.items()}, table)
    for name, fake in layers.items():
        packed = model.get_submodule(name)
        packed.set_weight(fake)
        if fake.input_scale is not None:
            packed.set_input_range(fake.input_scale, fake.input_zero_point)
    reader_of(model).changed(model)
    return model


@torch.no_grad()
def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every low-bit layer back into a float layer with the weight that its codes stand for, in place.

    Args:
        model (`nn.Module`): a packed or fake-quantized model.
        dtype (`torch.dtype`, *optional*): of the weights; by default that of the layer's marker or master weight.

    Returns:
        `nn.Module`: the same model; its outputs are those of the low-bit model but for the quantization of inputs.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLayer)}
    weights: dict[int, nn.Parameter] = {}

    def build(layer: LowBitLayer, _: LayerSpec) -> nn.Module:
        weight = layer.quantized_weight().to(dtype or layer.weight.dtype)
        new = kind_of(layer).build(layer, weight)
        if layer.owner is not layer or id(layer) in weights:
            new.weight = weights.setdefault(id(layer.owner), new.weight)
        weights.setdefault(id(layer), new.weight)
        return new

    swap(model, dict.fromkeys(layers, build), {name: layer.spec for name, layer in layers.items()})
    reader_of(model).changed(model)
    return model


def range_method(spec: LayerSpec, ranges: str) -> str:
    """The range method of one layer in a model quantized with `ranges`: of a ternary model the wider tables take "mse".

    "auto" is "lsq" for 2 bits with one scale a matrix, where "mse" would clip the weights that count, "signed" for
    symmetric groups of 2 and 3 bits, else "mse": our choice, measured in docs/methods/zsaq.md and autoround.md.
    """
    if spec.weight.ternary:
        return "ternary"
    if ranges == "auto":
        bits, granularity = spec.weight.bits, spec.weight.granularity
        if granularity == "group" and bits <= 3 and spec.weight.symmetric:
            return "signed"
        return "lsq" if (bits, granularity) == (2, "tensor") else "mse"
    return "mse" if ranges == "ternary" else ranges


def skeleton(model: nn.Module, table: Mapping[str, LayerSpec], packed: bool = True) -> nn.Module:
    """Put empty low-bit layers in place of the layers of a table, in place, on the device they are on (also "meta")."""
    kinds = {name: kind_of(model.get_submodule(name)) for name in table}
    swap(model, {n: k.packed.skeleton if packed else k.fake.from_float for n, k in kinds.items()}, table)
    return model


def swap(
    model: nn.Module,
    build: Mapping[str, Callable[[nn.Module, LayerSpec], nn.Module]],
    table: Mapping[str, LayerSpec],
) -> None:
    """Replace layers by name, wherever the model holds them, then tie the new low-bit ones as the old were tied."""
    tied = reader_of(model).facts(model).tied
    old = {name: model.get_submodule(name) for name in build}
    new = {}
    for name, layer in old.items():
        new[id(layer)] = _carry_over(layer, build[name](layer, table[name]))
        if isinstance(new[id(layer)], LowBitLayer):
            new[id(layer)].float_type = getattr(layer, "float_type", None) or type(layer)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if id(module) in new:
                setattr(parent, child, new[id(module)])
    for name in build:
        layer, owner = model.get_submodule(name), tied.get(name)
        if isinstance(layer, LowBitLayer) and owner is not None:
            layer.tie_to(model.get_submodule(owner))


def _carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give the new layer what was added to the old one: hooks, buffers, plain attributes, training mode."""
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    for name, buffer in old._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, value in vars(old).items():
        if name not in vars(new) and name not in _STATE_ATTRIBUTES:
            setattr(new, name, value)
    return new.train(old.training)


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_STATE_ATTRIBUTES = {"spec", "rows", "columns", "runtime", "float_type", "kernel", "_tied", "nx", "nf"}
_STATE_ATTRIBUTES |= {
    "perturbation",
    "forward",
    "_old_forward",
    "_hf_hook",
}  # accelerate's hooks wrap the old layer's forward


def low_bit_layers(model: nn.Module) -> Iterator[tuple[str, LowBitLayer]]:
    """The low-bit layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowBitLayer))


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, such as its encoder and decoder layers, by name, found by structure.

    They are the entries of its outermost `nn.ModuleList`s of which every entry holds a Linear layer, in whichever state.
    """

    def holds_linear(module: nn.Module) -> bool:
        return any((kind := kind_of(m)) is not None and not kind.table for m in module.modules())

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(holds_linear, module)):
            found |= {f"{name}.{i}": block for i, block in enumerate(module)}
    return found


def quantize_weight(layer: LowBitLayer, weight: Tensor, ranges: str, packed: bool = True) -> dict[str, Tensor]:
    """The weight's tensors of a packed or, with `packed=False`, a fake-quantized layer, by name; the layer is unchanged.

    Shapes: weight as the float layer stores it, (O, I) or, transposed, (I, O) -> see `layers/packed.py`.
    """
    kind = kind_of(layer)
    parameter = nn.Parameter(weight, requires_grad=False)
    fake = kind.fake(parameter, layer.spec) if kind.table else kind.fake(parameter, None, layer.spec)
    fake.find_ranges(range_method(layer.spec, ranges))
    if packed:
        return packed_tensors(fake)
    return {name: p.detach() for name, p in fake.named_parameters(recurse=False) if not name.startswith("input")}


def set_runtime(model: nn.Module, runtime: str, kernel: str | None = None) -> nn.Module:
    """Choose how the packed layers of a model run, in place.

    Args:
        model (`nn.Module`): a packed model.
        runtime (`str`): "fast": beside its codes, a layer keeps its weight in the layout of its kernel, one byte a weight
            for "int8", half a byte for "int4", nothing for "native", from its first call on. "small": only the codes are
            kept, as they are on disk.
        kernel (`str`, *optional*): the only kernel allowed, a name in `kernels.KERNELS`; a layer that it does not serve
            raises a ValueError when it is called. None: the fastest that serves.

    Raises:
        ValueError: an unknown runtime or kernel.
    """
    check_runtime(runtime, kernel)
    for _, layer in low_bit_layers(model):
        if isinstance(layer, PackedLinear | PackedEmbedding):
            layer.set_runtime(runtime, kernel)
    return model
