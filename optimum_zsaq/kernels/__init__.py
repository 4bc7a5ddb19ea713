"""Running packed weights: `packed_linear(x, packed, bias)` and the registry of kernels it chooses from."""

from .linear import packed_linear
from .packed_tensors import PackedTensors
from .prepacked import drop_prepacked
from .registry import KERNELS, Kernel, choose_kernel, register_kernel
from .sparse import OutlierProducts, drop_outlier_matrix


__all__ = [
    "KERNELS",
    "Kernel",
    "OutlierProducts",
    "PackedTensors",
    "choose_kernel",
    "drop_outlier_matrix",
    "drop_prepacked",
    "packed_linear",
    "register_kernel",
]
