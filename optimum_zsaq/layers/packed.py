"""The frozen state: integer codes and scales, no float weight.

State dict of a packed layer: `weight` (marker), `weight_codes`, `weight_scale`, then what the scheme has of
`weight_zero_point` or `weight_minimum`, `weight_outlier_positions`, `weight_outlier_values`, `input_scale`,
`input_zero_point`, and `bias`.

The marker is a float Parameter (O, 1) of zeros under the name `weight`. It has the model's dtype for code that asks for
`layer.weight.dtype`; its shape makes a process without this package stop at loading, and a merge into it fail.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels import KERNELS, PackedTensors, drop_outlier_matrix, drop_prepacked, packed_linear
from ..ops import (
    dequantize,
    gather_outlier_rows,
    pack_codes,
    packed_columns,
    quantize,
    scale_dtype,
    to_stored,
    unpack_codes,
)
from ..spec import LayerSpec
from .common import LowBitLayer
from .fake import _FakeQuant, row_blocks, rows_of


RUNTIMES = ("fast", "small")


class _Packed(LowBitLayer):
    """What packed layers share."""

    def _new_tensors(self, spec: LayerSpec, rows: int, columns: int, dtype: torch.dtype | None) -> None:
        self.spec = spec
        self.rows, self.columns = rows, columns
        self.runtime, self.kernel = "fast", ""
        self._tied = ()
        self.weight = nn.Parameter(torch.zeros(rows, 1, dtype=dtype), requires_grad=False)
        shape = spec.weight.scale_shape(rows, columns)
        codes = torch.zeros(rows, packed_columns(columns, spec.weight.bits), dtype=torch.uint8)
        self._set_tensor("weight_codes", codes)
        self._set_tensor("weight_scale", torch.ones(shape, dtype=scale_dtype(spec.weight)))
        self._new_shift(shape)
        count = spec.outlier_count(rows, columns)
        self._set_tensor("weight_outlier_positions", torch.zeros(count, dtype=torch.int32) if count else None)
        self._set_tensor("weight_outlier_values", torch.zeros(count, dtype=torch.float32) if count else None)
        self._new_input_tensors()

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight."""
        return self.rows, self.columns

    def set_weight(self, fake: _FakeQuant) -> None:
        """Take codes, scales and outliers from a fake-quantized layer. Nothing to do on a tied layer."""
        if not self._tied:
            for name, value in packed_tensors(fake).items():
                self._set_tensor(name, value)

    def set_runtime(self, runtime: str, kernel: str | None = None) -> None:
        """How this layer is run: see `surgery.set_runtime`.

        Raises:
            ValueError: an unknown runtime or kernel.
        """
        check_runtime(runtime, kernel)
        self.runtime, self.kernel = runtime, kernel or ""
        self.drop_prepacked()

    def drop_prepacked(self) -> None:
        """Free what a kernel keeps of this layer beside its codes; the next call builds it again."""
        if self.owner.weight_codes is not None:
            drop_prepacked(self.owner.weight_codes)
        if self.owner.weight_outlier_positions is not None:
            drop_outlier_matrix(self.owner.weight_outlier_positions)

    def packed(self) -> PackedTensors:
        """The tensors that a kernel computes this layer from."""
        owner = self.owner
        spec = self.spec if owner is self else replace(owner.spec, inputs=self.spec.inputs)
        own, tensors = self._parameters, owner._parameters
        return PackedTensors(
            spec,
            owner.columns,
            tensors["weight_codes"],
            tensors["weight_scale"],
            owner.weight_shift,
            tensors["weight_outlier_positions"],
            tensors["weight_outlier_values"],
            own.get("input_scale"),
            own.get("input_zero_point"),
            self.runtime,
            self.kernel,
        )

    def quantized_weight(self) -> Tensor:
        """The dense weight that the codes (and outliers) stand for. Shapes: (O, I) float32."""
        return self.packed().weight()

    def _apply(self, fn, recurse: bool = True):
        self.drop_prepacked()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.drop_prepacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def check_runtime(runtime: str, kernel: str | None) -> None:
    """Raise a ValueError for an unknown runtime or kernel."""
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is unknown; use one of {RUNTIMES}")
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; use one of {sorted(KERNELS)}, or None for the fastest that serves")


