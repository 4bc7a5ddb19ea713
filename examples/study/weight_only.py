"""Data-free quantization of the weights alone, one scale for 64 of them: this package's rounding, HQQ, SINQ, a second axis,
and what `ZSAQConfig` makes of it.

One language model; inputs, embeddings and head stay float, nothing is calibrated and nothing tuned on the text that is
measured. HQQ and SINQ are written here from what their authors published, so neither package is needed. The data folder
holds `models/wikitext-opt` and `wikitext-2/test.txt`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bootstrap import paired_interval
from prequant import MODELS, _measure_text
from prequant_tables import Rows, circumstances, markdown
from runner import Cell
from torch import Tensor, nn

from optimum_zsaq import LowBitConfig, PreQuantConfig, QuantSpec, ZSAQConfig
from optimum_zsaq.ops import fake_quantize, find_ranges
from optimum_zsaq.surgery import select


BITS = (4, 3, 2)
GROUP = 64
TASK = "wikitext"
SYMMETRIC = {"asymmetric": False, "symmetric": True}

# HQQ: the blog's and the package's defaults.
_NORM, _BETA, _KAPPA, _STEPS = 0.7, 10.0, 1.01, 20
# SINQ: the bounds of a step, of all steps together and of a deviation, and how many iterates are looked at.
_STEP, _TOTAL, _DEVIATION, _ITERATES = (0.7, 2.0), (-0.3, 10.0), (1e-3, 1e3), 16


# Quantizers: a weight (O, I) float32 -> the values that its codes stand for, (O, I) float32 -----------------------------


def groups_of(weight: Tensor, group_size: int) -> Tensor:
    """The groups of each row.

    Shapes: weight (O, I) -> (O, I / group_size, group_size).

    Raises:
        ValueError: the group size does not divide the columns.
    """
    if weight.shape[1] % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {weight.shape[1]} columns of the weight; use one that does"
        )
    return weight.detach().float().unflatten(1, (-1, group_size))


def _extremes(groups: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """The minimum of each group (..., 1), and how far it is to the maximum; groups of one value get a scale of 1."""
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    return low, torch.where(high > low, high - low, torch.full_like(low, highest))


def hqq(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """HQQ: unsigned codes, the scale of the extremes, and a float zero point found by half-quadratic optimisation.

    Shapes: weight (O, I) float32 -> (O, I) float32. Rounds end when the mean magnitude of the error does not fall any more.

    Source: https://mobiusml.github.io/hqq_blog/ and hqq 0.2.8 (`optimize_weights_proximal_v2`, axis 1; that the first zero
    point is rounded at 4 bits is its `BaseQuantizeConfig`).

    Raises:
        ValueError: see `groups_of`.
    """
    groups, highest = groups_of(weight, group_size), 2**bits - 1
    low, width = _extremes(groups, highest)
    inverse = highest / width
    zero = (-low * inverse).round() if bits == 4 else -low * inverse
    best, least, beta = groups, torch.inf, _BETA
    for _ in range(_STEPS):
        codes = (groups * inverse + zero).round().clamp(0, highest)
        values = (codes - zero) / inverse
        error = groups - values
        if (mean := error.abs().mean().item()) >= least:
            break
        best, least = values, mean
        zero = (codes - (groups - shrink(error, beta)) * inverse).mean(dim=-1, keepdim=True)
        beta *= _KAPPA
    return best.flatten(1)


def shrink(x: Tensor, beta: float) -> Tensor:
    """Generalised soft threshold of the l_p norm, sign(x) * max(0, |x| - |x|^(p - 1) / beta), p = 0.7 (the blog).

    With beta = 10 it is 0 for |x| < 0.17: errors of common weights are smaller, and the zero point is then the one at which
    the mean error of the group is 0.
    """
    size = x.abs()
    return x.sign() * (size - size ** (_NORM - 1) / beta).clamp(min=0.0)


def sinq(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """SINQ: each tile of `group_size` columns is balanced, then rounded between the extremes of its rows.

    Shapes: weight (O, I) float32 -> (O, I) float32. A group has a scale and an integer zero point, a column has a scale.

    Source: https://arxiv.org/abs/2509.22944 and sinq 0.2.0 ("1D" tiles; it does not balance a matrix of
    kurtosis above 5, this does).

    Raises:
        ValueError: see `groups_of`.
    """
    tiles, highest = groups_of(weight, group_size).transpose(0, 1), 2**bits - 1
    rows, columns = balance(tiles)
    balanced = tiles / columns / rows
    low, width = _extremes(balanced, highest)
    scale = width / highest
    zero = -(low / scale).round()
    codes = (balanced / scale + zero).round().clamp(0, highest)
    return ((codes - zero) * scale * rows * columns).transpose(0, 1).flatten(1)


def balance(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Sinkhorn's iteration on the logarithms of the standard deviations of rows and columns; the most balanced iterate.

    Shapes: tiles (T, O, g) -> rows (T, O, 1) and columns (T, 1, g), to divide by. A tile stops where its imbalance rises.

    Source: sinq 0.2.0; the bounds of steps and sums too (`sinkhorn_log`).
    """
    logs = [torch.zeros_like(tiles[:, :, :1]), torch.zeros_like(tiles[:, :1, :])]
    best = [log.exp() for log in logs]
    target = torch.minimum(*(d.clamp(*_DEVIATION).amin(dim=(1, 2), keepdim=True) for d in _deviations(tiles))) + 1e-6
    least = imbalance(tiles)
    running = torch.ones_like(least, dtype=torch.bool)
    for _ in range(_ITERATES):
        now = tiles / logs[1].exp() / logs[0].exp()
        value = imbalance(now)
        running &= value <= least
        least = torch.minimum(least, value)
        best = [torch.where(running, log.exp(), old) for log, old in zip(logs, best, strict=True)]
        steps = [(d.clamp(*_DEVIATION) / target).clamp(*_STEP).log() for d in _deviations(now)]
        logs = [torch.where(running, (log + s).clamp(*_TOTAL), log) for log, s in zip(logs, steps, strict=True)]
    return best[0], best[1]


