"""MREM-S: stages of a model are reconstructed one after the other, see `reconstruction.py`."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import set_runtime
from .activations import Activations, Kept
from .offload import OffloadedBlocks
from .reconstruction import (
    Batch,
    ReconstructionSettings,
    StageTraining,
    batch_order,
    check_models,
    compensate_stage,
    load_tensors,
    start_batches,
    wanted_states,
)
from .stages import Memory, Stage, cut, run_stage


class SequentialReconstruction:
    """Stage after stage, each on the outputs of the quantized stages before it.

    Args:
        teacher (`nn.Module`): the float model. It may share the Parameters of its blocks with the student: a stage of it is
            run for the last time before that stage of the student is trained.
        student (`nn.Module`): its fake-quantized copy, trained in place.
        batches (`Sequence[dict]`): what both are called with.
        settings (`ReconstructionSettings`): how.
        offloaded (`OffloadedBlocks`, *optional*): has the weights of the blocks, which are "meta" in both models. Those of
            a stage are read when it begins; when it has ended, its blocks are packed, and the next stage learns on what
            the packed ones return.

    Raises:
        ValueError: see `check_models` and `stages.cut`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        offloaded: OffloadedBlocks | None = None,
    ):
        check_models(teacher, student, batches, settings)
        self.teacher, self.student, self.batches, self.settings = teacher, student, batches, settings
        self.offloaded = offloaded
        with offloaded.passing(teacher) if offloaded else nullcontext():
            self.stages = cut(student, batches[0], settings.stages, teacher, bool(settings.output_weight))
        self.losses: list[list[float]] = []
        self.resumable = True  # whether `state_dict` has all that was done: when a stage has ended
        self._finished: list[dict[str, Tensor]] = []

    def own_stages(self) -> list[Stage]:
        """Those that this process trains."""
        return self.stages

    @property
    def done(self) -> int:
        """Steps of all stages."""
        return len(self._finished) * self.settings.steps

    def steps(self) -> Iterator[tuple[Stage, float]]:
        """Train what is left; yields each stage and its error, step by step."""
        store = Activations(self.settings.cache)
        nothing = store.keep({})
        known: list[tuple[Kept, Kept]] = [(nothing, nothing)] * len(self.batches)
        for stage in self.stages:
            self._read(stage)
            wanted, teachers = self._float_outputs(stage, [teacher for teacher, _ in known], store)
            if stage.index < len(self._finished):
                self._release(stage)
                load_tensors(self.student, self._finished[stage.index])
            else:
                self._start(stage, known)
                yield from self._train(stage, [student for _, student in known], wanted)
            del wanted
            if not stage.last:
                students = []
                for i, (_, memory) in enumerate(known):
                    students.append(store.keep(self._run(self.student, stage, i, memory.get())[1]))
                known = list(zip(teachers, students, strict=True))
            if self.offloaded:
                set_runtime(self.student, "fast")  # drops what a kernel keeps of packed blocks beside their codes

    def _read(self, stage: Stage) -> None:
        if self.offloaded:
            for block in stage.blocks:
                self.offloaded.load(block, self.teacher, self.student)

    def _release(self, stage: Stage) -> None:
        if self.offloaded:
            for block in stage.blocks:
                self.offloaded.free(block, self.teacher)
                self.offloaded.pack(block, self.student)

    def _tensors(self, stage: Stage) -> dict[str, Tensor]:
        """What goes with a stage that is finished, by name."""
        prefixes = tuple(f"{block}." for block in stage.blocks)
        own = {n: p for n, p in self.student.named_parameters() if n in stage.parameters or n.startswith(prefixes)}
        return {name: p.detach() for name, p in own.items()}

    def _float_outputs(self, stage: Stage, known: list[Kept], store: Activations) -> tuple[list[Kept], list[Kept]]:
        """What the float stage returns for each batch: what is to be learned, and what the next float stage is given."""
        wanted, teachers = [], []
        for i, memory in enumerate(known):
            states, following = self._run(self.teacher, stage, i, memory.get())
            wanted.append(store.keep(wanted_states(states, stage, self.settings)))
            teachers.append(store.keep(following))
        return wanted, teachers

    def _start(self, stage: Stage, known: list[tuple[Kept, Kept]]) -> None:
        if self.settings.start == "compensated":
            chosen = start_batches(len(self.batches), self.settings)
            memories = [(known[i][0].get(), known[i][1].get()) for i in chosen]
            compensate_stage(
                self.teacher,
                self.student,
                stage,
                [self.batches[i] for i in chosen],
                memories,
                self.settings.start_ranges,
            )

    def _train(self, stage: Stage, memories: list[Kept], wanted: list[Kept]) -> Iterator[tuple[Stage, float]]:
        training = StageTraining(self.student, stage, self.settings)
        order = batch_order(len(self.batches), self.settings.seed)
        losses: list[float] = []
        self.resumable = False
        for i in order:
            losses.append(training.step(self.batches[i], memories[i].get(), wanted[i].get())[0])
            if training.done == self.settings.steps:
                break
            yield stage, losses[-1]
        self.losses.append(losses)
        del training
        self._release(stage)
        self._finished.append(self._tensors(stage))
        self.resumable = True
        yield stage, losses[-1]

    @torch.no_grad()
    def _run(self, model: nn.Module, stage: Stage, i: int, memory: Memory) -> tuple[dict[str, Tensor], Memory]:
        return run_stage(model, stage, self.batches[i], memory)

    def finish(self) -> None:
        """All steps are made: everything that was trained is in the student."""

    def state_dict(self) -> dict[str, Any]:
        """The stages that are finished: all that `load_state_dict` needs to go on with the next."""
        return {"finished": self._finished, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; before `steps` is called."""
        self._finished, self.losses = list(state["finished"]), list(state["losses"])
