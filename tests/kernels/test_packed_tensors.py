import pytest
import torch
from conformance import random_weight, spec_id, weight_specs

from optimum_zsaq.kernels import PackedTensors
from optimum_zsaq.kernels.packed_tensors import quantize_inputs
from optimum_zsaq.ops import dequantize, fake_quantize, fake_quantize_tokens, find_ranges, pack_codes, quantize, scale_dtype
from optimum_zsaq.spec import LayerSpec, QuantSpec


def packed_weight(spec: QuantSpec, device="cpu", **others) -> tuple[PackedTensors, torch.Tensor]:
    """The tensors of a packed weight (3, 17), and its codes."""
    weight = random_weight(3, 17, 0)
    scale, shift = find_ranges(weight, spec, "ternary" if spec.ternary else "minmax")
    codes = quantize(weight, scale, shift, spec)
    tensors = {"codes": pack_codes(codes, spec.bits), "scale": scale.to(scale_dtype(spec)), "shift": shift, **others}
    tensors = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    return PackedTensors(LayerSpec(spec), 17, **tensors), codes


@pytest.mark.parametrize("spec", weight_specs(), ids=spec_id)
class TestWeight:
    def test_is_what_the_codes_stand_for(self, spec, device):
        packed, codes = packed_weight(spec, device)
        expected = dequantize(codes, packed.scale.cpu(), None if spec.symmetric else packed.shift.cpu(), spec)
        assert packed.weight().dtype == torch.float32
        assert torch.equal(packed.weight().cpu(), expected)

    def test_outliers_are_added(self, spec):
        plain, _ = packed_weight(spec)
        positions, values = torch.tensor([0, 16, 17, 50], dtype=torch.int32), torch.randn(4)
        packed, _ = packed_weight(spec, outlier_positions=positions, outlier_values=values)
        expected = plain.weight()
        expected.view(-1)[positions.long()] += values
        assert torch.equal(packed.weight(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestInputs:
    scale, zero_point = torch.tensor([[0.02]]), torch.tensor([[40]], dtype=torch.uint8)

    def test_float(self, dtype):
        x = torch.randn(2, 3, 17, dtype=dtype)
        assert quantize_inputs(x, None, None, None) is x

    def test_dynamic(self, dtype):
        spec = QuantSpec(4, "token", symmetric=False)
        x = torch.randn(2, 3, 17, dtype=dtype)
        expected = fake_quantize_tokens(x, spec).to(dtype)
        assert torch.equal(quantize_inputs(x, spec, None, None), expected)

    def test_static(self, dtype):
        spec = QuantSpec(8, "tensor", symmetric=False)
        x = torch.randn(2, 3, 17, dtype=dtype)
        expected = fake_quantize(x, self.scale, self.zero_point, spec).to(dtype)
        assert torch.equal(quantize_inputs(x, spec, self.scale, self.zero_point), expected)

    def test_packed_tensors_use_their_own(self, dtype):
        spec = LayerSpec(QuantSpec(4), QuantSpec(8, "tensor", symmetric=False))
        weight, _ = packed_weight(QuantSpec(4))
        packed = PackedTensors(
            spec, 17, weight.codes, weight.scale, input_scale=self.scale, input_zero_point=self.zero_point
        )
        x = torch.randn(2, 17, dtype=dtype)
        assert torch.equal(packed.inputs(x), quantize_inputs(x, spec.inputs, self.scale, self.zero_point))
