"""Parallel module-wise reconstruction on several processes: each trains one or more stages, and hands its outputs on.

The processes are those of torch.distributed, under torchrun or another launcher. What a stage returns goes point to point
to the process of the next stage and waits there; both sides send and receive beside their training. An entry is used
`queue` steps after it was made, as in one process, so the result is the same, bit for bit where a processor computes the
same sums. A process that is far ahead waits until the next one has room for what it sends; it is not waited for in turn.
No process is waited for longer than a timeout.
"""

import io
import queue as threaded
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .parallel import Entry, ParallelReconstruction, StageWorker
from .reconstruction import Batch, ReconstructionSettings, own_tensors
from .stages import Stage


class PipelineReconstruction(ParallelReconstruction):
    """MREM-P on the processes of torch.distributed: this one's part of it.

    Args:
        teacher, student (`nn.Module`): the whole models, the same in each process.
        batches (`Sequence[dict]`): all of them, the same in each process.
        settings (`ReconstructionSettings`): how.
        timeout (`float`): seconds that a neighbour is waited for.

    `trained` is how many seconds `steps` took so far, of which the training waited `waited` for its neighbours.

    Raises:
        ValueError: fewer stages than processes; see `ParallelReconstruction`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        timeout: float = 600.0,
    ):
        self.rank, self.world, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        if settings.stages < self.world:
            raise ValueError(
                f"stages={settings.stages} cannot keep {self.world} processes busy; use at least {self.world} stages, or "
                f"start {settings.stages} processes"
            )
        self.trained = self.waited = 0.0
        self._all_losses: list[list[float]] | None = None
        self._arrivals: threaded.Queue[Any] = threaded.Queue(settings.queue)
        self._departures: threaded.Queue[Any] = threaded.Queue(1)
        self._error: BaseException | None = None
        limit = timedelta(seconds=timeout)
        self._neighbours, self._everybody = dist.new_group(timeout=limit), dist.new_group(timeout=limit)
        super().__init__(teacher, student, batches, settings)
        self._device = next(student.parameters()).device

    def own_stages(self) -> list[Stage]:
        """Those that this process trains: a run of about as many as every other has."""
        return [self.stages[i] for i in _share(len(self.stages), self.rank, self.world)]

    @property
    def losses(self) -> list[list[float]]:
        """Of each stage, step by step: of this process's stages, and after `finish` of all."""
        return self._all_losses or super().losses

    def steps(self) -> Iterator[tuple[Stage, float]]:
        """Train what is left of this process's stages.

        Raises:
            ConnectionError: a neighbour is gone, or did not answer in time.
        """
        started = self.workers[0].training.done
        to_come = self.settings.steps - started + (0 if started else self.settings.queue)
        if self.rank:
            self._aside(self._receive, to_come)
        if self.rank < self.world - 1:
            self._aside(self._send, to_come)
        began = time.perf_counter()
        for stage, loss in super().steps():
            self.trained = time.perf_counter() - began
            yield stage, loss

    def _aside(self, work: Callable[[int], None], count: int) -> None:
        Thread(target=work, args=(count,), daemon=True).start()

    def _receive(self, count: int) -> None:
        try:
            for _ in range(count):
                length = torch.zeros(1, dtype=torch.int64, device=self._device)
                dist.recv(length, self.rank - 1, self._neighbours)
                content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
                dist.recv(content, self.rank - 1, self._neighbours)
                self._arrivals.put(_read(content, self._device))
        except Exception as error:  # raised where the training asks for the next entry
            self._arrivals.put(error)

    def _send(self, count: int) -> None:
        try:
            for _ in range(count):
                content = _written(self._departures.get(), self._device)
                dist.send(torch.tensor([len(content)], device=self._device), self.rank + 1, self._neighbours)
                dist.send(content, self.rank + 1, self._neighbours)
        except Exception as error:  # raised where the training hands the next entry on
            self._error = error

    def _take(self, worker: StageWorker, queue: deque[Entry], order: Iterator[Entry]) -> Entry:
        if worker.stage.index == 0 or queue:
            return super()._take(worker, queue, order)
        return self._arrived()

    def _arrived(self) -> Entry:
        found = self._waiting(lambda: self._arrivals.get(timeout=1.0), threaded.Empty, self.rank - 1)
        if isinstance(found, Exception):
            raise self._lost(self.rank - 1) from found
        return found

    def _hand_on(self, entry: Entry) -> None:
        if self.rank < self.world - 1:
            self._waiting(lambda: self._departures.put(entry, timeout=1.0), threaded.Full, self.rank + 1)

    def _waiting(self, act: Callable[[], Any], not_yet: type[Exception], neighbour: int) -> Any:
        """Do what may have to wait for a neighbour, as long as the timeout allows and the connection stands."""
        started = time.perf_counter()
        try:
            while time.perf_counter() - started < self.timeout:
                if self._error is not None:
                    raise self._lost(self.rank + 1) from self._error
                with suppress(not_yet):
                    return act()
            raise self._lost(neighbour)
        finally:
            self.waited += time.perf_counter() - started

    def _lost(self, neighbour: int) -> ConnectionError:
        return ConnectionError(
            f"process {self.rank} lost process {neighbour}, which trains the stages beside its own: it ended, or did not "
            f"answer for {self.timeout:g} s"
        )

    def finish(self) -> None:
        """Give every process what all of them trained.

        Raises:
            ConnectionError: a process is gone, or did not answer in time.
        """
        owners = [rank for rank in range(self.world) for _ in _share(len(self.stages), rank, self.world)]
        with self._together():
            for stage, owner in zip(self.stages, owners, strict=True):
                for tensor in own_tensors(self.student, stage).values():
                    dist.broadcast(tensor, owner, self._everybody)
        self._all_losses = [losses for part in self.agree(super().losses) for losses in part]

    def agree(self, found: Any) -> list[Any]:
        """What each process gave, in the order of the processes; all wait for one another.

        Raises:
            ConnectionError: a process is gone, or did not answer in time.
        """
        everything: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(everything, found, self._everybody)
        return everything

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.rank} lost another one of {self.world}: it ended, or did not answer for {self.timeout:g} s"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """This process's part of the state; what its neighbour has not sent yet of it is waited for."""
        queue = self.queues[0]
        while self.rank and len(queue) < self.settings.queue:
            queue.append(self._arrived())
        return super().state_dict()


def _share(count: int, rank: int, world: int) -> range:
    """The numbers of the stages that a process trains, of `count`."""
    return range(rank * count // world, (rank + 1) * count // world)


def _written(entry: Entry, device: torch.device) -> Tensor:
    """An entry as bytes."""
    buffer = io.BytesIO()
    torch.save(vars(entry), buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8).to(device)


def _read(content: Tensor, device: torch.device) -> Entry:
    """The entry that bytes stand for."""
    buffer = io.BytesIO(content.cpu().numpy().tobytes())
    return Entry(**torch.load(buffer, map_location=device, weights_only=True))
