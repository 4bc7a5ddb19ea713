"""Which transformers class and tokenizer a task or a checkpoint is loaded with."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text-regression": "AutoModelForSequenceClassification",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
}

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "*.codes", "tekken.json")


def model_class(config: PreTrainedConfig, task: str | None = None) -> type:
    """The class for a task; without a task, the architecture that the checkpoint was saved with.

    Raises:
        ValueError: an unknown task; no task, and the config names no architecture that transformers has.
    """
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; use one of {sorted(TASKS)}")
        return getattr(transformers, TASKS[task])
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"the checkpoint's config names no architecture that transformers has (architectures={config.architectures!r}); "
        f"name its task, one of {sorted(TASKS)}"
    )


def load_config(model: str) -> PreTrainedConfig:
    """The config of a checkpoint, by path or Hub id.

    Raises:
        ValueError: there is no checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"there is no model at {model!r}: give a folder with config.json and model.safetensors, or a Hub id"
        ) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: there is none. (transformers makes an empty one of a folder without tokenizer files.)
    """
    folder = Path(path)
    if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ValueError(_no_tokenizer(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_no_tokenizer(path)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(_no_tokenizer(path))
    return tokenizer


def _no_tokenizer(path: str | Path) -> str:
    return f"no tokenizer was found at {str(path)!r}; save the model's tokenizer there"
