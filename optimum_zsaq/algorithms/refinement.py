"""Codes and ranges of one weight, made better for each other: coordinate descent and least squares in turn.

    min over codes, scales, minima of  tr((Q - W) H (Q - W)^T),    H = X X^T of the layer's inputs

A sweep takes each column in turn and rounds it to what is best given all others; with codes fixed, the error is quadratic
in the scales (and minima) of a row, which are solved for together. Neither step can make the error larger, but for the
rounding of scales to what is stored. Coordinate descent as in QuantEase, https://huggingface.co/papers/2309.01885; solving
for ranges between sweeps, and how many there are, are our choice (docs/methods/language_models.md).
"""

import torch
from torch import Tensor

from ..layers import LowBitLayer
from ..ops import dequantize, fake_quantize, quantize, stored_scale
from ..ops.affine import expand_slices
from ..spec import QuantSpec


_BLOCK = 128  # columns that are swept before the rest of the errors' products is brought up to date
_AT_ONCE = 2**24  # numbers of the largest intermediate while ranges are solved for
_STAY = 1e-4  # share of the diagonal that pulls ranges to where they were: nearly empty slices have no best one


def can_refine(layer: LowBitLayer) -> bool:
    """Whether a layer's codes follow each weight alone, and nothing is stored beside them."""
    return not layer.spec.weight.ternary and layer.weight_outlier_positions is None


@torch.no_grad()
def refine(layer: LowBitLayer, wanted: Tensor, hessian: Tensor, rounds: int) -> None:
    """Sweep a fake-quantized layer's codes and solve for its ranges `rounds` times, and sweep once more, in place.

    Args:
        layer (`LowBitLayer`): whose master weight rounds to the codes to begin with; see `can_refine`.
        wanted (`Tensor`): W.
        hessian (`Tensor`): H, damped.
        rounds (`int`): at least 1.

    Shapes: wanted (O, I), hessian (I, I), both float32.
    """
    spec = layer.spec.weight
    weight = layer.master().float()
    for i in range(rounds + 1):
        scale, shift = stored_scale(layer.weight_scale, spec), layer.weight_shift
        weight = sweep(weight, wanted, hessian, scale, shift, spec)
        if i < rounds and spec.granularity != "tensor":
            codes = quantize(weight, scale, shift, spec)
            scale, shift = best_ranges(codes, wanted, hessian, scale, shift, spec)
            layer.weight_scale.copy_(scale)
            if spec.minimum:
                layer.weight_shift.copy_(shift)
            weight = dequantize(codes, stored_scale(layer.weight_scale, spec), layer.weight_shift, spec)
    layer.master().copy_(weight)


def sweep(weight: Tensor, wanted: Tensor, hessian: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec) -> Tensor:
    """One turn of each column; gives weights that round to the new codes.

    Shapes: weight and wanted (O, I), hessian (I, I), scale and shift as in `QuantSpec` -> (O, I) float32.
    """
    rows, columns = weight.shape
    per_row = QuantSpec(spec.bits, "row", symmetric=spec.symmetric, minimum=spec.minimum)
    scales = expand_slices(scale, columns, spec).expand(rows, columns)
    shifts = None if shift is None else expand_slices(shift, columns, spec).expand(rows, columns)
    values = fake_quantize(weight, scale, shift, spec)
    products, found = (values - wanted) @ hessian, torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        inner, own, changes = hessian[part, part], products[:, part].clone(), torch.zeros_like(products[:, part])
        for i, j in enumerate(range(part.start, part.stop)):
            best = values[:, j] - own[:, i] / inner[i, i]
            of_column = None if shifts is None else shifts[:, j, None]
            changes[:, i] = fake_quantize(best[:, None], scales[:, j, None], of_column, per_row)[:, 0] - values[:, j]
            own.addr_(changes[:, i], inner[i])
            found[:, j] = best
        products.addmm_(changes, hessian[part])
    return found


def best_ranges(
    codes: Tensor, wanted: Tensor, hessian: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Scales, and minima where the spec has them, of least error for codes that stay as they are.

    A scale that would change its sign stays as it was, and its minimum with it.

    Shapes: codes (O, I) uint8, wanted (O, I), hessian (I, I), scale and shift (O, n) -> 2 x (O, n) float32; without
    minima the shift is returned as it was given.
    """
    rows, columns = codes.shape
    count, size = scale.shape[1], columns if spec.granularity == "row" else spec.group_size
    levels = dequantize(codes, torch.ones_like(scale), torch.zeros_like(scale) if spec.minimum else shift, spec)
    pad = count * size - columns
    levels, wanted = (torch.nn.functional.pad(t, (0, pad)) for t in (levels, wanted))
    hessian = torch.nn.functional.pad(hessian, (0, pad, 0, pad))
    ones = torch.nn.functional.pad(torch.ones(columns, device=codes.device), (0, pad)).view(count, size)
    blocks = hessian.view(count, size, count, size)
    found = []
    for part in torch.arange(rows, device=codes.device).split(max(1, _AT_ONCE // (columns * count))):
        own = levels[part].view(len(part), count, size)
        reached = torch.einsum("kalb,nlb->nkal", blocks, own)
        normal = torch.einsum("nka,nkal->nkl", own, reached)
        target = (wanted[part] @ hessian).view(len(part), count, size)
        right, start = (target * own).sum(dim=2), scale[part]
        if spec.minimum:
            mixed = torch.einsum("ka,nkal->nkl", ones, reached)
            constant = torch.einsum("kalb,ka,lb->kl", blocks, ones, ones).expand(len(part), -1, -1)
            normal = torch.cat([torch.cat([normal, mixed.mT], 2), torch.cat([mixed, constant], 2)], 1)
            right, start = torch.cat([right, (target * ones).sum(dim=2)], 1), torch.cat([start, shift[part]], 1)
        stay = torch.diag_embed(_STAY * normal.diagonal(dim1=1, dim2=2) + 1e-12)
        left = right - (normal @ start[..., None])[..., 0]
        found.append(start + torch.linalg.solve(normal + stay, left[..., None])[..., 0])
    new = torch.cat(found)
    kept = torch.isfinite(new[:, :count]) & (new[:, :count] * scale > 0)
    if not spec.minimum:
        return torch.where(kept, new, scale), shift
    kept &= torch.isfinite(new[:, count:])
    return torch.where(kept, new[:, :count], scale), torch.where(kept, new[:, count:], shift)
