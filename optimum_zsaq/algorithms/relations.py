"""How parts of an input are related: what a model that compares, copies or looks up must have seen to keep doing so.

`relate` makes a second segment out of a first one, `relate_within` repeats parts of one text. Both move tokens that are
there; how much is kept is drawn anew for each sequence, from none to all. Which relations there are, and their shares, are
our choice, measured in docs/methods/zsaq_forms.md.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


PAIR_RELATIONS = ("copy", "shifted", "shuffled", "inserted", "neighbours", "part", "follows", "unrelated")
INNER_RELATIONS = ("none", "topic", "repeat", "keys", "list")
_FARTHEST = 2  # places that a shifted copy is moved by
_PHRASE = 0.5  # the longest phrase that is repeated, as a share of the text
_ITEM = 4  # tokens between two separators of a list, at most

Nearest = Callable[[Tensor], Tensor]


def check_shares(shares: Mapping[str, float], known: tuple[str, ...]) -> None:
    """Raises: ValueError: an unknown relation, a negative share, or none above zero."""
    for name, share in shares.items():
        if name not in known:
            raise ValueError(f"{name!r} is no relation; use some of {known}")
        if not share >= 0.0:
            raise ValueError(f"the share of {name!r} is {share!r}; use a number of at least 0")
    if not sum(shares.values()) > 0.0:
        raise ValueError(f"no relation has a share above 0: {dict(shares)!r}; give one to some of {known}")


def draw_relations(shares: Mapping[str, float], size: int, random: torch.Generator) -> list[str]:
    """One relation a sequence."""
    names = list(shares)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    return [names[i] for i in torch.multinomial(weights, size, replacement=True, generator=random).tolist()]


def relate(
    first: Tensor, follows: Tensor, other: Tensor, relations: list[str], random: torch.Generator, nearest: Nearest
) -> Tensor:
    """A second segment for each first one.

    Args:
        first (`Tensor`): (B, N) int64.
        follows (`Tensor`): (B, M) int64, what the source has after the first segment.
        other (`Tensor`): (B, M) int64, of other sequences: what does not come from the first segment.
        relations (`list[str]`): of `PAIR_RELATIONS`, one a sequence.
        random (`torch.Generator`): what is drawn.
        nearest (`Callable`): (n,) tokens -> (n,) tokens of similar embeddings.

    Shapes: -> (B, M) int64.
    """
    size, count = other.shape
    places = torch.arange(count).repeat(size, 1) % first.shape[1]
    for row, relation in enumerate(relations):
        places[row] = _places(relation, first.shape[1], count, random)
    share = torch.rand(size, 1, generator=random)
    kept = torch.rand(size, count, generator=random) < share
    copied = first.gather(1, places.to(first.device))
    known = torch.tensor([relation not in ("follows", "unrelated") for relation in relations])
    found = torch.where((kept & known[:, None]).to(first.device), copied, other)
    similar = torch.tensor([relation == "neighbours" for relation in relations])[:, None] & ~kept
    if similar.any():
        chosen = similar.to(first.device)
        found[chosen] = nearest(copied[chosen])
    following = torch.tensor([relation == "follows" for relation in relations], device=first.device)
    return torch.where(following[:, None], follows, found)


def _places(relation: str, length: int, count: int, random: torch.Generator) -> Tensor:
    """Which token of the first segment each of the second one's is a copy of. Shapes: -> (count,) int64."""

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=random))

    places = torch.arange(count)
    if relation == "shifted":
        places = places + 1 + below(_FARTHEST)
    elif relation == "shuffled":
        places = places[torch.randperm(count, generator=random)]
    elif relation == "inserted":  # one token more, or less, from some place on
        places = places + (places >= below(count)) * (1 if below(2) else -1)
    elif relation == "part":
        places = places + below(max(1, length))
    return places % length


def relate_within(ids: Tensor, relations: list[str], random: torch.Generator, on_topic: Nearest) -> Tensor:
    """Texts of whose parts some come again.

    Args:
        ids (`Tensor`): (B, L) int64.
        relations (`list[str]`): of `INNER_RELATIONS`, one a sequence: "topic": its tokens are about one thing; "repeat": a
            phrase comes again, one or more times; "keys": two tokens that stand together do so again and again; "list":
            every few tokens the same separator.
        random (`torch.Generator`): what is drawn.
        on_topic (`Callable`): (n, L) texts -> (n, L) texts of the same topic, one each.

    Shapes: -> (B, L) int64, a copy.
    """
    found, length = ids.clone(), ids.shape[1]
    topical = torch.tensor([relation == "topic" for relation in relations])
    if topical.any():
        chosen = topical.to(ids.device)
        share = torch.rand(int(topical.sum()), 1, generator=random)
        kept = torch.rand(int(topical.sum()), length, generator=random) < share
        found[chosen] = torch.where(kept.to(ids.device), ids[chosen], on_topic(ids[chosen]))
    for row, relation in enumerate(relations):
        if relation in ("none", "topic") or length < 4:
            continue
        draw = torch.rand(3, generator=random).tolist()
        text = found[row]
        if relation == "repeat":
            size = max(1, int(draw[0] * _PHRASE * length))
            start = int(draw[1] * (length - 2 * size + 1))
            times = 1 + int(draw[2] * 3)
            phrase = text[start : start + size].clone()
            for i in range(times):
                place = start + size + i * (size + int(draw[2] * size))
                part = text[place : place + size]
                part.copy_(phrase[: len(part)])
        elif relation == "keys":
            known = max(1, int(draw[0] * length / 4))
            again = torch.randint(known, (length // 2 - known,), generator=random).to(text.device)
            pairs = text[: 2 * (length // 2)].view(-1, 2)
            pairs[known:] = pairs[again]
        else:
            every = 2 + int(draw[0] * (_ITEM - 1))
            text[every - 1 :: every] = text[int(draw[1] * length)].clone()
    return found
