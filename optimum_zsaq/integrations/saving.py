"""`save_pretrained` and `push_to_hub` of a low-bit model: as transformers', with a model card, and whole or not at all.

transformers asks a quantizer for the state dict only, and `push_to_hub` puts its own card in place of a model's; so the
two methods are set on the model instance. Everything is written beside the target first and moved when it is complete.
"""

import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import PreTrainedModel
from transformers.utils.hub import hf_api

from ..layers import LowBitLayer
from .model_card import MARK, model_card


_METHODS = ("save_pretrained", "push_to_hub", "resize_token_embeddings")
_SAVE_OPTIONS = ("max_shard_size", "save_peft_format", "save_original_format", "distributed_checkpoint")
_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision", "tags")


def attach_saving(model: PreTrainedModel) -> None:
    """Give a low-bit model the methods below."""
    model.save_pretrained = partial(_save_pretrained, model)  # not a bound method: these do not survive a pickle
    model.push_to_hub = partial(_push_to_hub, model)
    model.resize_token_embeddings = partial(_resize_token_embeddings, model)


def detach_saving(model: PreTrainedModel) -> None:
    """Give a model transformers' methods back."""
    for name in _METHODS:
        vars(model).pop(name, None)


def _save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    variant: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`; the files appear in `save_directory` only when all of them are written.

    Raises:
        ValueError: a `state_dict` is given: what is saved of a low-bit model is always its own.
        NotADirectoryError: `save_directory` is a file.
        TypeError: an unknown option.
    """
    if state_dict is not None:
        raise ValueError("a low-bit model saves its own tensors; leave out state_dict=, or load it into the model first")
    options.pop("safe_serialization", None)  # what happens anyway; transformers ignores it too
    unknown = [name for name in options if name not in (*_SAVE_OPTIONS, *_HUB_OPTIONS)]
    if unknown:
        raise TypeError(f"save_pretrained has no option {unknown[0]!r}; it has {sorted((*_SAVE_OPTIONS, *_HUB_OPTIONS))}")
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give save_pretrained a folder")
    original = partial(type(self).save_pretrained, self, is_main_process=is_main_process, variant=variant, token=token)
    if _saves_otherwise(self, is_main_process, options):
        original(target, push_to_hub=push_to_hub, **options)
        return
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        original(staging, **options)
        names = [file.name for file in staging.iterdir()]
        _write_card(self, staging, target)
        _move(staging, target, variant)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if push_to_hub:
        _upload(self, target, names, hub.pop("repo_id", None) or target.name, token=token, **hub)


def _saves_otherwise(model: PreTrainedModel, is_main_process: bool, options: dict[str, Any]) -> bool:
    """Adapters, sharded checkpoints and all processes but the first are transformers' own business."""
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    return adapters or options.get("distributed_checkpoint", False) or not model.should_save_on_this_rank(is_main_process)


def _write_card(model: PreTrainedModel, staging: Path, target: Path) -> None:
    """A README.md that a person wrote stays."""
    there = target / "README.md"
    if not there.exists() or MARK in there.read_text(encoding="utf-8", errors="replace"):
        (staging / "README.md").write_text(model_card(model, target.name), encoding="utf-8")


def _push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
) -> Any:
    """As `PreTrainedModel.push_to_hub`; a card that a person wrote on the Hub stays, any other becomes ours."""
    hub = {"commit_message": commit_message, "commit_description": commit_description, "private": private}
    hub |= {"token": token, "revision": revision, "create_pr": create_pr, **({"tags": tags} if tags else {})}
    if getattr(self, "_hf_peft_config_loaded", False):
        return type(self).push_to_hub(self, repo_id, max_shard_size=max_shard_size, **hub)
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        return _upload(self, Path(folder), [file.name for file in Path(folder).iterdir()], repo_id, **hub)


def _resize_token_embeddings(
    self: PreTrainedModel, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs: Any
) -> Any:
    """As `PreTrainedModel.resize_token_embeddings`, but a table in low bits keeps its size.

    Raises:
        ValueError: another size is asked of such a table: transformers would resize its marker.
    """
    table = self.get_input_embeddings()
    if not isinstance(table, LowBitLayer):
        return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, **kwargs)
    multiple = pad_to_multiple_of or 1
    wanted = -(-(new_num_tokens or table.num_embeddings) // multiple) * multiple
    if wanted != table.num_embeddings:
        raise ValueError(
            f"a table in low bits of {table.num_embeddings} tokens cannot be resized to {wanted}; "
            "call model.dequantize(), resize, and quantize again"
        )
    return table


def _move(staging: Path, target: Path, variant: str | None) -> None:
    """Put complete files in place; weight files of an earlier save that are not replaced would mix in, so they go."""
    target.mkdir(exist_ok=True)
    new = {file.name for file in staging.iterdir()}
    for file in staging.iterdir():
        os.replace(file, target / file.name)
    part = re.escape(f".{variant}") if variant else ""
    weights = re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")
    for file in target.iterdir():
        if weights.fullmatch(file.name) and file.name not in new:
            file.unlink()


def _upload(
    model: PreTrainedModel,
    folder: Path,
    names: list[str],
    repo_id: str,
    token: str | bool | None = None,
    private: bool | None = None,
    tags: list[str] | str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
) -> Any:
    """Create the repository if need be and upload the named files of a folder in one commit, with a card."""
    repo_id = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    card = ModelCard(model_card(model, repo_id))
    theirs = _card_on_hub(repo_id, token)
    if theirs is not None and MARK not in theirs.text:
        card = theirs
    wanted = [tags] if isinstance(tags, str) else list(tags or [])
    have = list(card.data.tags or [])
    card.data.tags = have + [tag for tag in (*wanted, *(model.model_tags or []), "zsaq") if tag not in have]
    with tempfile.TemporaryDirectory() as upload:
        for name in names:
            shutil.copyfile(folder / name, Path(upload) / name)
        card.save(Path(upload) / "README.md")
        return model._upload_modified_files(
            upload,
            repo_id,
            files_timestamps={},
            token=token,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
        )


def _card_on_hub(repo_id: str, token: str | bool | None) -> ModelCard | None:
    try:
        return ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
