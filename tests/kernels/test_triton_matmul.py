"""The Triton kernel without a GPU: its numbers in Triton's interpreter, and that it compiles for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = """
import torch
from kernel_cases import INPUTS, packed_weight
from tolerances import KERNEL, relative_error
from optimum_zsaq.kernels import KERNELS, PackedTensors
from optimum_zsaq.spec import LayerSpec, QuantSpec

torch.manual_seed(0)
kernel, reference = KERNELS["cuda_dequantize"], KERNELS["reference"]
cases = 0
for bits in (2, 3, 4, 8):
    for layout in (("tensor", None), ("row", None), ("group", 16), ("group", 128)):
        for form in ({"symmetric": True}, {"symmetric": False}, {"symmetric": False, "minimum": True, "scale_bits": 16}):
            for rows, columns in ((8, 17), (33, 129), (40, 300)):
                share = 0.02 * (columns == 129)
                inputs = INPUTS["dynamic-8"] if columns == 300 else None
                spec = LayerSpec(QuantSpec(bits, *layout, **form), inputs, share)
                packed = packed_weight(rows, columns, spec, seed=cases)
                for batch in (1, 20):
                    for dtype in (torch.float32, torch.float16):  # the interpreter multiplies no bfloat16
                        x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
                        bias = bias if cases % 3 else None
                        found, expected = kernel(x, packed, bias), reference(x, packed, bias)
                        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                        assert relative_error(found, expected) <= KERNEL[dtype], (spec, dtype, batch)
                        cases += 1
assert kernel(torch.empty(0, 300), packed, None).shape == (0, 40)
codes = torch.arange(33 * 24).view(33, 24).remainder(256).to(torch.uint8)  # what is tried once on a GPU
packed = PackedTensors(LayerSpec(QuantSpec(3)), 64, codes, torch.full((33, 1), 0.5))
x = torch.arange(3 * 64).view(3, 64).remainder(7).float()
assert torch.equal(kernel(x, packed, None), x @ packed.weight().t())
print(cases)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimum_zsaq.kernels.triton_matmul import dequantize_and_multiply as kernel

def compile_for(capability, dtype, bits, form, blocks):
    types = {name: "i32" for name in kernel.arg_names}
    types.update({name: f"*{dtype}" for name in ("x", "bias", "out")}, codes="*u8")
    types["scale"] = "*fp16" if form == "minimum" else "*fp32"
    types["shift"] = "*u8" if form == "asymmetric" else types["scale"]
    constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks))
    constants.update(OFFSET=2 ** (bits - 1), BITS=bits, BIAS=True)
    constants.update(ASYMMETRIC=form == "asymmetric", MINIMUM=form == "minimum")
    types.update({name: "constexpr" for name in constants})
    source = ASTSource(kernel, types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

for capability in (80, 90):
    for dtype, bits, form in (("bf16", 3, "asymmetric"), ("fp16", 8, "symmetric"), ("fp32", 4, "minimum")):
        for blocks in ((16, 32, 128), (64, 64, 32)):
            binary = compile_for(capability, dtype, bits, form, blocks)
            assert binary.asm["cubin"] and binary.metadata.shared <= 64 * 1024, binary.metadata.shared
print("compiled")
"""


def run(script: str, **environment: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_is_the_reference():
    assert int(run(INTERPRETED, TRITON_INTERPRET="1")) == 576


def test_compiles_for_gpus(tmp_path):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"
