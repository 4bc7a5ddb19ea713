"""Sequences that a language model writes for zero-shot training, in the vocabulary of the model that is to be trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..algorithms.forms import SequenceForm
from ..algorithms.generators import PriorSource, Source, WrittenSource
from .data import OWN_DISTRIBUTION, continue_sequences, openings
from .tasks import load_tokenizer


Watch = Callable[[int], Any]
_WRITTEN_TOGETHER = 64  # sequences
_MORE = 1.25  # tokens of the generator for a token of the teacher, when their vocabularies differ
_READERS = ("MaskedLM", "Classification", "QuestionAnswering")  # transformers loads some of these as if they wrote
_LENGTHS = 8  # of the inputs of an encoder-decoder model, between the shortest and the longest


def write_continuations(teacher: PreTrainedModel, form: SequenceForm, count: int, seed: int, watch: Watch) -> WrittenSource:
    """What a decoder writes after what its texts begin with (see `openings`), sampled from its own distribution."""
    begun = openings(teacher, _tokenizer(teacher), count, seed)
    special = len(form.first) if tuple(begun[0].tolist()) == form.first else 0  # which `form` puts before what is drawn
    return WrittenSource(_sampled(teacher, begun, form.longest - form.special + special, seed, watch)[:, special:])


def write_texts(
    generator: PreTrainedModel | str | Path,
    teacher: PreTrainedModel,
    form: SequenceForm,
    count: int,
    seed: int,
    watch: Watch,
) -> WrittenSource:
    """What another language model writes, as text that the teacher's tokenizer reads.

    Args:
        generator: a causal language model: itself, its path or its Hub id, with a tokenizer beside it.
        teacher (`PreTrainedModel`): whose vocabulary is wanted.
        form (`SequenceForm`): the longest sequence.
        count (`int`): sequences to write.
        seed (`int`): of the sampling.
        watch (`Callable`): told how many more were written.

    Raises:
        ValueError: no causal language model there; one of the two has no tokenizer while the vocabularies differ; it has
            too few positions, or its text is too short for the teacher.
    """
    writer = load_generator(generator)
    own, other = _tokenizer(writer), _tokenizer(teacher)
    width = form.longest - form.special
    if own is None or other is None:
        sizes = [m.get_input_embeddings().weight.shape[0] for m in (writer, teacher)]
        if sizes[0] != sizes[1]:
            missing = writer if own is None else teacher
            raise ValueError(
                f"the generator has {sizes[0]} tokens and the model {sizes[1]}, and there is no tokenizer beside "
                f"{missing.config.name_or_path!r} to translate with; save it there, or use generator='noise'"
            )
        return WrittenSource(_sampled(writer, openings(writer, own, count, seed), width, seed, watch))
    ids = _sampled(writer, openings(writer, own, count, seed), int(_MORE * width) + 1, seed, watch)
    texts = own.batch_decode(ids, skip_special_tokens=True)
    rows = _rows(other(texts, add_special_tokens=False, verbose=False)["input_ids"], width)
    if not rows:
        raise ValueError(
            f"{count} texts of the generator are fewer than {width} tokens for the model's tokenizer; "
            "use another generator or a smaller sequence_length"
        )
    return WrittenSource(torch.tensor(rows))


def answer_inputs(
    teacher: PreTrainedModel, prior: Tensor, form: SequenceForm, count: int, seed: int, watch: Watch
) -> "AnsweredSource":
    """Sequences from a prior, and what an encoder-decoder model answers to them, sampled from its own distribution."""
    random = torch.Generator().manual_seed(seed)
    source, groups = PriorSource(prior), {}
    lengths = torch.linspace(form.shortest, form.longest, min(_LENGTHS, form.longest - form.shortest + 1)).int().tolist()
    for i, length in enumerate(lengths):
        ids = source.draw(-(-count // len(lengths)), length - form.special, random)["input_ids"]
        answers = [
            _answers(teacher, form.finish(part)["input_ids"], form.longest, seed + i, watch)
            for part in ids.split(_WRITTEN_TOGETHER)
        ]
        padding = teacher.generation_config.pad_token_id or 0
        width = max(answer.shape[1] for answer in answers)
        answers = torch.cat([torch.nn.functional.pad(a, (0, width - a.shape[1]), value=padding) for a in answers])
        groups[length - form.special] = WrittenSource(ids, answers, _until_end(teacher, answers))
    return AnsweredSource(groups)


class AnsweredSource:
    """Inputs of several lengths and the answers to them. Args: groups (`dict[int, WrittenSource]`): by length."""

    def __init__(self, groups: dict[int, WrittenSource]):
        self.groups = groups

    def draw(self, size: int, length: int, random: torch.Generator) -> dict[str, Tensor]:
        """See `Source`; of the lengths there are, the nearest."""
        nearest = min(self.groups, key=lambda known: abs(known - length))
        return self.groups[nearest].draw(size, nearest, random)


def load_generator(generator: PreTrainedModel | str | Path) -> PreTrainedModel:
    """A causal language model.

    Raises:
        ValueError: there is none.
    """
    if isinstance(generator, PreTrainedModel):
        if not generator.can_generate() or generator.config.is_encoder_decoder:
            raise ValueError(
                f"generator is a {type(generator).__name__}, which writes no text; use a causal language model"
            )
        return generator
    try:
        model, info = AutoModelForCausalLM.from_pretrained(generator, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no causal language model at generator={str(generator)!r}; "
            "give a folder or Hub id of one, 'noise' or 'teacher'"
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"generator={str(generator)!r} is no causal language model: it has no weights for "
            f"{sorted(info['missing_keys'])[:3]}; give one, or use 'noise'"
        )
    readers = [name for name in model.config.architectures or [] if name.endswith(_READERS)]
    if readers:
        raise ValueError(
            f"generator={str(generator)!r} holds a {readers[0]}, which writes no text; give a causal language model, "
            "or use 'noise'"
        )
    if model.dtype == torch.float16 and model.device.type == "cpu":  # which processors do not multiply
        model.to(torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32)
    return model.eval()


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(model.config.name_or_path)
    except ValueError:
        return None


def _sampled(model: PreTrainedModel, first: Tensor, length: int, seed: int, watch: Watch) -> Tensor:
    """Shapes: first (N, k) -> (N, length) int64 on the CPU."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{length} tokens are to be written and {type(model).__name__} has {positions} positions; "
            "use a smaller sequence_length"
        )
    parts = []
    for i, part in enumerate(first.split(_WRITTEN_TOGETHER)):
        parts.append(continue_sequences(model, part, length, seed + i).cpu())
        watch(len(part))
    return torch.cat(parts)


