"""Where zero-shot training gets its inputs from: sequences from a source, and a network that makes them harder.

A source gives token ids: `PriorSource` draws them from a guess of how likely each token is, `WrittenSource` from sequences
that a language model wrote. `Generator` makes inputs of them, of the forms that the model may meet and related to
themselves (`forms.py`, `relations.py`), and, where training asks for it, pushes them to where teacher and student differ.
Its parameters and its random numbers are its state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .forms import Batch, InputMixture, SequenceForm
from .relations import draw_relations, relate, relate_within


_SMALLEST_NORM = 0.7
_HEAD = 10.0
_NARROWEST = 3.0  # a token that is one standard deviation more like a topic is up to exp(3) times as likely: our choice
_ALWAYS = 1e4  # a logit that beats every other
_KEPT = 2.0  # the generator starts with exp(2) : 1 for a token as it came against all candidates together, our choice


def token_prior(table: Tensor, special: list[int], exponent: float = 0.7, rare: Tensor | None = None) -> Tensor:
    """How likely each token is in text, guessed from the vocabulary alone.

    Vocabularies are ordered roughly by frequency, so the r-th token has p ~ 1 / (r + 10)^exponent. Special tokens have
    none, nor has a token whose embedding is shorter than 0.7 of the median: training hardly touched it. Zipf's law has
    exponent 1; a flatter prior, with more of the words that mean something, is our choice.

    Args:
        table (`Tensor`): (V, D), input embeddings.
        special (`list[int]`): ids that text does not hold.
        exponent (`float`): how steep the prior is.
        rare (`Tensor`, *optional*): (V,) bool, tokens that come after all others, wherever they stand.

    Shapes: -> (V,) float32, sums to 1.

    Raises:
        ValueError: every token is special.
    """
    norms = torch.linalg.vector_norm(table.detach().float(), dim=1)
    plain = torch.ones(len(norms), dtype=torch.bool, device=norms.device)
    plain[special] = False
    if not plain.any():
        raise ValueError(f"all {len(plain)} tokens of the vocabulary are special, so there is nothing to write inputs with")
    plain &= norms >= _SMALLEST_NORM * norms[plain].median()
    rank = torch.cumsum(plain, dim=0) - 1
    if rare is not None:
        rare = rare.to(plain.device)
        usual = plain & ~rare
        last = usual.sum() + torch.cumsum(plain & rare, dim=0) - 1
        rank = torch.where(rare, last, torch.cumsum(usual, dim=0) - 1)
    prior = plain / (rank.clamp(min=0).float() + _HEAD) ** exponent
    return prior / prior.sum()


@runtime_checkable
class Source(Protocol):
    """Draws sequences without special tokens."""

    def draw(self, size: int, length: int, random: torch.Generator) -> Batch:
        """Shapes: -> input_ids (size, length) int64, on the CPU; and what else belongs to these sequences."""


class PriorSource:
    """Every token on its own, from a prior. Args: prior (`Tensor`): (V,), see `token_prior`."""

    def __init__(self, prior: Tensor):
        self.prior = prior.cpu()

    def draw(self, size: int, length: int, random: torch.Generator) -> Batch:
        """See `Source`."""
        drawn = torch.multinomial(self.prior, size * length, replacement=True, generator=random)
        return {"input_ids": drawn.view(size, length)}


class WrittenSource:
    """Pieces of sequences that were written before.

    Args:
        written (`Tensor`): (N, W) int64, token ids; a shorter piece begins anywhere in a row.
        decoder (`Tensor`, *optional*): (N, M) int64, what an encoder-decoder model answers to each row; rows are then
            given whole.
        decoder_mask (`Tensor`, *optional*): (N, M), 0 behind the end of an answer.

    Raises:
        ValueError: nothing was written.
    """

    def __init__(self, written: Tensor, decoder: Tensor | None = None, decoder_mask: Tensor | None = None):
        if not written.numel():
            raise ValueError("no sequence was written, so there is nothing to train on; check the generator")
        self.written, self.decoder, self.decoder_mask = written, decoder, decoder_mask

    def draw(self, size: int, length: int, random: torch.Generator) -> Batch:
        """See `Source`; an encoder-decoder model's batch has its decoder's inputs too."""
        rows = torch.randint(len(self.written), (size,), generator=random)
        if self.decoder is not None:
            answers = {"decoder_input_ids": self.decoder[rows], "decoder_attention_mask": self.decoder_mask[rows]}
            return {"input_ids": self.written[rows], **answers}
        starts = torch.randint(self.written.shape[1] - length + 1, (size, 1), generator=random)
        return {"input_ids": self.written[rows].gather(1, starts + torch.arange(length))}

    def part(self, rows: slice) -> "WrittenSource":
        """Some of what was written."""
        answers = (None if t is None else t[rows] for t in (self.decoder, self.decoder_mask))
        return WrittenSource(self.written[rows], *answers)


@dataclass(frozen=True)
class SoftBatch:
    """A batch that gradients reach the generator through.

    Shapes: batch of (B, L) as it is read; written (B, L) int64, as the source gave it; candidates (C,) int64; choice
    (B, L, 1 + C) float32: exactly one-hot, first the token as it was written, then the candidates, with the gradient
    of the probabilities; entropy () float32: how undecided the generator is, 1 where it starts, 0 if it never doubts.
    """

    batch: Batch
    written: Tensor
    candidates: Tensor
    choice: Tensor
    entropy: Tensor

    def embed(self, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What a model reads: rows of its own table, with gradients to the choice.

        Args:
            embed (`Callable`): the model's input embedding, (...) int64 -> (..., D).

        Shapes: -> (B, L, D), in the embedding's dtype.
        """
        written, rows = embed(self.written), embed(self.candidates)
        choice = self.choice.to(rows.dtype)
        return choice[..., :1] * written + choice[..., 1:] @ rows

    def part(self, rows: slice) -> "SoftBatch":
        """Some of its sequences."""
        batch = {name: tensor[rows] for name, tensor in self.batch.items()}
        return SoftBatch(batch, self.written[rows], self.candidates, self.choice[rows], self.entropy)


