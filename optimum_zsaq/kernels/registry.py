"""Which kernel computes a packed layer: the first registered one that serves exactly its scheme, device and dtype."""

from typing import Protocol

from torch import Tensor

from .cuda_dequantize import CudaDequantize
from .cuda_int8 import CudaInt8
from .int4 import Int4
from .int8 import Int8
from .native import Native
from .packed_tensors import PackedTensors
from .reference import Reference


class Kernel(Protocol):
    """One way to compute a packed layer. Gradients are not its business (see `gradient.py`)."""

    name: str

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Whether this kernel computes exactly this layer's scheme on this input; looks at no values and no `codes`."""
        ...

    def __call__(self, x: Tensor, packed: PackedTensors, bias: Tensor | None) -> Tensor:
        """x (..., I), bias (O,) or None -> (..., O) in x's dtype."""
        ...


KERNELS: dict[str, Kernel] = {}


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel in front of those registered before it.

    Raises:
        ValueError: the name is taken.
    """
    if kernel.name in KERNELS:
        raise ValueError(f"a kernel named {kernel.name!r} is registered already; give yours another name")
    others = dict(KERNELS)
    KERNELS.clear()
    KERNELS.update({kernel.name: kernel, **others})


def choose_kernel(x: Tensor, packed: PackedTensors) -> Kernel:
    """The kernel that `packed_linear` uses for this input.

    Raises:
        ValueError: the one that was asked for does not serve it.
    """
    for kernel in (KERNELS[packed.kernel],) if packed.kernel else KERNELS.values():
        if kernel.serves(x, packed):
            return kernel
    able = [name for name, other in KERNELS.items() if other.serves(x, packed)]
    raise ValueError(
        f"kernel={packed.kernel!r} does not serve {packed.spec.text()} on {str(x.dtype).removeprefix('torch.')} inputs "
        f"on {x.device.type} with runtime={packed.runtime!r}; use one of {able}, or kernel=None for the fastest of them"
    )


for _kernel in (Reference(), CudaDequantize(), CudaInt8(), Int8(), Native(), Int4()):
    register_kernel(_kernel)
