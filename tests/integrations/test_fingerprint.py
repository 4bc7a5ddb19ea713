"""What tells two bases apart, and what does not."""

import copy

import pytest
import torch
from outlier_adapters import config
from peft import get_peft_model
from tiny_models import make, quantized
from transformers import BertForSequenceClassification

from optimum_zsaq import pack
from optimum_zsaq.integrations.fingerprint import check_fingerprint, fingerprint
from optimum_zsaq.integrations.peft import default_targets


# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def of(model):
    return fingerprint(model, default_targets(model))


SETTINGS = {"weight_bits": 3, "outliers": 0.02, "symmetric": False}


@pytest.fixture
def base(tmp_path):
    return quantized("bert-cls", tmp_path, **SETTINGS)


def test_every_state_of_a_checkpoint_has_the_same(base, tmp_path):
    expected = of(base)
    assert expected["scheme"] == "13 x W3 row, A8 dynamic, outliers=0.02; 1 x W8 row, outliers=0.02"
    base.save_pretrained(tmp_path / "saved")
    fake = quantized("bert-cls", tmp_path, packed=False, **SETTINGS)
    for same in (type(base).from_pretrained(tmp_path / "saved"), fake, pack(copy.deepcopy(fake)), base.to(torch.bfloat16)):
        assert of(same) == expected


def test_the_body_alone_has_the_same(tmp_path):
    body = quantized("bert", tmp_path)
    body.save_pretrained(tmp_path / "saved")
    whole = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert of(whole) == of(body)


def test_adapters_heads_norms_and_biases_are_no_part_of_it(base):
    expected = of(base)
    model = get_peft_model(base, config(train_norms=True))
    assert of(model.model) == expected
    base = model.unload()
    for name, parameter in base.named_parameters():
        if "classifier" in name or "LayerNorm" in name or name.endswith(".bias"):
            parameter.data.add_(1.0)
    assert of(base) == expected


@pytest.mark.parametrize(
    "name",
    ["weight_codes", "weight_scale", "weight_zero_point", "weight_outlier_positions", "weight_outlier_values"],
)
@pytest.mark.parametrize("layer", ["bert.encoder.layer.1.output.dense", "bert.embeddings.word_embeddings"])
def test_one_changed_number_makes_another_base(base, layer, name):
    expected = of(base)
    tensor = base.get_submodule(layer).get_parameter(name).data.view(-1)
    tensor[-1] = tensor[-1] + 1
    found = of(base)
    assert found["scheme"] == expected["scheme"]
    assert found["weights"] != expected["weights"]


def test_static_input_ranges_are_part_of_it(tmp_path):
    base = quantized("bert-cls", tmp_path, activations="static")
    expected = of(base)
    base.bert.pooler.dense.input_scale.data.mul_(2.0)
    assert of(base) != expected


def test_of_a_float_model_the_targets_count(tmp_path):
    model = make("bert-cls")
    expected = of(model)
    assert expected["scheme"] == "13 x float, float32"
    model.classifier.weight.data.add_(1.0)
    assert of(model) == expected
    model.bert.pooler.dense.weight.data[0, 0] += 1.0
    assert of(model) != expected


def test_the_error_says_what_differs():
    one = {"scheme": "1 x W4 row", "weights": "00000001"}
    check_fingerprint(one, dict(one))
    with pytest.raises(
        ValueError, match="it was trained on one of '1 x W3 row', and this model is '1 x W4 row'.*config.check_base"
    ):
        check_fingerprint(one, {**one, "scheme": "1 x W3 row"})
    with pytest.raises(ValueError, match="the scheme is the same, the weights are not .checksums 00000002 and 00000001"):
        check_fingerprint(one, {**one, "weights": "00000002"})