class Generator(nn.Module):
    """Inputs made of a source's sequences, and a small network that replaces some of their tokens.

    For each token the network turns noise (of the sequence and of the token) and the token's embedding into a vector h. The
    token is kept with weight exp(2) * C, and replaced by candidate c, of C that are drawn from the prior for each batch,
    with weight exp(h . E_c), where E are the teacher's embeddings, scaled to unit variance. The last layer starts at zero:
    one token in nine is replaced by one from the prior. Until it is trained, `sample` gives what the source gives.

    Args:
        source (`Source`): where sequences come from.
        table (`Tensor`): (V, D), the teacher's input embeddings; not trained, not part of the state.
        prior (`Tensor`): (V,), see `token_prior`.
        forms (`InputMixture` or `SequenceForm`): special tokens, segments, lengths and relations; of one form alone texts
            are as the source gives them, and second segments unrelated.
        candidates (`int`): tokens that may come in. Our choice: a step costs no product with the whole vocabulary.
        width (`int`): of noise and network. Our choice.
        seed (`int`): of the start values and of all that is drawn.
    """

    def __init__(
        self,
        source: Source,
        table: Tensor,
        prior: Tensor,
        forms: InputMixture | SequenceForm,
        candidates: int = 1024,
        width: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        self.source, self.candidates, self.width = source, candidates, width
        self.forms = InputMixture((forms,)) if isinstance(forms, SequenceForm) else forms
        self._table, self.prior = table.detach(), prior.cpu()
        self._spread = table.detach().float().std().clamp(min=1e-6)
        self.random = torch.Generator().manual_seed(seed)
        columns = table.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(2 * width + columns, 4 * width), nn.GELU(), nn.Linear(4 * width, columns, bias=False)
            )
        nn.init.zeros_(self.network[-1].weight)
        self.network.to(table.device)

    @torch.no_grad()
    def sample(self, size: int) -> Batch:
        """`size` sequences of one form. Shapes: -> input_ids (size, L) int64, and what else belongs to them."""
        if not self.network[-1].weight.any():
            return self._draw(size)[0]
        return self.soft_sample(size).batch

    def soft_sample(self, size: int) -> SoftBatch:
        """`size` sequences with gradients, by Gumbel's trick, straight-through."""
        batch, fixed = self._draw(size)
        candidates, logits = self._logits(batch["input_ids"], fixed)
        uniform = torch.rand(logits.shape, generator=self.random).clamp_(min=1e-20).to(logits.device)
        soft = (logits - torch.log(-torch.log(uniform))).softmax(dim=-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
        written, chosen = batch["input_ids"], hard.argmax(dim=-1)
        ids = torch.where(chosen > 0, candidates[chosen - 1], written)
        choice = hard + (soft - soft.detach())
        return SoftBatch({**batch, "input_ids": ids}, written, candidates, choice, self._entropy(logits, fixed))

    def another(self, source: Source, forms: InputMixture, seed: int) -> "Generator":
        """An untrained generator of the same vocabulary."""
        return Generator(source, self._table, self.prior, forms, self.candidates, self.width, seed)

    def _draw(self, size: int) -> tuple[Batch, Tensor]:
        """A batch, and where its tokens are fixed: special or padding. Shapes: -> (size, L) bool."""
        form = self.forms.draw_form(self.random)
        length = form.draw_length(self.random)
        drawn = self.source.draw(size, length - form.special, self.random)
        answers = {name: tensor.to(self._table.device) for name, tensor in drawn.items() if name != "input_ids"}
        ids = drawn["input_ids"]
        if not answers:  # an answer belongs to what it was given to
            relations = draw_relations(self.forms.inner, size, self.random)
            ids = relate_within(ids.to(self._table.device), relations, self.random, self._on_topic)
        segments = self._segments(form, ids.to(self._table.device))
        batch = form.finish(*segments)
        length = batch["input_ids"].shape[1]
        fixed = form.special_places(segments[0].shape[1], length).to(self._table.device).expand(size, -1)
        if form.padding is not None and not answers and torch.rand((), generator=self.random) < self.forms.padded:
            lengths = torch.tensor([min(length, form.draw_length(self.random)) for _ in range(size)])
            batch = form.shorten(batch, lengths, segments[-1].shape[1])
            ends = form.shorten({"input_ids": fixed.long()}, lengths, segments[-1].shape[1])
            fixed = (ends["input_ids"] == 1) | (ends["attention_mask"] == 0)
        return {**batch, **answers}, fixed

    def _segments(self, form: SequenceForm, ids: Tensor) -> list[Tensor]:
        """The texts of each sequence. Shapes: ids (B, n) -> (B, n), or (B, m) and (B, n - m)."""
        if form.segments == 1:
            return [ids]
        split = form.draw_split(ids.shape[1], self.random)
        first, follows = ids[:, :split], ids[:, split:]
        relations = draw_relations(self.forms.pairs, len(ids), self.random)
        return [first, relate(first, follows, follows.roll(1, dims=0), relations, self.random, self._similar)]

    def _similar(self, tokens: Tensor) -> Tensor:
        """Of some candidates, the token whose embedding is nearest. Shapes: (n,) -> (n,) int64."""
        candidates = self._candidates()
        rows = [nn.functional.normalize(self._table[ids].float(), dim=-1) for ids in (tokens, candidates)]
        return candidates[(rows[0] @ rows[1].t()).argmax(dim=-1)]

    def _on_topic(self, ids: Tensor) -> Tensor:
        """Texts of tokens whose embeddings are like that of one token of each text. Shapes: (n, L) -> (n, L) int64."""
        candidates, size = self._candidates(), len(ids)
        place = torch.randint(ids.shape[1], (size, 1), generator=self.random).to(ids.device)
        topics = ids.gather(1, place).flatten()
        rows = [nn.functional.normalize(self._table[known].float(), dim=-1) for known in (topics, candidates)]
        likeness = rows[0] @ rows[1].t()
        likeness = (likeness - likeness.mean(dim=1, keepdim=True)) / likeness.std(dim=1, keepdim=True).clamp(min=1e-6)
        narrow = _NARROWEST * torch.rand(size, 1, generator=self.random)
        weights = (narrow * likeness.cpu()).softmax(dim=1)
        chosen = torch.multinomial(weights, ids.shape[1], replacement=True, generator=self.random)
        return candidates[chosen.to(ids.device)]

    def _candidates(self) -> Tensor:
        drawn = torch.multinomial(self.prior, self.candidates, replacement=True, generator=self.random)
        return drawn.to(self._table.device)

    def _logits(self, ids: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: ids, fixed (B, L) -> candidates (C,) int64; logits (B, L, 1 + C) float32, the first for keeping it."""
        candidates = self._candidates()
        size, length = ids.shape
        sequence = torch.randn(size, 1, self.width, generator=self.random).expand(-1, length, -1)
        token = torch.randn(size, length, self.width, generator=self.random)
        noise = torch.cat([sequence, token], dim=-1).to(self._table.device)
        hidden = self.network(torch.cat([noise, self._table[ids].float() / self._spread], dim=-1))
        logits = hidden @ (self._table[candidates].float() / self._spread).t()
        kept = torch.full_like(logits[..., :1], math.log(self.candidates) + _KEPT)
        kept[fixed] = _ALWAYS
        return candidates, torch.cat([kept, logits], dim=-1)

    def _entropy(self, logits: Tensor, fixed: Tensor) -> Tensor:
        logs = logits[~fixed].log_softmax(dim=-1)
        start = torch.tensor([math.log(self.candidates) + _KEPT, *[0.0] * self.candidates]).softmax(dim=0)
        return -(logs.exp() * logs).sum(dim=-1).mean() / -(start * start.log()).sum().to(logits.device)

    def get_extra_state(self) -> Tensor:
        """The state of the random numbers."""
        return self.random.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with these random numbers."""
        self.random.set_state(state)
