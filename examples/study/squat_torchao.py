"""Cells of the study `squat` beside torchao's quantization-aware training, `pip install torchao`.

The same layers, bits, data, steps and learning rates: weights of 2, 3 and 4 bits, symmetric, one scale a row, inputs of 8
bits with a range a token; embeddings and heads stay float. "torchao" finds a weight's range anew at each step,
"torchao-range" learns the ranges of weights. Its models are measured fake-quantized, as they are trained.
"""

from typing import Any

from runner import Cell


SCHEMES = ("w2a8ef-row", "w3a8ef-row", "w4a8ef-row")
METHODS = ("lsq", "squat", "torchao", "torchao-range")


def peer_cells() -> list[Cell]:
    """One task, one seed."""
    return [Cell(method, scheme, "sst2") for scheme in SCHEMES for method in METHODS]


def fake_quantized(model: Any, config: Any, learned: bool) -> Any:
    """torchao's fake quantization in the layers that `config` would quantize, in place.

    Raises:
        ImportError: no torchao.
    """
    import torch

    from optimum_zsaq.surgery import select

    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers
    except ImportError as error:
        raise ImportError("these cells of the study `squat` need torchao; pip install torchao") from error
    layers = select(model, config.scheme())
    codes = getattr(torch, f"int{config.weight_bits}")
    learning = {"range_learning": True, "is_dynamic": False} if learned else {}
    weights = IntxFakeQuantizeConfig(codes, granularity="per_channel", is_symmetric=True, **learning)
    inputs = IntxFakeQuantizeConfig(torch.int8, granularity="per_token", is_symmetric=False)
    prepare = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, prepare, filter_fn=lambda module, name: name in layers)
    if learned:
        ids = torch.arange(5, 13).view(1, -1)
        initialize_fake_quantizers(model, (ids,))
    return model
