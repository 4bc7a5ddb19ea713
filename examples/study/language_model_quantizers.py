"""What the study `language_model_peers` compares: each method as a float32 model with the values that it stores.

`quantized` serves them all. Every peer is imported where it is used, so a cell needs its own package alone.
"""

import importlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from autoround import ITERATIONS, exact_values, rounded_layers
from language_models import MODELS, PARAGRAPHS, _bits_a_weight, _config
from runner import Cell


TASK = "smollm2"
TRAINED = {"w4-g128": (4, 128), "w3-g64": (3, 64), "w2-g64": (2, 64)}  # bits and group size
GROUPED = {"w4-g64": (4, 64), "w3-g64": (3, 64), "w2-g64": (2, 64)}
LENGTH, BATCH = 256, 8  # tokens of a sample and samples of a step: what "mrem" has as it comes
EQUAL = {"w4-g128": 115, "w3-g64": 115, "w2-g64": 120}  # iterations: about the time of "mrem"
PACKAGES = {
    "nf4": "bitsandbytes",
    "nf4-double": "bitsandbytes",
    "hqq": "hqq",
    "sinq": "sinq",
    "gptq": "gptqmodel",
    "autoround": "auto-round",
    "autoround-equal": "auto-round",
}
Quantizer = Callable[[Any], tuple[Any, int]]  # a weight (O, I) -> values (O, I) and bytes


def quantized(cell: Cell, data: Path) -> tuple[Any, float, dict[str, Any]]:
    """The model of a cell, bits a weight as they are stored, and what else belongs into the row.

    Raises:
        ImportError: a peer that is not installed. ValueError: a peer that quantized other layers.
    """
    if cell.method == "float":
        return load(data), 32.0, {}
    if cell.method in ("rounding", "mrem"):
        model = load(data, quantization_config=_own_config(cell, data))
        bits = _bits_a_weight(model)
        return model.dequantize().eval(), bits, {}
    model = load(data)
    if cell.method.startswith("autoround"):
        found, bits, more = _autoround(model, cell, data)
    elif cell.method == "gptq":
        found, bits, more = _gptq(model, cell, data)
    elif cell.method.startswith("llama.cpp"):
        found, bits, more = _llama_cpp(model, cell, data)
    else:
        found, bits, more = _weightwise(model, cell)
    _put(model, cell, found)
    if cell.method in PACKAGES:
        more["package"] = f"{PACKAGES[cell.method]} {metadata.version(PACKAGES[cell.method])}"
    return model, bits, more


# What all share -------------------------------------------------------------------------------------------------------


def load(data: Path, **options: Any) -> Any:
    """The float model, or one of this package's."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data / MODELS[TASK][0], dtype=torch.float32, **options).eval()


def tokenizer(data: Path) -> Any:
    """The model's."""
    from optimum_zsaq.report.evaluation import load_tokenizer

    return load_tokenizer(data / MODELS[TASK][0])


def samples(model: Any, data: Path) -> list[dict[str, Any]]:
    """The sequences that "mrem" reads, one a batch: {"input_ids": (1, 256), "attention_mask": (1, 256)}."""
    from optimum_zsaq.integrations.data import packed_batches, read_texts

    texts = read_texts(_config("mrem", {}, data).calibration_data, PARAGRAPHS)
    return [dict(batch) for batch in packed_batches(model, texts, 1, LENGTH)]


def sizes(cell: Cell) -> tuple[int, int]:
    """Bits and group size; of what names neither, those of the layers' choice alone."""
    return {**TRAINED, **GROUPED}.get(cell.scheme, (4, 64))


def _scheme(cell: Cell) -> dict[str, Any]:
    bits, group = sizes(cell)
    return {"weight_bits": bits, "granularity": "group", "group_size": group, "activation_bits": None}


def _own_config(cell: Cell, data: Path) -> Any:
    """As it comes, but with a float embedding, as the peers have it."""
    method = "mrem" if cell.method == "mrem" else "rounding-auto"
    return _config(method, {**_scheme(cell), "embedding_bits": None, "seed": cell.seed}, data)


def _layers(model: Any, cell: Cell) -> dict[str, Any]:
    """The layers that this package quantizes, by name: a peer must take the same."""
    from optimum_zsaq import PreQuantConfig
    from optimum_zsaq.surgery import select

    config = PreQuantConfig(**_scheme(cell), embedding_bits=None)
    return {name: model.get_submodule(name) for name in select(model, config.scheme())}


def _put(model: Any, cell: Cell, values: dict[str, Any]) -> None:
    import torch

    layers = _layers(model, cell)
    if set(layers) != set(values):
        raise ValueError(f"{cell.method} quantized other layers, {sorted(set(layers) ^ set(values))[:5]}; compare the same")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(values[name])


def _peer(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"the study `language_model_peers` needs {package}; pip install {package}") from error


