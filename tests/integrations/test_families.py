"""The life of a low-bit checkpoint, on tiny models of every family: quantized on load, saved, reloaded in another process.

Everything here is exact. One fixture makes all checkpoints, and one process that never imports the plugin reloads them.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conformance import exactly
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import MODELS, logits, make
from tolerances import KERNEL_MODEL, relative_error
from torch import Tensor
from transformers.utils import logging as transformers_logging

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.integrations.forms import sampled_batches
from optimum_zsaq.integrations.rounding import SEQUENCES, SMOOTHED, look_at_inputs
from optimum_zsaq.layers.common import INTEGERS, SCALES
from optimum_zsaq.surgery import low_bit_layers


SCHEMES = {
    "default": {},
    "bits2": {"weight_bits": 2, "embedding_bits": 2},
    "bits3": {"weight_bits": 3, "embedding_bits": 3},
    "bits5": {"weight_bits": 5, "embedding_bits": 5},
    "bits6": {"weight_bits": 6, "embedding_bits": 6},
    "bits7": {"weight_bits": 7, "embedding_bits": 7},
    "bits8": {"weight_bits": 8, "embedding_bits": 8},
    "tensor": {"granularity": "tensor", "ranges": "minmax"},
    "group": {"granularity": "group", "group_size": 10},
    "asymmetric": {"symmetric": False, "ranges": "lsq"},
    "ternary": {"weight_bits": 2, "embedding_bits": 2, "ranges": "ternary"},
    "ternary-tensor": {"weight_bits": 2, "embedding_bits": 8, "ranges": "ternary", "granularity": "tensor"},
    "outliers": {"weight_bits": 3, "embedding_bits": 3, "outliers": 0.02},
    "all": {"symmetric": False, "granularity": "group", "group_size": 7, "outliers": 0.01, "activation_bits": 5},
    "weights-only": {"embedding_bits": None, "activation_bits": None},
    "static": {"activations": "static", "calibration_samples": 4},
}
HALF_MODELS = (
    "bert-cls",
    "roberta-cls",
    "distilbert-mlm-tied",
    "electra-cls",
    "deberta-cls",
    "opt-tied",
    "gpt2-untied",
    "llama-tied",
    "qwen2-untied",
    "t5-tied",
    "bart-tied",
)


@dataclass(frozen=True)
class Case:
    """One checkpoint: a model, how it is quantized, and in which state it is saved."""

    model: str
    scheme: str = "default"
    dtype: torch.dtype = torch.float32
    packed: bool = True

    @property
    def id(self) -> str:
        state = "" if self.packed else "-fake"
        return f"{self.model}-{self.scheme}-{str(self.dtype).removeprefix('torch.')}{state}"

    def config(self) -> PreQuantConfig:
        return PreQuantConfig(**SCHEMES[self.scheme])


CASES = [
    *(Case(model) for model in MODELS),
    *(Case(model, dtype=torch.bfloat16) for model in HALF_MODELS),
    *(Case(model, dtype=torch.float16) for model in ("bert-cls", "gpt2-untied", "llama-tied", "t5-tied", "bart-tied")),
    *(Case("llama-tied", f"bits{bits}") for bits in (2, 3, 5, 6, 7, 8)),
    *(Case("bert-cls", scheme) for scheme in SCHEMES if not scheme.startswith(("default", "bits"))),
    *(Case(model, scheme) for model in ("gpt2-tied", "t5-untied", "bart-tied") for scheme in ("all", "static", "ternary")),
    Case("gpt2-tied", "group"),
    Case("bart-tied", "outliers"),
    *(Case(model, packed=False) for model in MODELS),
    *(Case("gpt2-tied", scheme, packed=False) for scheme in ("ternary", "outliers", "all", "asymmetric")),
    *(Case(model, dtype=torch.bfloat16, packed=False) for model in ("bart-tied", "bert-cls")),
    Case("t5-tied", dtype=torch.float16, packed=False),
]
PACKED = [case for case in CASES if case.packed]
FAKE = [case for case in CASES if not case.packed]

RELOAD = """
import json, sys
import torch, transformers
from tiny_models import logits

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
for job in json.load(open(sys.argv[1])):
    found = {}
    try:
        auto = getattr(transformers, job["auto"])
        model, info = auto.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]), output_loading_info=True)
        found["class"] = type(model).__name__
        found["loading"] = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        found["outputs"] = logits(model)
        found["parameters"] = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        found["buffers"] = [name for name, _ in model.named_buffers()]
        model.save_pretrained(job["again"])
    except Exception as error:
        found["error"] = repr(error)
    torch.save(found, job["result"])
