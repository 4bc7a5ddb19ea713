"""The recipe: how a checkpoint was made, written down and never needed to read it."""

import json

import torch
import transformers as tf
from tiny_models import logits, make, make_tokenizer, quantized

import optimum_zsaq
from optimum_zsaq import PreQuantConfig, QuantScheme, QuantSpec, calibrate, pack, prepare


def _recipe(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]


def test_recipe_is_saved_and_survives(tmp_path):
    model = quantized("bert-cls", tmp_path, ranges="lsq", activations="static", calibration_samples=3, seed=4)
    model.save_pretrained(tmp_path / "saved")
    expected = {
        "base_model": "float",
        "ranges": "lsq",
        "smoothing": 0.0,
        "calibration": {"kind": "sampled token sequences", "count": 3, "seed": 4},
        "versions": {
            "optimum_zsaq": optimum_zsaq.__version__,
            "torch": torch.__version__,
            "transformers": tf.__version__,
        },
    }
    assert _recipe(tmp_path / "saved") == expected
    again = type(model).from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    assert _recipe(tmp_path / "again") == expected


def test_nothing_of_it_is_needed(tmp_path):
    model = quantized("bert-cls", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    content = json.loads(path.read_text())
    for recipe in (None, {}, {"base_model": None, "more": [1]}):
        content["quantization_config"]["recipe"] = recipe
        path.write_text(json.dumps(content))
        again = type(model).from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")  # a card is written from it


def test_without_static_ranges_no_data_is_told(tmp_path):
    model = quantized("bert-cls", tmp_path)
    assert model.config.quantization_config.recipe["calibration"] is None


def test_of_data_kind_count_and_hash(tmp_path):
    make("bert-cls").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = PreQuantConfig(activations="static", calibration_data=["w5 w6", "w7"], calibration_samples=1)
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    found = model.config.quantization_config.recipe["calibration"]
    assert found.keys() == {"kind", "count", "sha256"}
    assert (found["kind"], found["count"], len(found["sha256"])) == ("list", 1, 64)


def test_minmax_ranges_calibrate_with_minmax(tmp_path):
    """Static ranges of a min-max model hold all inputs that were seen."""
    found = {}
    for ranges in ("minmax", "mse"):
        model = quantized("bert-cls", tmp_path, ranges=ranges, activations="static", calibration_samples=64)
        layer = model.bert.encoder.layer[0].intermediate.dense
        found[ranges] = layer.input_scale.item()
    assert found["minmax"] >= found["mse"]


def test_model_made_in_memory_has_a_recipe(tmp_path):
    model = make("bert-cls")
    prepare(model, QuantScheme(QuantSpec(4), QuantSpec(8), QuantSpec(8, "tensor", symmetric=False)), "minmax")
    calibrate(model, [{"input_ids": torch.arange(5, 25).view(2, 10)}])
    pack(model)
    outputs = logits(model)
    model.save_pretrained(tmp_path)
    assert _recipe(tmp_path)["base_model"] == ""
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), outputs)
