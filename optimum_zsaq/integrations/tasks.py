"""Which transformers class a task or a checkpoint is loaded with."""

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


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
