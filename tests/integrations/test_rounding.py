"""Rounding that looks at the layers' inputs first: `PreQuantConfig(ranges="energy")`."""

import copy

import pytest
import torch
import transformers as tf
from conformance import exactly
from tiny_models import logits, make, make_tokenizer
from transformers import AutoConfig

from optimum_zsaq import MREMConfig, PreQuantConfig, SQuATConfig, ZSAQConfig, pack, prepare, unpack
from optimum_zsaq.algorithms.energy import input_energies
from optimum_zsaq.integrations.forms import sampled_batches
from optimum_zsaq.integrations.rounding import SEQUENCES
from optimum_zsaq.kinds import kind_of
from optimum_zsaq.layers.fake import _FakeQuant
from optimum_zsaq.report.inspection import inspect_checkpoint
from optimum_zsaq.surgery import low_bit_layers, select


SCHEME = {"weight_bits": 4, "granularity": "group", "group_size": 8}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared, relative."""
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


def load(folder, cls, **settings):
    config = PreQuantConfig(**{**SCHEME, "ranges": "energy", **settings})
    return cls.from_pretrained(folder, quantization_config=config).eval()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "bert-cls", "t5-tied"])
def test_is_what_its_parts_make_of_the_float_model(name, tmp_path):
    float_model = make(name).eval()
    float_model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = load(tmp_path, type(float_model), seed=3)
    reference = type(float_model).from_pretrained(tmp_path).eval()
    scheme = PreQuantConfig(**SCHEME).scheme()
    names = [n for n in select(reference, scheme) if not kind_of(reference.get_submodule(n)).table]
    energies = input_energies(reference, names, sampled_batches(reference, SEQUENCES, 3))
    assert set(energies) == set(names)
    pack(prepare(reference, scheme, "energy", energies))
    assert torch.equal(logits(exactly(found)), logits(exactly(reference)))


def test_saves_reloads_and_says_how_it_was_made(tmp_path):
    float_model = make("llama-tied")
    float_model.save_pretrained(tmp_path / "float")
    found = load(tmp_path / "float", type(float_model))
    found.save_pretrained(tmp_path / "out")
    again = type(float_model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(found), logits(again))
    recipe = AutoConfig.from_pretrained(tmp_path / "out").quantization_config["recipe"]
    assert (recipe["ranges"], recipe["calibration"]["kind"]) == ("energy", "sampled token sequences")
    assert recipe["calibration"]["count"] == SEQUENCES


def test_is_nearer_to_the_float_model_where_inputs_have_strong_channels(tmp_path):
    float_model = make("llama-untied").eval()
    with torch.no_grad():
        for name, p in float_model.named_parameters():
            if "layernorm" in name:
                p[::9] *= 12.0  # and their weights are small: what they carry together is as much as elsewhere
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                p[:, ::9] /= 4.0
    float_model.save_pretrained(tmp_path)
    wanted = logits(float_model)
    plain = {**SCHEME, "activation_bits": None, "embedding_bits": None}
    found = distance(logits(load(tmp_path, type(float_model), **plain)), wanted)
    for ranges in ("mse", "minmax", "signed"):
        other = load(tmp_path, type(float_model), **{**plain, "ranges": ranges})
        assert found < 0.8 * distance(logits(other), wanted)


def test_layers_that_the_checkpoint_lacks_stay_float(tmp_path):
    make("bert").save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    body = tf.BertModel(config, add_pooling_layer=False)
    body.save_pretrained(tmp_path / "body")
    found = load(tmp_path / "body", tf.BertModel)
    assert type(found.pooler.dense) is torch.nn.Linear
    assert "pooler.dense" in found.config.quantization_config.modules["float"]


def test_fake_quantized_and_static(tmp_path):
    float_model = make("bert-cls")
    float_model.save_pretrained(tmp_path)
    trained = load(tmp_path, type(float_model), packed=False)
    assert all(type(layer) is kind_of(layer).fake for _, layer in low_bit_layers(trained))
    static = load(tmp_path, type(float_model), activations="static", calibration_samples=8)
    ranges = [layer.input_scale for _, layer in low_bit_layers(static) if layer.spec.inputs is not None]
    assert ranges
    assert all(torch.isfinite(scale).all() for scale in ranges)


def test_hard_inputs_have_ranges_a_token_and_come_back_so(monkeypatch, tmp_path, caplog):
    """Everything counts as hard here; tiny models have nothing of the kind."""
    monkeypatch.setattr("optimum_zsaq.algorithms.hard_inputs._HARD", 0.0)
    monkeypatch.setattr("optimum_zsaq.algorithms.hard_inputs._BETTER", 2.0)
    make("llama-tied").save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    with caplog.at_level("INFO", "optimum_zsaq.integrations.recipe"):
        model = load(tmp_path / "float", tf.LlamaForCausalLM, activations="static", calibration_samples=8)
    layers = {n: m for n, m in low_bit_layers(model) if m.spec.inputs is not None}
    freed = [name for name, layer in layers.items() if layer.spec.inputs.granularity == "token"]
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in layers.items()}
    assert 0 < sum(sizes[name] for name in freed) <= 0.05 * sum(sizes.values())
    assert all(name in caplog.text for name in freed)
    assert all(layers[name].input_scale is None for name in freed)
    model.save_pretrained(tmp_path / "low")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "low").eval()
    assert {n: m.spec for n, m in low_bit_layers(again)} == {n: m.spec for n, m in low_bit_layers(model)}
    assert torch.equal(logits(exactly(again)), logits(exactly(model)))
    found = inspect_checkpoint(str(tmp_path / "low"))
    assert found["dynamic"] == pytest.approx(sum(sizes[name] for name in freed) / sum(sizes.values()))


def test_the_texts_of_static_ranges_stay_in_the_recipe(tmp_path):
    float_model = make("bert-cls")
    float_model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = load(tmp_path, type(float_model), activations="static", calibration_data=["the cat sat", "a dog ran"])
    data = found.config.quantization_config.recipe["calibration"]
    assert data["count"] == 2
    assert data["kind"] != "sampled token sequences"


@pytest.mark.parametrize(("ranges", "energies"), [("energy", None), ("mse", {})])
def test_prepare_takes_energies_with_that_method_alone(ranges, energies):
    with pytest.raises(ValueError, match="do not go together; use ranges='energy' with"):
        prepare(make("bert-cls"), PreQuantConfig(**SCHEME).scheme(), ranges, energies)


@pytest.mark.parametrize("algorithm", [PreQuantConfig, ZSAQConfig])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, algorithm, name, bad):
    """Also one that is not quantized: the model would have nothing to write."""
    model = make("llama-untied")
    model.get_parameter(name).data.view(-1)[0] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: a weight is NaN or infinite.*check the float checkpoint"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=algorithm())


def test_squat_refuses_it():
    with pytest.raises(ValueError, match="ranges='energy' is not allowed; use one of"):
        SQuATConfig(ranges="energy")
    with pytest.raises(ValueError, match="smoothing=0.5 looks at inputs of the float model, which SQuATConfig does not"):
        SQuATConfig(smoothing=0.5)


def test_padding_does_not_count():
    model = make("bert-cls").eval()
    ids = torch.randint(5, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    name = "bert.encoder.layer.0.attention.self.query"
    found = input_energies(model, [name], [{"input_ids": ids, "attention_mask": mask}])
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][mask.bool()]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert torch.allclose(found[name], seen[0].square().mean(dim=0))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "bert-cls"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_moves_sizes_before_ranges_are_found(tmp_path, name, activations):
    float_model = make(name).eval()
    float_model.save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    settings = {"weight_bits": 8, "activations": activations, "calibration_samples": 32}
    config = PreQuantConfig(**settings, smoothing=0.7)
    found = type(float_model).from_pretrained(tmp_path / "float", quantization_config=config).eval()
    plain = PreQuantConfig(**settings, smoothing=0.0)
    other = type(float_model).from_pretrained(tmp_path / "float", quantization_config=plain).eval()
    assert not torch.equal(logits(found), logits(other))
    unpacked = [unpack(model, torch.float32) for model in (copy.deepcopy(found), copy.deepcopy(other))]
    assert distance(logits(unpacked[0]), logits(float_model)) < 1e-3  # moved, and by the same factors on both sides
    found.save_pretrained(tmp_path / "out")
    again = type(float_model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(found), logits(again))
    assert again.config.quantization_config.recipe["smoothing"] == 0.7


def test_smoothing_is_for_decoders_with_coarse_inputs():
    decoder, encoder = make("llama-tied"), make("bert-cls")
    for settings, of_decoder in (
        ({}, 0.0),
        ({"weight_bits": 8}, 0.7),
        ({"weight_bits": 8, "activation_bits": None}, 0.0),
        ({"activations": "static"}, 0.7),
        ({"activations": "static", "smoothing": 0.3}, 0.3),
        ({"weight_bits": 8, "smoothing": 0.0}, 0.0),
    ):
        config = PreQuantConfig(**settings)
        assert config.smoothing_for(decoder) == of_decoder
        assert config.smoothing_for(encoder) == (config.smoothing or 0.0)
    assert MREMConfig(weight_bits=8, offload=True).smoothing_for(decoder) == 0.0


@pytest.mark.parametrize("algorithm", [ZSAQConfig, MREMConfig])
def test_teacher_and_student_are_smoothed_alike(tmp_path, monkeypatch, algorithm):
    make("llama-tied").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    data = {"calibration_data": [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 40)]} if algorithm is MREMConfig else {}
    small = {"written_sequences": 8} if algorithm is ZSAQConfig else {"stages": 1}
    where, seen = (
        ("zero_shot", "make_minimax") if algorithm is ZSAQConfig else ("reconstruct", "SequentialReconstruction"),
        [],
    )

    class Stop(Exception):
        pass

    def stop(teacher, student, *_, **__):
        seen.extend((teacher, student))
        raise Stop

    monkeypatch.setattr(f"optimum_zsaq.integrations.{where[0]}.{where[1]}", stop)
    config = algorithm(weight_bits=8, sequence_length=8, batch_size=4, **small, **data)
    with pytest.raises(Stop):
        tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    teacher, student = seen
    original = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(teacher), logits(original), atol=1e-5)
    for name in ("input_layernorm", "mlp.up_proj"):
        own, float_weight = (m.get_parameter(f"model.layers.0.{name}.weight") for m in (teacher, original))
        assert not torch.allclose(own, float_weight)
        assert torch.equal(own, student.get_parameter(f"model.layers.0.{name}.weight"))


@pytest.mark.parametrize(
    ("algorithm", "start"), [(ZSAQConfig, "rounding"), (MREMConfig, "rounding"), (MREMConfig, "compensated")]
)
def test_methods_that_train_begin_with_it(tmp_path, monkeypatch, algorithm, start):
    """Of decoders; "compensated" finds ranges anew from what each layer is given."""
    make("llama-tied").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    data = {"calibration_data": [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 40)]} if algorithm is MREMConfig else {}
    found = []
    monkeypatch.setattr(_FakeQuant, "find_ranges", lambda self, ranges, energies=None: found.append((ranges, energies)))
    small = {"sequence_length": 8, "batch_size": 4} | (
        {"written_sequences": 8} if algorithm is ZSAQConfig else {"stages": 1}
    )
    config = algorithm(steps=1, start=start, **small, **data)
    tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    energies = [e for ranges, e in found if ranges == "energy"]
    assert all(e is not None for e in energies)
    layers = 14  # of two blocks
    assert len(energies) == layers * (2 if start == "compensated" else 1)
