"""Calibration data: from what a user has (texts, dicts, a Dataset, a file), or from nothing, to batches."""

import hashlib
import inspect
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .tasks import load_tokenizer


Batch = dict[str, Tensor]
BATCH_SIZE = 16
_MAX_LENGTH = 128
OWN_DISTRIBUTION = {  # of `generate`, whatever a model's generation_config says
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
_OWN_SCRIPT = 0.05  # share of the vocabulary
_ALPHABET = 0.2  # share of the vocabulary
_MARKS = ".,:;!?'\"-()"
_BRACKETS = re.compile(r"[\[<].*[\]>]")
_READERS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


def read_file(path: str | Path) -> Any:
    """A `datasets.Dataset` of a TSV, CSV, JSON(L), parquet or plain text file; each line of a text file is a row "text".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind of file.
    """
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix not in _READERS:
        raise ValueError(f"{path.name} is of no kind we read; use a file that ends with one of {sorted(_READERS)}")
    options: dict[str, Any] = {}
    if path.suffix == ".tsv":
        options = {"sep": "\t", "quoting": 3}
    disable_progress_bar()
    if not path.read_bytes()[:1]:
        raise ValueError(f"{path} is empty and holds no text; give a file with at least one line")
    return load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)


def read_texts(data: Any, limit: int) -> list[dict[str, str]]:
    """The first `limit` samples of what a user gives as data, each {"text": ..., "text_pair": ...}.

    Args:
        data: a list of strings, a list of dicts with "text" (and "text_pair"), a `datasets.Dataset` with these columns
            (or with "sentence"), or the path of a file that holds one.
        limit (`int`): samples to take.

    Raises:
        ValueError: no samples, or samples without text.
        TypeError: data of another type.
    """
    if isinstance(data, str | Path):
        data = read_file(data)
    if isinstance(getattr(data, "column_names", None), list) and hasattr(data, "select"):
        data = list(data.select(range(min(limit, len(data)))))
    if not isinstance(data, list | tuple):
        raise TypeError(
            f"calibration_data is a {type(data).__name__}; use a list of strings, a list of dicts with 'text', "
            "a datasets.Dataset or the path of a file"
        )
    samples = [_sample(sample) for sample in data[:limit]]
    samples = [sample for sample in samples if sample["text"].strip()]
    if not samples:
        raise ValueError("calibration_data holds no text; give at least one sentence")
    return samples


def _sample(sample: Any) -> dict[str, str]:
    if isinstance(sample, str):
        return {"text": sample}
    if isinstance(sample, dict):
        text = sample.get("text", sample.get("sentence"))
        pair = sample.get("text_pair")
        if isinstance(text, str):
            return {"text": text, **({"text_pair": pair} if isinstance(pair, str) else {})}
    raise ValueError(f"calibration_data has a sample without text: {sample!r:.100}; use strings or dicts with 'text'")


def describe_data(data: Any, limit: int) -> dict[str, Any]:
    """Kind, count and hash of calibration data, never its text."""
    samples = read_texts(data, limit)
    digest = hashlib.sha256(json.dumps(samples, ensure_ascii=False).encode()).hexdigest()
    kind = "file" if isinstance(data, str | Path) else "dataset" if hasattr(data, "column_names") else "list"
    return {"kind": kind, "count": len(samples), "sha256": digest}


