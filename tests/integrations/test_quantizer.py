"""Quantizing while loading: heads, layers that the checkpoint lacks, ties, dtypes, devices, and transformers' contract."""

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from conformance import exactly
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, inputs, logits, make, make_tokenizer, quantized
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from optimum_zsaq import LowBitConfig, PreQuantConfig, QuantScheme, QuantSpec, pack, prepare
from optimum_zsaq.integrations.quantizer import LowBitQuantizer, QuantizeOnLoad
from optimum_zsaq.layers import LowBitLayer, PackedEmbedding, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


W8 = {"weight_bits": 8, "embedding_bits": 8, "activation_bits": None}


def _edit(folder: Path, **fields) -> None:
    """Change fields of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _float_list(model) -> list[str]:
    return model.config.quantization_config.modules["float"]


# Heads and layers that are not in the checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "config", "head"),
    [
        (tf.BertForQuestionAnswering, "bert", "qa_outputs"),
        (tf.BertForTokenClassification, "bert", "classifier"),
        (tf.RobertaForSequenceClassification, "roberta-cls", "classifier.out_proj"),
        (tf.LlamaForSequenceClassification, "llama", "score"),
        (tf.T5ForQuestionAnswering, "t5-tied", "qa_outputs"),
        (tf.T5ForTokenClassification, "t5-tied", "classifier"),
        (tf.T5ForSequenceClassification, "t5-tied", "classification_head.out_proj"),
        (tf.BartForQuestionAnswering, "bart-tied", "qa_outputs"),
        (tf.GPT2ForQuestionAnswering, "gpt2-tied", "qa_outputs"),
        (tf.BertForPreTraining, "bert", "cls.seq_relationship"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_heads_stay_float(tmp_path, cls, config, head):
    """Those of models whose body has no attribute of its own (T5ForQuestionAnswering) too."""
    torch.manual_seed(0)
    cls(MODELS[config][1]()).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path, quantization_config=PreQuantConfig())
    assert type(model.get_submodule(head)) is nn.Linear
    assert head in _float_list(model)
    assert len(list(low_bit_layers(model))) >= 9


def test_new_classifier_is_float_and_finite(tmp_path, caplog):
    """A layer that the checkpoint does not contain would get codes of uninitialised memory."""
    make("bert").save_pretrained(tmp_path)
    cls = tf.BertForSequenceClassification
    model, info = cls.from_pretrained(tmp_path, quantization_config=PreQuantConfig(), output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert type(model.classifier) is nn.Linear
    assert "classifier" in _float_list(model)
    assert torch.isfinite(logits(model)).all()
    assert 0 < model.classifier.weight.abs().max() < 0.2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
def test_layers_missing_in_the_checkpoint_become_float(tmp_path, caplog, packed):
    """A base checkpoint without its pooler: the pooler is a Linear of the body, and new."""
    make("bert-mlm-tied").save_pretrained(tmp_path / "mlm")
    config = PreQuantConfig(packed=packed)
    with caplog.at_level(logging.WARNING):
        model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "mlm", quantization_config=config)
    assert type(model.bert.pooler.dense) is nn.Linear
    assert "newly initialised and left float: bert.pooler.dense" in caplog.text
    assert {"pooler.dense", "classifier"} <= set(_float_list(model))
    assert model.bert.pooler.dense.weight.requires_grad
    assert 0 < model.bert.pooler.dense.weight.std() < 0.1
    outputs = logits(model)
    assert torch.isfinite(outputs).all()
    model.save_pretrained(tmp_path / "saved")
    again, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), outputs)


def test_nothing_to_quantize(tmp_path):
    make("bert-cls").save_pretrained(tmp_path)
    config = PreQuantConfig(modules_to_not_convert=["bert"])
    with pytest.raises(ValueError, match="nothing to quantize in BertForSequenceClassification.*shorten that list"):
        tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)


def test_pattern_that_matches_nothing(tmp_path):
    make("bert-cls").save_pretrained(tmp_path)
    config = PreQuantConfig(modules_to_not_convert=["poolr"])
    with pytest.raises(ValueError, match="'poolr', which matches no Linear or embedding layer.*pooler"):
        tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)


def test_pattern_keeps_layers_float(tmp_path):
    """A bare "pooler" protects bert.pooler.dense, which transformers' own rule does not."""
    model = quantized("bert-cls", tmp_path, modules_to_not_convert=["pooler", "layer.1.attention"])
    assert type(model.bert.pooler.dense) is nn.Linear
    assert type(model.bert.encoder.layer[1].attention.self.query) is nn.Linear
    assert isinstance(model.bert.encoder.layer[1].output.dense, PackedLinear)
    assert {"pooler.dense", "encoder.layer.1.attention.self.query"} <= set(_float_list(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_without_a_range(tmp_path, bad):
    model = make("bert-cls")
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer.1.output.dense: a weight is NaN or infinite"):
        type(model).from_pretrained(tmp_path, quantization_config=PreQuantConfig())


# Ties -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt-tied", "llama-tied", "t5-tied", "bart-tied", "bert-mlm-tied", "gpt2-tied"])
@pytest.mark.parametrize("skip", [[], ["0"]], ids=["empty", "one"])
def test_tied_head_with_a_users_list(tmp_path, name, skip):
    """transformers' default list of what stays float is replaced by a user's, and then a packed lm_head is NaN."""
    model = quantized(name, tmp_path, modules_to_not_convert=skip, **W8)
    outputs, expected = logits(model), logits(make(name))
    assert torch.isfinite(outputs).all()
    assert (outputs - expected).norm() < 0.05 * expected.norm()
    head = model.get_output_embeddings()
    assert head.owner is model.get_input_embeddings()
    assert sum(name.endswith("weight_codes") for name in model.state_dict()) == len(
        [layer for _, layer in low_bit_layers(model) if layer.owner is layer]
    )


def test_tied_head_cannot_stay_float_alone(tmp_path):
    with pytest.raises(ValueError, match="'lm_head' shares its weight with the embedding 'model.embed_tokens'"):
        quantized("llama-tied", tmp_path, modules_to_not_convert=["lm_head"])


@pytest.mark.parametrize("kept", ["both", "head", "embedding"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "opt-tied"])
def test_checkpoint_with_either_or_both_tied_tensors(tmp_path, name, kept):
    model = make(name)
    model.save_pretrained(tmp_path / "plain")
    expected = type(model).from_pretrained(tmp_path / "plain", quantization_config=PreQuantConfig())
    model.save_pretrained(tmp_path / "kept")
    tensors = load_file(tmp_path / "kept" / "model.safetensors")
    table = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[table].clone()
    if kept == "head":
        del tensors[table]
    elif kept == "embedding":
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "kept" / "model.safetensors", {"format": "pt"})
    config = PreQuantConfig()
    loaded, info = type(model).from_pretrained(tmp_path / "kept", quantization_config=config, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved")), logits(expected))


@pytest.mark.parametrize("factor", [2.0, -1.0, None], ids=["doubled", "negated", "other"])
def test_checkpoint_with_two_different_tensors_for_a_tie(tmp_path, factor):
    """Doubled: the codes are equal and only the scales differ."""
    model = make("llama-untied")
    if factor is not None:
        model.lm_head.weight.data = factor * model.model.embed_tokens.weight.data
    model.save_pretrained(tmp_path)
    _edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="another weight for a layer that is tied to model.embed_tokens.*untied|=False"):
        type(model).from_pretrained(tmp_path, quantization_config=PreQuantConfig(**W8, ranges="mse"))


def test_untied_checkpoint_keeps_its_own_head(tmp_path):
    model = make("llama-untied")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=PreQuantConfig())
    assert type(loaded.lm_head) is nn.Linear
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# Dtypes ---------------------------------------------------------------------------------------------------------------


