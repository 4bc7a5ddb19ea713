"""Which inputs a transformers' model may meet, read off its tokenizer and its config."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..algorithms.forms import Batch, InputMixture, SequenceForm
from ..algorithms.generators import Generator, PriorSource, Source, token_prior
from .data import (
    BATCH_SIZE,
    complete_batch,
    continue_sequences,
    fitting_length,
    openings,
    rare_tokens,
    special_tokens,
    tokenizer_or_none,
)


SHORTEST = 5  # tokens of the shortest sequence, special ones included
_LONGEST, _LONGEST_ANSWERED = 128, 32  # tokens of a sequence, and of one that an encoder-decoder model answers
# Our choices from here on, measured in docs/methods/zsaq_forms.md.
_PAIRS = 0.7  # share of the batches that are pairs, where a model reads pairs
_PADDED = 0.15  # share of the batches with sequences of different lengths
_BETWEEN = {
    "copy": 0.4,
    "shifted": 0.1,
    "shuffled": 0.1,
    "inserted": 0.1,
    "neighbours": 0.1,
    "part": 0.1,
    "follows": 0.05,
    "unrelated": 0.05,
}
_WITHIN = {"none": 0.7, "repeat": 0.2, "keys": 0.05, "list": 0.05}
_FAR = 4  # times shorter, or longer, is another kind of text
_PROBE = "a"  # a text of which the tokenizer makes a template
_TOGETHER = 4  # of these sequences have one form and length
_SAMPLED = 64  # tokens of a sequence that static ranges are measured on, at most


def writes_text(model: PreTrainedModel) -> bool:
    """Whether a model is a decoder that can write its own sequences."""
    return model.can_generate() and not model.config.is_encoder_decoder


def longest_sequence(model: PreTrainedModel, wanted: int | None = None) -> int:
    """Tokens of the longest sequence that a model is trained on.

    Args:
        model (`PreTrainedModel`): that is trained.
        wanted (`int`, *optional*): what a user asks for.

    Raises:
        ValueError: the model has no positions for what is wanted.
    """
    answers = model.config.is_encoder_decoder
    if wanted is None:
        return fitting_length(model, _LONGEST_ANSWERED if answers and model.can_generate() else _LONGEST)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = positions if positions is None or writes_text(model) else positions - 2  # some count from the padding id on
    if most is not None and wanted > most:
        raise ValueError(
            f"sequence_length={wanted!r} is longer than {type(model).__name__} has positions for; use at most {most}"
        )
    return wanted


def input_mixture(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, longest: int) -> InputMixture:
    """The forms of a model's inputs, and how much there is of each.

    Args:
        model (`PreTrainedModel`): whose inputs they are.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): what it puts around a text, and between two.
        longest (`int`): tokens of the longest sequence.
    """
    first, last, _, padding = special_tokens(model, tokenizer)
    pads = not model.config.is_encoder_decoder and tokenizer is not None and tokenizer.pad_token_id is not None
    pads = pads and (model.config.pad_token_id is not None or not hasattr(model, "score"))
    sizes = {"longest": longest, "padding": padding if pads else None, "left": pads and tokenizer.padding_side == "left"}
    shortest = longest if writes_text(model) else min(longest, max(SHORTEST, len(first) + len(last) + 1))
    single = SequenceForm(first, last, shortest, types=_types(model, tokenizer, first, last), **sizes)
    pair = pair_form(model, tokenizer, sizes) if not model.can_generate() else None
    if pair is None:
        return InputMixture((single,), (1.0,), _PADDED, inner=_WITHIN)
    return InputMixture((single, pair), (1.0 - _PAIRS, _PAIRS), _PADDED, _BETWEEN, _WITHIN)


def pair_form(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sizes: dict) -> SequenceForm | None:
    """How a tokenizer writes two texts as one input; None if it puts nothing between them, or there is no room."""
    if tokenizer is None:
        return None
    text = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(_PROBE, _PROBE)
    ids = encoded["input_ids"]
    starts = [i for i in range(len(ids) - len(text) + 1) if ids[i : i + len(text)] == text]
    if not text or len(starts) < 2 or starts[-1] == starts[0] + len(text):
        return None
    (one, two), size = (starts[0], starts[-1]), len(text)
    first, middle, last = tuple(ids[:one]), tuple(ids[one + size : two]), tuple(ids[two + size :])
    types = encoded.get("token_type_ids") if _reads_types(model) else None
    if types is not None:
        kept = [i for i in range(len(ids)) if not (one < i < one + size or two < i < two + size)]
        types = tuple(types[i] for i in kept)
    shortest = max(SHORTEST, len(first) + len(middle) + len(last) + 2)
    if shortest > sizes["longest"]:
        return None
    return SequenceForm(first, last, shortest, middle=middle, types=types, **sizes)


def _types(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, first: tuple[int, ...], last: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Token types of one text: those of its special tokens, and one for the text."""
    if tokenizer is None or not _reads_types(model):
        return None
    encoded = tokenizer(_PROBE)
    types = encoded.get("token_type_ids")
    if types is None or len(types) < len(first) + len(last) + 1:
        return None
    return (*types[: len(first) + 1], *types[len(types) - len(last) :])