def _deviations(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of rows (T, O, 1) and columns (T, 1, g)."""
    return tiles.std(dim=2, keepdim=True), tiles.std(dim=1, keepdim=True)


def imbalance(tiles: Tensor) -> Tensor:
    """The largest standard deviation of a row or column over the smallest (as in SINQ): (T, O, g) -> (T, 1, 1)."""
    rows, columns = _deviations(tiles)
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), columns.amax(dim=2, keepdim=True))
    return largest / torch.minimum(rows.amin(dim=1, keepdim=True), columns.amin(dim=2, keepdim=True)).clamp(min=1e-12)


def rounding(weight: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """This package's rounding with MSE ranges: (O, I) -> (O, I) float32."""
    spec = QuantSpec(bits, "group", group_size, symmetric)
    return fake_quantize(weight.detach(), *find_ranges(weight, spec), spec)


def rescaled(weight: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """`rounding` with the scale of each group multiplied by <w, w> / <w, q>, so that the result q is as long as w along w.

    Shapes: weight (O, I) float32 -> (O, I) float32. The range of least squared error makes weights smaller on average:
    there, <w, q> = <q, q>. The codes stay the same.

    Source: our choice; it adds squared error and takes perplexity.

    Raises:
        ValueError: see `groups_of`.
    """
    groups, values = groups_of(weight, group_size), groups_of(rounding(weight, bits, group_size, symmetric), group_size)
    along = (groups * values).sum(dim=-1, keepdim=True)
    factor = torch.where(along > 0, (groups * groups).sum(dim=-1, keepdim=True) / along, torch.ones_like(along))
    return (values * factor).flatten(1)


def second_axis(
    weight: Tensor, bits: int, group_size: int, columns: str = "deviation", power: float = 1.0, symmetric: bool = False
) -> Tensor:
    """`rounding` of the weight with its columns divided by a scale, which multiplies the result again.

    Shapes: weight (O, I) float32 -> (O, I) float32; one scale a column. A scale of the rows would change nothing: the
    search finds it with the scales of the groups.

    Args:
        weight (`torch.Tensor`): the float weight.
        bits (`int`): width of a code.
        group_size (`int`): consecutive weights of a row that share a scale.
        columns (`str`): "deviation": a column's standard deviation. "sinkhorn": SINQ's scale of it, a tile a group;
            "sinkhorn-whole": the same with the whole matrix as one tile.
        power (`float`): of that scale; 0 is `rounding`.
        symmetric (`bool`): codes without a zero point.

    Raises:
        KeyError: unknown columns. ValueError: see `groups_of`.
    """
    scale = COLUMNS[columns](groups_of(weight, group_size)) ** power
    return rounding(weight.detach() / scale, bits, group_size, symmetric) * scale


COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "deviation": lambda groups: groups.flatten(1).std(dim=0, keepdim=True).clamp(min=1e-8),
    "sinkhorn": lambda groups: balance(groups.transpose(0, 1))[1].reshape(1, -1),
    "sinkhorn-whole": lambda groups: balance(groups.flatten(1)[None])[1].reshape(1, -1),
}


# The study ------------------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, Callable[..., Tensor]] = {
    "hqq": hqq,
    "sinq": sinq,
    "rescaled": rescaled,
    "second-axis": second_axis,
}


def schemes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, what of it, settings) of every row; "prequant" and "zsaq" are the package's configs."""
    for name, symmetric in SYMMETRIC.items():
        yield "prequant", name, {"symmetric": symmetric}
    yield "hqq", "asymmetric", {}
    yield "sinq", "asymmetric", {}
    for name, symmetric in SYMMETRIC.items():
        for columns in ("deviation", "sinkhorn"):
            yield "second-axis", f"{columns}-{name}", {"columns": columns, "symmetric": symmetric}
        yield "rescaled", name, {"symmetric": symmetric}
    yield "zsaq", "asymmetric", {"symmetric": False}


