"""The library is there: what is installed for these tests has a compiler, and a silent fallback must fail them."""

import os
import platform
import subprocess
import sys

from optimum_zsaq.native import AVX512, PORTABLE, best, library


def test_is_built():
    assert library() is not None


def test_takes_the_best_instructions_there_are():
    flags = open("/proc/cpuinfo").read().split() if os.path.exists("/proc/cpuinfo") else []
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bitalg"}
    able = platform.machine() == "x86_64" and wanted <= set(flags)
    assert best() == (AVX512 if able else PORTABLE)


CHILD = """
import os, torch
from conformance import DYNAMIC
from kernel_cases import packed_weight
from optimum_zsaq.kernels.native import native_linear
from optimum_zsaq.spec import LayerSpec, QuantSpec

torch.set_num_threads(2)
packed, x = packed_weight(2048, 1024, LayerSpec(QuantSpec(4), DYNAMIC)), torch.randn(4, 1024)
expected = native_linear(x, packed, None)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(native_linear(x, packed, None), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_works_in_a_forked_process(pytestconfig):
    """Its threads are not in the child."""
    path = [str(pytestconfig.rootpath / "tests")]
    code = f"import sys; sys.path[:0] = {path}\n{CHILD}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr
