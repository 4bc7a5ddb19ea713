import pytest
import torch
from conformance import DTYPES, DYNAMIC, STATIC, random_weight, spec_id, weight_specs
from tolerances import MATMUL, relative_error

from optimum_zsaq.kernels import PackedTensors
from optimum_zsaq.kernels.reference import Reference
from optimum_zsaq.ops import find_ranges, pack_codes, quantize
from optimum_zsaq.spec import LayerSpec, QuantSpec


def packed_weight(spec: QuantSpec, inputs: QuantSpec | None = None, device="cpu") -> PackedTensors:
    """The tensors of a packed weight (3, 17), with two outliers."""
    weight = random_weight(3, 17, 0)
    scale, zero_point = find_ranges(weight, spec, "ternary" if spec.ternary else "minmax")
    tensors = {
        "codes": pack_codes(quantize(weight, scale, zero_point, spec), spec.bits),
        "scale": scale,
        "zero_point": zero_point,
        "outlier_positions": torch.tensor([3, 40], dtype=torch.int32),
        "outlier_values": torch.tensor([0.5, -0.25]),
        "input_scale": torch.tensor([[0.02]]),
        "input_zero_point": torch.tensor([[100]], dtype=torch.uint8),
    }
    return PackedTensors(
        LayerSpec(spec, inputs), 17, **{name: None if t is None else t.to(device) for name, t in tensors.items()}
    )


linear = Reference()


@pytest.mark.parametrize("inputs", [None, DYNAMIC, STATIC], ids=["float", "dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestForward:
    def test_is_a_matmul_with_the_dense_weight(self, dtype, inputs, device):
        packed = packed_weight(QuantSpec(4), inputs, device)
        x = torch.randn(2, 3, 17, dtype=dtype, device=device)
        bias = torch.randn(3, dtype=dtype, device=device)
        found = linear(x, packed, bias)
        assert (found.dtype, found.shape) == (dtype, (2, 3, 3))
        expected = packed.inputs(x).double() @ packed.weight().to(dtype).double().t() + bias.double()
        assert relative_error(found, expected) < MATMUL[dtype]

    @pytest.mark.parametrize("shape", [(17,), (1, 17), (0, 17), (2, 0, 17), (2, 1, 3, 17)], ids=str)
    def test_any_leading_shape(self, dtype, inputs, shape, device):
        packed = packed_weight(QuantSpec(3), inputs, device)
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        bias = torch.randn(3, dtype=dtype, device=device, requires_grad=True)
        found = linear(x, packed, bias)
        assert found.shape == (*shape[:-1], 3)
        found.backward(torch.ones_like(found))
        assert x.grad.shape == x.shape
        assert torch.equal(bias.grad, torch.full_like(bias, x.numel() / 17))


@pytest.mark.parametrize("spec", weight_specs((2, 3, 8)), ids=spec_id)
class TestGradients:
    def test_first_and_second_order(self, spec):
        packed = packed_weight(spec)
        x = torch.randn(2, 2, 17, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, b: linear(x, packed, b), (x, bias))
        # the kernel is linear: squared, so that a second derivative is there to check
        assert torch.autograd.gradgradcheck(lambda x, b: linear(x, packed, b).square(), (x, bias))

    def test_without_bias(self, spec):
        packed = packed_weight(spec)
        x = torch.randn(2, 17, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: linear(x, packed, None), (x,))

    def test_of_the_bias_alone(self, spec):
        bias = torch.zeros(3, requires_grad=True)
        linear(torch.randn(4, 17), packed_weight(spec), bias).sum().backward()
        assert bias.grad.tolist() == [4.0] * 3


def test_dynamic_inputs_let_the_gradient_through():
    packed = packed_weight(QuantSpec(4), DYNAMIC)
    x = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(linear(x, packed, None), x, upstream)
    assert torch.equal(gradient, upstream @ packed.weight().double())


def test_static_inputs_stop_it_where_they_clip():
    """Scale 0.02 and zero point 100 of 8 bits: the range is [-2.0, 3.1]."""
    packed = packed_weight(QuantSpec(4), STATIC)
    x = torch.linspace(-4, 5, 5 * 17, dtype=torch.float64).view(5, 17).requires_grad_()
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(linear(x, packed, None), x, upstream)
    inside = (x > -2.0) & (x < 3.1)
    expected = upstream @ packed.weight().double() * inside
    assert not gradient[~inside].any()
    assert relative_error(gradient, expected) < MATMUL[torch.float64]


def test_no_dense_weight_is_kept_for_the_backward_pass():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = linear(torch.randn(2, 17, requires_grad=True), packed_weight(QuantSpec(4)), None)
    assert (3, 17) not in saved
    kept = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not kept
