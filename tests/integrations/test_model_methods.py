"""What users do with a loaded low-bit model: cast, copy, pickle, resize, dequantize, load a state dict."""

import copy
import io
import json
import pickle

import pytest
import torch
from conformance import exactly
from tiny_models import logits, make, quantized
from torch import nn

from optimum_zsaq import PreQuantConfig, pack, prepare, unpack
from optimum_zsaq.surgery import low_bit_layers


NAMES = ("bert-cls", "llama-tied", "gpt2-tied", "t5-tied", "bart-tied")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> a fresh packed model from a saved checkpoint."""
    made = {}

    def get(name: str = "bert-cls"):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            quantized(name, root).save_pretrained(root / "saved")
            made[name] = root / "saved"
        cls = type(make(name))
        return cls.from_pretrained(made[name])

    return get


def _fake(name: str = "bert-cls"):
    return prepare(make(name), PreQuantConfig().scheme())


# Casting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "float"])
def test_half_and_float_are_refused_by_transformers(checkpoint, cast):
    with pytest.raises(ValueError, match=f"`.{cast}\\(\\)` is not supported for quantized model"):
        getattr(checkpoint(), cast)()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("state", ["packed", "fake"])
def test_to_a_dtype_leaves_scales_and_codes(checkpoint, tmp_path, state, dtype):
    model = checkpoint("gpt2-tied") if state == "packed" else _fake("gpt2-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        if name.endswith(("_scale", "_minimum", "_codes")):
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
        else:
            assert tensor.dtype == dtype
    outputs = logits(model)
    assert outputs.dtype == dtype
    if dtype == torch.float64:
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), outputs)


def test_to_meta(checkpoint):
    model = checkpoint().to("meta")
    expected = checkpoint().state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", ["packed", "fake"])
def test_deepcopy_is_a_model_of_its_own(checkpoint, tmp_path, name, state):
    model = checkpoint(name) if state == "packed" else _fake(name)
    outputs = logits(model)
    clone = copy.deepcopy(model)
    codes = "weight_codes" if state == "packed" else "weight_scale"
    for _, layer in low_bit_layers(clone):
        if layer.owner is layer:
            getattr(layer, codes).data.fill_(1)
    changed = logits(clone)
    assert not torch.equal(changed, outputs)
    assert torch.equal(logits(model), outputs)
    clone.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), changed)
    assert clone.hf_quantizer is not model.hf_quantizer
    assert clone.hf_quantizer.quantization_config is clone.config.quantization_config


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_model_runs_and_saves(checkpoint, tmp_path, name, how):
    """torch.save(model) and everything that spawns processes pickle it."""
    model = checkpoint(name)
    outputs = logits(model)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(again), outputs)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), outputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_a_forward(checkpoint, tmp_path, name, assign):
    """What "fast" keeps of the codes must not outlive them."""
    model, other = checkpoint(name), quantized(name, tmp_path, model_seed=5)
    assert not torch.equal(logits(model), logits(other))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits(model), logits(other))


def test_tie_weights_again_changes_nothing(checkpoint):
    for name in ("llama-tied", "bart-tied", "t5-tied"):
        model = checkpoint(name)
        outputs = logits(model)
        model.tie_weights()
        assert torch.equal(logits(model), outputs)


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_memory_footprint(checkpoint):
    model, plain = checkpoint("llama-tied"), make("llama-tied")
    assert 0.1 < model.get_memory_footprint() / plain.get_memory_footprint() < 0.35
    logits(model)
    assert model.get_memory_footprint() < 0.35 * plain.get_memory_footprint()


def test_num_parameters_counts_codes(checkpoint):
    """transformers counts stored elements: fewer than weights, as for every packed format."""
    model, plain = checkpoint("llama-tied"), make("llama-tied")
    assert 0 < model.num_parameters() < plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in plain.parameters() if p.dim() == 1)
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
@pytest.mark.parametrize("state", ["packed", "fake"])
def test_resize_token_embeddings_is_refused(checkpoint, name, state):
    """transformers would resize the marker: (V, 1) zeros."""
    model = checkpoint(name) if state == "packed" else _fake(name)
    outputs = logits(model)
    with pytest.raises(ValueError, match="99 tokens cannot be resized to 105; call model.dequantize"):
        model.resize_token_embeddings(105)
    assert model.config.vocab_size == 99
    assert torch.equal(logits(model), outputs)
    assert model.resize_token_embeddings().num_embeddings == 99
    assert model.resize_token_embeddings(99).num_embeddings == 99
    model.dequantize()
    model.resize_token_embeddings(105)
    assert model.get_input_embeddings().weight.shape == (105, 32)


# Back to float --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", ["packed", "fake"])
def test_dequantize_gives_a_plain_float_checkpoint(checkpoint, tmp_path, caplog, name, state):
    model = checkpoint(name) if state == "packed" else _fake(name)
    weights = {n: layer.quantized_weight().detach() for n, layer in low_bit_layers(model)}
    assert model.dequantize() is not None
    assert not list(low_bit_layers(model))
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    assert not {"save_pretrained", "push_to_hub", "resize_token_embeddings"} & vars(model).keys()
    for layer, weight in weights.items():
        found = model.get_submodule(layer).weight
        assert torch.equal(found.t() if type(model.get_submodule(layer)).__name__ == "Conv1D" else found, weight)
    assert model.state_dict().keys() == make(name).state_dict().keys()
    assert model.num_parameters() == make(name).num_parameters()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    caplog.clear()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not caplog.records
    assert torch.equal(logits(again), logits(model))
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16"], ids=str)
def test_dequantize_to_a_dtype(checkpoint, tmp_path, dtype):
    """The whole model has that dtype, or it could not run."""
    model = checkpoint("llama-tied")
    model.dequantize(dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert logits(model).dtype == expected
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path, dtype=expected)), logits(model))


def test_dequantize_after_a_cast(checkpoint):
    model = checkpoint("bert-cls").to(torch.bfloat16)
    model.dequantize()
    assert len({parameter.dtype for parameter in model.parameters()}) == 1
    assert torch.isfinite(logits(model)).all()


def test_dequantized_weights_only_model_keeps_its_outputs(tmp_path):
    """Without input quantization the dense weights give the very same numbers."""
    model = quantized("llama-tied", tmp_path, activation_bits=None, outliers=0.02, symmetric=False, kernel="reference")
    outputs = logits(model)
    assert torch.equal(logits(model.dequantize()), outputs)


def test_dequantized_model_can_be_quantized_again(checkpoint, tmp_path):
    """The codes of codes: the same scheme finds the same numbers again with min-max ranges."""
    model = quantized("bert-cls", tmp_path, ranges="minmax")
    outputs = logits(model)
    model.dequantize()
    prepare(model, PreQuantConfig(ranges="minmax").scheme(), "minmax")
    pack(model)
    assert torch.allclose(logits(model), outputs, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))


def test_unpack_is_dequantize(checkpoint):
    assert torch.equal(logits(unpack(checkpoint())), logits(checkpoint().dequantize()))


def test_prepare_and_pack_twice_change_nothing(tmp_path):
    model, scheme = make("bart-tied"), PreQuantConfig().scheme()
    outputs = logits(prepare(model, scheme))
    assert torch.equal(logits(prepare(model, scheme)), outputs)
    assert torch.equal(logits(exactly(pack(pack(model)))), outputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(exactly(type(model).from_pretrained(tmp_path))), outputs)
    with pytest.raises(ValueError, match="packed and has no float weights to prepare; call unpack"):
        prepare(model, scheme)


def test_prepared_model_is_trainable_and_packed_is_not():
    model = prepare(make("bert-cls"), PreQuantConfig().scheme())
    assert model.bert.pooler.dense.weight.requires_grad
    assert not model.bert.pooler.dense.weight_scale.requires_grad
    pack(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {f"{name}.weight" for name, layer in low_bit_layers(model)} <= frozen
    assert isinstance(model.classifier, nn.Linear)
    assert model.classifier.weight.requires_grad
