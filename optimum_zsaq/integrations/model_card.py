"""The README.md that is saved with a low-bit model: what it is, how it was made, how to load it."""

from typing import Any

from transformers import PreTrainedModel

from ..kinds import kind_of
from ..size import measure_size
from ..surgery import low_bit_layers
from .closing import won_lines


_TOLD_APART = ("kept", "stopped")  # in sentences of their own
MARK = "<!-- written by optimum-zsaq -->"

_TEMPLATE = """---
library_name: transformers
{base}tags:
- zsaq
- quantized
---
{mark}

# {title}, quantized by optimum-zsaq

{summary}

## How to load it

```bash
pip install optimum-zsaq
```

```python
import optimum_zsaq
from transformers import {architecture}

model = {architecture}.from_pretrained("{name}")
```

The package has to be installed; without it, loading stops with an error.

## What is in it

| part | layers | weights | bytes |
|---|---|---|---|
{rows}

{layers} layers are quantized. The weights take {packed} bytes instead of {dense} in float16.

## How it was made

{recipe}
"""


def model_card(model: PreTrainedModel, name: str) -> str:
    """The card of a low-bit model that is loaded as `name`: a folder or a Hub id."""
    size = measure_size(model)
    recipe = model.config.quantization_config.recipe or {}
    base = recipe.get("base_model") or ""
    names = {"codes": "codes", "scales": "scales and zero points", "outliers": "outliers", "float": "float"}
    rows = "\n".join(
        f"| {title} | {size.layers[part]:,} | {size.weights[part]:,} | {size.bytes[part]:,} |"
        for part, title in names.items()
        if size.bytes[part]
    )
    return _TEMPLATE.format(
        base=f"base_model: {base}\n" if "/" in base else "",
        mark=MARK,
        title=(base.rpartition("/")[2] or type(model).__name__),
        name=name,
        summary=_summary(model),
        architecture=type(model).__name__,
        rows=rows,
        layers=len(list(low_bit_layers(model))),
        packed=f"{sum(size.bytes.values()):,}",
        dense=f"{2 * size.parameters:,}",
        recipe=_recipe(model),
    )


def _summary(model: PreTrainedModel) -> str:
    linear = next((x.spec for _, x in low_bit_layers(model) if not kind_of(x).table and x.owner is x), None)
    table = next((x.spec for _, x in low_bit_layers(model) if kind_of(x).table), None)
    parts = []
    if linear is not None:
        weight, inputs = linear.weight, linear.inputs
        group = f" of {weight.group_size}" if weight.group_size else ""
        kind = "ternary" if weight.ternary else "symmetric" if weight.symmetric else "asymmetric"
        parts.append(f"Linear layers: {weight.bits} bits, one scale a {weight.granularity}{group}, {kind}")
        how = "on a range a token" if inputs and inputs.granularity == "token" else "on one stored range a layer"
        parts.append(f"inputs of Linear layers: {f'{inputs.bits} bits, {how}' if inputs else 'float'}")
    parts.append(f"input embeddings: {f'{table.weight.bits} bits' if table else 'float'}")
    if (linear or table).outliers:
        share, scope = (linear or table).outliers, (linear or table).outlier_scope
        parts.append(f"outliers: {100 * share:g} % of each {scope} keep a float residual")
    return "\n".join(f"- {part}" for part in parts)


def _recipe(model: PreTrainedModel) -> str:
    config = model.config.quantization_config
    recipe = config.recipe or {}
    versions = ", ".join(f"{name} {version}" for name, version in recipe.get("versions", {}).items())
    data, training = recipe.get("calibration"), recipe.get("training")
    told = {name: value for name, value in (data or {}).items() if not isinstance(value, dict) and name not in _TOLD_APART}
    lines = [
        f"- from `{recipe.get('base_model') or 'a model in memory'}`",
        f"- algorithm: {config.algorithm}, ranges: {recipe.get('ranges')}",
        f"- data: {', '.join(f'{k} {v}' for k, v in told.items()) or 'none'}",
        *([f"- trained: {', '.join(f'{k} {v}' for k, v in training.items())}"] if training else []),
        *(f"- {line}" for line in _won(data or {})),
        f"- versions: {versions}",
    ]
    return "\n".join(lines)


def _won(data: dict[str, Any]) -> list[str]:
    """What training was measured to win."""
    if "kept" in data:
        return won_lines(data)
    stages = data.get("won", {}).items()
    return [f"{stage}: {', '.join(f'{name} {value:.4f}' for name, value in found.items())}" for stage, found in stages]
