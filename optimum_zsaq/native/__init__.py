"""Our C++ kernels, as a shared library that is built with the package: how it is found and called, not when."""

import ctypes
import logging
from functools import lru_cache
from pathlib import Path


logger = logging.getLogger(__name__)

BEST, PORTABLE, AVX512, AVX2 = 0, 1, 2, 3  # instruction sets


class Weight(ctypes.Structure):
    """`ZsaqWeight` of zsaq_kernels.h. It holds addresses: the tensors must outlive it."""

    _fields_ = (
        *[(name, ctypes.c_int32) for name in ("bits", "rows", "columns", "group", "one_scale", "shift_type", "scale_type")],
        *[(name, ctypes.c_void_p) for name in ("codes", "scale", "shift")],
    )


class Input(ctypes.Structure):
    """`ZsaqInput` of zsaq_kernels.h."""

    _fields_ = (*[(name, ctypes.c_int32) for name in ("digits", "highest", "is_static", "zero")], ("scale", ctypes.c_float))


def _built() -> list[Path]:
    folder = Path(__file__).parent
    return sorted(folder.glob("_kernels*.so")) + sorted(folder.glob("_kernels*.pyd"))


@lru_cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where the package was installed without a compiler."""
    found = _built()
    if not found:
        logger.warning(
            "The C++ kernels were not built, for want of a compiler, and others serve: install one, and the package anew"
        )
        return None
    try:
        kernels = ctypes.CDLL(str(found[0]))
    except OSError as error:
        logger.warning("The C++ kernels do not load (%s): others serve; install optimum-zsaq anew to build them", error)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    kernels.zsaq_linear.argtypes = [*[pointer] * 3, ctypes.c_int64, pointer, integer, pointer, *[integer] * 3]
    return kernels


@lru_cache
def best() -> int:
    """The instruction set that kernels use on this processor; `PORTABLE` without kernels, too."""
    kernels = library()
    return PORTABLE if kernels is None else kernels.zsaq_best_isa()


def has(isa: int) -> bool:
    """Whether the kernels have an instruction set on this processor."""
    kernels = library()
    return kernels is not None and bool(kernels.zsaq_has_isa(isa))
