"""Gradients of packed layers; the kernel has no part in them but the forward pass."""

import pytest
import torch
from conformance import DTYPES, DYNAMIC, STATIC, spec_id, weight_specs
from kernel_cases import INPUTS, packed_weight
from tolerances import KERNEL, MATMUL, relative_error

from optimum_zsaq.kernels import packed_linear
from optimum_zsaq.kernels.prepacked import _ENTRIES
from optimum_zsaq.spec import LayerSpec, QuantSpec


SPECS = [*weight_specs((2, 3, 8)), QuantSpec(4, "group", 32, symmetric=False)]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
class TestReference:
    """In float64, which the reference alone serves, against numerical derivatives."""

    def test_first_and_second_order(self, spec):
        packed = packed_weight(3, 17, LayerSpec(spec, None, 0.05))
        x = torch.randn(2, 2, 17, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, b: packed_linear(x, packed, b), (x, bias))
        # the layer is linear: squared, so that a second derivative is there to check
        assert torch.autograd.gradgradcheck(lambda x, b: packed_linear(x, packed, b).square(), (x, bias))

    def test_without_bias(self, spec):
        packed = packed_weight(3, 17, spec)
        x = torch.randn(2, 17, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: packed_linear(x, packed), (x,))

    def test_of_the_bias_alone(self, spec):
        bias = torch.zeros(3, requires_grad=True)
        packed_linear(torch.randn(4, 17), packed_weight(3, 17, spec), bias).sum().backward()
        assert bias.grad.tolist() == [4.0] * 3


def test_dynamic_inputs_let_the_gradient_through():
    packed = packed_weight(3, 17, LayerSpec(QuantSpec(4), DYNAMIC))
    x = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(packed_linear(x, packed), x, upstream)
    assert torch.equal(gradient, upstream @ packed.weight().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_static_inputs_stop_it_where_they_clip(dtype):
    """Scale 0.02 and zero point 100 of 8 bits: the range is [-2.0, 3.1]."""
    packed = packed_weight(3, 17, LayerSpec(QuantSpec(4), STATIC))
    packed.input_scale, packed.input_zero_point = torch.tensor([[0.02]]), torch.tensor([[100]], dtype=torch.uint8)
    x = torch.linspace(-4, 5, 5 * 17, dtype=dtype).view(5, 17).requires_grad_()
    upstream = torch.randn(5, 3, dtype=dtype)
    (gradient,) = torch.autograd.grad(packed_linear(x, packed), x, upstream)
    inside = (x > -2.0) & (x < 3.1)
    expected = upstream @ packed.weight().to(dtype) * inside
    assert not gradient[~inside].any()
    assert relative_error(gradient, expected) < MATMUL[dtype]


@pytest.mark.parametrize("runtime", ["fast", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
class TestKernels:
    def test_gradients_are_those_of_the_reference(self, inputs, dtype, runtime):
        """Bit for bit: only the result is the kernel's."""
        for spec in (QuantSpec(4), QuantSpec(8, symmetric=False), QuantSpec(3, "group", 32, symmetric=False)):
            for batch in ((1,), (2, 10)):
                found = {}
                for kernel in ("", "reference"):
                    layer = LayerSpec(spec, INPUTS[inputs], 0.02)
                    packed = packed_weight(33, 64, layer, runtime=runtime, kernel=kernel)
                    torch.manual_seed(1)
                    x, bias = torch.randn(*batch, 64).to(dtype).mul(3).requires_grad_(), torch.randn(33).requires_grad_()
                    y = packed_linear(x, packed, bias.to(dtype))
                    y.backward(torch.randn(*batch, 33).to(dtype))
                    found[kernel] = y, x.grad, bias.grad
                assert relative_error(found[""][0], found["reference"][0]) <= KERNEL[dtype]
                for a, b in zip(found[""][1:], found["reference"][1:], strict=True):
                    assert a.dtype == b.dtype
                    assert torch.equal(a, b)

    def test_forward_is_that_without_gradients(self, inputs, dtype, runtime):
        packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), INPUTS[inputs], 0.02), runtime=runtime)
        for batch in (1, 20):
            x = torch.randn(batch, 64, dtype=dtype)
            assert torch.equal(packed_linear(x.clone().requires_grad_(), packed).detach(), packed_linear(x, packed))


@pytest.mark.parametrize("kernel", ["int8", "reference"])
def test_no_dense_weight_is_kept_for_the_backward_pass(kernel):
    for inputs in INPUTS.values():
        saved, packed = [], packed_weight(33, 64, LayerSpec(QuantSpec(4), inputs), kernel=kernel)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(tuple(t.shape)) or t, lambda t: t
        ):
            y = packed_linear(torch.randn(2, 64, requires_grad=True), packed)
        assert (33, 64) not in saved
        assert not [shape for shape in saved if shape != (2, 64)]
        assert y.grad_fn.packed.codes is packed.codes
        if kernel == "reference":
            assert packed.codes not in _ENTRIES


def test_training_through_a_layer_learns_what_comes_before_it():
    """A LoRA-like matrix in front: the loss falls, and the layer's own tensors do not change."""
    packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), DYNAMIC))
    before = packed.codes.clone(), packed.scale.clone()
    down, up = torch.randn(64, 4).div_(8).requires_grad_(), torch.zeros(4, 64, requires_grad=True)
    x, target = torch.randn(40, 64), torch.randn(40, 33)
    optimizer, losses = torch.optim.Adam([down, up], lr=0.02), []
    for _ in range(30):
        loss = (packed_linear(x + x @ down @ up, packed) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(packed.codes, before[0])
    assert torch.equal(packed.scale, before[1])


def test_a_frozen_input_gets_no_gradient():
    x, bias = torch.randn(2, 17), torch.randn(3, requires_grad=True)
    y = packed_linear(x, packed_weight(3, 17, QuantSpec(4)), bias)
    assert y.requires_grad
    assert not packed_linear(x, packed_weight(3, 17, QuantSpec(4)), bias.detach()).requires_grad
    with torch.no_grad():
        assert not packed_linear(x, packed_weight(3, 17, QuantSpec(4)), bias).requires_grad


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kernel", ["int8", "reference"])
def test_gradient_to_the_outliers_is_that_of_the_dense_weight(kernel, inputs):
    packed = packed_weight(7, 33, LayerSpec(QuantSpec(4), inputs, 0.1), kernel=kernel)
    values = packed.outlier_values = packed.outlier_values.detach().clone().requires_grad_()
    x, weight = torch.randn(2, 3, 33, requires_grad=True), packed.weight().detach().requires_grad_()
    (packed_linear(x, packed).pow(2).sum()).backward()
    torch.nn.functional.linear(packed.inputs(x.detach()), weight).pow(2).sum().backward()
    expected = weight.grad.flatten()[packed.outlier_positions.long()]
    assert torch.allclose(values.grad, expected, rtol=1e-4, atol=1e-4)
    assert x.grad is not None
