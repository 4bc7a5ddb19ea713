"""Running packed weights: `packed_linear(x, packed, bias)` and the registry of kernels it chooses from."""

from .packed_tensors import PackedTensors
from .registry import KERNELS, Kernel, choose_kernel, packed_linear, register_kernel


__all__ = ["KERNELS", "Kernel", "PackedTensors", "choose_kernel", "packed_linear", "register_kernel"]
