"""The trainable state: a float master weight that every forward pass quantizes and dequantizes.

`from_float` shares the float layer's Parameters and copies nothing. Scales are set explicitly, by `find_ranges`, never in
a forward pass. A scale is a frozen Parameter until an algorithm unfreezes it.

`perturbation` (O, I) float32 or None is added to the quantized weight; sharpness-aware training sets it for its second
pass (`algorithms/sharpness.py`). It is no Parameter and never saved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import (
    NOT_FINITE,
    add_outliers,
    fake_quantize,
    find_ranges,
    gather_outlier_rows,
    largest_of_rows,
    largest_positions,
    stored_scale,
)
from ..spec import LayerSpec, QuantSpec
from .common import LowBitLayer


_CHUNK = 2**20  # weights looked at together when a large table is quantized


def row_blocks(weight: Tensor, spec: QuantSpec) -> Iterator[tuple[int, Tensor]]:
    """A weight (O, I) block of rows by block of rows, as (first row, float32 rows), so that temporaries stay small.

    Ternary codes with one scale a tensor depend on the mean of the whole weight, which then comes as one block.
    """
    whole = spec.ternary and spec.granularity == "tensor"
    step = len(weight) if whole else max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step].detach().float()


class _FakeQuant(LowBitLayer):
    """What fake-quantized layers share. `master()` is the float weight (O, I)."""

    perturbation: Tensor | None = None

    def _new_tensors(self, spec: LayerSpec, rows: int, columns: int) -> None:
        self.spec = spec
        self._tied = ()
        shape = spec.weight.scale_shape(rows, columns)
        device = self.weight.device
        self._set_tensor("weight_scale", torch.ones(shape, dtype=torch.float32, device=device))
        count = spec.outlier_count(rows, columns)
        with torch.device(device):
            self._new_shift(shape)
            self._set_tensor("weight_outlier_positions", torch.zeros(count, dtype=torch.int32) if count else None)
            self._set_tensor("weight_outlier_values", torch.zeros(count, dtype=torch.float32) if count else None)
            self._new_input_tensors()

    def master(self) -> Tensor:
        """The float master weight. Shapes: (O, I), a view."""
        return self.oriented(self.weight)

    @staticmethod
    def oriented(tensor: Tensor) -> Tensor:
        """A tensor in the shape of the Parameter as (O, I), or back. A view."""
        return tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight."""
        return tuple(self.master().shape)

    @torch.no_grad()
    def find_ranges(self, ranges: str = "mse", energies: Tensor | None = None) -> None:
        """Set scales (and zero points or minima, outliers) from the master weight, in place. Does nothing on a tied layer.

        Args: see `ops.find_ranges`.

        Raises:
            ValueError: see `ops.find_ranges`.
        """
        if self._tied:
            return
        weight = self.master().detach().float()
        if self.weight_outlier_positions is not None:
            choose = largest_of_rows if self.spec.outlier_scope == "row" else largest_positions
            self.weight_outlier_positions.copy_(choose(weight, len(self.weight_outlier_positions)))
            if not torch.isfinite(weight.reshape(-1)[self.weight_outlier_positions.long()]).all():
                raise ValueError(NOT_FINITE)
            weight = weight.contiguous().view(-1).index_fill(0, self.weight_outlier_positions.long(), 0.0).view_as(weight)
        scale, shift = find_ranges(weight, self.spec.weight, ranges, energies)
        self.weight_scale.copy_(scale)
        if shift is not None:
            self.weight_shift.copy_(shift)
        if self.weight_outlier_values is not None:
            self.weight_outlier_values.copy_(self._residual())

    def _residual(self) -> Tensor:
        """W - Q(W) at the outlier positions. Shapes: -> (k,) float32."""
        columns, spec = self.master().shape[1], self.spec.weight
        found = []
        for start, rows in row_blocks(self.master(), spec):
            error = rows - fake_quantize(rows, *self.block_ranges(start, len(rows)), spec)
            bounds = torch.tensor([start * columns, (start + len(rows)) * columns], device=rows.device)
            first, last = torch.searchsorted(self.weight_outlier_positions, bounds).tolist()
            inside = self.weight_outlier_positions[first:last].long() - start * columns
            found.append(error.reshape(-1)[inside])
        return torch.cat(found)

    def block_ranges(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale, and zero point or minimum, of `count` rows from row `start` on."""
        return self._ranges_of(torch.arange(start, start + count, device=self.weight_scale.device))

    def _ranges_of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return rows_of(stored_scale(self.weight_scale, self.spec.weight), rows), rows_of(self.weight_shift, rows)

    def rounded_weight(self) -> Tensor:
        """The weight that the codes alone stand for. Shapes: (O, I) float32, differentiable (straight-through)."""
        owner = self.owner
        master = self.master().float().contiguous()  # a matmul may round by the memory layout: that of the packed layer
        spec = owner.spec.weight
        return fake_quantize(master, stored_scale(owner.weight_scale, spec), owner.weight_shift, spec)

    def quantized_weight(self) -> Tensor:
        """The weight as the packed layer will have it. Shapes: (O, I) float32, differentiable (straight-through)."""
        owner, weight = self.owner, self.rounded_weight()
        if owner.weight_outlier_positions is not None:
            weight = add_outliers(weight, owner.weight_outlier_positions, owner.weight_outlier_values)
        return weight if owner.perturbation is None else weight + owner.perturbation


class FakeQuantLinear(_FakeQuant, nn.Linear):
    """A Linear layer whose weight (O, I), and input if the spec says so, is quantized and dequantized in the forward."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, spec: LayerSpec):
        nn.Module.__init__(self)
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = self._shape(weight)
        self._new_tensors(spec, self.out_features, self.in_features)

    @staticmethod
    def _shape(weight: Tensor) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1]

    @classmethod
    def from_float(cls, layer: nn.Module, spec: LayerSpec) -> "FakeQuantLinear":
        """Take over the Parameters of a float layer."""
        return cls(layer.weight, layer.bias, spec)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., I) -> (..., O), in the input's dtype."""
        return nn.functional.linear(self.quantize_inputs(input), self.quantized_weight().to(input.dtype), self.bias)


