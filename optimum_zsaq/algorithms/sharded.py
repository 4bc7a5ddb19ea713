"""Tensors that are sharded over processes (FSDP2), seen whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; of a sharded one every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
