"""The search behind "mse", "signed" and "energy": a few clipping ranges, and for the codes of each the best scale.

For given codes the squared error is quadratic in the scale and the minimum, so the best of both and the error there follow
from a few sums; that scale gives better codes, so the best range found is coded anew. llama.cpp finds its k-quants so
(`make_qkx2_quants` in https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c); grids and rounds are our
choice, measured in docs/methods/language_models.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec import QuantSpec


Range = tuple[Tensor, Tensor | None]
CHUNK = 2**17  # weights looked at together: bounds the temporary memory, and stays in the processor's cache
_COARSE = 8  # clipping ranges, geometric from the smallest that clips nothing to `_NARROWEST`
_NARROWEST = {2: 0.7, 3: 1.2, 4: 1.6, 5: 2.2, 6: 2.8, 7: 3.3, 8: 3.8}  # by bits, in root mean squares of the slice
_FINE = (-2 / 3, -1 / 3, 1 / 3, 2 / 3)  # around the best of them, in steps of that grid, where one number is fitted
_ROUNDS = 2  # how often the best is coded anew
_ENDS = (0.9, 0.8, 0.7)  # integer zero point: either end clipped alone
_SPREAD = 1e-6  # share of their sum of squares that codes must vary by, for a minimum beside the scale to be fitted


def positive(scale: Tensor) -> Tensor:
    """A slice of zeros has no range; any scale represents it exactly, 1 is one."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def from_bounds(low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
    """Scale, and zero point or minimum, of the smallest range that holds [low, high], and zero but for a minimum."""
    if spec.minimum:
        return positive((high - low) / spec.highest), low
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        return positive(torch.maximum(high / spec.highest, -low / -spec.lowest)), None
    scale = positive((high - low) / spec.highest)
    return scale, torch.clamp(torch.round(-low / scale), spec.lowest, spec.highest)


def search(slices: Tensor, spec: QuantSpec, weights: Tensor | None = None, both_signs: bool = False) -> Range:
    """The range of least squared error among those looked at; never worse than the smallest that clips nothing.

    Shapes: slices and weights of the squared errors (R, n) float32 -> scale (R,), zero point or minimum (R,) or None.

    Args:
        both_signs (`bool`): symmetric codes may get a negative scale: their one code more is then on the positive side.
    """
    low, high = slices.amin(dim=1), slices.amax(dim=1)
    found = _Fit(slices, spec, weights)
    step = _step(found, low, high)
    shares = [step**i for i in range(_COARSE)]
    if spec.minimum:
        middle, half = (low + high) / 2, (high - low) / 2
        for share in shares:
            found.consider(*from_bounds(middle - half * share, middle + half * share, spec))
    else:
        for share in shares:
            found.consider(*from_bounds(low * share, high * share, spec))
        for share in shares if both_signs and spec.symmetric else ():
            found.consider(-from_bounds(-high * share, -low * share, spec)[0], None)
        if not spec.symmetric:
            for first, last in _one_ended(*_bounds(found.best, spec)):
                found.consider(*from_bounds(first, last, spec))
            scale, zero_point = found.best
            for shift in (-1, 1):
                found.consider(scale, (zero_point + shift).clamp(spec.lowest, spec.highest))
        scale, shift = found.best
        for power in _FINE:
            found.consider(scale * step**power, shift)
    for _ in range(_ROUNDS):
        found.consider(*found.best)
    best = _better(slices, spec, weights, from_bounds(low, high, spec), found.best)
    if both_signs and spec.symmetric:
        best = _better(slices, spec, weights, best, (-from_bounds(-high, -low, spec)[0], None))
    return best


def _step(fit: "_Fit", low: Tensor, high: Tensor) -> Tensor:
    """From a clipping range to the next narrower one, slice by slice. Shapes: -> (R,)."""
    spec = fit.spec
    widest = (high - low) / 2 if spec.minimum else torch.maximum(high, -low)
    narrowest = fit.root_mean_square() * _NARROWEST[spec.bits]
    return (narrowest / positive(widest)).clamp(1e-3, 0.8).pow(1 / (_COARSE - 1))