class FakeQuantTransposedLinear(FakeQuantLinear):
    """As `FakeQuantLinear`, for a layer that stores its weight as (I, O), such as GPT-2's Conv1D."""

    @staticmethod
    def _shape(weight: Tensor) -> tuple[int, int]:
        return weight.shape[1], weight.shape[0]

    @staticmethod
    def oriented(tensor: Tensor) -> Tensor:
        """The transpose: the Parameter is (I, O)."""
        return tensor.t()


class FakeQuantEmbedding(_FakeQuant, nn.Embedding):
    """An input embedding whose table (V, D) is quantized and dequantized row by row as it is looked up."""

    def __init__(self, weight: nn.Parameter, spec: LayerSpec, padding_idx: int | None = None):
        nn.Module.__init__(self)
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._new_tensors(spec, self.num_embeddings, self.embedding_dim)

    @classmethod
    def from_float(cls, layer: nn.Embedding, spec: LayerSpec) -> "FakeQuantEmbedding":
        """Take over the Parameter of a float table."""
        return cls(layer.weight, spec, layer.padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        """input (...) integer -> (..., D), in the weight's dtype."""
        owner, spec = self.owner, self.owner.spec.weight
        if spec.ternary and spec.granularity == "tensor":  # the threshold needs the whole table
            return nn.functional.embedding(input, self.quantized_weight().to(self.weight.dtype), self.padding_idx)
        flat = input.reshape(-1).long()
        rows = nn.functional.embedding(flat, self.weight, self.padding_idx).float()
        rows = fake_quantize(rows, *owner._ranges_of(flat), spec)
        if owner.weight_outlier_positions is not None:
            positions, values = owner.weight_outlier_positions, owner.weight_outlier_values
            rows = rows + gather_outlier_rows(flat, self.embedding_dim, positions, values)
        if owner.perturbation is not None:
            rows = rows + owner.perturbation[flat]
        return rows.to(self.weight.dtype).view(*input.shape, self.embedding_dim)


def rows_of(per_slice: Tensor | None, rows: Tensor) -> Tensor | None:
    """The scales of some rows of a table; a per-tensor scale serves them all.

    Shapes: per_slice (1, 1) or (V, G), rows (n,) -> (1, 1) or (n, G).
    """
    return per_slice if per_slice is None or per_slice.shape[0] == 1 else per_slice[rows]
