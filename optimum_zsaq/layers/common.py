"""What fake-quantized and packed layers share: the names and dtypes of their tensors, and tied layers.

A tied layer (an output embedding, or a second input embedding, that reads the table of another layer) has no codes and no
scale of its own: `owner` is the layer it reads them from.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels.packed_tensors import quantize_inputs
from ..ops import scale_dtype
from ..spec import LayerSpec


STEP_SIZES = ("weight_scale", "input_scale")
SCALES = (*STEP_SIZES, "weight_minimum", "weight_outlier_values")  # keep their dtype, whatever the model's is
INTEGERS = ("weight_codes", "weight_zero_point", "input_zero_point", "weight_outlier_positions")


class LowBitLayer:
    """A layer whose weight is low-bit, in either state.

    `spec` says what its tensors mean, `float_type` which float layer it was made from.
    """

    spec: LayerSpec
    float_type: type | None = None

    @property
    def weight_shift(self) -> Tensor | None:
        """What stands beside the weight's scale: its zero point, its minimum, or None where codes are symmetric."""
        return self._parameters["weight_minimum" if self.spec.weight.minimum else "weight_zero_point"]

    @property
    def owner(self) -> "LowBitLayer":
        """The layer whose weight tensors this one reads: itself, unless it is tied."""
        return self._tied[0] if self._tied else self

    def tie_to(self, owner: "LowBitLayer") -> None:
        """Read the weight of `owner` from now on; own weight tensors are given up."""
        self._tied = (owner,)  # a tuple: a module attribute would register the owner a second time
        if owner.weight.device.type != "meta":  # a loader ties what it reads, after it may have sharded it
            self.weight = owner.weight
        for name in (*SCALES, *INTEGERS):
            if not name.startswith("input"):
                self.register_parameter(name, None)

    def _set_tensor(self, name: str, value: Tensor | None) -> None:
        """Register a scale or integer tensor as a frozen Parameter, so that DDP does not broadcast it."""
        self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiply the rows that the codes stand for; scales are float32 from now on.

        Shapes: factors (1,) or (O,) float32.
        """
        spec = self.spec.weight
        self.spec = replace(self.spec, weight=replace(spec, scale_bits=32))
        names = ("weight_scale", "weight_minimum") if spec.minimum else ("weight_scale",)
        for name in names:
            self._set_tensor(name, getattr(self, name).float() * factors.view(-1, 1))

    def store_outliers(self, positions: Tensor, values: Tensor, share: float | None = None) -> None:
        """Store other outliers than until now; the spec's share of them becomes the one that gives as many.

        Shapes: positions (k,) int32 ascending, values (k,) float32; k may be 0. `share` is taken if it gives k of them.

        Raises:
            ValueError: the layer is tied: its weight is another layer's.
        """
        if self._tied:
            raise ValueError(
                "a layer that reads another layer's weight stores no outliers of its own; change the other one"
            )
        rows, columns = self.shape
        shares = (self.spec.outliers, share or 0.0, len(positions) / (rows * columns))
        specs = (replace(self.spec, outliers=value, outlier_scope="matrix") for value in shares)
        self.spec = next(spec for spec in specs if spec.outlier_count(rows, columns) == len(positions))
        self._set_tensor("weight_outlier_positions", positions if len(positions) else None)
        self._set_tensor("weight_outlier_values", values if len(positions) else None)

    def _new_shift(self, shape: tuple[int, int]) -> None:
        """The zero point or the minimum of the weight, as zeros."""
        spec = self.spec.weight
        zero_point = None if spec.symmetric or spec.minimum else torch.zeros(shape, dtype=torch.uint8)
        self._set_tensor("weight_zero_point", zero_point)
        self._set_tensor("weight_minimum", torch.zeros(shape, dtype=scale_dtype(spec)) if spec.minimum else None)

    def _new_input_tensors(self) -> None:
        tensors = self.uncalibrated_input_tensors(self.weight.device)
        for name in ("input_scale", "input_zero_point"):
            self._set_tensor(name, tensors.get(name))

    def uncalibrated_input_tensors(self, device: torch.device) -> dict[str, Tensor]:
        """A static range is NaN, and so are the outputs, until it is calibrated or loaded; empty for other inputs."""
        if self.spec.inputs is None or self.spec.inputs.granularity != "tensor":
            return {}
        return {
            "input_scale": torch.full((1, 1), torch.nan, dtype=torch.float32, device=device),
            "input_zero_point": torch.zeros(1, 1, dtype=torch.uint8, device=device),
        }

    def set_input_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store the static range of the input. Shapes: scale (1, 1) float32, zero_point (1, 1) uint8."""
        with torch.no_grad():
            self.input_scale.copy_(scale)
            self.input_zero_point.copy_(zero_point)

    def free_input_range(self) -> None:
        """Give each token a range of its own instead of the stored one."""
        self.spec = replace(self.spec, inputs=replace(self.spec.inputs, granularity="token"))
        self._new_input_tensors()

    def quantize_inputs(self, x: Tensor) -> Tensor:
        """The input as the layer's scheme sees it. Shapes: x (..., I) -> (..., I), in x's dtype."""
        return quantize_inputs(x, self.spec.inputs, self.input_scale, self.input_zero_point)

    def _apply(self, fn, recurse: bool = True):
        """As `nn.Module._apply`, but `model.to(bfloat16)` leaves scales as they are."""
        kept = {name: self._parameters[name] for name in SCALES if self._parameters.get(name) is not None}
        kept = {name: parameter.data for name, parameter in kept.items()}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = self._parameters[name]
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        """Shape and spec, as `print(model)` shows them."""
        return f"{super().extra_repr()}, {self.spec.text()}{', tied' if self._tied else ''}"
