"""The few weights of a matrix whose float residual is kept beside the codes: where they are, and adding them back.

PreQuant (https://huggingface.co/papers/2306.00014) tunes about 0.5 % "outlier" weights a task; its criterion is unknown to
us. Largest magnitudes, of the whole matrix or of each row, are our choice, measured in docs/methods/prequant.md and
docs/methods/prequant_adapters.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


_CHUNK = 2**22


def largest_positions(weight: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes of a matrix, ascending.

    Shapes: weight (O, I) -> (count,) int32, positions in `weight.flatten()`. Of equal magnitudes the first ones are taken.
    The weight is read in chunks, so that no second copy of a large table is made.

    Raises:
        ValueError: the matrix has more elements than an int32 can count.
    """
    flat = weight.detach().reshape(-1)
    _check_size(flat.numel())
    values, positions = flat.new_empty(0, dtype=torch.float32), flat.new_empty(0, dtype=torch.int64)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].float().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        where = first_largest(chunk, count)
        values, positions = torch.cat([values, chunk[where]]), torch.cat([positions, where + start])
        keep = first_largest(values, count)
        values, positions = values[keep], positions[keep]
    return positions.to(torch.int32)


def largest_of_rows(weight: Tensor, count: int) -> Tensor:
    """Positions of the largest magnitudes of each row, as many of each; what cannot be shared out goes to the rows whose
    next one is largest.

    Shapes: weight (O, I) -> (count,) int32 ascending, positions in `weight.flatten()`. Of equal magnitudes the first ones
    are taken. The weight is read in blocks of rows.

    Raises:
        ValueError: see `largest_positions`.
    """
    rows, columns = weight.shape
    _check_size(rows * columns)
    each, rest = divmod(min(count, rows * columns), rows)
    taken, nexts, values = [], [], []
    for start, block in zip(range(0, rows, _rows(columns)), weight.detach().split(_rows(columns)), strict=True):
        sizes = block.float().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        order = sizes.argsort(dim=1, descending=True, stable=True)[:, : each + 1]
        where = order + torch.arange(start, start + len(block), device=order.device).unsqueeze(1) * columns
        taken.append(where[:, :each].reshape(-1))
        nexts.append(where[:, each:].reshape(-1))
        values.append(sizes.gather(1, order[:, each:]).view(-1))
    if rest:
        taken.append(torch.cat(nexts)[first_largest(torch.cat(values), rest)])
    return torch.cat(taken).sort().values.to(torch.int32)


def _rows(columns: int) -> int:
    """How many rows make up a chunk."""
    return max(1, _CHUNK // max(1, columns))


def _check_size(count: int) -> None:
    if count > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"a matrix of {count} weights is too large for int32 outlier positions; "
            "name it in modules_to_not_convert or use outliers=None"
        )


def first_largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of some values are, ascending; of equal ones the first. All, if there are fewer.

    Shapes: values (n,), without NaN -> (min(count, n),) int64.
    """
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    smallest = torch.topk(values, count, sorted=False).values.min() if count else values.new_full((), torch.inf)
    taken = values > smallest
    equal = (values == smallest).nonzero().view(-1)
    taken[equal[: count - int(taken.sum())]] = True
    return taken.nonzero().view(-1)


def add_outliers(weight: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Add stored residuals to a dequantized weight.

    Shapes: weight (O, I) float, positions (k,) int32, values (k,) float32 -> (O, I); differentiable in both.
    """
    return weight.reshape(-1).index_add(0, positions.long(), values.to(weight.dtype)).view_as(weight)


def union_of_positions(parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """All positions of several tensors, and where in them those of each part are: None, if a part has them all.

    Shapes: parts of (k,) int32 ascending -> (n,) int32 ascending, [(k,) int64 or None]. If all parts are equal, the first
    is returned itself.
    """
    everything = parts[0]
    if not all(torch.equal(part, everything) for part in parts[1:]):
        everything = torch.cat(list(parts)).unique()
    whole = len(everything)
    return everything, [None if len(p) == whole else torch.searchsorted(everything, p) for p in parts]


def sum_at_positions(parts: Sequence[Tensor], where: Sequence[Tensor | None], count: int) -> Tensor:
    """The sum of values whose places `union_of_positions` found. Shapes: parts of (k,) float32 -> (count,) float32."""
    total = None
    for values, index in zip(parts, where, strict=True):
        if index is not None:
            total = (values.new_zeros(count) if total is None else total).index_add(0, index, values)
        else:
            total = values if total is None else total + values
    return total


def gather_outlier_rows(rows: Tensor, columns: int, positions: Tensor, values: Tensor) -> Tensor:
    """The residuals of some rows of a matrix, as a dense matrix of those rows.

    Shapes: rows (n,) int64 row numbers, positions (k,) int32 ascending, values (k,) float32 -> (n, columns) float32.
    """
    starts = torch.searchsorted(positions, (rows * columns).to(torch.int64))
    counts = torch.searchsorted(positions, ((rows + 1) * columns).to(torch.int64)) - starts
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    first = counts.cumsum(0) - counts
    index = torch.arange(len(owner), device=rows.device) - first[owner] + starts[owner]
    target = owner * columns + positions[index].long() - rows[owner] * columns
    dense = values.new_zeros(len(rows) * columns)
    return dense.index_add(0, target, values[index]).view(len(rows), columns)