def test_float16_checkpoint_on_cpu_is_float32_unless_asked(tmp_path, caplog):
    make("bert-cls").half().save_pretrained(tmp_path / "float16")
    cls, any_cls = tf.BertForSequenceClassification, tf.AutoModelForSequenceClassification
    config = PreQuantConfig()
    with caplog.at_level(logging.WARNING):
        found = {
            "class": cls.from_pretrained(tmp_path / "float16", quantization_config=config),
            "auto class": any_cls.from_pretrained(tmp_path / "float16", quantization_config=config),
            "dtype auto": cls.from_pretrained(tmp_path / "float16", quantization_config=config, dtype="auto"),
            "device map": cls.from_pretrained(tmp_path / "float16", quantization_config=config, device_map="auto"),
        }
    assert {name: model.dtype for name, model in found.items()} == dict.fromkeys(found, torch.float32)
    assert caplog.text.count("on CPU its float part is loaded as float32 (dtype= overrides this)") == len(found)
    assert torch.isfinite(logits(found["class"])).all()


HALF = {
    "dtype": {"dtype": torch.float16},
    "string": {"dtype": "float16"},
    "torch_dtype": {"torch_dtype": torch.float16},
    "torch_dtype string": {"torch_dtype": "float16"},
    "device map": {"dtype": torch.float16, "device_map": "cpu"},
    "auto device map": {"dtype": torch.float16, "device_map": "auto"},
}