def _rows(texts: list[list[int]], width: int) -> list[list[int]]:
    """Rows of one width: the beginnings of long texts, and the short ones put together."""
    rows = [ids[:width] for ids in texts if len(ids) >= width]
    rest = [token for ids in texts if len(ids) < width for token in ids]
    return rows + [rest[i : i + width] for i in range(0, len(rest) - width + 1, width)]


def _answers(teacher: PreTrainedModel, ids: Tensor, longest: int, seed: int, watch: Watch) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        answers = teacher.generate(ids.to(teacher.device), max_new_tokens=longest, **OWN_DISTRIBUTION)
    watch(len(ids))
    return answers.cpu()


def _until_end(teacher: PreTrainedModel, answers: Tensor) -> Tensor:
    """1 for each token that the decoder reads before it is done, 0 behind. Shapes: (B, L) -> (B, L) int64."""
    ends = teacher.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ended = torch.isin(answers[:, 1:], torch.tensor(ends, dtype=answers.dtype)).cumsum(dim=1)
    return torch.cat([torch.ones_like(answers[:, :1]), (ended == 0).long()], dim=1)


def describe_generator(generator: Any) -> str:
    """The name of a generator, as a recipe stores it: a Hub id, of a path the last folder, of a `Source` its class."""
    if isinstance(generator, PreTrainedModel):
        generator = generator.config.name_or_path or type(generator).__name__
    if isinstance(generator, Source):
        return type(generator).__name__
    path = Path(str(generator))
    hub_id = not path.is_dir() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(generator))
    return str(generator) if hub_id else path.resolve().name
