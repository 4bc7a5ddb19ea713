"""Where zero-shot training gets its inputs from: batches to learn from, and a way to make them harder.

A generator is an `nn.Module` with `sample`, which draws a batch of token ids, and `soft_sample`, which draws one that
gradients reach the generator through. Its parameters and its random numbers are its state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


Batch = dict[str, Tensor]

_SMALLEST_NORM = 0.7
_HEAD = 10.0


def token_prior(table: Tensor, special: list[int], exponent: float = 0.7) -> Tensor:
    """How likely each token is in text, guessed from the embeddings alone.

    Vocabularies are ordered roughly by frequency, so the r-th token has p ~ 1 / (r + 10)^exponent. Special tokens have
    none, nor has a token whose embedding is shorter than 0.7 of the median: training hardly touched it. Zipf's law has
    exponent 1; a flatter prior, with more of the words that mean something, is our choice.

    Shapes: table (V, D) -> (V,) float32, sums to 1.

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
    prior = plain / (rank.clamp(min=0).float() + _HEAD) ** exponent
    return prior / prior.sum()


@dataclass(frozen=True)
class SequenceForm:
    """What every sequence looks like: its special tokens, its lengths, and what fills the rest of a batch.

    Args:
        first, last (`tuple[int, ...]`): ids it begins and ends with, such as [CLS] and [SEP].
        shortest, longest (`int`): its length, special tokens included, is uniform between these.
        padding (`int`): the id behind its end.

    Raises:
        ValueError: no room between the special tokens, or lengths out of order.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    shortest: int = 5
    longest: int = 24
    padding: int = 0

    def __post_init__(self):
        least = len(self.first) + len(self.last) + 1
        if not least <= self.shortest <= self.longest:
            raise ValueError(
                f"sequences of {self.shortest} to {self.longest} tokens are not possible with {least - 1} special ones; "
                f"use lengths of at least {least}, the shorter first"
            )


class NoiseGenerator(nn.Module):
    """From noise to sequences of tokens, by a small network that starts as the prior and is pushed from there.

    A batch is written with `candidates` tokens drawn from the prior, so that a step costs no product with the whole
    vocabulary. Token t of a sequence has the probabilities softmax(h_t . E_c) over the candidates c, where E are the
    teacher's embeddings, scaled to unit variance, and h comes from noise of the sequence and noise of the token. The last
    layer starts at zero: all candidates are equally likely, which is the prior.

    Args:
        table (`Tensor`): (V, D), the teacher's input embeddings; not trained, not part of the state.
        prior (`Tensor`): (V,), see `token_prior`.
        form (`SequenceForm`): special tokens and lengths.
        candidates (`int`): tokens a batch is written with. Our choice.
        width (`int`): of noise and network. Our choice.
        seed (`int`): of the start values and of all that is drawn.
    """

    def __init__(
        self, table: Tensor, prior: Tensor, form: SequenceForm, candidates: int = 1024, width: int = 64, seed: int = 0
    ):
        super().__init__()
        self.form, self.candidates, self.width = form, candidates, width
        self._table, self._prior = table.detach(), prior
        self._spread = table.detach().float().std().clamp(min=1e-6)
        self.random = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, table.shape[1], bias=False)
            )
        nn.init.zeros_(self.network[-1].weight)
        self.network.to(table.device)

    @torch.no_grad()
    def sample(self, size: int) -> Batch:
        """`size` sequences. Shapes: -> input_ids, attention_mask (size, longest) int64."""
        candidates, logits = self._logits(size)
        choice = torch.multinomial(logits.softmax(dim=-1).flatten(0, 1).cpu(), 1, generator=self.random)
        ids = candidates[choice.to(candidates.device).view(size, -1)]
        return self._finish(ids)

    def soft_sample(self, size: int) -> tuple[Batch, Tensor, Tensor, Tensor]:
        """`size` sequences with gradients: `one_hot` is exactly one-hot, its gradient that of the probabilities.

        Shapes: -> batch; candidates (C,) int64; one_hot (size, longest, C) float32; entropy () float32, that of the
        probabilities over log C, 0 to 1.
        """
        candidates, logits = self._logits(size)
        uniform = torch.rand(logits.shape, generator=self.random).clamp_(min=1e-20).to(logits.device)
        soft = (logits - torch.log(-torch.log(uniform))).softmax(dim=-1)  # Gumbel-softmax, straight-through
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
        logs = logits.log_softmax(dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1).mean() / torch.log(torch.tensor(float(len(candidates))))
        batch = self._finish(candidates[hard.argmax(dim=-1)])
        return batch, candidates, hard + (soft - soft.detach()), entropy

    def _logits(self, size: int) -> tuple[Tensor, Tensor]:
        """Shapes: -> candidates (C,) int64; logits (size, longest, C) float32."""
        drawn = torch.multinomial(self._prior.cpu(), self.candidates, replacement=True, generator=self.random)
        candidates = drawn.to(self._table.device)
        sequence = torch.randn(size, 1, self.width, generator=self.random).expand(-1, self.form.longest, -1)
        token = torch.randn(size, self.form.longest, self.width, generator=self.random)
        hidden = self.network(torch.cat([sequence, token], dim=-1).to(self._table.device))
        return candidates, hidden @ (self._table[candidates].float() / self._spread).t()

    def _finish(self, ids: Tensor) -> Batch:
        """Special tokens, lengths and padding."""
        form, size = self.form, len(ids)
        lengths = torch.randint(form.shortest, form.longest + 1, (size, 1), generator=self.random).to(ids.device)
        position = torch.arange(form.longest, device=ids.device)
        for offset, token in enumerate(form.first):
            ids[:, offset] = token
        for offset, token in enumerate(reversed(form.last), 1):
            ids = torch.where(position == lengths - offset, token, ids)
        inside = position < lengths
        return {"input_ids": torch.where(inside, ids, form.padding), "attention_mask": inside.long()}

    def get_extra_state(self) -> Tensor:
        """The state of the random numbers."""
        return self.random.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with these random numbers."""
        self.random.set_state(state)


def soft_embeddings(embed: Callable[[Tensor], Tensor], batch: Batch, candidates: Tensor, one_hot: Tensor) -> Tensor:
    """What a model reads of a soft sample: the chosen candidates' rows of its own table, with gradients to the choice.

    Positions whose token the form set (special tokens, padding) are read as they are.

    Args:
        embed (`Callable`): the model's input embedding, (...) int64 -> (..., D).

    Shapes: batch of (B, L); candidates (C,); one_hot (B, L, C) -> (B, L, D), in the embedding's dtype.
    """
    ids = batch["input_ids"]
    chosen = candidates[one_hot.detach().argmax(dim=-1)] == ids
    rows = embed(candidates)
    return torch.where(chosen.unsqueeze(-1), one_hot.to(rows.dtype) @ rows, embed(ids))
