"""A guard that needs no data: is a trained student nearer to its teacher than rounding is, on inputs of every kind?

Probes are inputs that training does not draw from: every form of the training's own, and others that no training asked
for (a flatter prior, uniform and repeated tokens, reversed text). `Guard` measures them on states of the student along the
way, keeps the best state that is not worse than rounding on any of them, and puts it back at the end. Source: our choice,
measured in docs/methods/zsaq_forms.md.
"""

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .distance import sequence_discrepancies
from .forms import Batch, InputMixture, SequenceForm
from .generators import Generator, PriorSource, Source, WrittenSource
from .minimax import Minimax


logger = logging.getLogger(__name__)

ROUNDED = "rounded"
_LENGTHS = (8, 20, 50)  # tokens of a probe's sequences
_EACH = 8  # sequences of each length
_FLATTER = 0.5  # power that flattens a prior for a probe
_SPREAD = 2.0  # standard errors by which a probe must be worse to count as worse,
_LEAST = 0.1  # and this share of rounding's distance on inputs as training has them
UNWRITTEN = 0.75  # share of rounding's distance that must be undercut where nobody wrote the inputs,
_HALF = 0.5  # and of the distance of its hidden states,
_ANYWHERE = 0.75  # and of that on each probe alone
_HELD_OUT = 16  # one sequence in so many of a written pool is kept for probes


@dataclass(frozen=True)
class Probe:
    """Inputs of one kind. Args: name (`str`); batches (`list[dict]`); unlike (`bool`): no training asks for these."""

    name: str
    batches: list[Batch]
    unlike: bool = False


@dataclass
class Found:
    """What was measured of one probe, a figure a sequence.

    Shapes: discrepancy (n,), D as training has it; output (n,), D of the outputs alone; agreement (n,), the share of equal
    answers. Of models without outputs the last two are empty.
    """

    discrepancy: Tensor
    output: Tensor
    agreement: Tensor

    def means(self) -> dict[str, float | None]:
        """For reports, and as JSON: of what is not finite None."""
        means = {name: values.mean().item() for name, values in vars(self).items() if len(values)}
        return {name: value if math.isfinite(value) else None for name, value in means.items()}

    @property
    def deciding(self) -> Tensor:
        """What a user would see: the outputs, or without a head the hidden states."""
        return self.output if len(self.output) else self.discrepancy


class ReversedSource:
    """Another source's sequences, from the end to the beginning."""

    def __init__(self, source: Source):
        self.source = source

    def draw(self, size: int, length: int, random: torch.Generator) -> Batch:
        """See `Source`."""
        return {"input_ids": self.source.draw(size, length, random)["input_ids"].flip(1)}


class RepeatedSource:
    """One token, again and again. Args: prior (`Tensor`): (V,), which one."""

    def __init__(self, prior: Tensor):
        self.prior = prior.cpu()

    def draw(self, size: int, length: int, random: torch.Generator) -> Batch:
        """See `Source`."""
        return {
            "input_ids": torch.multinomial(self.prior, size, replacement=True, generator=random)[:, None].repeat(1, length)
        }


