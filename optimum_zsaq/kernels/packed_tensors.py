"""The tensors of one packed weight, as a kernel gets them."""

from dataclasses import dataclass

from torch import Tensor

from ..ops import add_outliers, dequantize, fake_quantize, fake_quantize_tokens, unpack_codes
from ..spec import LayerSpec, QuantSpec


@dataclass(slots=True, eq=False)
class PackedTensors:
    """One packed weight (O, I), what its layer does to the input, and how it shall be run.

    Shapes: codes (O, ceil(I * bits / 8)) uint8; scale and shift (uint8 zero point or float minimum) as in `QuantSpec`;
    outlier_positions (k,) int32; outlier_values (k,) float32; input_scale (1, 1) float32; input_zero_point (1, 1) uint8.
    What a scheme lacks is None.
    `runtime` is "fast" or "small" (see `surgery.set_runtime`); `kernel` names the only kernel allowed, "" allows all.
    """

    spec: LayerSpec
    columns: int
    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None
    outlier_positions: Tensor | None = None
    outlier_values: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    runtime: str = "fast"
    kernel: str = ""

    @property
    def rows(self) -> int:
        """O."""
        return self.codes.shape[0]

    def weight(self) -> Tensor:
        """The dense weight (O, I) float32 that the codes and the outliers stand for."""
        spec = self.spec.weight
        weight = dequantize(unpack_codes(self.codes, spec.bits, self.columns), self.scale, self.shift, spec)
        if self.outlier_positions is not None:
            weight = add_outliers(weight, self.outlier_positions, self.outlier_values)
        return weight

    def inputs(self, x: Tensor) -> Tensor:
        """The input as the layer's scheme sees it, in x's dtype."""
        return quantize_inputs(x, self.spec.inputs, self.input_scale, self.input_zero_point)


def quantize_inputs(x: Tensor, spec: QuantSpec | None, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """Quantize and dequantize a layer's input: not at all (None), per token, or on one stored range.

    Shapes: x (..., I), scale (1, 1) float32, zero_point (1, 1) uint8 -> (..., I), in x's dtype.
    """
    if spec is None:
        return x
    if spec.granularity == "token":
        return fake_quantize_tokens(x, spec).to(x.dtype)
    return fake_quantize(x, scale, zero_point, spec).to(x.dtype)