def _reads_types(model: PreTrainedModel) -> bool:
    read = "token_type_ids" in inspect.signature(type(model).forward).parameters
    return read and getattr(model.config, "type_vocab_size", 0) > 1


def vocabulary_prior(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """How likely each token of a model's vocabulary is, see `token_prior`. Shapes: -> (V,) float32."""
    table = model.get_input_embeddings().weight
    rare = None if tokenizer is None else rare_tokens(tokenizer, len(table))
    return token_prior(table, special_tokens(model, tokenizer)[2], rare=rare)


def sampled_batches(model: PreTrainedModel, count: int, seed: int) -> Iterator[Batch]:
    """`count` sequences of at most 64 tokens: what static input ranges are measured on where there is no data.

    A causal language model writes them itself, sampled from its own distribution after what its texts begin with; other
    models get tokens from a prior over their vocabulary, in every form that they may read.
    """
    tokenizer, length = tokenizer_or_none(model), fitting_length(model, _SAMPLED)
    together = BATCH_SIZE if writes_text(model) else _TOGETHER
    sizes = [min(together, count - start) for start in range(0, count, together)]
    if writes_text(model):
        begun = openings(model, tokenizer, count, seed).split(sizes)
        for i, first in enumerate(begun):
            ids = continue_sequences(model, first, length, seed + i * BATCH_SIZE)
            yield complete_batch(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return
    prior = vocabulary_prior(model, tokenizer)
    forms = replace(input_mixture(model, tokenizer, length), padded=0.0)  # what stands on padding is nobody's input
    generator = make_inputs(model, PriorSource(prior), prior, forms, seed)
    for size in sizes:
        yield complete_batch(model, generator.sample(size))


def make_inputs(model: PreTrainedModel, source: Source, prior: Tensor, forms: InputMixture, seed: int) -> Generator:
    """A generator of a model's vocabulary."""
    return Generator(source, model.get_input_embeddings().weight, prior, forms, seed=seed)


def missing_forms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    longest: int,
    used_on: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """What inputs a model may meet that those it is trained on do not show, in words; [] if none.

    Args:
        model (`PreTrainedModel`): that is trained.
        tokenizer (`PreTrainedTokenizerBase`): its own.
        rows (`Sequence[Sequence[int]]`): token ids of some inputs, at least one, with or without padding.
        longest (`int`): tokens that an input is cut to.
        used_on (`Sequence[Sequence[int]]`, *optional*): inputs that it will be used on; None: whatever it may read.
    """
    mixture = input_mixture(model, tokenizer, longest_sequence(model))
    rows, known = (
        [[token for token in row if token != tokenizer.pad_token_id] for row in r] for r in (rows, used_on or [])
    )
    found, pairs = [], len(mixture.forms) > 1
    if pairs and used_on is not None:
        pairs = any(_is_pair(row, mixture.forms[1]) for row in known)
    if pairs and not any(_is_pair(row, mixture.forms[1]) for row in rows):
        found.append("no pairs of texts, which the model's tokenizer can write")
    lengths = sorted(map(len, rows))
    usual = min(longest, max(map(len, known)) if known else mixture.longest)
    if lengths[-1] * _FAR < usual:
        found.append(f"nothing longer than {lengths[-1]} tokens, of {usual} that the model may read")
    shortest = min(map(len, known)) if known else SHORTEST
    if lengths[0] > shortest * _FAR and not writes_text(model):
        found.append(f"nothing shorter than {lengths[0]} tokens")
    return found


def _is_pair(row: Sequence[int], form: SequenceForm) -> bool:
    inner, size = tuple(row[len(form.first) : len(row) - len(form.last)]), len(form.middle)
    return any(inner[i : i + size] == form.middle for i in range(len(inner) - size + 1))