@torch.no_grad()
def packed_tensors(fake: _FakeQuant) -> dict[str, Tensor]:
    """The tensors of a fake-quantized layer's weight as a packed layer stores them, by name."""
    spec, master = fake.spec.weight, fake.master()
    codes = fake.weight_scale.new_empty(len(master), packed_columns(master.shape[1], spec.bits), dtype=torch.uint8)
    for start, rows in row_blocks(master, spec):
        block = quantize(rows, *fake.block_ranges(start, len(rows)), spec)
        codes[start : start + len(rows)] = pack_codes(block, spec.bits)
    names = ("weight_zero_point", "weight_minimum", "weight_outlier_positions", "weight_outlier_values")
    kept = {name: getattr(fake, name).detach().clone() for name in names if getattr(fake, name) is not None}
    return {"weight_codes": codes, "weight_scale": to_stored(fake.weight_scale.detach().clone(), spec), **kept}


class PackedLinear(_Packed, nn.Linear):
    """A Linear layer of integer codes; gradients flow to its input and its bias.

    It is an `nn.Linear` for tools that look for one, but has no float weight to merge into.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, spec: LayerSpec, dtype: torch.dtype | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._new_tensors(spec, out_features, in_features, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @classmethod
    def skeleton(cls, layer: nn.Module, spec: LayerSpec) -> "PackedLinear":
        """An empty packed layer in the shape of a float or fake-quantized one, on its device; shares the bias."""
        rows, columns = cls._shape(layer)
        with torch.device(layer.weight.device):
            packed = cls(columns, rows, layer.bias is not None, spec, layer.weight.dtype)
        packed.bias = layer.bias
        return packed

    @staticmethod
    def _shape(layer: nn.Module) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight.shape[1]

    def forward(self, input: Tensor, outliers: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """input (..., I) -> (..., O), in the input's dtype.

        `outliers`, positions (k,) int32 ascending and residuals (k,) float32, take the place of those that the layer
        stores; gradients flow to the residuals.
        """
        packed = self.packed()
        if outliers is not None:
            packed.outlier_positions, packed.outlier_values = outliers
        return packed_linear(input, packed, self.bias)


class PackedTransposedLinear(PackedLinear):
    """A `PackedLinear` that stands for a layer with its weight as (I, O); the codes are (O, I) all the same."""

    @staticmethod
    def _shape(layer: nn.Module) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]


class PackedEmbedding(_Packed, nn.Embedding):
    """An input embedding of integer codes: rows are unpacked as they are looked up."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: LayerSpec,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._new_tensors(spec, num_embeddings, embedding_dim, dtype)

    @classmethod
    def skeleton(cls, layer: nn.Embedding, spec: LayerSpec) -> "PackedEmbedding":
        """An empty packed table in the shape of a float or fake-quantized one, on its device."""
        with torch.device(layer.weight.device):
            return cls(layer.num_embeddings, layer.embedding_dim, spec, layer.padding_idx, layer.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input (...) integer -> (..., D), in the marker's dtype."""
        owner, spec = self.owner, self.owner.spec.weight
        flat = input.reshape(-1).long()
        codes = unpack_codes(owner.weight_codes.index_select(0, flat), spec.bits, owner.columns)
        rows = dequantize(codes, rows_of(owner.weight_scale, flat), rows_of(owner.weight_shift, flat), spec)
        if owner.weight_outlier_positions is not None:
            positions, values = owner.weight_outlier_positions, owner.weight_outlier_values
            gather = torch.ops.zsaq.outlier_rows if torch.compiler.is_compiling() else gather_outlier_rows
            rows = rows + gather(flat, owner.columns, positions, values)
        return rows.to(self.weight.dtype).view(*input.shape, owner.columns)
