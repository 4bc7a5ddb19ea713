"""What kernels derive from a packed weight and keep for the next call: built lazily, once, and never saved.

An entry belongs to the tensor of codes itself, not to a layer, so that compiled and exported graphs find it too, and dies
with it. It is made anew when codes, scales or zero points were written to or moved since. Outliers are apart (`sparse.py`).
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from .packed_tensors import PackedTensors


T = TypeVar("T")


class TensorTable:
    """What belongs to tensors, and dies with them.

    As `torch.utils.weak.WeakTensorKeyDictionary`, whose look-ups cost a small layer's call a sixth of its time.
    """

    def __init__(self):
        self._entries: dict[int, tuple[weakref.ref, Any]] = {}

    def get(self, key: Tensor, default: Any = None) -> Any:
        """What belongs to this tensor, or `default`."""
        entry = self._entries.get(id(key))
        return entry[1] if entry is not None and entry[0]() is key else default

    def __setitem__(self, key: Tensor, value: Any) -> None:
        number = id(key)

        def forget(reference: weakref.ref) -> None:
            entry = self._entries.get(number)
            if entry is not None and entry[0] is reference:
                del self._entries[number]

        self._entries[number] = (weakref.ref(key, forget), value)

    def __getitem__(self, key: Tensor) -> Any:
        if key not in self:
            raise KeyError(tuple(key.shape))
        return self.get(key)

    def __contains__(self, key: Tensor) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def pop(self, key: Tensor) -> None:
        """Forget what belongs to this tensor."""
        if key in self:
            self._entries.pop(id(key), None)


_ENTRIES = TensorTable()  # codes -> (stamp, {name: what a kernel keeps})
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
    shift = packed.shift
    return stamp(packed.codes), stamp(packed.scale), None if shift is None else stamp(shift)


def drop_prepacked(codes: Tensor) -> None:
    """Forget what is kept for these codes; the next call builds it again."""
    with LOCK:
        _ENTRIES.pop(codes)


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """Changes when the values may have: other memory, or a write. Inference tensors cannot count writes."""
    try:
        return id(tensor), tensor.data_ptr(), tensor._version
    except RuntimeError:  # an inference tensor
        return id(tensor), tensor.data_ptr(), 0
