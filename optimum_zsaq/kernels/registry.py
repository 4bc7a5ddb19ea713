"""Which kernel computes a packed layer: the first registered one that serves exactly its scheme, device and dtype."""

from typing import Protocol

from torch import Tensor

from .packed_tensors import PackedTensors
from .reference import Reference


class Kernel(Protocol):
    """One way to compute a packed layer."""

    name: str

    def serves(self, x: Tensor, packed: PackedTensors) -> bool:
        """Whether this kernel computes exactly this layer's scheme on this input, gradients to x included."""
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
    """The kernel that `packed_linear` uses for this input."""
    return next(kernel for kernel in KERNELS.values() if kernel.serves(x, packed))


def packed_linear(x: Tensor, packed: PackedTensors, bias: Tensor | None = None) -> Tensor:
    """A Linear layer on a packed weight.

    Shapes: x (..., I) float, bias (O,) -> (..., O) in x's dtype. Gradients flow to x and to the bias.
    """
    return choose_kernel(x, packed)(x, packed, bias)


register_kernel(Reference())