def hold_out(source: Source) -> tuple[Source, Source]:
    """A source for training and one for probes; only sequences that were written are few enough to be parted."""
    if not isinstance(source, WrittenSource) or len(source.written) < 2 * _HELD_OUT:
        return source, source
    return source.part(slice(len(source.written) // _HELD_OUT, None)), source.part(slice(len(source.written) // _HELD_OUT))


def make_probes(generator: Generator, source: Source, seed: int) -> list[Probe]:
    """Probes of the forms of a generator.

    Args:
        generator (`Generator`): of the training.
        source (`Source`): what the probes draw from where the training draws from the generator's.
        seed (`int`): of what is drawn.
    """
    found = []
    prior = generator.prior
    answers = "decoder_input_ids" in source.draw(1, 1, torch.Generator().manual_seed(0))
    others = {"reversed text": ReversedSource(source)} if not answers else {}
    others |= {
        "a flatter prior": PriorSource(prior**_FLATTER),
        "uniform tokens": PriorSource((prior > 0).float()),
        "repeated tokens": RepeatedSource(prior),
    }
    mixture = generator.forms
    for form in mixture.forms:
        kinds = {"": mixture}
        if form.segments == 2:
            kinds = {"related": mixture, "unrelated": replace(mixture, pairs={"unrelated": 1.0})}
        for kind, own in kinds.items():
            name = f"{form.name}, {kind}" if kind else form.name
            found.append(Probe(name, list(_batches(generator, source, own, form, seed))))
        for name, other in ({} if answers else others).items():
            plain = InputMixture((form,), pairs=mixture.pairs)
            found.append(Probe(f"{form.name}, {name}", list(_batches(generator, other, plain, form, seed)), unlike=True))
    return found


def _batches(generator: Generator, source: Source, mixture: InputMixture, form: SequenceForm, seed: int) -> Iterator[Batch]:
    for i, length in enumerate(_LENGTHS):
        size = max(form.special + form.segments, min(length, form.longest))
        one = replace(mixture, forms=(replace(form, shortest=size, longest=size),), shares=(1.0,), padded=0.0)
        yield generator.another(source, one, seed + i).sample(_EACH)


class Guard:
    """Measures the states of a training on probes, keeps the best that is not worse than rounding, and puts it back.

    Args:
        run (`Minimax`): whose student is rounded when the guard is made.
        probes (`list[Probe]`): what to measure on.
        keeps (`bool`): whether a copy of the best state is made; without, `restore` is not to be called.
        below (`float`): a state takes rounding's place if its distance is below this share of rounding's; of those that do,
            the nearest on all probes is kept. Inputs that nobody wrote are unlike text, and a small gain on them is none
            on text: with `UNWRITTEN`, or any share below 1, the hidden states' distance must fall by half too, and by a
            quarter on each probe alone, which it does not where a source writes one thing only.
    """

    def __init__(self, run: Minimax, probes: list[Probe], keeps: bool = True, below: float = 1.0):
        self.run, self.probes, self.keeps, self.below = run, probes, keeps, below
        self.measured: dict[str, dict[str, Found]] = {}
        self.worse: dict[str, list[str]] = {}
        self._best, self._kept = ROUNDED, _Kept()
        self._scales = [p.detach().clone() for p in run.scales]

    def measure(self, stage: str) -> dict[str, Found]:
        """Measure the student as it is, and keep it if it is the best so far."""
        for p in self.run.trained:
            p.grad = None
        found = {probe.name: self._found(probe) for probe in self.probes}
        self.measured[stage] = found
        if stage == ROUNDED:
            return found
        self.worse[stage] = [name for name in found if self._is_worse(name, found[name])]
        allowed = not self.worse[stage] and self.distance(stage) < self.below
        allowed = allowed and (self.below == 1.0 or self._hidden_states_follow(stage))
        if self.keeps and allowed and self.distance(stage, unlike=True) < self.distance(self.chosen, unlike=True):
            self._best = stage
            self._kept.write(self.run.trained)
        return found

    @property
    def chosen(self) -> str:
        """The best state so far."""
        return self._best

    def distance(self, stage: str, unlike: bool = False) -> float:
        """How far a state is from the teacher on inputs as training has them, over how far rounding is.

        With `unlike` on all probes: more inputs, which tell two states apart with less noise.
        """
        like = [probe.name for probe in self.probes if unlike or not probe.unlike]
        sums = [sum(self.measured[s][name].deciding.mean().item() for name in like) for s in (stage, ROUNDED)]
        return _ratio(*sums)

    def discrepancy(self, stage: str, probes: Sequence[str] | None = None) -> float:
        """As `distance`, of the hidden states; on some probes, by name, or as training has them."""
        names = probes or [probe.name for probe in self.probes if not probe.unlike]
        return _ratio(*(sum(self.measured[s][name].discrepancy.mean().item() for name in names) for s in (stage, ROUNDED)))

    def _hidden_states_follow(self, stage: str) -> bool:
        each = (self.discrepancy(stage, [probe.name]) for probe in self.probes)
        return self.discrepancy(stage) < _HALF and max(each) < _ANYWHERE

    @torch.no_grad()
    def restore(self) -> str:
        """Give the student the best state's weights and step sizes, in place; gives the state's name."""
        kept = self._kept.read(self.run.trained)
        if self._best == ROUNDED:
            named = dict(self.run.teacher.named_parameters())
            floats = {id(p): named.get(name) for name, p in self.run.student.named_parameters()}
            kept = [*(floats[id(p)] for p in self.run.weights), *self._scales]
        for p, value in zip(self.run.trained, kept, strict=True):
            p.copy_(value)
        return self._best

    @torch.no_grad()
    def _found(self, probe: Probe) -> Found:
        parts = []
        for batch in probe.batches:
            completed = self.run.complete(dict(batch))
            outputs = [model(**completed, output_hidden_states=True) for model in (self.run.teacher, self.run.student)]
            parts.append(sequence_discrepancies(*outputs, completed, self.run.settings))
        return Found(*(torch.cat(figures) for figures in zip(*parts, strict=True)))

    def _is_worse(self, name: str, found: Found) -> bool:
        rounded = self.measured[ROUNDED]
        change = (found.deciding - rounded[name].deciding).double()
        if not torch.isfinite(change).all():
            return True
        usual = [rounded[probe.name].deciding.mean().item() for probe in self.probes if not probe.unlike]
        least = max(_SPREAD * change.std().item() / math.sqrt(len(change)), _LEAST * sum(usual) / len(usual))
        return change.mean().item() > least

    def state_dict(self) -> dict[str, Any]:
        """What was measured and kept."""
        figures = {s: {name: list(vars(f).values()) for name, f in found.items()} for s, found in self.measured.items()}
        kept = None if self._best == ROUNDED else list(self._kept.read(self.run.trained))
        return {"measured": figures, "worse": self.worse, "best": (self._best, kept), "scales": self._scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.measured = {s: {name: Found(*f) for name, f in found.items()} for s, found in state["measured"].items()}
        self.worse, self._scales = state["worse"], state["scales"]
        self._best, kept = state["best"]
        if kept is not None:
            self._kept.write(kept)


class _Kept:
    """The float32 tensors of a state, in a temporary file: in memory they are as much again as the student.

    They are in memory where the disk is full.
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile()
        self._copies: list[Tensor] = []

    def write(self, tensors: list[Tensor]) -> None:
        try:
            self._file.seek(0)
            for tensor in tensors:
                self._file.write(tensor.detach().cpu().contiguous().numpy())
            self._file.flush()
            self._copies = []
        except OSError as error:
            logger.warning("No room for a temporary file (%s): the best state is kept in memory", error)
            self._copies = [tensor.detach().clone() for tensor in tensors]

    def read(self, like: list[Tensor]) -> Iterator[Tensor]:
        """One after the other, in the shapes and on the devices of others."""
        if self._copies:
            yield from self._copies
            return
        self._file.seek(0)
        for tensor in like:
            values = bytearray(tensor.numel() * tensor.element_size())
            self._file.readinto(values)
            yield torch.frombuffer(values, dtype=tensor.dtype).view(tensor.shape).to(tensor.device)


def _ratio(value: float, reference: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return value / reference if reference > 0.0 else float(value > 0.0)