"""


def _auto_class(name: str) -> str:
    """The Auto class that loads the checkpoint of a model."""
    kinds = {"cls": "AutoModelForSequenceClassification", "mlm": "AutoModelForMaskedLM"}
    for part, auto in kinds.items():
        if part in name:
            return auto
    if name in ("bert", "llama"):
        return "AutoModel"
    return "AutoModelForSeq2SeqLM" if name.startswith(("t5", "bart")) else "AutoModelForCausalLM"


def _float_model(case: Case, folder: Path):
    """The float model in a case's dtype, also saved.

    A half-precision one is as transformers loads it, with rotary frequencies and a T5's `wo` in float32.
    """
    model = make(case.model).to(case.dtype)
    model.save_pretrained(folder)
    return model if case.dtype == torch.float32 else type(model).from_pretrained(folder, dtype=case.dtype)


def _make(case: Case, root: Path) -> dict:
    """Save a case's checkpoint as `root / case.id`; returns what to remember of the model."""
    model, loading = _float_model(case, root / f"{case.id}-float"), {}
    if case.packed:
        model, loading = type(model).from_pretrained(
            root / f"{case.id}-float", quantization_config=case.config(), dtype=case.dtype, output_loading_info=True
        )
    else:
        prepare(model, case.config().scheme(), case.config().ranges)
    outputs = logits(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(root / case.id)
    return {"outputs": outputs, "tensors": tensors, "loading": {name: keys for name, keys in loading.items() if keys}}


def _make_all(root: Path) -> None:
    """Make and save every case, then reload all of them in one other process."""
    jobs, made = [], {}
    for case in CASES:
        made[case.id] = _make(case, root)
        jobs.append(
            {
                "auto": _auto_class(case.model),
                "folder": str(root / case.id),
                "dtype": str(case.dtype).removeprefix("torch."),
                "again": str(root / f"{case.id}-again"),
                "result": str(root / f"{case.id}.pt"),
            }
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-c", RELOAD, str(root / "jobs.json")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    reloaded = {case.id: torch.load(root / f"{case.id}.pt", weights_only=False) for case in CASES}
    torch.save((made, reloaded), root / "found.pt")


@dataclass(frozen=True, repr=False)
class Found:
    """All cases by id: what was seen of the model that was saved, and of the one that the other process reloaded."""

    root: Path
    made: dict[str, dict]
    reloaded: dict[str, dict]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    """All cases, made once even where several pytest workers run this file."""
    transformers_logging.disable_progress_bar()
    shared = "PYTEST_XDIST_WORKER" in os.environ
    root = (tmp_path_factory.getbasetemp().parent if shared else tmp_path_factory.getbasetemp()) / "families"
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "found.pt").exists():
            _make_all(root)
    return Found(root, *torch.load(root / "found.pt", weights_only=False))


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(_bytes(a[k]), _bytes(b[k]))]
    assert not different


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reload_in_another_process_is_exact(found, case):
    made, reloaded = found.made[case.id], found.reloaded[case.id]
    assert reloaded.get("error") is None
    assert reloaded["class"] == MODELS[case.model][0].__name__
    assert reloaded["loading"] == {}
    assert torch.isfinite(made["outputs"]).all()
    assert reloaded["outputs"].dtype == made["outputs"].dtype
    assert torch.equal(reloaded["outputs"], made["outputs"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_saved_again_after_a_forward_is_the_same_checkpoint(found, case):
    first, again = found.root / case.id, found.root / f"{case.id}-again"
    assert {file.name for file in first.iterdir()} == {file.name for file in again.iterdir()}
    for file in first.glob("*.json"):
        assert _differences(json.loads(file.read_text()), json.loads((again / file.name).read_text())) == []
    _equal(load_file(first / "model.safetensors"), load_file(again / "model.safetensors"))
    headers = [_header(folder / "model.safetensors") for folder in (first, again)]
    assert _differences(*headers) == []


def _differences(a: dict, b: dict) -> list[str]:
    """Names whose values differ; == on the whole would print a long diff."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _header(file: Path) -> dict:
    """The plugin's part of a safetensors header: one entry for the table, one for each checksum."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["zsaq"])
    return {"table": header["table"], **header["crc32"]}


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_loading_info_is_empty_when_quantizing(found, case):
    assert found.made[case.id]["loading"] == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scales_stay_float32_and_frozen(found, case):
    parameters = found.reloaded[case.id]["parameters"]
    assert any(name.endswith("weight_scale") for name in parameters)
    for name, (dtype, trainable) in parameters.items():
        leaf = name.rpartition(".")[2]
        if leaf in SCALES:
            halves = (torch.float16,) if leaf in ("weight_scale", "weight_minimum") else ()
            assert dtype in (torch.float32, *halves)
            assert not trainable
        elif leaf in INTEGERS:
            assert dtype in (torch.uint8, torch.int32)
            assert not trainable
        elif "DenseReluDense.wo" not in name:  # transformers keeps it in float32 when the rest is float16
            assert dtype == case.dtype


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_codes_are_parameters_and_no_buffers(found, case):
    """DDP broadcasts buffers at every forward."""
    assert not [name for name in found.reloaded[case.id]["buffers"] if name.rpartition(".")[2] in (*SCALES, *INTEGERS)]
    assert case.packed == any(name.endswith("weight_codes") for name in found.reloaded[case.id]["parameters"])


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_prepare_and_pack_give_the_tensors_of_quantize_on_load(found, tmp_path, case):
    if case.scheme == "static":
        pytest.skip("calibrated on load; see tests/algorithms/test_calibration.py")
    model, config = _float_model(case, tmp_path), case.config()
    written = sampled_batches(model, SMOOTHED if config.smoothing_for(model) else SEQUENCES, config.seed)
    energies = look_at_inputs(model, config.scheme(model), config, written)
    prepare(model, config.scheme(model), config.ranges_for(model), energies)
    fake = logits(model)
    pack(model)
    assert torch.equal(logits(model), found.made[case.id]["outputs"])
    _equal(model.state_dict(), found.made[case.id]["tensors"])
    assert torch.equal(logits(exactly(model)), fake)
    assert relative_error(found.made[case.id]["outputs"], fake) <= KERNEL_MODEL[case.dtype]


@pytest.mark.parametrize("case", FAKE, ids=lambda case: case.id)
def test_fake_quantized_checkpoint_keeps_float_masters(found, tmp_path, case):
    fields = json.loads((found.root / case.id / "config.json").read_text())["quantization_config"]
    assert fields["packed"] is False
    stored = load_file(found.root / case.id / "model.safetensors")
    masters = dict(_float_model(case, tmp_path).named_parameters())
    assert masters.keys() == {name for name in stored if name.rpartition(".")[2] in ("weight", "bias")}
    assert all(torch.equal(stored[name], master) for name, master in masters.items())
    assert not [name for name in stored if name.endswith("weight_codes")]


@pytest.mark.parametrize("case", FAKE, ids=lambda case: case.id)
def test_reloaded_fake_quantized_model_packs_to_the_same_numbers(found, case):
    model = MODELS[case.model][0].from_pretrained(found.root / case.id, dtype=case.dtype)
    assert torch.equal(logits(exactly(pack(model))), found.made[case.id]["outputs"])


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_position_tables_stay_float(found, name):
    config = json.loads((found.root / Case(name).id / "config.json").read_text())
    packed = {key.removesuffix(".weight_codes") for key in found.made[Case(name).id]["tensors"] if key.endswith("_codes")}
    heads = {"score", "classifier", "classification_head", "pre_classifier", "cls", "lm_head", "generator_predictions"}
    assert packed
    assert not [layer for layer in packed if layer.split(".")[0] in heads]
    assert not [layer for layer in packed if "position" in layer or "relative" in layer or "token_type" in layer]
    float_layers = config["quantization_config"]["modules"]["float"]
    assert not [layer for layer in float_layers if layer in packed]
    if name.endswith("-cls"):
        assert heads & {layer.split(".")[0] for layer in float_layers}


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied", "bart-cls"])
def test_calibration_on_load(tmp_path, name):
    """Static ranges from sampled sequences are finite, positive, reproducible, and differ between seeds."""
    model = make(name)
    model.save_pretrained(tmp_path / "float")
    found = []
    for seed in (0, 0, 1):
        config = PreQuantConfig(activations="static", calibration_samples=4, seed=seed)
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
        ranges = [layer.input_scale for _, layer in low_bit_layers(loaded) if layer.input_scale is not None]
        assert ranges
        found.append(torch.cat(ranges).flatten())
    assert torch.isfinite(found[0]).all()
    assert (found[0] > 0).all()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
