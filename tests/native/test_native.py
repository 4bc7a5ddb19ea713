"""The library is there: what is installed for these tests has a compiler, and a silent fallback must fail them."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from optimum_zsaq.native import AVX2, AVX512, PORTABLE, best, has, library


def test_is_built():
    assert library() is not None


def test_takes_the_best_instructions_there_are():
    flags = open("/proc/cpuinfo").read().split() if os.path.exists("/proc/cpuinfo") else []
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bitalg"}
    intel = platform.machine() == "x86_64"
    able = {AVX512: intel and wanted <= set(flags), AVX2: intel and {"avx2", "fma"} <= set(flags), PORTABLE: True}
    assert {isa: has(isa) for isa in able} == able
    assert best() == next(isa for isa, there in able.items() if there)


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


GUARDED = """
import ctypes, mmap, torch
from conformance import DYNAMIC
from kernel_cases import packed_weight
from optimum_zsaq.kernels import native
from optimum_zsaq.native import AVX2, AVX512, PORTABLE, has
from optimum_zsaq.spec import LayerSpec, QuantSpec

libc, page, kept, empty = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, [], torch.empty


def at_the_end(tensor):
    '''A copy whose last byte is the last one before memory that nobody may touch.'''
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // page) * page
    room = mmap.mmap(-1, whole + page)
    kept.append(room)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert libc.mprotect(ctypes.c_void_p(address + whole), page, 0) == 0
    start = (whole - size) // tensor.element_size() * tensor.element_size()
    copy = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


half = {"symmetric": False, "minimum": True, "scale_bits": 16}
zeros = {"symmetric": False}
layouts = [("row", None, {}), ("tensor", None, zeros), ("group", 32, half), ("group", 64, zeros), ("group", 128, half)]
layouts += [("group", 17, {})]
for bits in (2, 3, 4, 5, 8):
    for name, size, options in layouts:
        for rows, columns in ((1, 1), (3, 33), (2, 511), (5, 513), (33, 576), (1, 1025)):
            for inputs in (DYNAMIC, None):
                packed = packed_weight(rows, columns, LayerSpec(QuantSpec(bits, name, size, **options), inputs))
                for field in ("codes", "scale", "shift"):
                    if getattr(packed, field) is not None:
                        setattr(packed, field, at_the_end(getattr(packed, field)))
                for count, dtype in ((1, torch.float32), (5, torch.bfloat16), (13, torch.float16)):
                    x, bias = at_the_end(torch.randn(count, columns).to(dtype)), at_the_end(torch.randn(rows).to(dtype))
                    torch.empty = lambda *shape, dtype: at_the_end(empty(*shape, dtype=dtype).fill_(torch.nan))
                    isas = [isa for isa in (PORTABLE, AVX2, AVX512) if has(isa)]
                    found = [native.native_linear(x, packed, bias, isa) for isa in isas]
                    torch.empty = empty
                    assert all(torch.equal(found[0], y) for y in found)
        kept.clear()
print("within")
"""


def test_reads_and_writes_nothing_outside(pytestconfig):
    """Every tensor ends where memory ends, for widths on both sides of each step of the kernels."""
    code = f"import sys; sys.path[:0] = [{str(pytestconfig.rootpath / 'tests')!r}]\n{GUARDED}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "within", (done.returncode, done.stderr)


SANITIZED = """
import random, torch
from pathlib import Path
from optimum_zsaq import native as home
home._built = lambda: [Path(LIBRARY)]
from conformance import DYNAMIC, STATIC
from kernel_cases import packed_weight
from optimum_zsaq.kernels.native import native_linear
from optimum_zsaq.native import AVX2, AVX512, PORTABLE, has
from optimum_zsaq.spec import LayerSpec, QuantSpec

draw, half = random.Random(0), {"symmetric": False, "minimum": True, "scale_bits": 16}
layouts = [("row", None), ("tensor", None), ("group", 32), ("group", 64), ("group", 128), ("group", 17)]
for turn in range(400):
    (name, size), options = draw.choice(layouts), draw.choice([{}, {"symmetric": False}, half])
    spec = QuantSpec(draw.choice([2, 3, 4, 5, 8]), name, size, **options)
    rows, columns, count = draw.randint(1, 70), draw.randint(1, 2100), draw.choice([1, 2, 5, 12, 15, 30])
    packed = packed_weight(rows, columns, LayerSpec(spec, draw.choice([DYNAMIC, STATIC, None])), seed=turn)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    x, bias = torch.randn(count, columns).to(dtype), draw.choice([None, torch.randn(rows)])
    torch.set_num_threads(draw.choice([1, 2]))
    found = [native_linear(x, packed, bias, isa) for isa in (PORTABLE, AVX2, AVX512) if has(isa)]
    assert all(torch.equal(found[0], y) for y in found), (spec, rows, columns, count)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with sanitizers")
def test_address_and_undefined_behaviour_sanitizers_find_nothing(pytestconfig, tmp_path):
    sources = sorted(map(str, (pytestconfig.rootpath / "optimum_zsaq/native").glob("*.cpp")))
    library = tmp_path / "kernels.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-pthread"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run(["g++", *flags, "-o", library, *sources], check=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    code = f"import sys; sys.path[:0] = [{str(pytestconfig.rootpath / 'tests')!r}]\nLIBRARY = {str(library)!r}\n{SANITIZED}"
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]
