"""Anonymous memory while a BERT-base shape is quantized on load and reloaded: the float model is never in memory whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel


MEASURE = """
import json, sys, threading, time
import torch, transformers, transformers.models.bert.modeling_bert
from transformers import BertModel
from optimum_zsaq import PreQuantConfig
from optimum_zsaq.size import measure_size

def anonymous():  # bytes that no file backs, as the kernel counts them
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peaks.append(anonymous())

source, config, target = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
before, peaks, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = BertModel.from_pretrained(source, quantization_config=PreQuantConfig(**config))
done.set()
thread.join()
packed = sum(measure_size(model).bytes.values())
if target:
    model.save_pretrained(target)
print(json.dumps({"over_packed": max([anonymous(), *peaks]) - before - packed, "packed": packed}))
"""
MEGABYTE = 10**6


def measure(source: Path, config: dict, target: Path | str = "") -> dict:
    command = [sys.executable, "-P", "-c", MEASURE, str(source), json.dumps(config), str(target)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=source.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to count anonymous memory")
def test_bert_base_streams(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(tmp_path / "float")
    bits = {"weight_bits": 4, "embedding_bits": 4}
    quantized = measure(tmp_path / "float", bits, tmp_path / "packed")
    assert quantized["packed"] < 60 * MEGABYTE
    assert quantized["over_packed"] <= 150 * MEGABYTE
    reloaded = measure(tmp_path / "packed", {"runtime": "small"})
    assert reloaded["over_packed"] <= 60 * MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to count anonymous memory")
def test_reconstruction_of_blocks_on_disk_holds_one_at_a_time():
    """Two models of which one has twenty blocks more: what that takes is what those blocks take packed, not as floats."""
    study = Path(__file__).parents[1] / "examples" / "study" / "mrem_offload.py"
    found = []
    for count in (4, 24):
        done = subprocess.run(
            [sys.executable, str(study), "--blocks", str(count)], capture_output=True, text=True, timeout=900, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[1]["checkpoint_bytes"] - found[0]["checkpoint_bytes"] > 250 * MEGABYTE
    assert found[1]["peak_bytes"] - found[0]["peak_bytes"] < 100 * MEGABYTE
