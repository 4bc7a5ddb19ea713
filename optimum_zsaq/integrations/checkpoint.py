"""What a safetensors header says of a low-bit checkpoint, and checking files against it.

The header of every shard carries, under "zsaq", a JSON object: the table of specs the tensors were written with, and a
CRC-32 of each tensor. Both are checked before anything is loaded, on the file itself, so that the check does not depend on
dtypes, devices or sharding.
"""

import json
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


HEADER_KEY = "zsaq"


class CheckpointError(ValueError):
    """A checkpoint whose files are damaged, or do not belong together."""


def tensor_crc(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, as safetensors stores them."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy())


def header(state_dict: dict[str, Tensor], table: dict[str, Any]) -> dict[str, str]:
    """The metadata that `verify_files` checks: the table of specs and the CRC-32 of every tensor."""
    crc = {name: tensor_crc(tensor) for name, tensor in state_dict.items()}
    return {HEADER_KEY: json.dumps({"table": table, "crc32": crc}, sort_keys=True)}


def verify_files(files: list[str], table: dict[str, Any], required: bool = True) -> set[str]:
    """Check every safetensors file of a checkpoint against its header, and the header against the config's table.

    Args:
        files (`list[str]`): all safetensors files of the checkpoint.
        table (`dict`): what the config says that was given to `header`.
        required (`bool`): refuse files without our header; False: check those that have one.

    Returns:
        `set[str]`: the model's names of the tensors that were saved and that no file has under this name. (transformers
        stores some models under other names; whether a tensor is lost is known when the model is loaded.)

    Raises:
        CheckpointError: a file is cut short or changed, was not written by this package, or belongs to another config or
            to other files.
    """
    first: dict[str, int] | None = None
    found: set[str] = set()
    for file in files:
        try:
            names, crc = _verify_file(Path(file), table, required)
        except (LookupError, TypeError, AttributeError, OverflowError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise _damaged(Path(file), f"its header cannot be read ({error!r})") from error
        if crc != (first := crc if first is None else first):
            raise CheckpointError(
                f"{file} belongs to another checkpoint than {files[0]}; take all files from the same checkpoint"
            )
        found |= names
    return set(first or ()) - found


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {why}; download or save the checkpoint again")


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin in a safetensors file, and its JSON header.

    Raises:
        CheckpointError: the file is shorter than its header says.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length or length == 0:
            raise _damaged(file, f"it has {size} bytes, fewer than its header alone should have")
        return 8 + length, json.loads(stream.read(length))


def _verify_file(file: Path, table: dict[str, Any], required: bool) -> tuple[set[str], dict[str, int]]:
    """The names in a file, and the checksums that its header has of all tensors, once they are found to agree."""
    start, tensors = read_header(file)
    metadata = tensors.pop("__metadata__", {})
    expected = start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if file.stat().st_size != expected:
        raise _damaged(file, f"it has {file.stat().st_size} bytes instead of {expected}")
    if HEADER_KEY not in metadata and not required:
        return set(tensors), {}
    if HEADER_KEY not in metadata:
        raise CheckpointError(
            f"{file} has no optimum-zsaq header, so its codes cannot be checked: it was written or changed by another "
            "program; save the model with save_pretrained again"
        )
    stored = json.loads(metadata[HEADER_KEY])
    if stored["table"] != table:
        raise CheckpointError(
            f"the config and the weights disagree: {file} was written with {_difference(stored['table'], table)}; "
            "take config.json and the safetensors files from the same checkpoint"
        )
    _verify_tensors(file, start, tensors, stored["crc32"])
    return set(tensors), stored["crc32"]


def _difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    return ", ".join(f"{key}={stored.get(key)}, the config says {wanted.get(key)}" for key in keys)


def _verify_tensors(file: Path, start: int, tensors: dict[str, Any], crc: dict[str, int]) -> None:
    renamed = set(crc.values())  # transformers may store a tensor under another name than the model's
    for name, found in _crcs(file, start, tensors):
        if found != crc.get(name, found) or found not in renamed:
            raise _damaged(file, f"the bytes of {name} are not those that were saved (CRC-32)")


def _crcs(file: Path, start: int, tensors: dict[str, Any]) -> Iterator[tuple[str, int]]:
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for name, entry in tensors.items():
                first, last = entry["data_offsets"]
                yield name, zlib.crc32(view[start + first : start + last])
        finally:
            view.release()


def is_read(parameter: Tensor) -> bool:
    """Whether transformers read a Parameter from the checkpoint; one that is new has values that were made up."""
    return getattr(parameter, "_is_hf_initialized", False)
