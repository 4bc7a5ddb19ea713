"""Two gloo processes: FSDP2 loading of packed checkpoints, DDP training of a LoRA on one. Slow: each starts torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import logits, quantized


pytestmark = [
    pytest.mark.slow,
    # PEFT asks for it, and transformers has renamed it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

FSDP = """
import sys
import torch, transformers
import torch.distributed as dist
from tiny_models import logits
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

cls, folder, out = getattr(transformers, sys.argv[1]), sys.argv[2], sys.argv[3]
model = cls.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
sharded = sum(isinstance(p, DTensor) for n, p in model.named_parameters() if n.endswith("weight_codes"))
outputs = [logits(model) for _ in range(2)]
outputs = [o.full_tensor() if isinstance(o, DTensor) else o for o in outputs]
if dist.get_rank() == 0:
    torch.save({"sharded": sharded, "outputs": outputs}, out)
dist.barrier()
dist.destroy_process_group()
"""

SAVE = """
import sys
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(fsdp_size=2))
try:
    model.save_pretrained(sys.argv[2])
    result = "saved"
except Exception as error:
    result = f"{type(error).__name__}: {error}"
if dist.get_rank() == 0:
    open(sys.argv[3], "w").write(result)
dist.barrier()
dist.destroy_process_group()
"""

DDP = """
import json, sys
import torch, transformers
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import inputs, token_ids
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
base = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
wrapped = DistributedDataParallel(model)
broadcast = sum(b.numel() * b.element_size() for b in wrapped.modules_buffers) if wrapped.modules_buffers else 0
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids = token_ids(4)
for _ in range(3):
    mine = ids[2 * rank : 2 * rank + 2]
    loss = wrapped(input_ids=mine, labels=mine).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, sys.argv[2])
    json.dump(broadcast, open(sys.argv[3], "w"))
dist.barrier()
dist.destroy_process_group()
"""


def _torchrun(tmp_path: Path, script: str, *arguments) -> None:
    (tmp_path / "script.py").write_text(script)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert done.returncode == 0, errors[:3] or done.stderr[-500:]


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied", "bert-cls", "gpt2-tied"])
@pytest.mark.parametrize("settings", [{}, {"outliers": 0.02, "symmetric": False}], ids=["plain", "outliers"])
def test_fsdp_equals_one_process(tmp_path, name, settings):
    model = quantized(name, tmp_path, **settings)
    model.save_pretrained(tmp_path / "saved")
    _torchrun(tmp_path, FSDP, type(model).__name__, tmp_path / "saved", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["sharded"] > 0
    assert all(torch.equal(outputs, logits(model)) for outputs in found["outputs"])


def test_saving_a_sharded_model_is_exact_or_refused(tmp_path):
    model = quantized("llama-untied", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    _torchrun(tmp_path, SAVE, tmp_path / "saved", tmp_path / "again", tmp_path / "result.txt")
    result = (tmp_path / "result.txt").read_text()
    if result == "saved":
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))
    else:
        assert "sharded" in result
        assert result.startswith(("ValueError", "NotImplementedError"))


def test_ddp_trains_a_lora_as_one_process_does(tmp_path):
    """Equal up to the order of sums; and no packed tensor is broadcast at every forward."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import token_ids

    base = quantized("llama-tied", tmp_path)
    base.save_pretrained(tmp_path / "saved")
    _torchrun(tmp_path, DDP, tmp_path / "saved", tmp_path / "out.pt", tmp_path / "broadcast.json")
    found = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for part in token_ids(4).split(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        optimizer.step()
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    # 3 steps of float32 sums in another order
    assert all(torch.allclose(found[n], expected[n], rtol=1e-4, atol=1e-6) for n in found)
    codes = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight_codes"))
    assert json.loads((tmp_path / "broadcast.json").read_text()) < codes
