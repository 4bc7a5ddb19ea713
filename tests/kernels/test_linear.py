import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conformance import DYNAMIC
from kernel_cases import INPUTS, packed_weight
from tolerances import KERNEL, relative_error

from optimum_zsaq.kernels import choose_kernel, int8, packed_linear
from optimum_zsaq.spec import LayerSpec, QuantSpec


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_chosen_kernel_computes(inputs):
    for spec in (QuantSpec(3), QuantSpec(8, symmetric=False), QuantSpec(4, "group", 5)):
        packed = packed_weight(3, 17, LayerSpec(spec, INPUTS[inputs]))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x, bias = torch.randn(2, 17, dtype=dtype), torch.randn(3, dtype=dtype)
            assert torch.equal(packed_linear(x, packed, bias), choose_kernel(x, packed)(x, packed, bias))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kernel", ["", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(inputs, kernel, dtype):
    packed = packed_weight(33, 64, LayerSpec(QuantSpec(4), INPUTS[inputs]), kernel=kernel)
    x, bias = torch.randn(20, 64, requires_grad=True), torch.randn(33, requires_grad=True)
    expected = packed_linear(x, packed, bias)
    with torch.autocast("cpu", dtype):
        y = packed_linear(x, packed, bias)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= 2 * KERNEL[dtype]
    y.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype, enabled=False):
        assert packed_linear(x, packed, bias).dtype == torch.float32


def test_the_wrong_width_raises():
    for kernel in ("", "reference"):
        for runtime in ("fast", "small"):
            for inputs in INPUTS.values():
                packed = packed_weight(3, 17, LayerSpec(QuantSpec(4), inputs), kernel=kernel, runtime=runtime)
                for batch in (1, 2, 40):
                    with pytest.raises(RuntimeError):
                        packed_linear(torch.randn(batch, 18), packed)


WARNINGS = """
import warnings
warnings.simplefilter("error")
import torch
from conformance import DYNAMIC
from kernel_cases import INPUTS, packed_weight
from optimum_zsaq.kernels import packed_linear
from optimum_zsaq.spec import LayerSpec, QuantSpec

for outliers in (0.0, 0.05):
    for inputs in INPUTS.values():
        for runtime in ("fast", "small"):
            packed = packed_weight(3, 64, LayerSpec(QuantSpec(4), inputs, outliers), runtime=runtime)
            for dtype in (torch.float32, torch.bfloat16):
                for batch in (40, 1):
                    packed_linear(torch.randn(batch, 64, dtype=dtype), packed)
print("silent")
"""


def test_first_calls_warn_of_nothing(pytestconfig):
    """PyTorch warns once a process of quantized and of sparse tensors, which users did not ask for."""
    path = [str(pytestconfig.rootpath / "tests")]
    code = f"import sys; sys.path[:0] = {path}\n{WARNINGS}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("silent", ""), done.stderr


def test_a_kernel_that_does_not_serve_raises():
    x = torch.randn(2, 64)
    packed = packed_weight(3, 64, LayerSpec(QuantSpec(4, "group", 32), DYNAMIC), kernel="int4")
    with pytest.raises(
        ValueError,
        match=r"kernel='int4' does not serve W4 group/32, A8 dynamic on float32 inputs on cpu with runtime='fast'; "
        r"use one of \[(?:'native', )?'int8', 'reference'\], or kernel=None for the fastest of them",
    ):
        packed_linear(x, packed)
    with pytest.raises(ValueError, match=r"kernel='int8' .* on float64 inputs .*; use one of \['reference'\]"):
        packed_linear(x.double(), replace(packed, kernel="int8"))
    with pytest.raises(ValueError, match=r"kernel='int4' .* on bfloat16 inputs on cpu with runtime='small'"):
        packed_linear(x.bfloat16(), packed_weight(3, 64, QuantSpec(4), kernel="int4", runtime="small"))


def test_the_kernel_that_was_asked_for_computes(monkeypatch):
    called = []
    monkeypatch.setattr(int8.Int8, "__call__", lambda self, x, packed, bias: called.append(1) or x.new_zeros(2, 3))
    packed = packed_weight(3, 64, QuantSpec(4))
    x = torch.randn(2, 64)
    packed_linear(x, replace(packed, kernel="reference"))
    assert not called
    packed_linear(x, replace(packed, kernel="int8"))
    packed_linear(x.bfloat16(), replace(packed, kernel="int8"))
    assert len(called) == 2
