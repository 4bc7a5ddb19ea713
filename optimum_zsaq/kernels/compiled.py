"""Packed layers in graphs that torch.compile and torch.export make: custom operators, opaque to the tracer.

`zsaq::packed_linear` is any layer on any kernel. Where no gradient is asked for and "int8" serves with one scale a row, the
input's quantization is left to the compiler, which fuses it with what is before.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, library

from ..ops import gather_outlier_rows
from ..spec import LayerSpec, QuantSpec
from .gradient import input_gradient
from .int8 import integer_linear
from .packed_tensors import PackedTensors
from .registry import choose_kernel
from .sparse import value_gradient


def _spec_text(spec: LayerSpec) -> str:
    """A spec as an argument that graphs can carry: "4 row 0 100 32 8 token"; the outliers' share is not needed."""
    weight, inputs = spec.weight, spec.inputs
    flags = f"{int(weight.symmetric)}{int(weight.ternary)}{int(weight.minimum)}"
    text = f"{weight.bits} {weight.granularity} {weight.group_size or 0} {flags} {weight.scale_bits}"
    return text if inputs is None else f"{text} {inputs.bits} {inputs.granularity}"


@lru_cache
def _spec(text: str) -> LayerSpec:
    bits, granularity, size, flags, scale_bits, *inputs = text.split()
    weight = QuantSpec(int(bits), granularity, int(size) or None, *(flag == "1" for flag in flags), int(scale_bits))
    return LayerSpec(weight, QuantSpec(int(inputs[0]), inputs[1], symmetric=False) if inputs else None)


def compiled_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    """`packed_linear` as a graph sees it. Shapes: x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, packed.outlier_values))
    spec = packed.spec
    if (
        not gradient
        and spec.inputs is not None
        and packed.runtime == "fast"
        and packed.outlier_positions is None
        and spec.weight.granularity != "group"
        and (spec.weight.symmetric or spec.weight.bits < 8)
        and choose_kernel(x, packed).name in ("int8", "native")
    ):
        return _int8_linear(x, packed, bias)
    return torch.ops.zsaq.packed_linear(
        x, bias, *_tensors(packed), _spec_text(spec), packed.columns, packed.runtime, packed.kernel
    )


def _int8_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, packed.columns).float()
    highest = packed.spec.inputs.highest
    if packed.spec.inputs.granularity == "tensor":
        scale, zero_point = packed.input_scale, packed.input_zero_point.float()
    else:
        low = rows.amin(dim=-1, keepdim=True).clamp(max=0.0)
        scale = (rows.amax(dim=-1, keepdim=True).clamp(min=0.0) - low) / highest
        scale = torch.where(scale == 0, 1.0, scale)
        zero_point = torch.round(-low / scale)
    codes = (torch.round(rows / scale) + zero_point).clamp(0.0, highest).to(torch.uint8)
    weight = (packed.codes, packed.scale, packed.shift, _spec_text(packed.spec), packed.columns)
    y = torch.ops.zsaq.integer_linear(codes, scale, zero_point, bias, *weight)
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def _tensors(packed: PackedTensors) -> tuple[Tensor | None, ...]:
    outliers = (packed.outlier_positions, packed.outlier_values)
    return packed.codes, packed.scale, packed.shift, *outliers, packed.input_scale, packed.input_zero_point


# Operators -----------------------------------------------------------------------------------------------------------

_LIBRARY = library.Library("zsaq", "FRAGMENT")
_VALUES = 6  # where `packed_linear` takes the outliers' residuals
_ANY_DEVICE = "CompositeExplicitAutograd"


def _define(schema: str, run: Callable, fake: Callable) -> None:
    """An operator; `library.custom_op` would take longer a call than a small layer does."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, _ANY_DEVICE)
    library.register_fake(f"zsaq::{name}", fake, lib=_LIBRARY)


def _run_packed_linear(x, bias, *arguments):
    *tensors, spec, columns, runtime, kernel = arguments
    packed = PackedTensors(_spec(spec), columns, *tensors, runtime, kernel)
    x = x.detach()  # an own tensor: compiled code writes to the memory of its tensors unseen by `integer_inputs`
    return choose_kernel(x, packed)(x, packed, bias).contiguous()


def _setup_context(ctx, inputs, output):
    x, bias, *tensors, spec, columns, _, _ = inputs
    ctx.spec, ctx.columns = spec, columns
    ctx.bias_dtype = None if bias is None else bias.dtype
    static = _spec(spec).inputs is not None and tensors[5] is not None
    ctx.save_for_backward(x if static or ctx.needs_input_grad[_VALUES] else None, *tensors)


def _backward(ctx, grad):
    x, *tensors = ctx.saved_tensors
    packed = PackedTensors(_spec(ctx.spec), ctx.columns, *tensors)
    grad_x = input_gradient(grad, packed, x) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    grads = [grad_x, grad_bias, *[None] * 11]
    if ctx.needs_input_grad[_VALUES]:
        grads[_VALUES] = value_gradient(grad, packed.inputs(x), packed.outlier_positions)
    return tuple(grads)


_define(
    "packed_linear(Tensor x, Tensor? bias, Tensor codes, Tensor scale, Tensor? shift, Tensor? outlier_positions, "
    "Tensor? outlier_values, Tensor? input_scale, Tensor? input_zero_point, str spec, SymInt columns, str runtime, "
    "str kernel) -> Tensor",
    _run_packed_linear,
    lambda x, bias, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]),
)
library.register_autograd("zsaq::packed_linear", _backward, setup_context=_setup_context, lib=_LIBRARY)


def _run_integer_linear(inputs, input_scale, input_zero_point, bias, codes, scale, shift, spec, columns):
    packed = PackedTensors(_spec(spec), columns, codes, scale, shift)
    return integer_linear(inputs, input_scale, input_zero_point, packed, bias)


_define(
    "integer_linear(Tensor inputs, Tensor input_scale, Tensor input_zero_point, Tensor? bias, Tensor codes, Tensor scale, "
    "Tensor? shift, str spec, SymInt columns) -> Tensor",
    _run_integer_linear,
    lambda inputs, input_scale, input_zero_point, bias, codes, *_: inputs.new_empty(
        inputs.shape[0], codes.shape[0], dtype=torch.float32
    ),
)

# How many residuals a row has is not known to a tracer.
_define(
    "outlier_rows(Tensor rows, SymInt columns, Tensor positions, Tensor values) -> Tensor",
    gather_outlier_rows,
    lambda rows, columns, positions, values: values.new_empty(rows.shape[0], columns),
)