def _one_ended(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for share in _ENDS:
        yield low * share, high
        yield low, high * share


def _bounds(found: Range, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    scale, zero_point = found
    return -zero_point * scale, (spec.highest - zero_point) * scale


class _Fit:
    """The best range so far, slice by slice. With a minimum, values are counted from the middle of theirs."""

    def __init__(self, slices: Tensor, spec: QuantSpec, weights: Tensor | None):
        self.spec, self.weights = spec, weights
        self.center = (slices.amin(dim=1, keepdim=True) + slices.amax(dim=1, keepdim=True)) / 2 if spec.minimum else None
        self.values = slices - self.center if spec.minimum else slices
        self.weighted = self.values if weights is None else self.values * weights
        rows, length = slices.shape
        self.count = slices.new_full((rows,), length) if weights is None else weights.sum(dim=1)
        self.sum = self.weighted.sum(dim=1) if spec.minimum else None
        self.squares = (self.weighted * self.values).sum(dim=1)
        self.gain = slices.new_full((rows,), -torch.inf)  # how much of the sum of squares the codes explain
        self._best = slices.new_ones(rows), slices.new_zeros(rows)

    def root_mean_square(self) -> Tensor:
        """Of the values, weighted. Shapes: -> (R,)."""
        return (self.squares / self.count).sqrt()

    @property
    def best(self) -> Range:
        """Scale, and zero point or minimum."""
        scale, shift = self._best
        return scale, None if self.spec.symmetric else shift

    def consider(self, scale: Tensor, shift: Tensor | None) -> None:
        """Code the slices on a range; where the scale that fits these codes best explains more, it is the best now."""
        squares, products, codes = self._sums(scale, shift)
        fitted, usable = products / squares, squares > 0
        gain = fitted * products
        if self.spec.minimum:
            determinant = self.count * squares - codes.square()
            usable = determinant > _SPREAD * self.count * squares
            fitted = (self.count * products - self.sum * codes) / determinant
            middle = (self.sum - fitted * codes) / self.count
            gain = middle * self.sum + fitted * products
            shift = middle + self.center.view(-1)
        better = usable & (fitted * scale > 0) & (gain > self.gain)
        self.gain = torch.where(better, gain, self.gain)
        kept_scale, kept_shift = self._best
        shift = kept_shift if shift is None else torch.where(better, shift, kept_shift)
        self._best = torch.where(better, fitted, kept_scale), shift

    def _sums(self, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over each slice, weighted: code squared, code times value, code. Shapes: -> three of (R,)."""
        squares, products, sums = (torch.zeros_like(scale) for _ in range(3))
        for start in range(0, self.values.shape[1], CHUNK):
            columns = slice(start, start + CHUNK)
            codes = self._codes(self.values[:, columns], scale[:, None], shift)
            weighted = codes.clone() if self.weights is None else codes * self.weights[:, columns]
            if self.spec.minimum:
                sums += weighted.sum(dim=1)
            squares += weighted.mul_(codes).sum(dim=1)
            products += codes.mul_(self.weighted[:, columns]).sum(dim=1)
        return squares, products, sums

    def _codes(self, values: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        spec, inverse = self.spec, 1.0 / scale
        if spec.minimum:
            offset = (self.center - shift[:, None]) * inverse
            return torch.addcmul(offset, values, inverse).round_().clamp_(0, spec.highest)
        zero = 0 if shift is None else shift[:, None]
        return (values * inverse).round_().clamp_(spec.lowest - zero, spec.highest - zero)


def squared_error(slices: Tensor, found: Range, spec: QuantSpec, weights: Tensor | None = None) -> Tensor:
    """Squared error of each slice on a range. Shapes: as in `search` -> (R,)."""
    scale, shift = found[0][:, None], 0 if found[1] is None else found[1][:, None]
    error = torch.zeros_like(found[0])
    for start in range(0, slices.shape[1], CHUNK):
        part = slices[:, start : start + CHUNK]
        if spec.minimum:
            values = ((part - shift) / scale).round_().clamp_(0, spec.highest).mul_(scale).add_(shift)
        else:
            values = (part / scale).round_().clamp_(spec.lowest - shift, spec.highest - shift).mul_(scale)
        values.sub_(part).square_()
        error += (values if weights is None else values.mul_(weights[:, start : start + CHUNK])).sum(dim=1)
    return error


def _better(slices: Tensor, spec: QuantSpec, weights: Tensor | None, first: Range, second: Range) -> Range:
    """The one of less error, slice by slice; the first of equals."""
    better = squared_error(slices, second, spec, weights) < squared_error(slices, first, spec, weights)
    shift = None if first[1] is None else torch.where(better, second[1], first[1])
    return torch.where(better, second[0], first[0]), shift
