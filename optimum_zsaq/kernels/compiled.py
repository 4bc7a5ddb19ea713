"""Packed layers in graphs that torch.compile and torch.export make: custom operators, opaque to the tracer.

`zsaq::packed_linear` is any layer on any kernel. Where no gradient is asked for and the kernel is "int8", the input's
quantization and the scaling of the result are left to the compiler, which fuses them with what is around them; only the
integer products are opaque.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..ops import gather_outlier_rows
from ..spec import LayerSpec, QuantSpec
from .gradient import input_gradient
from .int8 import integer_products, integer_sums, static_linear
from .packed_tensors import PackedTensors
from .registry import choose_kernel


def _spec_text(spec: LayerSpec) -> str:
    """A spec as an argument that graphs can carry: "4 row 0 1 0 8 token" and so on; the outliers' share is not needed."""
    weight, inputs = spec.weight, spec.inputs
    text = f"{weight.bits} {weight.granularity} {weight.group_size or 0} {int(weight.symmetric)} {int(weight.ternary)}"
    return text if inputs is None else f"{text} {inputs.bits} {inputs.granularity}"


@lru_cache
def _spec(text: str) -> LayerSpec:
    bits, granularity, size, symmetric, ternary, *inputs = text.split()
    weight = QuantSpec(int(bits), granularity, int(size) or None, symmetric == "1", ternary == "1")
    return LayerSpec(weight, QuantSpec(int(inputs[0]), inputs[1], symmetric=False) if inputs else None)


def compiled_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    """`packed_linear` as a graph sees it. Shapes: x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    spec = packed.spec
    if (
        not gradient
        and spec.inputs is not None
        and packed.runtime == "fast"
        and packed.outlier_positions is None
        and spec.weight.granularity != "group"
        and (spec.weight.symmetric or spec.weight.bits < 8)
        and choose_kernel(x, packed).name == "int8"
    ):
        return _int8_linear(x, packed, bias)
    return packed_linear_op(x, bias, *_tensors(packed), _spec_text(spec), packed.columns, packed.runtime, packed.kernel)


def _int8_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, packed.columns).float()
    highest = packed.spec.inputs.highest
    weight = (packed.codes, packed.scale, packed.zero_point, _spec_text(packed.spec), packed.columns)
    if packed.spec.inputs.granularity == "tensor":
        zero_point = packed.input_zero_point.float()
        codes = (torch.round(rows / packed.input_scale) + zero_point).clamp(0.0, highest).to(torch.uint8)
        y = static_linear_op(codes, packed.input_scale, packed.input_zero_point, bias, *weight)
    else:
        low = rows.amin(dim=-1, keepdim=True).clamp(max=0.0)
        scale = (rows.amax(dim=-1, keepdim=True).clamp(min=0.0) - low) / highest
        scale = torch.where(scale == 0, 1.0, scale)
        zero_point = torch.round(-low / scale)
        codes = (torch.round(rows / scale) + zero_point).clamp(0.0, highest).to(torch.uint8)
        y = products_op(codes, *weight) + (128.0 - zero_point) * sums_op(*weight)
        y = y * scale if bias is None else y * scale + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def _tensors(packed: PackedTensors) -> tuple[Tensor | None, ...]:
    outliers = (packed.outlier_positions, packed.outlier_values)
    return packed.codes, packed.scale, packed.zero_point, *outliers, packed.input_scale, packed.input_zero_point


# Operators -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("zsaq::packed_linear", mutates_args=())
def packed_linear_op(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outlier_positions: Tensor | None,
    outlier_values: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    spec: str,
    columns: int,
    runtime: str,
    kernel: str,
) -> Tensor:
    """A packed layer. Shapes: see `PackedTensors`; spec is see `_spec_text`."""
    outliers = (outlier_positions, outlier_values)
    inputs = (input_scale, input_zero_point)
    packed = PackedTensors(_spec(spec), columns, codes, scale, zero_point, *outliers, *inputs, runtime, kernel)
    x = x.detach()  # an own tensor: compiled code writes to the memory of its tensors unseen by `integer_inputs`
    return choose_kernel(x, packed)(x, packed, bias).contiguous()


@packed_linear_op.register_fake
def _(x, bias, codes, *_):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _setup_context(ctx, inputs, output):
    x, bias, *tensors, spec, columns, _, _ = inputs
    ctx.spec, ctx.columns = spec, columns
    ctx.bias_dtype = None if bias is None else bias.dtype
    static = _spec(spec).inputs is not None and tensors[5] is not None
    ctx.save_for_backward(x if static else None, *tensors)


def _backward(ctx, grad):
    x, *tensors = ctx.saved_tensors
    packed = PackedTensors(_spec(ctx.spec), ctx.columns, *tensors)
    grad_x = input_gradient(grad, packed, x) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_bias, *[None] * 11


packed_linear_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("zsaq::integer_products", mutates_args=())
def products_op(inputs: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, columns: int) -> Tensor:
    """Shapes: inputs (M, I) uint8 -> (inputs - 128) @ integer weight.T * scale (M, O) float32."""
    return integer_products(inputs, PackedTensors(_spec(spec), columns, codes, scale, zero_point))


@products_op.register_fake
def _(inputs, codes, *_):
    return inputs.new_empty(inputs.shape[0], codes.shape[0], dtype=torch.float32)


@torch.library.custom_op("zsaq::integer_sums", mutates_args=())
def sums_op(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, columns: int) -> Tensor:
    """The sum of each row of the dense weight. Shapes: -> (O,) float32."""
    return integer_sums(PackedTensors(_spec(spec), columns, codes, scale, zero_point)).clone()


@sums_op.register_fake
def _(codes, *_):
    return codes.new_empty(codes.shape[0], dtype=torch.float32)


@torch.library.custom_op("zsaq::static_linear", mutates_args=())
def static_linear_op(
    inputs: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    columns: int,
) -> Tensor:
    """A layer on codes of one stored range. Shapes: inputs (M, I) uint8 -> (M, O) float32."""
    ranges = {"input_scale": input_scale, "input_zero_point": input_zero_point}
    return static_linear(inputs, PackedTensors(_spec(spec), columns, codes, scale, zero_point, **ranges), bias)


@static_linear_op.register_fake
def _(inputs, input_scale, input_zero_point, bias, codes, *_):
    return inputs.new_empty(inputs.shape[0], codes.shape[0], dtype=torch.float32)


@torch.library.custom_op("zsaq::outlier_rows", mutates_args=())
def outlier_rows_op(rows: Tensor, columns: int, positions: Tensor, values: Tensor) -> Tensor:
    """`ops.gather_outlier_rows`: how many residuals a row has is not known to a tracer."""
    return gather_outlier_rows(rows, columns, positions, values)


@outlier_rows_op.register_fake
def _(rows, columns, positions, values):
    return values.new_empty(rows.shape[0], columns)
