"""The file that a training is kept in while a model loads, so that a run that was interrupted goes on."""

import logging
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algorithms.pipeline import PipelineReconstruction
from .configs import LowBitConfig


logger = logging.getLogger(__name__)


class TrainingState:
    """The file that a run is kept in while it trains, if its config names one; written beside itself, then renamed.

    Args:
        config (`LowBitConfig`): what is run; its `state` names the file.
        run: the training: `done`, `teacher`, `state_dict()` and `load_state_dict()`.
        data (`dict`, *optional*): what it is trained on.
    """

    def __init__(self, config: LowBitConfig, run: Any, data: dict[str, Any] | None = None):
        self.path, self.run = config.state and Path(config.state), run
        settings = {**config.to_dict(), "data": data}
        self._of = {"config": repr(sorted(settings.items(), key=str)), "teacher": _checksum(run.teacher)}

    def load(self) -> dict[str, Any] | None:
        """Go on from the file, if there is one; gives what `save` was given.

        Raises:
            ValueError: it is no such file, is damaged, or belongs to another model or to other settings.
        """
        return self._read(self.path) if self.path is not None and self.path.exists() else None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = torch.load(path, weights_only=True)
            of = state["of"]
        except Exception as error:  # whatever unpickling a damaged file raises
            raise ValueError(f"{path} is no state of a training, or is damaged; delete it, or name another file") from error
        if of != self._of:
            what = "another model" if of.get("teacher") != self._of["teacher"] else "other settings"
            raise ValueError(f"{path} is the state of a training with {what}; delete it, or name another file")
        self.run.load_state_dict(state["run"])
        logger.warning("Going on from step %d, kept in %s", self.run.done, path)
        return state["won"]

    def save(self, won: dict[str, Any]) -> None:
        """Keep the training as it is now, and what was measured of its start."""
        if self.path is not None:
            self._write(self.path, won)

    def _write(self, path: Path, won: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        torch.save({"of": self._of, "won": won, "run": self.run.state_dict()}, beside)
        beside.replace(path)

    def remove(self) -> None:
        """The training is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def kept(self) -> str:
        """For people: what is left of a training that could not go on."""
        if self.path is None:
            return "nothing was kept; name a file with state= to be able to go on"
        return f"what was done is kept beside {self.path}; start it again to go on"


class PipelineState(TrainingState):
    """The part of a run on several processes that this one keeps: a file a process and step, beside `state`.

    A process deletes an older file of its own only when all have written the newer one, so that there is always a step of
    which every process has its file.
    """

    run: PipelineReconstruction

    def _file(self, done: int | str) -> Path:
        return self.path.with_name(f"{self.path.name}.{self.run.rank}-of-{self.run.world}.step-{done}")

    def _steps(self) -> set[int]:
        return {int(file.name.rpartition("-")[2]) for file in self.path.parent.glob(self._file("*").name)}

    def load(self) -> dict[str, Any] | None:
        """Go on from the last step of which every process has its file, if there is one.

        Raises:
            ValueError: see `TrainingState.load`.
            ConnectionError: see `PipelineReconstruction.agree`.
        """
        if self.path is None:
            return None
        common = set.intersection(*self.run.agree(self._steps()))
        return self._read(self._file(max(common))) if common else None

    def save(self, won: dict[str, Any]) -> None:
        """Keep this process's part, when all processes have come to the same step."""
        if self.path is None:
            return
        done = self.run.workers[0].training.done
        self._write(self._file(done), won)
        self.run.agree(done)
        for step in self._steps() - {done}:
            self._file(step).unlink(missing_ok=True)

    def remove(self) -> None:
        """The training is done, here and elsewhere."""
        if self.path is not None:
            self.run.agree("removing")
            for step in self._steps():
                self._file(step).unlink(missing_ok=True)


def _checksum(model: nn.Module) -> int:
    found = 0
    for p in (p for p in model.parameters() if not p.is_meta):
        found = zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy(), found)
    return found
