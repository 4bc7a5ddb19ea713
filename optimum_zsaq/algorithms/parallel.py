"""Parallel module-wise reconstruction (MREM-P): all stages are trained at once, fed by queues.

Each stage takes what the stage before it returned from a queue, first in, first out. `queue` batches (t0) that go through
the rounded model before training fill the queues, so what a stage takes was put there that many steps ago: no stage waits
for its neighbour within a step, and a run is the same whoever computes it and when. While a stage's predecessors are not
trained yet, its inputs are mixed with the float model's (annealed teacher forcing):

    f~ = lambda_t f + (1 - lambda_t) f^,   lambda_t = max(1 - t / T0, 0)

The paper samples from the queues; that entries are taken in order, each once, is our choice. Here all stages take turns in
one process; `pipeline.py` gives them processes of their own.
"""

from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .reconstruction import (
    Batch,
    ReconstructionSettings,
    StageTraining,
    batch_order,
    check_models,
    compensate_stage,
    start_batches,
    wanted_states,
)
from .stages import Memory, Stage, cut, read_by_later, run_stage


@dataclass
class Entry:
    """What a stage is given: which batch, and what the blocks before returned for it, float and quantized."""

    batch: int
    teacher: Memory
    student: Memory


class StageWorker:
    """One stage of MREM-P: its training, and what it hands on.

    Args:
        teacher, student (`nn.Module`): the float model and its fake-quantized copy, which share no Parameter of this stage.
        stage (`Stage`): which.
        batches (`Sequence[dict]`): all of them.
        settings (`ReconstructionSettings`): how.
        frozen (`Container[str]`): names of Parameters that are not trained.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        stage: Stage,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        frozen: Container[str] = (),
    ):
        self.teacher, self.student, self.stage = teacher, student, stage
        self.batches, self.settings = batches, settings
        self.training = StageTraining(student, stage, settings, frozen)
        self.losses: list[float] = []

    @torch.no_grad()
    def pass_on(self, entry: Entry) -> Entry:
        """What the stage returns as it is."""
        batch = self.batches[entry.batch]
        models = (self.teacher, entry.teacher), (self.student, entry.student)
        return Entry(entry.batch, *(run_stage(model, self.stage, batch, memory)[1] for model, memory in models))

    def step(self, entry: Entry) -> Entry:
        """Train on an entry; gives what the stage returned before the step.

        Raises:
            FloatingPointError: see `StageTraining.step`.
        """
        batch, until = self.batches[entry.batch], self.settings.forcing * self.settings.steps
        share = max(1.0 - self.training.done / until, 0.0) if until else 0.0
        with torch.no_grad():
            states, teacher = run_stage(self.teacher, self.stage, batch, entry.teacher)
        mixed = mix(entry.teacher, entry.student, share)
        loss, student = self.training.step(batch, mixed, wanted_states(states, self.stage, self.settings))
        self.losses.append(loss)
        return Entry(entry.batch, teacher, student)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, but for the queue."""
        return {"training": self.training.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.training.load_state_dict(state["training"])
        self.losses = list(state["losses"])


def mix(teacher: Memory, student: Memory, share: float) -> Memory:
    """share * teacher + (1 - share) * student of every float tensor."""

    def one(t: Any, s: Any) -> Any:
        floats = isinstance(s, Tensor) and s.is_floating_point()
        return torch.lerp(s, t.to(s.dtype), share) if floats and share else s

    return {name: tree_map(one, teacher[name], student[name]) for name in student}


class ParallelReconstruction:
    """MREM-P in one process: the stages take turns, one step each.

    What several stages read, such as a table that a head shares, is not trained: on processes of their own, the others
    would not see it change.

    Args:
        teacher (`nn.Module`): the float model; it shares no Parameter with the student.
        student (`nn.Module`): its fake-quantized copy, trained in place.
        batches (`Sequence[dict]`): what both are called with.
        settings (`ReconstructionSettings`): how.

    Raises:
        ValueError: the models share weights; see `check_models` and `stages.cut`.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: Sequence[Batch], settings: ReconstructionSettings):
        check_models(teacher, student, batches, settings)
        if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError("teacher and student share weights; make the student from copy.deepcopy(teacher)")
        self.teacher, self.student, self.batches, self.settings = teacher, student, batches, settings
        self.stages = cut(student, batches[0], settings.stages, outputs=bool(settings.output_weight))
        frozen = read_by_later(student, self.stages, batches[0])
        self.workers = [StageWorker(teacher, student, stage, batches, settings, frozen) for stage in self.own_stages()]
        self.queues: list[deque[Entry]] = [deque() for _ in self.workers]  # of each worker; the first stage has none

    def own_stages(self) -> list[Stage]:
        """Those that this process trains."""
        return self.stages

    @property
    def losses(self) -> list[list[float]]:
        """Of each stage, step by step."""
        return [worker.losses for worker in self.workers]

    @property
    def done(self) -> int:
        """Steps of all stages here."""
        return sum(worker.training.done for worker in self.workers)

    @property
    def resumable(self) -> bool:
        """Whether `state_dict` has all that was done: between two whole steps."""
        return len({worker.training.done for worker in self.workers}) == 1

    def steps(self) -> Iterator[tuple[Stage, float]]:
        """Train what is left; yields each stage and its error, stage by stage within a step."""
        started = self.workers[0].training.done
        order = source(len(self.batches), self.settings, started)
        if not started:
            start(self.teacher, self.student, self.stages, self.own_stages(), self.batches, self.settings)
            self._warm_up(order)
        for _ in range(started, self.settings.steps):
            handed: Entry | None = None
            for worker, queue in zip(self.workers, self.queues, strict=True):
                if handed is not None:
                    queue.append(handed)
                handed = worker.step(self._take(worker, queue, order))
                if worker is self.workers[-1]:
                    self._hand_on(handed)
                yield worker.stage, worker.losses[-1]

    def _warm_up(self, order: Iterator[Entry]) -> None:
        """Fill the queues: some batches go through the stages as they are."""
        for _ in range(self.settings.queue):
            entry = self._take(self.workers[0], deque(), order)
            for worker, queue in zip(self.workers, self.queues, strict=True):
                if worker.stage.index:
                    queue.append(entry)
                if not worker.stage.last:
                    entry = worker.pass_on(entry)
            self._hand_on(entry)

    def _take(self, worker: StageWorker, queue: deque[Entry], order: Iterator[Entry]) -> Entry:
        """The oldest entry of a worker's queue."""
        return queue.popleft() if worker.stage.index else next(order)

    def _hand_on(self, entry: Entry) -> None:
        """What the last stage returned: nobody waits for it."""

    def finish(self) -> None:
        """All steps are made: everything that was trained is in the student."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened, where `resumable`."""
        return {
            "workers": [worker.state_dict() for worker in self.workers],
            "queues": [[dict(vars(entry)) for entry in queue] for queue in self.queues],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; before `steps` is called."""
        for worker, known in zip(self.workers, state["workers"], strict=True):
            worker.load_state_dict(known)
        self.queues = [deque(Entry(**entry) for entry in queue) for queue in state["queues"]]


@torch.no_grad()
def start(
    teacher: nn.Module,
    student: nn.Module,
    stages: Sequence[Stage],
    own: Sequence[Stage],
    batches: Sequence[Batch],
    settings: ReconstructionSettings,
) -> None:
    """Compensate the rounding errors of some stages, in place, each on what the float stages before it return."""
    if settings.start != "compensated":
        return
    chosen = [batches[i] for i in start_batches(len(batches), settings)]
    memories: list[Memory] = [{} for _ in chosen]
    for stage in stages[: own[-1].index + 1]:
        if stage in own:
            compensate_stage(
                teacher, student, stage, chosen, [(memory, memory) for memory in memories], settings.start_ranges
            )
        memories = [run_stage(teacher, stage, batch, m)[1] for batch, m in zip(chosen, memories, strict=True)]


def source(count: int, settings: ReconstructionSettings, done: int = 0) -> Iterator[Entry]:
    """The first stage's entries; those of the warm-up come first, and `done` steps are passed over."""
    order = batch_order(count, settings.seed)
    if done:
        for _ in range(settings.queue + done):
            next(order)
    return (Entry(i, {}, {}) for i in order)
