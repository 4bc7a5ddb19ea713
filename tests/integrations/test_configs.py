"""Configs: a closed world with helpful errors, and one JSON that every algorithm's config reads back."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import logits, make, quantized
from transformers.quantizers.auto import AutoQuantizationConfig

from optimum_zsaq import LowBitConfig, PreQuantConfig, QuantScheme, QuantSpec, prepare
from optimum_zsaq.integrations.configs import ALGORITHMS, FORMAT_VERSION, body_name
from optimum_zsaq.surgery import low_bit_layers, select


CLASSES = [LowBitConfig, PreQuantConfig]

RAISES = {
    "unknown field": ({"weight_bit": 4}, "PreQuantConfig has no field 'weight_bit'; did you mean 'weight_bits'?"),
    "unknown field far from all": ({"zzz": 1}, r"has no field 'zzz'; the fields are \['weight_bits', 'embedding_bits'"),
    "near group size": ({"groupsize": 32}, "did you mean 'group_size'"),
    "near skip list": ({"modules_to_not_covert": []}, "did you mean 'modules_to_not_convert'"),
    "weight bits low": ({"weight_bits": 1}, "weight_bits=1 is not a width.*an integer from 2 to 8$"),
    "weight bits high": ({"weight_bits": 9}, "weight_bits=9 is not a width"),
    "weight bits none": ({"weight_bits": None}, "weight_bits=None is not a width"),
    "weight bits float": ({"weight_bits": 4.0}, "weight_bits=4.0 is not a width"),
    "weight bits bool": ({"weight_bits": True}, "weight_bits=True is not a width"),
    "weight bits text": ({"weight_bits": "4"}, "weight_bits='4' is not a width"),
    "embedding bits": ({"embedding_bits": 16}, "embedding_bits=16 is not a width.*, or None to leave them float"),
    "activation bits": ({"activation_bits": 0}, "activation_bits=0 is not a width.*, or None to leave them float"),
    "granularity": (
        {"granularity": "column"},
        r"granularity='column' is not allowed; use one of \('auto', 'row', 'tensor'",
    ),
    "ranges": (
        {"ranges": "max"},
        r"ranges='max' is not allowed; use one of \('auto', 'mse', 'minmax', 'signed', 'lsq', 'ternary'",
    ),
    "activations": ({"activations": "off"}, r"activations='off' is not allowed; use one of \('dynamic', 'static'\)"),
    "runtime": ({"runtime": "slow"}, r"runtime='slow' is unknown; use one of \('fast', 'small'\)"),
    "kernel": ({"kernel": "int5"}, r"kernel='int5' is unknown; use one of \[.*'int4', 'int8', .*'reference'\], or None"),
    "symmetric": ({"symmetric": "no"}, r"symmetric='no' is not allowed; use one of \(True, False, None\)"),
    "minimum of symmetric": (
        {"minimum": True, "symmetric": True},
        "minimum=True is for asymmetric weights",
    ),
    "group of one": ({"granularity": "group", "group_size": 1}, "needs a group size and got group_size=1"),
    "size without group": ({"group_size": 32, "granularity": "row"}, "group_size=32 has no meaning with granularity='row'"),
    "ternary of four bits": ({"ranges": "ternary"}, "ranges='ternary' has three levels and got weight_bits=4"),
    "ternary with zero point": (
        {"ranges": "ternary", "weight_bits": 2, "symmetric": False},
        "ranges='ternary' is symmetric and got symmetric=False",
    ),
    "data for dynamic inputs": ({"calibration_data": ["a"]}, "calibration_data measures static.*activations='dynamic'"),
    "data for float inputs": (
        {"calibration_data": ["a"], "activations": "static", "activation_bits": None},
        "calibration_data measures static.*activation_bits=None",
    ),
    "static float inputs": ({"activations": "static", "activation_bits": None}, "activations='static' needs a width"),
    "outliers none": ({"outliers": 0.0}, r"outliers=0.0 is not a share.*in \(0, 1\) or None"),
    "outliers all": ({"outliers": 1.0}, "outliers=1.0 is not a share"),
    "outliers percent": ({"outliers": 5}, "outliers=5 is not a share"),
    "outliers text": ({"outliers": "0.5"}, "outliers='0.5' is not a share"),
    "smoothing": ({"smoothing": 1.5}, "smoothing=1.5 is no power of a channel's size; use a number from 0 to 1, or None"),
    "outlier scope": ({"outlier_scope": "model"}, r"outlier_scope='model' is not allowed; use one of \('matrix', 'row'\)"),
    "outliers nan": ({"outliers": float("nan")}, "outliers=nan is not a share"),
    "no samples": ({"calibration_samples": 0}, "calibration_samples=0 is not a count; use at least 1"),
    "samples text": ({"calibration_samples": "many"}, "calibration_samples='many' is not a count"),
    "samples float": ({"calibration_samples": 1.5}, "calibration_samples=1.5 is not a count"),
    "seed text": ({"seed": "a"}, "seed='a'"),
    "seed float": ({"seed": 0.5}, "seed=0.5"),
    "packed text": ({"packed": "yes"}, "packed='yes'"),
    "skip text": ({"modules_to_not_convert": "pooler"}, "modules_to_not_convert='pooler'.*list"),
    "skip numbers": ({"modules_to_not_convert": [1]}, r"modules_to_not_convert=\[1\].*list of strings"),
    "skip number": ({"modules_to_not_convert": 3}, "modules_to_not_convert=3.*list"),
    "newer format": (
        {"format_version": FORMAT_VERSION + 1},
        f"format_version={FORMAT_VERSION + 1}.*install --upgrade",
    ),
    "format zero": ({"format_version": 0}, "format_version=0"),
    "format text": ({"format_version": "1"}, "format_version='1'"),
    "another method": ({"quant_method": "gptq"}, "quant_method='gptq'"),
}


@pytest.mark.parametrize("case", RAISES)
def test_raises(case):
    fields, message = RAISES[case]
    with pytest.raises(ValueError, match=message):
        PreQuantConfig(**fields)


@pytest.mark.parametrize("case", RAISES)
def test_raises_from_a_dict_too(case):
    fields, message = RAISES[case]
    with pytest.raises(ValueError, match=message):
        LowBitConfig.from_dict({"quant_method": "zsaq", "algorithm": "prequant", **fields})


GOOD = {
    "defaults": {},
    "three bits": {"weight_bits": 3, "embedding_bits": None, "activation_bits": None},
    "group": {"granularity": "group", "group_size": 64, "symmetric": False},
    "tensor": {"granularity": "tensor", "ranges": "minmax"},
    "ternary": {"weight_bits": 2, "ranges": "ternary", "embedding_bits": 2},
    "ternary weights, wider tables": {"weight_bits": 2, "ranges": "ternary", "embedding_bits": 8},
    "static": {"activations": "static", "calibration_samples": 3, "seed": 7},
    "static with data": {"activations": "static", "calibration_data": ["a text"]},
    "outliers": {"outliers": 0.005},
    "outliers of rows": {"outliers": 0.005, "outlier_scope": "row"},
    "skip": {"modules_to_not_convert": ["pooler", "encoder.layer.0"]},
    "empty skip": {"modules_to_not_convert": []},
    "skip tuple": {"modules_to_not_convert": ("pooler",)},
    "small": {"runtime": "small"},
    "fake": {"packed": False},
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", GOOD)
def test_round_trip(tmp_path, cls, case):
    config = cls(**GOOD[case])
    fields = config.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert fields["quant_method"] == "zsaq"
    assert fields["format_version"] == FORMAT_VERSION
    assert fields["algorithm"] == cls.algorithm
    assert not {"runtime", "calibration_data"} & fields.keys()
    for again in (LowBitConfig.from_dict(fields), cls.from_dict(fields), AutoQuantizationConfig.from_dict(fields)):
        assert type(again) is cls
        assert again == config
        assert again.to_dict() == fields
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert LowBitConfig.from_json_file(tmp_path / "config.json") == config
    assert LowBitConfig.from_json_file(str(tmp_path / "config.json")) == config
    assert dict(config) == fields
    assert isinstance(config.scheme(), QuantScheme)


def test_to_dict_is_a_copy():
    config = PreQuantConfig(modules_to_not_convert=["pooler"])
    config.to_dict()["modules_to_not_convert"].append("x")
    assert config.modules_to_not_convert == ["pooler"]
    names = ["pooler"]
    config = PreQuantConfig(modules_to_not_convert=names)
    names.append("x")
    assert config.modules_to_not_convert == ["pooler"]


def test_from_dict_leaves_the_dict_alone():
    fields = PreQuantConfig(weight_bits=3).to_dict()
    before = json.dumps(fields)
    LowBitConfig.from_dict(fields)
    assert json.dumps(fields) == before


def test_from_dict_takes_overrides_and_returns_unused():
    fields = PreQuantConfig(weight_bits=3).to_dict()
    assert LowBitConfig.from_dict(fields, weight_bits=5).weight_bits == 5
    config, unused = LowBitConfig.from_dict(fields, return_unused_kwargs=True)
    assert type(config) is PreQuantConfig
    assert unused == {}


def test_algorithm_picks_the_class():
    assert set(ALGORITHMS) >= {"none", "prequant"}
    for name, cls in ALGORITHMS.items():
        assert type(LowBitConfig.from_dict({"algorithm": name})) is cls
        assert cls.algorithm == name
    with pytest.raises(ValueError, match=r"algorithm='gptq' is unknown.*'none', 'prequant'.*pip install --upgrade"):
        LowBitConfig.from_dict({"algorithm": "gptq"})


def test_equality():
    assert PreQuantConfig() == PreQuantConfig()
    assert PreQuantConfig() != PreQuantConfig(weight_bits=3)
    assert PreQuantConfig() != LowBitConfig()
    assert PreQuantConfig() != PreQuantConfig().to_dict()
    assert PreQuantConfig(runtime="small") == PreQuantConfig()
    with pytest.raises(TypeError, match="unhashable"):
        hash(PreQuantConfig())


def test_repr_is_json():
    assert '"weight_bits": 3' in repr(PreQuantConfig(weight_bits=3))


def test_loading_attributes():
    assert PreQuantConfig(runtime="small").get_loading_attributes() == {"runtime": "small", "kernel": None}
    assert PreQuantConfig(kernel="int8").get_loading_attributes() == {"runtime": "fast", "kernel": "int8"}
    assert PreQuantConfig().get_loading_attributes() == {"runtime": "fast", "kernel": None}


def test_loading_attributes_are_not_stored():
    config = PreQuantConfig(runtime="small", kernel="reference")
    assert not {"runtime", "kernel"} & set(config.to_dict())
    assert "kernel" not in config.to_json_string()
    assert config == PreQuantConfig()


def test_get_is_that_of_a_dict():
    """transformers asks a config that is passed as `config=` so."""
    config = PreQuantConfig()
    assert config.get("quant_method") == "zsaq"
    assert config.get("load_in_8bit", False) is False
    assert config.get("load_in_4bit") is None


def test_defaults_are_those_of_the_design():
    config = PreQuantConfig()
    assert (config.weight_bits, config.embedding_bits, config.activation_bits) == (4, 8, 8)
    assert (config.granularity, config.symmetric, config.ranges, config.activations) == ("auto", None, "auto", "dynamic")


GROUPS_OF_64 = QuantSpec(4, "group", 64, symmetric=False, minimum=True, scale_bits=16)


@pytest.mark.parametrize(
    ("fields", "encoder", "decoder"),
    [
        ({}, QuantSpec(4), GROUPS_OF_64),
        ({"weight_bits": 6}, QuantSpec(6), replace(GROUPS_OF_64, bits=6)),
        ({"weight_bits": 8}, QuantSpec(8), QuantSpec(8)),
        ({"granularity": "row"}, QuantSpec(4), QuantSpec(4)),
        ({"symmetric": True}, QuantSpec(4), replace(GROUPS_OF_64, symmetric=True, minimum=False)),
        ({"symmetric": False}, QuantSpec(4, symmetric=False), GROUPS_OF_64),
        ({"minimum": True}, QuantSpec(4, symmetric=False, minimum=True), GROUPS_OF_64),
        ({"minimum": False}, QuantSpec(4), replace(GROUPS_OF_64, minimum=False)),
        ({"ranges": "ternary", "weight_bits": 2}, QuantSpec(2, ternary=True), QuantSpec(2, ternary=True)),
        *(({"group_size": 32, **f}, *[replace(GROUPS_OF_64, group_size=32)] * 2) for f in ({}, {"granularity": "group"})),
        ({"granularity": "group"}, GROUPS_OF_64, GROUPS_OF_64),
    ],
    ids=str,
)
def test_what_is_left_to_us_depends_on_the_kind_of_model(fields, encoder, decoder):
    config = PreQuantConfig(**fields)
    assert config.scheme().weights == config.scheme(make("bert-cls")).weights == config.scheme(make("t5-tied")).weights
    assert (config.scheme().weights, config.scheme(make("llama-tied")).weights) == (encoder, decoder)
    grouped = "group" if "group" in (fields.get("granularity"), *fields) or "group_size" in fields else "row"
    assert config.scheme(make("llama-tied")).embeddings.granularity == grouped


def test_what_energies_are_for():
    config, own = PreQuantConfig(), PreQuantConfig(ranges="minmax")
    for name, found in (("bert-cls", "auto"), ("t5-tied", "auto"), ("llama-tied", "energy"), ("gpt2-untied", "energy")):
        model = make(name)
        assert (config.ranges_for(model), own.ranges_for(model)) == (found, "minmax")
        assert config.runs_float_model(model) == (found == "energy")
        assert not LowBitConfig().runs_float_model(model)


def test_minima_come_back(tmp_path):
    """Scales and minima as they were, in half the bytes."""
    model = quantized("llama-tied", tmp_path, group_size=8)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    for (name, layer), (_, other) in zip(low_bit_layers(model), low_bit_layers(again), strict=True):
        if layer.owner is layer:
            assert layer.weight_scale.dtype == layer.weight_minimum.dtype == torch.float16, name
            assert torch.equal(layer.weight_scale, other.weight_scale)
            assert torch.equal(layer.weight_minimum, other.weight_minimum)
    assert torch.equal(logits(model), logits(again))
    assert again.config.quantization_config.format_version == 2


def test_a_table_of_format_1_is_read(tmp_path):
    """It knew neither minima nor float16 scales."""
    model = quantized("bert-cls", tmp_path, granularity="group", group_size=8, symmetric=False, minimum=False)
    table = model.config.quantization_config.to_dict()
    for row in ("linear", "embedding"):
        table["modules"][row]["weight"]["scale_bits"] = 32
        old = {k: v for k, v in table["modules"][row]["weight"].items() if k not in ("minimum", "scale_bits")}
        table["modules"][row]["weight"] = old
    config = PreQuantConfig.from_dict({**table, "format_version": 1})
    assert config.default_rows()["linear"].weight == QuantSpec(4, "group", 8, symmetric=False)


def test_calibration_data_is_never_stored(tmp_path):
    model = make("bert-cls")
    config = PreQuantConfig(activations="static", calibration_data=["a secret text"])
    model.config.quantization_config = config
    assert "secret" not in model.config.to_json_string()
    assert "secret" not in repr(config)
    assert "secret" not in json.dumps(config.to_dict())


def test_the_table_of_a_model(tmp_path):
    """Two widths: the most common row is the default, the others are exceptions, by name without the body's prefix."""
    model = make("bert-cls")
    scheme = QuantScheme(QuantSpec(4), QuantSpec(8), skip=("layer.1",))
    prepare(model, scheme)
    table = model.config.quantization_config.modules
    assert table["linear"]["weight"]["bits"] == 4
    assert table["embedding"]["weight"]["bits"] == 8
    assert table["exceptions"] == {}
    assert "encoder.layer.1.output.dense" in table["float"]
    assert "classifier" in table["float"]
    prepare(model, QuantScheme(QuantSpec(8), QuantSpec(8)))
    table = model.config.quantization_config.modules
    assert not [name for name in table["float"] if "layer.1" in name]
    assert {row["weight"]["bits"] for row in table["exceptions"].values()} | {table["linear"]["weight"]["bits"]} == {4, 8}


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied", "bart-tied", "gpt2-untied"])
def test_table_read_back_is_what_was_selected(tmp_path, name):
    model = quantized(name, tmp_path)
    plain = make(name)
    assert model.config.quantization_config.table(plain) == select(plain, PreQuantConfig().scheme(plain))


def test_body_names():
    bert, gpt2 = make("bert-cls"), make("gpt2-tied")
    assert body_name(bert, "bert.encoder.layer.0") == "encoder.layer.0"
    assert body_name(bert, "classifier") == "classifier"
    assert body_name(gpt2, "transformer.h.0") == "h.0"
    assert body_name(torch.nn.Linear(1, 1), "a.b") == "a.b"
