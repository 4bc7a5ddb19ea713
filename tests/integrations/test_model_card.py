"""The README.md of a saved model: its metadata parses, its figures are right, its snippet runs."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_models import logits, make, quantized

from optimum_zsaq import PreQuantConfig, prepare
from optimum_zsaq.integrations.model_card import MARK, model_card
from optimum_zsaq.size import measure_size
from optimum_zsaq.surgery import low_bit_layers


def _card(tmp_path, name="bert-cls", **settings):
    model = quantized(name, tmp_path, **settings)
    model.save_pretrained(tmp_path / "saved")
    return model, (tmp_path / "saved" / "README.md").read_text()


def test_metadata_parses(tmp_path):
    _, text = _card(tmp_path)
    card = ModelCard(text)
    assert card.data["library_name"] == "transformers"
    assert {"zsaq", "quantized"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert MARK in card.text
    assert yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["Linear layers: 4 bits, one scale a row, symmetric", "8 bits, on a range a token", "embeddings: 8 bits"]),
        ({"granularity": "group", "group_size": 8}, ["one scale a group of 8"]),
        ({"symmetric": False, "granularity": "tensor"}, ["one scale a tensor, asymmetric"]),
        ({"weight_bits": 2, "ranges": "ternary"}, ["2 bits, one scale a row, ternary", "ranges: ternary"]),
        ({"embedding_bits": None, "activation_bits": None}, ["inputs of Linear layers: float", "embeddings: float"]),
        ({"activations": "static", "calibration_samples": 2}, ["on one stored range a layer", "sampled token sequences"]),
        ({"outliers": 0.005}, ["0.5 % of each matrix keep a float residual"]),
        ({"outliers": 0.005, "outlier_scope": "row"}, ["0.5 % of each row keep a float residual"]),
    ],
    ids=["default", "group", "asymmetric", "ternary", "weights", "static", "outliers", "rows"],
)
def test_scheme(tmp_path, settings, expected):
    _, text = _card(tmp_path, **settings)
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "bart-tied"])
def test_sizes(tmp_path, name):
    model, text = _card(tmp_path, name)
    size = measure_size(model)
    rows = {
        row[0]: [int(v.replace(",", "")) for v in row[1:]]
        for row in re.findall(r"^\| (\w[\w ]*) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    }
    assert rows["codes"][2] == size.bytes["codes"]
    assert rows["scales and zero points"][2] == size.bytes["scales"]
    assert rows["float"][2] == size.bytes["float"]
    dense = sum({id(t): t.numel() for t in make(name).state_dict(keep_vars=True).values()}.values())
    assert f"instead of {2 * dense:,} in float16" in text
    assert f"{len(list(low_bit_layers(model)))} layers are quantized" in text
    file = (tmp_path / "saved" / "model.safetensors").stat().st_size
    total = int(re.search(r"weights take ([\d,]+) bytes", text).group(1).replace(",", ""))
    assert total < file < total + 20_000  # the file also has a header


def test_snippet_runs(tmp_path, monkeypatch):
    model, text = _card(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert "import optimum_zsaq" in snippet
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert torch.equal(logits(names["model"]), logits(model))
    assert "pip install optimum-zsaq" in text


def test_no_path_of_this_machine(tmp_path):
    """The folder's name is told, not where it was."""
    _, text = _card(tmp_path)
    assert str(tmp_path) not in text
    assert "from `float`" in text
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_base_model_of_the_hub(tmp_path):
    model = quantized("bert-cls", tmp_path)
    model.config.quantization_config.recipe["base_model"] = "someone/tiny-bert"
    card = ModelCard(model_card(model, "out"))
    assert card.data.base_model == "someone/tiny-bert"
    assert "# tiny-bert, quantized by optimum-zsaq" in card.text


def test_data_is_described_and_not_quoted(tmp_path):
    from tiny_models import make_tokenizer

    make("bert-cls").save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    config = PreQuantConfig(activations="static", calibration_data=["w77 w78", "w79"])
    model = type(make("bert-cls")).from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "data: kind list, count 2, sha256 " in text
    assert "w77" not in text + (tmp_path / "saved" / "config.json").read_text()


def test_fake_quantized_model_has_a_card(tmp_path):
    model = prepare(make("bert-cls"), PreQuantConfig().scheme())
    model.save_pretrained(tmp_path)
    assert ModelCard((tmp_path / "README.md").read_text()).data["library_name"] == "transformers"
