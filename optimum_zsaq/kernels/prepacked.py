"""What kernels derive from a packed weight and keep for the next call: built lazily, once, and never saved.

An entry belongs to the tensor of codes itself, not to a layer, so that compiled and exported graphs find it too, and dies
with it. It is made anew when codes, scales or zero points were written to or moved since. Outliers are apart (`sparse.py`).
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .packed_tensors import PackedTensors


T = TypeVar("T")

_ENTRIES = WeakTensorKeyDictionary()  # codes -> (stamp, {name: what a kernel keeps})
LOCK = threading.RLock()


def prepacked(packed: PackedTensors, name: str, build: Callable[[PackedTensors], T], instead_of: str = "") -> T:
    """What `build(packed)` returned for these tensors; it is called once, by one thread. `instead_of` is forgotten."""
    kept = all_prepacked(packed)
    if name in kept:
        return kept[name]
    with LOCK:
        kept = all_prepacked(packed)
        if name not in kept:
            kept = {**{k: v for k, v in kept.items() if k != instead_of}, name: build(packed)}
            _ENTRIES[packed.codes] = (_stamps(packed), kept)
        return kept[name]


def all_prepacked(packed: PackedTensors) -> dict[str, Any]:
    """What is kept for these tensors now, by name."""
    entry = _ENTRIES.get(packed.codes)
    return entry[1] if entry is not None and entry[0] == _stamps(packed) else {}


def _stamps(packed: PackedTensors) -> tuple:
    tensors = (packed.codes, packed.scale, packed.shift)
    return tuple([None if tensor is None else stamp(tensor) for tensor in tensors])


def drop_prepacked(codes: Tensor) -> None:
    """Forget what is kept for these codes; the next call builds it again."""
    with LOCK:
        _ENTRIES.pop(codes, None)


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """Changes when the values may have: other memory, or a write. Inference tensors cannot count writes."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
