import pytest
import torch
from conformance import spec_id
from kernel_cases import INPUTS, on_device, packed_weight
from tolerances import KERNEL, relative_error

from optimum_zsaq.kernels import KERNELS, choose_kernel, cuda_int8
from optimum_zsaq.spec import LayerSpec, QuantSpec


SPECS = [
    QuantSpec(bits, name, symmetric=sym) for bits in (2, 3, 4, 8) for name in ("tensor", "row") for sym in (True, False)
]
SHAPES = ((1, 17), (3, 32), (33, 129), (64, 256))  # (rows, columns)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

kernel, reference = KERNELS["cuda_int8"], KERNELS["reference"]
needs_gpu = pytest.mark.skipif(not cuda_int8.is_available(), reason="no GPU with int8 tensor cores")


def check(spec, inputs, dtype, device) -> None:
    """Against the reference in float32: integer sums are exact in every dtype, the reference rounds its weight."""
    for turn, (rows, columns) in enumerate(SHAPES):
        packed = packed_weight(rows, columns, LayerSpec(spec, INPUTS[inputs], 0.02 * (turn % 2)), seed=turn)
        packed = on_device(packed, device)
        for batch in (1, 16, 17, 40):
            x = torch.randn(batch, columns, device=device).to(dtype)
            bias = torch.randn(rows, device=device).to(dtype) if (turn + batch) % 3 else None
            found = kernel(x, packed, bias)
            expected = reference(x.float(), packed, None if bias is None else bias.float())
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            assert relative_error(found, expected) <= KERNEL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [name for name in INPUTS if name != "float"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
class TestIsTheReference:
    def test_its_arithmetic_on_cpu(self, spec, inputs, dtype):
        check(spec, inputs, dtype, "cpu")

    @needs_gpu
    def test_on_a_gpu(self, spec, inputs, dtype):
        check(spec, inputs, dtype, "cuda")


@pytest.mark.parametrize("shape", [(129,), (1, 129), (0, 129), (2, 0, 129), (2, 20, 129)], ids=str)
def test_any_leading_shape(shape):
    packed = packed_weight(3, 129, LayerSpec(QuantSpec(4), INPUTS["dynamic-8"]))
    x, bias = torch.randn(shape), torch.randn(3)
    found = kernel(x, packed, bias)
    assert found.shape == (*shape[:-1], 3)
    assert relative_error(found, reference(x, packed, bias)) <= KERNEL[torch.float32] if found.numel() else True


def test_tokens_that_are_not_finite_give_nan_and_spoil_no_other():
    packed = packed_weight(5, 32, LayerSpec(QuantSpec(8), INPUTS["dynamic-8"]))
    x = torch.randn(4, 32)
    clean = kernel(x, packed, None)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    found = kernel(x, packed, None)
    assert found[1:3].isnan().all()
    assert torch.equal(found[[0, 3]], clean[[0, 3]])


def test_zeros_stay_zeros():
    packed = packed_weight(5, 32, LayerSpec(QuantSpec(8), INPUTS["dynamic-8"]))
    assert torch.equal(kernel(torch.zeros(2, 32), packed, None), torch.zeros(2, 5))


def test_other_devices_and_schemes_are_not_its_business():
    dynamic, group = LayerSpec(QuantSpec(8), INPUTS["dynamic-8"]), LayerSpec(QuantSpec(8, "group", 16), INPUTS["dynamic-8"])
    x = torch.randn(2, 32)
    assert not kernel.serves(x, packed_weight(3, 32, dynamic))
    for spec in (LayerSpec(QuantSpec(8)), group):
        assert not kernel.serves(x.to("meta"), packed_weight(3, 32, spec))
    assert choose_kernel(x, packed_weight(3, 32, dynamic)).name in ("native", "int8", "reference")
    with pytest.raises(ValueError, match="kernel='cuda_int8' does not serve .* on cpu"):
        choose_kernel(x, packed_weight(3, 32, dynamic, kernel="cuda_int8"))


def test_without_a_gpu_it_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda_int8._multiplies_exactly.cache_clear()
    try:
        assert not cuda_int8.is_available()
    finally:
        cuda_int8._multiplies_exactly.cache_clear()


def test_a_gpu_that_cannot_is_said_and_not_used(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda_int8.torch, "tensor", fail)
    cuda_int8._multiplies_exactly.cache_clear()
    try:
        assert not cuda_int8.is_available()
    finally:
        cuda_int8._multiplies_exactly.cache_clear()
    assert "8-bit matmuls are not available on this GPU" in caplog.text
    assert "no such instruction" in caplog.text
