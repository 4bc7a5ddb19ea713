"""Trainings in processes of their own, which a test may kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers import TrainerCallback


TESTS = Path(__file__).parents[1]


class Slow(TrainerCallback):
    """Leaves a test the time to kill the process after its first checkpoint."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 3:
            time.sleep(0.5)


def environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def command(script: Path, folder: Path, out: Path, launcher: tuple[str, ...] = (), **options) -> list[str]:
    return [sys.executable, *launcher, str(script), str(folder), str(out), json.dumps(options)]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert done.returncode == 0, errors[:3] or done.stderr[-500:]


def kill_after_a_checkpoint(command: list[str], folder: Path, log: Path) -> None:
    """SIGKILL between two steps or wherever it hits, between the checkpoints of steps 4 and 6."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while not (folder / "checkpoint-4" / "trainer_state.json").exists() and time.time() < deadline:
        assert process.poll() is None, log.read_text()[-500:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "checkpoint-6").exists()
