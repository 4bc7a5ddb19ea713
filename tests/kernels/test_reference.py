import pytest
import torch
from conformance import DTYPES, DYNAMIC, STATIC, random_weight
from tolerances import MATMUL, relative_error

from optimum_zsaq.kernels import PackedTensors
from optimum_zsaq.kernels.reference import Reference
from optimum_zsaq.ops import find_ranges, pack_codes, quantize
from optimum_zsaq.spec import LayerSpec, QuantSpec


def packed_weight(spec: QuantSpec, inputs: QuantSpec | None = None, device="cpu") -> PackedTensors:
    """The tensors of a packed weight (3, 17), with two outliers."""
    weight = random_weight(3, 17, 0)
    scale, shift = find_ranges(weight, spec, "ternary" if spec.ternary else "minmax")
    tensors = {
        "codes": pack_codes(quantize(weight, scale, shift, spec), spec.bits),
        "scale": scale,
        "shift": shift,
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