def find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint that a model was loaded from, with a padding token.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = load_tokenizer(model.config.name_or_path)
    except ValueError as error:
        raise ValueError(f"{error}, or call optimum_zsaq.calibrate(model, batches) with token ids") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_or_none(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, with a padding token; None if there is none."""
    try:
        return find_tokenizer(model)
    except ValueError:
        return None


def text_batches(
    model: PreTrainedModel, data: Any, limit: int, size: int = BATCH_SIZE, length: int = _MAX_LENGTH
) -> Iterator[Batch]:
    """Texts as batches of at most `size` sequences of at most `length` tokens, on the model's device."""
    tokenizer = find_tokenizer(model)
    samples = read_texts(data, limit)
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        for paired in (False, True):  # a text without a partner must not get the separator of one
            same = [sample for sample in part if ("text_pair" in sample) is paired]
            if same:
                batch = tokenizer(
                    [sample["text"] for sample in same],
                    [sample["text_pair"] for sample in same] if paired else None,
                    padding=True,
                    truncation=True,
                    max_length=fitting_length(model, length),
                    return_tensors="pt",
                )
                yield complete_batch(model, dict(batch))


def packed_batches(model: PreTrainedModel, samples: Sequence[Mapping[str, str]], size: int, length: int) -> Iterator[Batch]:
    """Texts one behind the other, cut into sequences of `length` tokens, in batches of at most `size`.

    The end-of-text token stands between two texts, and what the tokenizer puts before a text before each sequence. The last
    tokens, which fill no sequence, are left out, unless they are all.
    """
    tokenizer = find_tokenizer(model)
    texts = [text for sample in samples for text in sample.values()]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in (*text, *end)])
    first = torch.tensor(special_tokens(model, tokenizer)[0], dtype=torch.int64)
    width = min(length - len(first), len(ids))
    rows = ids[: len(ids) // width * width].view(-1, width)
    rows = torch.cat([first.expand(len(rows), -1), rows], dim=1)
    for part in rows.split(size):
        yield complete_batch(model, {"input_ids": part, "attention_mask": torch.ones_like(part)})


def fitting_length(model: PreTrainedModel, length: int) -> int:
    """A sequence length that the model has positions for; two are spared, because some count from the padding id on."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if positions is None else min(length, positions - 2)


def special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], tuple[int, ...], list[int], int]:
    """Ids that a sequence begins with, those it ends with, all special ids, and the padding id."""
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer is None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        special = {token for name in names for token in _token_ids(model, name)}
        first, last = (), tuple(_token_ids(model, "eos_token_id")[:1]) if model.config.is_encoder_decoder else ()
        padding = next(iter(_token_ids(model, "pad_token_id")), 0)
    else:
        special, padding = set(tokenizer.all_special_ids), tokenizer.pad_token_id or 0
        written = tokenizer("")["input_ids"]  # what the tokenizer puts around a text
        half = (len(written) + 1) // 2
        first, last = tuple(written[:half]), tuple(written[half:])
        if written == [tokenizer.eos_token_id]:  # T5 and others only end their texts
            first, last = (), tuple(written)
    return first, last, sorted(token for token in special if token < size), padding


def plain_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids of all tokens that are not special, (n,) int64."""
    size = model.get_input_embeddings().weight.shape[0]
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    if tokenizer is None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        special = {token for name in names for token in _token_ids(model, name)}
    return torch.tensor([token for token in range(size) if token not in special])


def rare_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Tokens that text hardly holds, although they stand before its words in many vocabularies.

    These are letters of a script that less than a twentieth of the vocabulary is written in, bytes that are no letter on
    their own, names in brackets, such as [unused7], and, where words are longer, the alphabet that others are spelt with.

    Shapes: -> (size,) bool.
    """
    texts = [text.removeprefix("##").strip() for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
    scripts = [_script(text) for text in texts]
    counts = Counter(scripts)
    rare = [counts[script] < _OWN_SCRIPT * len(texts) for script in scripts]
    rare = [strange or bool(_BRACKETS.fullmatch(text)) for strange, text in zip(rare, texts, strict=True)]
    rare = [r and script != "" for r, script in zip(rare, scripts, strict=True)]
    if sum(len(text) == 1 for text in texts) < _ALPHABET * len(texts):  # else its words are single characters
        rare = [r or (len(text) == 1 and text not in _MARKS) for r, text in zip(rare, texts, strict=True)]
    return torch.tensor([*rare[:size], *[True] * (size - len(rare))])


def _script(text: str) -> str:
    """The script of the first letter, such as "LATIN"; "" for ASCII without letters, "other" for what is none."""
    if _BRACKETS.fullmatch(text) or "\ufffd" in text:
        return "other"
    letter = next((char for char in text if char.isalpha()), None)
    if letter is None:
        return "" if text.isascii() else "other"
    return unicodedata.name(letter, "other").split()[0]


def _token_ids(model: PreTrainedModel, name: str) -> list[int]:
    """A config's token id, or ids: some models have several end tokens."""
    ids = getattr(model.config, name, None)
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def openings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, seed: int) -> Tensor:
    """What a decoder's text begins with: what its tokenizer puts first, else one random token, uniform over the plain ones.

    Shapes: -> (count, number of tokens) int64.
    """
    first = () if tokenizer is None else special_tokens(model, tokenizer)[0]
    if first:
        return torch.tensor(first).repeat(count, 1)
    allowed, random = plain_tokens(model, tokenizer), torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (count, 1), generator=random)]


def continue_sequences(model: PreTrainedModel, ids: Tensor, length: int, seed: int) -> Tensor:
    """Extend sequences with samples from the model's own distribution; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = length - ids.shape[1]
        return model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            **OWN_DISTRIBUTION,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )


def complete_batch(model: PreTrainedModel, batch: Batch) -> Batch:
    """A batch on the model's device, with the decoder's inputs for an encoder-decoder model: the same tokens, shifted."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        start = model.config.decoder_start_token_id
        ids = batch["input_ids"]
        first = torch.full_like(ids[:, :1], 0 if start is None else start)
        batch["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
    return batch


def uncached_batch(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """`complete_batch` for a model that shall keep no cache of keys and values: parts of it may run more than once."""
    cached = "use_cache" in inspect.signature(type(model).forward).parameters
    return {**complete_batch(model, batch), **({"use_cache": False} if cached else {})}
