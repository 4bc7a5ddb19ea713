"""Bytes: what `measure_size` and `inspect_checkpoint` say is what the files hold."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from optimum_zsaq import PreQuantConfig
from optimum_zsaq.report.inspection import group_layers, inspect_checkpoint
from optimum_zsaq.size import measure_size


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}


def build(family: str):
    torch.manual_seed(0)
    if family == "bert":
        return BertForMaskedLM(BertConfig(**SIZES))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=family == "llama-tied", **SIZES))


@pytest.fixture(params=["bert", "llama-tied", "llama-untied"])
def saved(request, tmp_path):
    model = build(request.param)
    model.save_pretrained(tmp_path / "float")
    config = PreQuantConfig(weight_bits=3, embedding_bits=4, symmetric=False, outliers=0.01)
    packed = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "out")
    return model, packed, tmp_path / "out"


def test_parts_add_up_to_the_tensors_on_disk(saved):
    model, packed, folder = saved
    size = measure_size(packed)
    tensors = load_file(folder / "model.safetensors")
    assert sum(size.bytes.values()) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert size.parameters == model.num_parameters()
    codes = [t for name, t in tensors.items() if name.endswith("weight_codes")]
    assert size.bytes["codes"] == sum(t.numel() for t in codes)
    assert size.layers["codes"] == len(codes)


def test_a_float_model_is_all_float():
    model = build("llama-tied")
    size = measure_size(model)
    assert dict(size.bytes) == {"float": 4 * model.num_parameters()}


def test_inspection_agrees_with_the_loaded_model(saved):
    _, packed, folder = saved
    report = inspect_checkpoint(str(folder))
    expected = measure_size(packed).bytes
    assert {part: report["bytes"][part] for part in expected} == dict(expected)
    assert report["bytes"]["on_disk"] == (folder / "model.safetensors").stat().st_size
    assert report["memory"]["fast"] > report["memory"]["small"]
    names = [name for name, module in packed.named_modules() if hasattr(module, "spec")]
    assert [layer["name"] for layer in report["layers"] if layer["bits"]] == names
    assert sum(row["count"] for row in group_layers(report["layers"])) == len(report["layers"])


def test_inspection_of_shards(saved, tmp_path):
    _, packed, folder = saved
    packed.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    one, many = inspect_checkpoint(str(folder)), inspect_checkpoint(str(tmp_path / "shards"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert {k: v for k, v in one["bytes"].items() if k in ("codes", "scales", "float")} == {
        k: v for k, v in many["bytes"].items() if k in ("codes", "scales", "float")
    }


def test_inspection_without_weights(saved, tmp_path):
    _, _, folder = saved
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        inspect_checkpoint(str(tmp_path / "empty"))
