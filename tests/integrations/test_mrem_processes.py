"""MREM-P under a launcher: `from_pretrained` on two processes, killed and started again. Slow: starts processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import make, make_tokenizer


pytestmark = pytest.mark.slow
TEXTS = [" ".join(f"w{5 + (7 * i + j) % 90}" for j in range(3 + i % 9)) for i in range(14)]
SETTINGS = {"steps": 60, "batch_size": 4, "stages": 2, "ranges": "minmax", "embedding_bits": 4, "weight_bits": 2}
SETTINGS |= {"start_samples": 4, "autocast": "float32", "queue": 2, "parallel": True, "timeout": 30.0}

SCRIPT = """
import json, os, sys, time
import torch, transformers
from optimum_zsaq import MREMConfig
from optimum_zsaq.algorithms.reconstruction import StageTraining

torch.set_num_threads(1)
folder, out, settings, slow = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
step = StageTraining.step

def slower(*arguments):
    time.sleep(slow)
    return step(*arguments)

StageTraining.step = slower
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
model = transformers.BertForSequenceClassification.from_pretrained(folder, quantization_config=MREMConfig(**settings))
recipe = model.config.quantization_config.recipe["calibration"]
torch.save({"model": model.state_dict(), "recipe": recipe, "world": int(world)}, f"{out}/rank-{rank}.pt")
"""


def started(tmp_path: Path, world: int, slow: float = 0.0, **settings) -> list[subprocess.Popen]:
    make("bert-cls").save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    arguments = [tmp_path / "float", tmp_path, json.dumps({**SETTINGS, "calibration_data": TEXTS, **settings}), slow]
    command = [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)]
    running = []
    for rank in range(world):
        with (tmp_path / f"errors-{rank}").open("w") as errors:
            running.append(subprocess.Popen(command, env={**around, "RANK": str(rank)}, stdout=errors, stderr=errors))
    return running


def ended(tmp_path: Path, running: list[subprocess.Popen]) -> list[dict]:
    codes = [process.wait(400.0) for process in running]
    texts = [(tmp_path / f"errors-{rank}").read_text()[-2000:] for rank in range(len(running))]
    assert codes == [0] * len(running), texts
    return [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(len(running))]


def wait_for(tmp_path: Path, pattern: str) -> None:
    until = time.monotonic() + 300.0
    while not list(tmp_path.glob(pattern)):
        assert time.monotonic() < until, (tmp_path / "errors-0").read_text()[-2000:]
        time.sleep(0.05)


def assert_same(found: list[dict], expected: dict) -> None:
    for part in found:
        assert part["world"] == len(found) == 2
        assert part["recipe"]["won"] == expected["recipe"]["won"]
        assert len(part["recipe"]["idle"]) == 2
        assert all(torch.equal(part["model"][name], value) for name, value in expected["model"].items())


def test_two_processes_equal_one_also_when_one_was_killed(tmp_path):
    (whole,) = ended(tmp_path, started(tmp_path, 1))
    assert "idle" not in whole["recipe"]
    assert_same(ended(tmp_path, started(tmp_path, 2)), whole)
    state = {"state": str(tmp_path / "state")}
    running = started(tmp_path, 2, slow=0.2, **state)
    wait_for(tmp_path, "state.1-of-2.step-25")
    running[1].send_signal(signal.SIGKILL)
    assert running[0].wait(60.0) != 0
    text = (tmp_path / "errors-0").read_text()
    assert "process 0 lost process 1" in text or "process 0 lost another one of 2" in text
    assert f"what was done is kept beside {state['state']}; start it again to go on" in text
    assert_same(ended(tmp_path, started(tmp_path, 2, **state)), whole)
    assert "Going on from step" in (tmp_path / "errors-0").read_text()
    assert not list(tmp_path.glob("state*"))


def test_a_stopped_process_is_waited_for_and_goes_on(tmp_path):
    (whole,) = ended(tmp_path, started(tmp_path, 1))
    state = {"state": str(tmp_path / "state")}
    running = started(tmp_path, 2, slow=0.2, **state)
    wait_for(tmp_path, "state.1-of-2.step-25")
    running[1].send_signal(signal.SIGSTOP)
    time.sleep(5.0)
    running[1].send_signal(signal.SIGCONT)
    assert_same(ended(tmp_path, running), whole)
