"""The life of a low-bit checkpoint, on tiny models of every family: quantized on load, saved, reloaded in another process.

Everything here is exact. One fixture makes all checkpoints, and one process that never imports the plugin reloads them.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import MODELS, logits, make
from torch import Tensor
from transformers.utils import logging as transformers_logging

from optimum_zsaq import LowBitConfig, PreQuantConfig, pack, prepare
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
# One model of each way to hold a weight: with and without a tie, (I, O) weights, scaled and second tables, odd heads.
SCHEME_MODELS = ("bert-cls", "opt-tied", "gpt2-tied", "t5-untied", "bart-tied")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One checkpoint, and what was seen of the model before it was saved."""

    model: str
    scheme: str = "default"
    dtype: torch.dtype = torch.float32
    packed: bool = True
    folder: Path | None = None
    outputs: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    loading: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        state = "" if self.packed else "-fake"
        return f"{self.model}-{self.scheme}-{str(self.dtype).removeprefix('torch.')}{state}"

    def config(self) -> PreQuantConfig:
        return PreQuantConfig(**SCHEMES[self.scheme])


CASES = [
    *(Case(model, dtype=dtype) for model in MODELS for dtype in DTYPES),
    *(Case(model, scheme) for model in SCHEME_MODELS for scheme in SCHEMES if scheme != "default"),
    *(Case(model, packed=False) for model in MODELS),
    *(Case("llama-tied", scheme, packed=False) for scheme in SCHEMES if scheme not in ("default", "static")),
    *(Case("bart-tied", dtype=dtype, packed=False) for dtype in DTYPES[1:]),
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
        found["dtypes"] = {name: (str(p.dtype), p.requires_grad) for name, p in model.named_parameters()}
        found["buffers"] = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
        found["runtime"] = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "spec")}
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


def _float_model(case: Case):
    model = make(case.model).to(case.dtype)
    # what a fresh model has as zeros and ones must be seen too
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.empty(parameter.shape).uniform_(-0.2, 0.2, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    return model


def _make(case: Case, root: Path) -> None:
    model = _float_model(case)
    case.folder = root / case.id
    if case.packed:
        model.save_pretrained(root / f"{case.id}-float")
        model, info = type(model).from_pretrained(
            root / f"{case.id}-float", quantization_config=case.config(), dtype=case.dtype, output_loading_info=True
        )
        case.loading = {name: keys for name, keys in info.items() if keys}
    else:
        prepare(model, case.config().scheme(), case.config().ranges)
    case.outputs = logits(model)
    case.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(case.folder)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory) -> dict[str, dict]:
    """Make and save every case, reload all of them in one other process: case id -> what that process saw."""
    root = tmp_path_factory.mktemp("families")
    transformers_logging.disable_progress_bar()
    jobs = []
    for case in CASES:
        _make(case, root)
        jobs.append(
            {
                "auto": _auto_class(case.model),
                "folder": str(case.folder),
                "dtype": str(case.dtype).removeprefix("torch."),
                "again": str(root / f"{case.id}-again"),
                "result": str(root / f"{case.id}.pt"),
            }
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", RELOAD, str(root / "jobs.json")]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
    return {case.id: torch.load(root / f"{case.id}.pt", weights_only=False) for case in CASES}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(_bytes(a[k]), _bytes(b[k]))]
    assert not different


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reload_in_another_process_is_exact(reloaded, case):
    found = reloaded[case.id]
    assert "error" not in found
    assert found["class"] == MODELS[case.model][0].__name__
    assert found["loading"] == {}
    assert torch.isfinite(case.outputs).all()
    assert found["outputs"].dtype == case.outputs.dtype
    assert torch.equal(found["outputs"], case.outputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_saved_again_after_a_forward_is_the_same_checkpoint(reloaded, case):
    again = case.folder.parent / f"{case.id}-again"
    for name in ("config.json", "generation_config.json"):
        assert (case.folder / name).exists() == (again / name).exists()
        if (case.folder / name).exists():
            assert json.loads((case.folder / name).read_text()) == json.loads((again / name).read_text())
    _equal(load_file(case.folder / "model.safetensors"), load_file(again / "model.safetensors"))
    metadata = []
    for folder in (case.folder, again):
        with safe_open(folder / "model.safetensors", "pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_loading_info_is_empty_when_quantizing(reloaded, case):
    assert case.loading == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scales_stay_float32_and_frozen(reloaded, case):
    types = reloaded[case.id]["dtypes"]
    assert any(name.endswith("weight_scale") for name in types)
    for name, (dtype, trainable) in types.items():
        leaf = name.rpartition(".")[2]
        if leaf in SCALES:
            assert (dtype, trainable) == ("torch.float32", False)
        elif leaf in INTEGERS:
            assert dtype in ("torch.uint8", "torch.int32")
            assert not trainable
        else:
            assert dtype == str(case.dtype)
    assert not [name for name in reloaded[case.id]["buffers"] if "weight" in name or "input" in name]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_prepare_and_pack_give_the_tensors_of_quantize_on_load(reloaded, case):
    if case.scheme == "static":
        pytest.skip("calibration is compared in test_calibration_on_load")
    model = prepare(_float_model(case), case.config().scheme(), case.config().ranges)
    fake = logits(model)
    pack(model)
    assert torch.equal(logits(model), fake)
    assert torch.equal(fake, case.outputs)
    _equal(model.state_dict(), case.tensors)


@pytest.mark.parametrize("case", FAKE, ids=lambda case: case.id)
def test_fake_quantized_checkpoint_keeps_float_masters(reloaded, case):
    assert not LowBitConfig.from_json_file(_quantization_config(case.folder)).packed
    stored = load_file(case.folder / "model.safetensors")
    masters = dict(_float_model(case).named_parameters())
    shared = [name for name in masters if name in stored]
    assert len(shared) > len(masters) // 2
    assert all(torch.equal(stored[name], masters[name]) for name in shared)
    assert not [name for name in stored if name.endswith("weight_codes")]


def _quantization_config(folder: Path) -> Path:
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    path = folder / "quantization_config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("case", FAKE, ids=lambda case: case.id)
def test_reloaded_fake_quantized_model_packs_to_the_same_numbers(reloaded, case):
    model = MODELS[case.model][0].from_pretrained(case.folder, dtype=case.dtype)
    assert torch.equal(logits(pack(model)), case.outputs)


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_unknown_tables_stay_float(reloaded, name):
    case = next(case for case in PACKED if case.model == name and case.scheme == "default")
    table = json.loads((case.folder / "config.json").read_text())["quantization_config"]["modules"]
    heads = {"score", "classifier", "classification_head", "qa_outputs", "pre_classifier", "cls", "lm_head"}
    tied = name.endswith("-tied")
    packed = {key.removesuffix(".weight_codes") for key in case.tensors if key.endswith(".weight_codes")}
    assert packed
    assert not [layer for layer in packed if layer.split(".")[0] in heads]
    assert not [layer for layer in packed if "position" in layer or "relative" in layer or "token_type" in layer]
    assert "lm_head" not in table["float"] or not tied
    if "cls" in name:
        assert [layer for layer in table["float"] if layer.split(".")[0] in heads]


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