@pytest.mark.parametrize("options", HALF.values(), ids=HALF)
@pytest.mark.parametrize("stage", ["quantize", "reload"])
def test_an_explicit_float16_is_honoured(tmp_path, caplog, options, stage):
    cls, any_cls = tf.BertForSequenceClassification, tf.AutoModelForSequenceClassification
    make("bert-cls").half().save_pretrained(tmp_path)
    extra = {"quantization_config": PreQuantConfig()}
    if stage == "reload":
        cls.from_pretrained(tmp_path, dtype=torch.float16, **extra).save_pretrained(tmp_path / "saved")
        tmp_path, extra = tmp_path / "saved", {}
    with caplog.at_level(logging.WARNING):
        for loader in (cls, any_cls):
            model = loader.from_pretrained(tmp_path, **options, **extra)
            assert model.dtype == torch.float16
            assert logits(model).dtype == torch.float16
    assert "float16; on CPU" not in caplog.text


def test_dtype_of_a_pipeline(tmp_path):
    make("bert-cls").half().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = tf.BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=PreQuantConfig(), dtype=torch.float16
    )
    model.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    for options, expected in (
        ({}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "float16"}, torch.float16),
        ({"model_kwargs": {"dtype": torch.float16}}, torch.float16),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
    ):
        pipe = tf.pipeline("text-classification", str(tmp_path / "saved"), **options)
        assert pipe.model.dtype == expected
        assert pipe("w5 w6 w7")[0]["label"].startswith("LABEL_")


def test_dtype_of_another_from_pretrained_on_the_stack_does_not_count(tmp_path):
    """Only the `dtype=` of transformers' own call is the user's."""
    make("bert-cls").half().save_pretrained(tmp_path)

    def from_pretrained(dtype):
        return tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=PreQuantConfig())

    assert from_pretrained(dtype=torch.float16).dtype == torch.float32


def test_dtype_through_a_subclass(tmp_path):
    class Mine(tf.BertForSequenceClassification):
        @classmethod
        def from_pretrained(cls, path, **options):
            return super().from_pretrained(path, **options)

    make("bert-cls").half().save_pretrained(tmp_path)
    for options, expected in (({}, torch.float32), ({"dtype": torch.float16}, torch.float16)):
        model = Mine.from_pretrained(tmp_path, quantization_config=PreQuantConfig(), **options)
        assert model.dtype == expected


