"""What a measurement starts from: a model that fits its task, its tokenizer, and samples in padded batches.

A sample is a dict of token ids, so that models without a tokenizer can be measured too. Never loads a model whose
weights the checkpoint lacks; does not read data files (`commands/evaluate.py` does).
"""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import tqdm


TASKS = {
    "text-classification": AutoModelForSequenceClassification,
    "text-regression": AutoModelForSequenceClassification,
    "text-generation": AutoModelForCausalLM,
    "text2text-generation": AutoModelForSeq2SeqLM,
}
Sample = dict[str, list[int]]


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, task: str) -> PreTrainedModel:
    """A model for a task, float or low-bit; a float16 checkpoint is loaded as float32 (CPUs are slow at float16).

    Raises:
        ValueError: an unknown task; a model that is not one of this task, or whose checkpoint lacks weights of it.
        FileNotFoundError: a folder without config.json, or no folder at all.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; use one of {sorted(TASKS)}")
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is no model folder: it has no config.json; give one that save_pretrained wrote"
        )
    if not folder.exists() and str(path).count("/") != 1:
        raise FileNotFoundError(
            f"there is no model folder {path}; give a folder that save_pretrained wrote, or a Hub id"
        )
    config = AutoConfig.from_pretrained(path)
    if type(config) not in TASKS[task]._model_mapping:
        raise ValueError(f"{path} is a {config.model_type} model, which cannot do {task}; {_hint(config)}")
    dtype = torch.float32 if config.dtype == torch.float16 else "auto"
    model, info = TASKS[task].from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{path} has no weights for {task}: it lacks {sorted(info['missing_keys'])[:3]}; {_hint(config)}"
        )
    _check_outputs(path, task, model)
    return model


def _hint(config: Any) -> str:
    return f"use the task that it was trained for (it was saved as {', '.join(config.architectures or ['?'])})"


def _check_outputs(path: str | Path, task: str, model: PreTrainedModel) -> None:
    if task in ("text-classification", "text-regression") and (task == "text-regression") != (
        model.config.num_labels == 1
    ):
        other = "text-classification" if task == "text-regression" else "text-regression"
        raise ValueError(f"{path} has {model.config.num_labels} output(s), which is not {task}; use --task {other}")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: there is none. (transformers makes an empty one of a folder without tokenizer files.)
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_no_tokenizer(path)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(_no_tokenizer(path))
    return tokenizer


def _no_tokenizer(path: str | Path) -> str:
    return f"no tokenizer was found at {str(path)!r}; save it there with tokenizer.save_pretrained({str(path)!r})"


# Text to samples -----------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[Sample]:
    """Texts, or pairs of texts, as samples, with the tokenizer's special tokens; cut at `max_length` tokens."""
    if not texts:
        return []
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    encoded = tokenizer(list(texts), None if pairs is None else list(pairs), verbose=False, **limit)
    return [{name: list(values[i]) for name, values in encoded.items()} for i in range(len(texts))]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> list[int]:
    """A long text as token ids; special tokens where the tokenizer puts them, once for the whole text."""
    return tokenizer(text, verbose=False)["input_ids"][:max_tokens]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Texts that a text2text model shall write, as token ids."""
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    return tokenizer(text_target=list(texts), verbose=False, **limit)["input_ids"]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor: n rows -> (n, longest) int64, filled with `value` on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def batches(
    model: PreTrainedModel, samples: Sequence[Sample], batch_size: int, title: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of samples, the longest first: (places in `samples`, padded tensors on the model's device).

    Inputs that `forward` does not name, as DistilBERT's token types, are left out; a wrapper that names none gets all.
    """
    accepted = inspect.signature(model.forward).parameters
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        places = order[start : start + batch_size]
        masked = [{"attention_mask": [1] * len(samples[i]["input_ids"]), **samples[i]} for i in places]
        padding = {"input_ids": model.config.pad_token_id or 0}
        names = [name for name in masked[0] if name in accepted or "input_ids" not in accepted]
        yield places, {n: pad([s[n] for s in masked], padding.get(n, 0)).to(model.device) for n in names}
