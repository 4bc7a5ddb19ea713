import pytest
import torch
from kernel_cases import compare, on_device, packed_weight

from optimum_zsaq.kernels import KERNELS, choose_kernel, cuda_dequantize
from optimum_zsaq.spec import LayerSpec, QuantSpec


kernel = KERNELS["cuda_dequantize"]
needs_gpu = pytest.mark.skipif(not cuda_dequantize.is_available(), reason="no GPU that Triton compiles for")


def test_does_not_serve_cpus():
    packed, x = packed_weight(3, 32, QuantSpec(4)), torch.randn(2, 32)
    assert not kernel.serves(x, packed)
    assert choose_kernel(x, packed).name != "cuda_dequantize"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_the_reference_on_a_gpu(bits, dtype):
    for turn, layout in enumerate((("tensor", None), ("row", None), ("group", 16), ("group", 64))):
        for rows, columns in ((1, 17), (33, 129), (64, 256)):
            spec = LayerSpec(QuantSpec(bits, *layout, symmetric=bool(turn % 2)), None, 0.02 * (columns == 129))
            packed = on_device(packed_weight(rows, columns, spec, seed=turn), "cuda")
            for batch in (1, 16, 40):
                x, bias = torch.randn(batch, columns), torch.randn(rows)
                compare("cuda_dequantize", x.to("cuda", dtype), packed, bias.to("cuda", dtype))
