"""Which inputs a model may meet: one segment or two, their special tokens and types, lengths, padding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .relations import INNER_RELATIONS, PAIR_RELATIONS, check_shares


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class SequenceForm:
    """What a sequence looks like: its special tokens, its segments and its lengths.

    The length is drawn for a whole batch, the logarithm uniform.

    Args:
        first, last (`tuple[int, ...]`): ids it begins and ends with, such as [CLS] and [SEP].
        shortest, longest (`int`): its length, special tokens included.
        middle (`tuple[int, ...]`, *optional*): ids between two segments, such as [SEP]; None: there is one segment.
        types (`tuple[int, ...]`, *optional*): token types of each id of `first`, of the first segment, of each of `middle`,
            of the second segment and of each id of `last`; None: the model is given none.
        padding (`int`, *optional*): id that shorter sequences of a batch are filled up with; None: all have one length.
        left (`bool`): that is done before a sequence, not behind it.

    Raises:
        ValueError: no room between the special tokens, or lengths out of order; types of another number.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    shortest: int = 5
    longest: int = 64
    middle: tuple[int, ...] | None = None
    types: tuple[int, ...] | None = None
    padding: int | None = None
    left: bool = False

    def __post_init__(self):
        least = self.special + self.segments
        if not least <= self.shortest <= self.longest:
            raise ValueError(
                f"sequences of {self.shortest} to {self.longest} tokens are not possible with {self.special} special ones; "
                f"use lengths of at least {least}, the shorter first"
            )
        if self.types is not None and len(self.types) != least:
            raise ValueError(f"types={self.types!r} are {len(self.types)}; use {least}, one a special token and segment")

    @property
    def name(self) -> str:
        """What people call it."""
        return "single text" if self.middle is None else "pair"

    @property
    def segments(self) -> int:
        """How many texts it holds."""
        return 1 if self.middle is None else 2

    @property
    def special(self) -> int:
        """How many of the tokens are special."""
        return len(self.first) + len(self.middle or ()) + len(self.last)

    def draw_length(self, random: torch.Generator) -> int:
        """The length of one batch."""
        low, high = math.log(self.shortest), math.log(self.longest + 1)
        return min(self.longest, int(math.exp(low + (high - low) * torch.rand((), generator=random).item())))

    def draw_split(self, inner: int, random: torch.Generator) -> int:
        """Tokens of the first of two segments, between a quarter and three quarters of all."""
        share = 0.25 + 0.5 * torch.rand((), generator=random).item()
        return min(inner - 1, max(1, round(share * inner)))

    def finish(self, *segments: Tensor) -> Batch:
        """Put the special tokens around one or two segments.

        Shapes: (B, n), (B, m) -> input_ids (B, n + m + special) int64; with `types` token_type_ids of the same shape.
        """
        size, device = len(segments[0]), segments[0].device
        pieces: list[Tensor] = []

        def add(ids: tuple[int, ...]) -> None:
            pieces.extend(torch.full((size, 1), token, dtype=torch.int64, device=device) for token in ids)

        add(self.first)
        for i, segment in enumerate(segments):
            if i:
                add(self.middle)
            pieces.append(segment)
        add(self.last)
        batch = {"input_ids": torch.cat(pieces, dim=1)}
        if self.types is not None:
            kinds = [torch.full_like(piece, kind) for piece, kind in zip(pieces, self.types, strict=True)]
            batch["token_type_ids"] = torch.cat(kinds, dim=1)
        return batch

    def special_places(self, split: int, length: int) -> Tensor:
        """Where the special tokens are, with a first segment of `split` tokens. Shapes: -> (length,) bool."""
        found = torch.zeros(length, dtype=torch.bool)
        found[: len(self.first)] = found[length - len(self.last) :] = True
        if self.middle is not None:
            found[len(self.first) + split : len(self.first) + split + len(self.middle)] = True
        return found

    def shorten(self, batch: Batch, lengths: Tensor, tail: int) -> Batch:
        """Cut each sequence to a length of its own, out of the end of its last segment, and fill it up with padding.

        Shapes: batch of (B, L), lengths (B,) -> batch of (B, L), with attention_mask (B, L) int64. `tail`: tokens of the
        last segment, of which at least one stays.
        """
        total = batch["input_ids"].shape[1]
        lengths = lengths.clamp(min=total - tail + 1, max=total).to(batch["input_ids"].device)[:, None]
        places = torch.arange(total, device=lengths.device).expand(len(lengths), -1)
        if self.left:
            places = places - (total - lengths)
        own = (places >= 0) & (places < lengths)
        ends = len(self.last)
        source = torch.where(places >= lengths - ends, places + total - lengths, places).clamp(0, total - 1)
        found = {name: tensor.gather(1, source) * own for name, tensor in batch.items()}
        found["input_ids"] = torch.where(own, found["input_ids"], self.padding)
        return {**found, "attention_mask": own.long()}


@dataclass(frozen=True)
class InputMixture:
    """The forms that inputs have, and how they are related to themselves.

    Args:
        forms (`tuple[SequenceForm, ...]`): which there are.
        shares (`tuple[float, ...]`): how many of the batches have each.
        padded (`float`): share of the batches with sequences of different lengths, where a form has a padding id.
        pairs (`dict[str, float]`): shares of `PAIR_RELATIONS`, of sequences with two segments.
        inner (`dict[str, float]`): shares of `INNER_RELATIONS`, of texts.

    Raises:
        ValueError: shares that are none, relations that are unknown.
    """

    forms: tuple[SequenceForm, ...]
    shares: tuple[float, ...] = (1.0,)
    padded: float = 0.0
    pairs: Mapping[str, float] = field(default_factory=lambda: {"unrelated": 1.0})
    inner: Mapping[str, float] = field(default_factory=lambda: {"none": 1.0})

    def __post_init__(self):
        if not self.forms or len(self.forms) != len(self.shares) or min(self.shares) < 0.0 or not sum(self.shares) > 0.0:
            raise ValueError(f"{len(self.forms)} forms have shares={self.shares!r}; give each a number of at least 0")
        if not 0.0 <= self.padded <= 1.0:
            raise ValueError(f"padded={self.padded!r} is no share; use a number from 0 to 1")
        check_shares(self.pairs, PAIR_RELATIONS)
        check_shares(self.inner, INNER_RELATIONS)

    def draw_form(self, random: torch.Generator) -> SequenceForm:
        """The form of one batch."""
        weights = torch.tensor(self.shares, dtype=torch.float64)
        return self.forms[int(torch.multinomial(weights, 1, generator=random))]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(form.longest for form in self.forms)

    def describe(self) -> dict[str, Any]:
        """As JSON, for a recipe."""
        total = sum(self.shares)
        forms = {form.name: round(share / total, 3) for form, share in zip(self.forms, self.shares, strict=True) if share}
        found = {"forms": forms, "lengths": [min(f.shortest for f in self.forms), self.longest], "within": dict(self.inner)}
        if "pair" in forms:
            found["between"] = dict(self.pairs)
        if any(form.padding is not None for form in self.forms):
            found["padded"] = self.padded
        return found