def _bytes(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Peers that look at a weight alone ------------------------------------------------------------------------------------


def _weightwise(model: Any, cell: Cell) -> tuple[dict[str, Any], float, dict[str, Any]]:
    quantizer, layers = WEIGHTWISE[cell.method](cell), _layers(model, cell)
    found = {name: quantizer(layer.weight.data) for name, layer in layers.items()}
    return {name: values for name, (values, _) in found.items()}, _bits(found), {}


def _bits(found: dict[str, tuple[Any, int]]) -> float:
    return round(8 * sum(stored for _, stored in found.values()) / sum(v.numel() for v, _ in found.values()), 3)


def _nf4(cell: Cell) -> Quantizer:
    """bitsandbytes; a scale a block of 64, with double quantization of 8 bits."""
    functional = _peer("bitsandbytes", "bitsandbytes").functional

    def quantize(weight: Any) -> tuple[Any, int]:
        options = {"blocksize": 64, "compress_statistics": cell.method == "nf4-double", "quant_type": "nf4"}
        codes, state = functional.quantize_4bit(weight, **options)
        stored = [codes, state.absmax, *([state.state2.absmax] if state.nested else [])]
        return functional.dequantize_4bit(codes, state), _bytes(*stored)

    return quantize


def _hqq(cell: Cell) -> Quantizer:
    """HQQ's defaults: float16 scales and zero points, the latter found by its optimisation."""
    import torch

    module, (bits, group) = _peer("hqq.core.quantize", "hqq"), sizes(cell)
    config = module.hqq_base_quant_config(nbits=bits, group_size=group)["weight_quant_params"]

    def quantize(weight: Any) -> tuple[Any, int]:
        codes, meta = module.Quantizer.quantize(weight, compute_dtype=torch.float16, device="cpu", **config)
        codes, meta = module.Quantizer.to_ooplace(codes, meta, "cpu")  # as HQQLinear keeps them
        return module.Quantizer.dequantize(codes, meta), _bytes(codes, meta["scale"], meta["zero"])

    return quantize


def _sinq(cell: Cell) -> Quantizer:
    """SINQ's defaults: scales and zero points of 8 bits, and a scale a column."""
    import torch

    module, (bits, group) = _peer("sinq.sinqlinear", "sinq"), sizes(cell)
    config = module.sinq_base_quant_config(nbits=bits, group_size=group, method="sinq")["weight_quant_params"]

    def quantize(weight: Any) -> tuple[Any, int]:
        codes, meta = module.Quantizer.quantize(weight, None, compute_dtype=torch.float32, device="cpu", **config)
        parts = [part for name in ("scale", "scale2", "zero") for part in _parts(meta[name]) if torch.is_tensor(part)]
        stored = [part.half() if part.is_floating_point() else part for part in parts]
        return module.Quantizer.dequantize(codes, meta), _bytes(codes, *stored)

    return quantize


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


WEIGHTWISE: dict[str, Callable[[Cell], Quantizer]] = {"nf4": _nf4, "nf4-double": _nf4, "hqq": _hqq, "sinq": _sinq}


# Peers that read texts ------------------------------------------------------------------------------------------------


def _autoround(model: Any, cell: Cell, data: Path) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """AutoRound's codes times its scales; it stores both, and a zero point in as many bits as a code."""
    (bits, group), texts = sizes(cell), samples(model, data)
    iterations = EQUAL[cell.scheme] if cell.method == "autoround-equal" else ITERATIONS
    _, layers = rounded_layers(
        model,
        tokenizer(data),
        texts,
        bits=bits,
        group_size=group,
        sym=False,
        iters=iterations,
        seqlen=LENGTH,
        batch_size=BATCH,
        seed=cell.seed,
    )
    groups = sum(layer.scale.numel() for layer in layers.values())
    count = sum(layer.weight.numel() for layer in layers.values())
    values = {name: exact_values(layer, group) for name, layer in layers.items()}
    return values, round(bits + groups * (16 + bits) / count, 3), {"iterations": iterations, "samples": len(texts)}


def _gptq(model: Any, cell: Cell, data: Path) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """GPTQModel's GPTQ with zero points, else as it comes; which group a column is in (`g_idx`) is not counted."""
    import torch

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # of two cores it takes one worker, and fails
    package, (bits, group), texts = _peer("gptqmodel", "gptqmodel"), sizes(cell), samples(model, data)
    torch.set_num_threads(1)
    form = package.quantization.FORMAT.GPTQ_V2  # zero points as they are
    config = package.QuantizeConfig(
        bits=bits, group_size=group, sym=False, format=form, device="cpu", offload_to_disk=False
    )
    peer = package.GPTQModel.load(str(data / MODELS[TASK][0]), config, dtype=torch.float32)
    rows = [{name: tensor[0].tolist() for name, tensor in batch.items()} for batch in texts]
    peer.quantize(rows, batch_size=BATCH, backend=package.BACKEND.TORCH)
    found = {}
    for name, layer in peer.model.named_modules():
        if hasattr(layer, "qweight"):
            stored = _bytes(layer.qweight, layer.qzeros, layer.scales)
            found[name] = layer.dequantize_weight().T.detach().float(), stored
    return {name: values for name, (values, _) in found.items()}, _bits(found), {"samples": len(texts)}


def _llama_cpp(model: Any, cell: Cell, data: Path) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """llama.cpp's own quantizer, with an importance matrix of the same texts or without one."""
    from language_model_gguf import quantize_gguf, version

    importance = _importance(model, cell, data) if cell.method.endswith("-imatrix") else None
    found = quantize_gguf(model, cell.scheme, importance)
    return {name: values for name, (values, _) in found.items()}, _bits(found), {"package": version()}


def _importance(model: Any, cell: Cell, data: Path) -> dict[str, Any]:
    """The mean square of each input channel, by layer: what llama.cpp's tool `imatrix` collects."""
    from optimum_zsaq.algorithms.energy import input_energies

    return input_energies(model, _layers(model, cell), samples(model, data))