def cells() -> list[Cell]:
    """The float model, then every method at 4, 3 and 2 bits."""
    rows = [(method, f"w{bits}-{name}", {**more, "bits": bits}) for bits in BITS for method, name, more in schemes()]
    return [Cell("float", "float32", TASK), *(Cell(method, name, TASK, 0, settings) for method, name, settings in rows)]


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Quantize and measure, in float32; the methods that are not the package's put their values in the float model."""
    from transformers import AutoModelForCausalLM

    def load(**options: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(data / MODELS[TASK][0], dtype=torch.float32, **options).eval()

    reference = load()
    if cell.method == "float":
        return _measure_text(TASK, reference, None, data)
    settings = dict(cell.settings)
    bits = settings.pop("bits")
    config = config_of(bits, settings.get("symmetric", False))
    own = {"prequant": config, "zsaq": config_of(bits, settings.get("symmetric", False), ZSAQConfig)}
    model = load(quantization_config=own[cell.method]) if cell.method in own else load()
    if cell.method not in own:
        apply(model, config, lambda weight: QUANTIZERS[cell.method](weight, bits, GROUP, **settings))
    return {**_measure_text(TASK, model, reference, data), "error": weight_error(model, reference, config)}


def config_of(bits: int, symmetric: bool, kind: type[LowBitConfig] = PreQuantConfig) -> LowBitConfig:
    """The package's config of weights alone."""
    floats = {"activation_bits": None, "embedding_bits": None}
    return kind(weight_bits=bits, granularity="group", group_size=GROUP, symmetric=symmetric, minimum=False, **floats)


@torch.no_grad()
def apply(model: nn.Module, config: LowBitConfig, quantizer: Callable[[Tensor], Tensor]) -> None:
    """Replace, in place, the weights of the layers that a config would quantize by what a quantizer makes of them."""
    for name in select(model, config.scheme()):
        weight = model.get_submodule(name).weight
        weight.copy_(quantizer(weight))


@torch.no_grad()
def weight_error(model: nn.Module, reference: nn.Module, config: LowBitConfig) -> float:
    """Norm of the error of all quantized weights over the norm of the weights."""
    error = norm = 0.0
    for name in select(reference, config.scheme()):
        layer, weight = model.get_submodule(name), reference.get_submodule(name).weight
        values = layer.quantized_weight() if hasattr(layer, "quantized_weight") else layer.weight
        error, norm = error + (values - weight).square().sum().item(), norm + weight.square().sum().item()
    return (error / norm) ** 0.5


# Tables: a cell that is not finished is an empty place ----------------------------------------------------------------


def tables(rows: Rows) -> dict[str, str]:
    """Every table by name, as Markdown."""
    return {maker.__name__: maker(rows) for maker in (perplexities, differences, circumstances)}


def perplexities(rows: Rows) -> str:
    """Perplexity, KL and error of the weights of each method."""
    found = []
    if reference := rows.get(f"{TASK}/float/float32/0"):
        found.append(["float32", "", "32", *[f"{reference['perplexity']:.3f}"] * len(BITS), *[""] * 2 * len(BITS)])
    for method, name, _ in schemes():
        row = [rows.get(f"{TASK}/{method}/w{bits}-{name}/0") for bits in BITS]
        figures = [("perplexity", ".3f"), ("kl", ".4f"), ("error", ".4f")]
        texts = [format(cell[key], form) if cell else "" for key, form in figures for cell in row]
        found.append([method, name, f"b + {_overhead(method, name):.2f}", *texts])
    names = [f"{name}{bits}" for name in ("W", "KL W", "error W") for bits in BITS]
    return markdown(["method", "codes", "bits a weight", *names], found)


def _overhead(method: str, name: str) -> float:
    """Bits a weight beside the codes: 16 a scale or a float zero point, 8 an integer one; columns' scales are not counted.

    They are 16 bits for as many weights as the matrix has rows, 0.02 to 0.06 bits a weight here.
    """
    zero_point = 16 if method == "hqq" else 8 if "asymmetric" in name else 0
    return (16 + zero_point) / GROUP


def differences(rows: Rows) -> str:
    """Loss of each method less that of the package's asymmetric rounding, in thousandths of a nat."""
    found = []
    for method, name, _ in schemes():
        texts = []
        for bits in BITS:
            row, other = (rows.get(f"{TASK}/{m}/w{bits}-{n}/0") for m, n in ((method, name), ("prequant", "asymmetric")))
            texts.append(_interval(row, other) if row and other else "")
        if (method, name) != ("prequant", "asymmetric"):
            found.append([method, name, *texts])
    return markdown(["method", "codes", *(f"W{bits} [95 %]" for bits in BITS)], found)


def _interval(row: dict[str, Any], other: dict[str, Any]) -> str:
    mean, low, high = (1000 * value for value in paired_interval(row["window_loss"], other["window_loss"]))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
