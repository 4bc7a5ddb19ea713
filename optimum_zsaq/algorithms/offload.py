"""Float weights of a model's blocks in files, read when a stage needs them: for models that memory does not hold."""

import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..surgery import find_layer_ranges, low_bit_layers, pack


class OffloadedBlocks:
    """Keeps the Parameters of blocks in a temporary folder, which goes when this does, and leaves "meta" ones in the model.

    Args:
        blocks (`Iterable[str]`): names of the blocks.
        ranges (`str`): the range method of their low-bit layers.

    `checksum` is that of all tensors that were put here.
    """

    def __init__(self, blocks: Iterable[str], ranges: str = "mse"):
        self.blocks, self.ranges, self.checksum = tuple(blocks), ranges, 0
        self._folder = tempfile.TemporaryDirectory(prefix="blocks-")
        self._device: dict[str, torch.device] = {}

    def holds(self, name: str) -> bool:
        """Whether a tensor of that name belongs to a block."""
        return any(name.startswith(f"{block}.") for block in self.blocks)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a Parameter's value.

        Raises:
            OSError: it could not be written.
        """
        content = tensor.detach().cpu().contiguous()
        self.checksum = zlib.crc32(content.view(-1).view(torch.uint8).numpy(), self.checksum)
        with self._file(name).open("wb") as file:
            torch.save(content, file)
        self._device[name] = tensor.device

    def _file(self, name: str) -> Path:
        return Path(self._folder.name, name)

    def load(self, block: str, *models: nn.Module) -> None:
        """Put a block's Parameters, in float32, into models, which share them; ranges of low-bit layers are found anew."""
        for name, device in self._device.items():
            if name.startswith(f"{block}."):
                value = torch.load(self._file(name), map_location=device, weights_only=True).float()
                parameter = nn.Parameter(value, requires_grad=False)
                for model in models:
                    _set(model, name, parameter)
        for module in (model.get_submodule(block) for model in models):
            layers = dict(low_bit_layers(module))
            for layer in layers.values():
                for name, p in layer._parameters.items():
                    if p is not None and p.is_meta:
                        setattr(layer, name, nn.Parameter(torch.empty_like(p, device=layer.weight.device), False))
            find_layer_ranges(layers, self.ranges)

    def free(self, block: str, model: nn.Module) -> None:
        """Take a block's Parameters out of a model again."""
        for name, p in list(model.get_submodule(block).named_parameters()):
            _set(model, f"{block}.{name}", nn.Parameter(torch.empty_like(p, device="meta"), False))

    def pack(self, block: str, student: nn.Module) -> None:
        """A trained block becomes packed, so that its float weights are free."""
        pack(student.get_submodule(block))

    @contextmanager
    def passing(self, model: nn.Module) -> Iterator[None]:
        """Whole passes of a float model, of which only one block is in memory at a time."""
        hooks = []
        for name in self.blocks:
            block = model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(lambda *_, name=name: self.load(name, model)))
            hooks.append(block.register_forward_hook(lambda *_, name=name: self.free(name, model)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, parameter)
