"""Stages on processes of their own give what stages that take turns give. Slow: each test starts processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from algorithms.mrem_run import reconstruct


pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def started(tmp_path: Path, world: int, **options) -> list[subprocess.Popen]:
    """The processes of a run, without a launcher: nobody stops the others when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HERE), str(HERE.parent), *sys.path]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(HERE / "mrem_run.py"), str(tmp_path), json.dumps(options)]
    errors = [(tmp_path / f"errors-{rank}").open("w") for rank in range(world)]
    return [
        subprocess.Popen(command, env={**around, "RANK": str(rank)}, stderr=errors[rank], stdout=errors[rank])
        for rank in range(world)
    ]


def ended(tmp_path: Path, running: list[subprocess.Popen], within: float = 120.0) -> list[dict]:
    """What the processes wrote; an empty dict of one that wrote nothing."""
    until = time.monotonic() + within
    try:
        for process in running:
            process.wait(max(1.0, until - time.monotonic()))
    finally:
        for process in running:
            process.kill()
    files = [tmp_path / f"rank-{rank}.pt" for rank in range(len(running))]
    for rank, file in enumerate(files):
        if not file.exists() and running[rank].returncode not in (1,):
            raise AssertionError((tmp_path / f"errors-{rank}").read_text()[-2000:])
    return [torch.load(file) if file.exists() else {} for file in files]


def assert_equal(found: list[dict], expected) -> None:
    for part in found:
        assert part["world"] == len(found)
        assert part["losses"] == expected.losses
        assert all(torch.equal(part["student"][name], value) for name, value in expected.student.state_dict().items())


OPTIONS = [{}, {"stages": 4, "forcing": 0.0}, {"stages": 3, "queue": 20}, {"model": "t5-tied", "stages": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_processes_equal_one(tmp_path, options):
    found = ended(tmp_path, started(tmp_path, 2, **options))
    assert len(found) == 2
    assert_equal(found, reconstruct(**options))


def test_four_processes_equal_one(tmp_path):
    assert_equal(ended(tmp_path, started(tmp_path, 4, stages=4)), reconstruct(stages=4))


def test_a_slow_process_changes_nothing(tmp_path):
    found = ended(tmp_path, started(tmp_path, 2, pause=[1, 4, 5.0]))
    assert_equal(found, reconstruct())
    found = ended(tmp_path, started(tmp_path, 2, pause=[0, 4, 5.0]))
    assert_equal(found, reconstruct())
    assert found[1]["waited"] > 2.0


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_other(tmp_path, dead):
    began = time.monotonic()
    found = ended(tmp_path, started(tmp_path, 2, steps=400, stop=[dead, 30]))
    assert found[dead] == {}
    assert found[1 - dead]["world"] == 2
    message = f"process {1 - dead} lost process {dead}, which trains the stages beside its own"
    assert found[1 - dead]["error"].startswith(message)
    assert time.monotonic() - began < 55.0  # of a timeout of 60


@pytest.mark.parametrize("still", [0, 1])
def test_a_process_that_stands_still_is_waited_for_no_longer_than_the_timeout(tmp_path, still):
    running = started(tmp_path, 2, steps=400, pause=[still, 30, 60.0], timeout=3.0)
    running[1 - still].wait(50.0)
    running[still].kill()
    (found,) = [torch.load(tmp_path / f"rank-{1 - still}.pt")]
    assert "did not answer for 3 s" in found["error"]


def test_fewer_stages_than_processes(tmp_path):
    for process in (running := started(tmp_path, 3, stages=2)):
        process.wait(60.0)
    assert all(process.returncode for process in running)
    assert "stages=2 cannot keep 3 processes busy; use at least 3 stages, or start 2" in (tmp_path / "errors-0").read_text()
