"""What passes returned, kept for later: in memory up to a limit, the rest on disk."""

import logging
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


logger = logging.getLogger(__name__)


class Kept:
    """One value that is kept for as long as somebody holds this."""

    def __init__(self, value: Any = None, file: Path | None = None):
        self._value, self._file = value, file

    def get(self) -> Any:
        """The value."""
        return self._value if self._file is None else torch.load(self._file, weights_only=True)


class Activations:
    """Keeps values made of tensors, tuples and dicts.

    Args:
        limit (`int`, *optional*): bytes of tensors that are held in memory; None: all. Where the disk is full all are,
            from then on, with a warning.

    `used` is how many are held now, `spilled` how many lie on disk, in a temporary folder that goes when this does.
    """

    def __init__(self, limit: int | None = None):
        self.limit, self.used, self.spilled = limit, 0, 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._count = 0

    def keep(self, value: Any) -> Kept:
        """Keep a value; its place is free again when nobody holds what this returns."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        if self.limit is None or self.used + size <= self.limit:
            return self._hold(value, size)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="activations-")
        file = Path(self._folder.name) / str(self._count)
        self._count += 1
        try:
            torch.save(value, file)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk is full
            file.unlink(missing_ok=True)
            logger.warning("No room in %s (%s): activations are kept in memory from here on", self._folder.name, error)
            self.limit = None
            return self._hold(value, size)
        self.spilled += size
        kept = Kept(file=file)
        weakref.finalize(kept, self._delete, file, size)
        return kept

    def _hold(self, value: Any, size: int) -> Kept:
        self.used += size
        kept = Kept(value)
        weakref.finalize(kept, self._free, size)
        return kept

    def _free(self, size: int) -> None:
        self.used -= size

    def _delete(self, file: Path, size: int) -> None:
        self.spilled -= size
        file.unlink(missing_ok=True)
