"""SQuATConfig: what from_pretrained gives with it, and how it is stored."""

import pytest
import torch
from tiny_models import MODELS, logits, make, make_tokenizer

from optimum_zsaq import LowBitConfig, SQuATConfig, prepare
from optimum_zsaq.layers.common import STEP_SIZES
from optimum_zsaq.surgery import low_bit_layers


def load(tmp_path, name: str = "bert-cls", **settings):
    make(name).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return MODELS[name][0].from_pretrained(tmp_path, quantization_config=SQuATConfig(**settings))


@pytest.mark.parametrize("name", ["bert-cls", "gpt2-tied", "t5-tied"])
def test_loads_what_prepare_makes(tmp_path, name):
    model = load(tmp_path, name, weight_bits=2, embedding_bits=2)
    plain = make(name)
    expected = prepare(plain, SQuATConfig(weight_bits=2, embedding_bits=2).scheme(plain), "auto")
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_config.packed is False


def test_every_step_size_has_its_value_and_is_trainable(tmp_path):
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 20)]
    model = load(tmp_path, activations="static", calibration_data=texts)
    found = [p for _, layer in low_bit_layers(model) for n in STEP_SIZES if (p := layer._parameters.get(n)) is not None]
    assert len(found) > 20
    assert all(p.requires_grad and torch.isfinite(p).all() and (p > 0).all() for p in found)
    assert model.config.quantization_config.recipe["calibration"]["count"] == len(texts)


def test_a_packed_model_has_none_to_train(tmp_path):
    model = load(tmp_path / "float")
    model.save_pretrained(tmp_path / "fake")
    again = type(model).from_pretrained(tmp_path / "fake")
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.config.quantization_config, SQuATConfig)
    packed = load(tmp_path / "again", packed=True)
    trained = {
        n for _, layer in low_bit_layers(packed) for n, p in layer.named_parameters(recurse=False) if p.requires_grad
    }
    assert trained <= {"bias"}


@pytest.mark.parametrize(
    ("granularity", "bits", "same"), [("tensor", 2, "lsq"), ("row", 2, "mse"), ("tensor", 3, "mse")], ids=str
)
def test_automatic_ranges(granularity, bits, same):
    scheme = SQuATConfig(weight_bits=bits, embedding_bits=4, granularity=granularity).scheme()
    found, expected = (prepare(make("bert"), scheme, ranges) for ranges in ("auto", same))
    for (name, one), (_, other) in zip(low_bit_layers(found), low_bit_layers(expected), strict=True):
        if "embeddings" not in name:
            assert torch.equal(one.weight_scale, other.weight_scale)


def test_is_read_from_a_dict():
    fields = {"quant_method": "zsaq", "algorithm": "squat", "weight_bits": 2}
    config = LowBitConfig.from_dict(fields)
    assert type(config) is SQuATConfig
    assert (config.packed, config.ranges) == (False, "auto")
    assert SQuATConfig.from_dict(config.to_dict()) == config
