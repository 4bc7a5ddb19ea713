"""Autoload: a process that never imports the package loads checkpoints; nothing of ours breaks another import."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from optimum_zsaq import PreQuantConfig


# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def run(code: str, cwd, **env: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, away from the repository."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Packed checkpoints of a tiny BERT at 8 and 4 bits, and their logits."""
    folder = tmp_path_factory.mktemp("autoload")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder / "float")
    logits = {}
    for bits in (8, 4):
        config = PreQuantConfig(weight_bits=bits, embedding_bits=bits)
        model = BertForSequenceClassification.from_pretrained(folder / "float", quantization_config=config)
        model.save_pretrained(folder / str(bits))
        with torch.no_grad():
            logits[bits] = model(torch.arange(5, 12)[None]).logits.tolist()
    return folder, logits


LOAD = """
import json, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
with torch.no_grad():
    print(json.dumps(model(torch.arange(5, 12)[None]).logits.tolist()))
"""


@pytest.mark.parametrize("bits", [8, 4])
def test_loads_in_a_process_that_never_imports_the_package(checkpoints, tmp_path, bits):
    folder, logits = checkpoints
    done = run(LOAD.format(folder=folder / str(bits)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == logits[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_turned_off_it_stops_with_an_error(checkpoints, tmp_path, bits):
    done = run(LOAD.format(folder=checkpoints[0] / str(bits)), tmp_path, OPTIMUM_ZSAQ_AUTOLOAD="0")
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "mismatch" in done.stderr


def test_turned_off_register_does_it(checkpoints, tmp_path):
    code = "import optimum_zsaq; optimum_zsaq.register()\n" + LOAD.format(folder=checkpoints[0] / "4")
    done = run(code, tmp_path, OPTIMUM_ZSAQ_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.modeling_utils",
        "from transformers.quantizers import HfQuantizer",
        "from transformers import AutoModel",
        "import torch, transformers",
        "import optimum_zsaq",
        "from optimum.zsaq import PreQuantConfig",
        "from optimum_zsaq.integrations.quantizer import LowBitQuantizer",
    ],
)
def test_registers_whatever_is_imported_first(tmp_path, first):
    code = f"""{first}
from transformers import BertModel
from transformers.quantizers import auto
assert "zsaq" in auto.AUTO_QUANTIZER_MAPPING and "zsaq" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimum-zsaq" not in done.stderr


@pytest.mark.parametrize("broken", ["optimum_zsaq.integrations.registration", "optimum_zsaq.autoload"])
def test_a_fault_of_ours_breaks_no_import(tmp_path, broken):
    code = f"""
import sys
sys.modules["{broken}"] = None  # importing it now raises ModuleNotFoundError
import optimum_zsaq
import torch
import transformers.modeling_utils
from transformers import BertModel
print("alive")"""
    done = run(code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0" if broken.endswith("autoload") else "1")
    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout
    assert "optimum-zsaq could not" in done.stderr


def test_a_loader_that_fails_is_reported_and_left_to_the_others(tmp_path):
    code = """
import importlib.util, torch
real = importlib.util.find_spec
def broken(name, package=None):
    if name == "transformers.modeling_utils":
        raise RuntimeError("no")
    return real(name, package)
importlib.util.find_spec = broken
import transformers.modeling_utils
print("alive")"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "could not follow the import" in done.stderr


ADAPTER = """
{first}
import json, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained("{folder}/4")
model = PeftModel.from_pretrained(base, "{folder}/adapter")
with torch.no_grad():
    print(json.dumps(model(torch.arange(5, 12)[None]).logits.tolist()))
"""


@pytest.fixture(scope="module")
def adapter(checkpoints):
    """A trained outlier adapter beside the checkpoints, and its logits."""
    from peft import get_peft_model

    from optimum_zsaq import OutlierConfig

    folder = checkpoints[0]
    model = get_peft_model(BertForSequenceClassification.from_pretrained(folder / "4"), OutlierConfig(fraction=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder, model(torch.arange(5, 12)[None]).logits.tolist()


@pytest.mark.parametrize(
    "first", ["import peft", "import torch", "import transformers", "from transformers import AutoModel"]
)
def test_an_adapter_loads_in_a_process_that_never_imports_the_package(adapter, tmp_path, first):
    done = run(ADAPTER.format(folder=adapter[0], first=first), tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == adapter[1]


def test_without_the_package_an_adapter_names_it(adapter, tmp_path):
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained('{adapter[0]}/adapter')"
    done = run(code, tmp_path, OPTIMUM_ZSAQ_AUTOLOAD="0")
    assert done.returncode != 0
    assert "KeyError: 'OPTIMUM_ZSAQ'" in done.stderr


def test_peft_without_what_we_need_breaks_no_import(tmp_path):
    code = """
import sys
sys.modules["optimum_zsaq.integrations.peft"] = None
from peft import LoraConfig
print("alive")"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout
    assert "optimum-zsaq could not register with PEFT" in done.stderr


def test_import_is_light(tmp_path):
    code = """
import sys, optimum_zsaq
heavy = {"torch", "transformers", "peft", "datasets", "optimum"} & set(sys.modules)
assert not heavy, heavy
import torch
from optimum_zsaq import PreQuantConfig
PreQuantConfig()
heavy = {"peft", "datasets", "evaluate", "sklearn"} & set(sys.modules)
assert not heavy, heavy"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