def test_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    make("llama-tied").to(torch.bfloat16).save_pretrained(tmp_path)
    for granularity, dtype in (("row", torch.float32), ("group", torch.float16)):
        config = PreQuantConfig(granularity=granularity)
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        assert model.dtype == torch.bfloat16
        assert all(layer.owner.weight_scale.dtype == dtype for _, layer in low_bit_layers(model.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_t5_dtype_probe(tmp_path, dtype):
    """T5 casts to the dtype of `wo.weight` unless that is int8; every `wo` is packed and close to the float model."""
    model = quantized("t5-tied", tmp_path, dtype=dtype, **W8)
    layers = [layer for name, layer in model.named_modules() if name.endswith("DenseReluDense.wo")]
    assert len(layers) == 4
    assert all(isinstance(layer, PackedLinear) for layer in layers)
    assert all(layer.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype) for layer in layers)
    expected = logits(make("t5-tied"))
    assert (logits(model).float() - expected).norm() < 0.06 * expected.norm()


# Configs and devices --------------------------------------------------------------------------------------------------


def test_config_from_a_dict_and_from_json(tmp_path):
    """A dict names the quant_method, as transformers asks; without an algorithm it is the common config."""
    expected = quantized("bert-cls", tmp_path, weight_bits=3, granularity="tensor", ranges="mse")
    fields = {"quant_method": "zsaq", "algorithm": "prequant", "weight_bits": 3, "granularity": "tensor"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    folder, cls = tmp_path / "float", tf.BertForSequenceClassification
    for config in (fields, PreQuantConfig.from_json_file(tmp_path / "config.json")):
        model = cls.from_pretrained(folder, quantization_config=config)
        assert type(model.config.quantization_config) is PreQuantConfig
        assert torch.equal(logits(model), logits(expected))
    common = cls.from_pretrained(folder, quantization_config={"quant_method": "zsaq", "weight_bits": 3})
    assert type(common.config.quantization_config) is LowBitConfig
    assert common.config.quantization_config.granularity == "auto"


def test_a_users_config_can_be_used_twice(tmp_path):
    """Loading writes the table and the recipe into the model's config, not into the user's object."""
    config = PreQuantConfig(weight_bits=3)
    loaded = {}
    for name in ("bert-cls", "llama-tied"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        loaded[name] = type(model).from_pretrained(tmp_path / name, quantization_config=config)
    assert config == PreQuantConfig(weight_bits=3)
    for name, model in loaded.items():
        model.save_pretrained(tmp_path / f"{name}-saved")
        again = type(model).from_pretrained(tmp_path / f"{name}-saved")
        assert torch.equal(logits(again), logits(model))
        assert again.config.quantization_config.recipe["base_model"] == name


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", "sequential", {"": "cpu"}, torch.device("cpu")], ids=["cpu", "auto", "seq", "dict", "dev"]
)
@pytest.mark.parametrize("name", ["bert-cls", "llama-tied"])
def test_device_map(tmp_path, name, device_map):
    expected = quantized(name, tmp_path, ranges="mse")
    config = PreQuantConfig(ranges="mse")
    model = type(expected).from_pretrained(tmp_path / "float", quantization_config=config, device_map=device_map)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("kind", ["shards", "bin", "subfolder", "base"])
def test_kinds_of_float_checkpoints(tmp_path, kind):
    """However the float weights are stored, they are quantized to the same numbers."""
    expected = quantized("bert-cls", tmp_path, ranges="mse")
    model, options = make("bert-cls"), {"quantization_config": PreQuantConfig()}
    folder = tmp_path / "other"
    if kind == "subfolder":
        model.save_pretrained(folder / "inner")
        options["subfolder"] = "inner"
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "5GB")
    if kind == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if kind == "base":  # names without the body's prefix, as a base model has them
        tensors = load_file(folder / "model.safetensors")
        save_file({n.removeprefix("bert."): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved")), logits(expected))


def test_quantizing_onto_disk_is_refused(tmp_path):
    """transformers reads an offloaded weight from the float checkpoint again, under the marker's name."""
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    make("llama-untied").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        tf.LlamaForCausalLM.from_pretrained(
            tmp_path / "float",
            quantization_config=PreQuantConfig(),
            device_map={**device_map, "model.rotary_emb": "cpu"},
            offload_folder=tmp_path / "offload",
        )


def test_fake_quantized_on_load(tmp_path):
    model = quantized("llama-tied", tmp_path, packed=False, ranges="mse")
    expected = prepare(make("llama-tied"), PreQuantConfig().scheme(make("llama-tied")))
    assert model.hf_quantizer.is_qat_trainable
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(exactly(pack(model))), logits(expected))
    assert not model.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
def test_loading_report_is_silent(tmp_path, packed):
    """Static ranges and scales are in no float checkpoint; a table of them as MISSING only frightens."""
    make("bert-cls").save_pretrained(tmp_path)
    config = PreQuantConfig(packed=packed, activations="static", calibration_samples=2)
    cls = tf.BertForSequenceClassification
    _, info = cls.from_pretrained(tmp_path, quantization_config=config, output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}


def test_mixed_widths_by_two_calls_of_prepare(tmp_path):
    """The widths in the config are those of most layers, whichever came first; the table has the exceptions."""
    model = make("bert-cls")
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer.0.attention.self" not in n]
    prepare(model, QuantScheme(QuantSpec(4), skip=tuple(others)))
    prepare(model, QuantScheme(QuantSpec(8)))
    outputs = logits(pack(model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), outputs)
    assert again.config.quantization_config.weight_bits == 8
    assert len(again.config.quantization_config.modules["exceptions"]) == 3


# The contract ---------------------------------------------------------------------------------------------------------


def test_every_member_is_called_as_transformers_calls_it(tmp_path):
    model = quantized("bert-cls", tmp_path)
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, LowBitQuantizer)
    assert quantizer.is_serializable() is True
    assert quantizer.is_trainable is True
    assert quantizer.is_qat_trainable is False
    assert quantizer.is_compileable is True
    assert quantizer.requires_calibration is False
    assert quantizer.validate_environment(device_map=None, weights_only=True) is None
    assert quantizer.validate_environment(device_map={"": "cpu"}) is None
    assert quantizer.validate_environment() is None
    assert quantizer.update_device_map(None) is None
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    assert quantizer.update_dtype(torch.bfloat16) == torch.bfloat16
    assert quantizer.update_attn_implementation(model.config) is model.config
    assert quantizer.adjust_max_memory({0: 1}) == {0: 1}
    assert quantizer.get_weight_conversions() == []
    assert quantizer.update_weight_conversions([], model) == []
    assert quantizer.param_needs_quantization(model, "bert.pooler.dense.weight") is True
    assert quantizer.param_needs_quantization(model, "bert.pooler.dense.bias") is False
    assert quantizer.param_needs_quantization(model, "classifier.weight") is False
    assert isinstance(quantizer.get_quantize_ops(), QuantizeOnLoad)
    name = "bert.pooler.dense.weight_codes"
    assert quantizer.param_element_size(model, name, model.bert.pooler.dense.weight_codes) == 1
    state_dict, metadata = quantizer.get_state_dict_and_metadata(model)
    assert state_dict.keys() == model.state_dict().keys()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    assert model.is_quantized
    assert model.quantization_method == "zsaq"
    assert model.config.quantization_config.quant_method == "zsaq"


def test_overrides_take_what_the_base_class_takes():
    """A hook whose parameter is renamed would fail only where transformers passes it by keyword."""
    for name, override in vars(LowBitQuantizer).items():
        base = inspect.getattr_static(HfQuantizer, name, None)
        if name.startswith("__") or not inspect.isfunction(override) or not inspect.isfunction(base):
            continue
        flexible = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(override).parameters.values())
        missing = inspect.signature(base).parameters.keys() - inspect.signature(override).parameters.keys()
        assert flexible or not missing - {"kwargs"}, name
    assert isinstance(inspect.getattr_static(LowBitQuantizer, "is_trainable"), property)
    assert isinstance(inspect.getattr_static(LowBitQuantizer, "is_qat_trainable"), property)
    assert inspect.isfunction(inspect.getattr_static(LowBitQuantizer, "is_serializable"))


def test_packed_layers_are_what_other_tools_look_for(tmp_path):
    model = quantized("bert-cls", tmp_path)
    query, table = model.bert.encoder.layer[0].attention.self.query, model.get_input_embeddings()
    assert isinstance(query, nn.Linear)
    assert isinstance(table, nn.Embedding)
    assert isinstance(table, PackedEmbedding)
    assert query.weight.shape == (32, 1)
    assert isinstance(query.weight, nn.Parameter)
    assert not hasattr(query, "qweight")
    assert all(isinstance(layer, LowBitLayer) for _, layer in low_bit_layers(model))


def test_registered_once_and_for_all_algorithms():
    assert auto.AUTO_QUANTIZER_MAPPING["zsaq"] is LowBitQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["zsaq"] is LowBitConfig
    assert LowBitConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES


def test_quantizing_leaves_no_weight_converters_behind(tmp_path):
    """transformers reverses those at save: with a converter left there, tensors vanish from the file."""
    model = quantized("bert-cls", tmp_path)
    assert not [c for c in model._weight_conversions if "Quantize" in type(c).__name__]
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == model.state_dict().keys()
    assert inputs(model)["input_ids"].dtype == torch.int64
