"""Stock PEFT on a packed model: it finds the layers, trains, saves, reloads, and cannot merge silently."""

import json

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny_models import inputs, logits, quantized

from optimum_zsaq.layers import PackedLinear


# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def _lora(**options) -> LoraConfig:
    return LoraConfig(r=2, **{"target_modules": "all-linear", **options})


def _randomized(model):
    """LoRA's B starts as zeros, which would hide an adapter that is lost."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied", "gpt2-tied", "bart-tied"])
def test_lora_on_all_linear_layers_trains(tmp_path, name, checkpointing):
    base = quantized(name, tmp_path)
    packed = {n for n, m in base.named_modules() if isinstance(m, PackedLinear) and m.owner is m}
    if checkpointing:
        base.activation_checkpointing_enable()
    model = get_peft_model(base, _lora())
    assert packed <= set(model.targeted_module_names)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    model.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(6):
        loss = model(**inputs(base))[0].float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)


def test_checkpointing_gives_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        base = quantized("llama-tied", tmp_path)
        if checkpointing:
            base.activation_checkpointing_enable()
        torch.manual_seed(0)
        model = _randomized(get_peft_model(base, _lora())).train()
        model(**inputs(base))[0].pow(2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("settings", [{}, {"outliers": 0.02}, {"symmetric": False}], ids=["plain", "outliers", "zero"])
def test_gradients_are_those_of_the_dense_weights(tmp_path, settings):
    """Without input quantization, LoRA on codes and LoRA on the dense weights they stand for learn the same."""
    found = []
    for dense in (False, True):
        base = quantized("bert-cls", tmp_path, activation_bits=None, kernel="reference", **settings)
        base = base.dequantize() if dense else base
        torch.manual_seed(0)
        model = _randomized(get_peft_model(base, _lora(target_modules=["query", "value", "dense"])))
        outputs = model(**inputs(base))[0]
        outputs.pow(2).mean().backward()
        found.append((outputs, [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_fails_loudly_and_changes_nothing(tmp_path, bits, method):
    base = quantized("bert-cls", tmp_path, weight_bits=bits)
    model = _randomized(get_peft_model(base, _lora(target_modules=["query", "dense"])))
    outputs = logits(base)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        getattr(model, method)()
    assert torch.equal(logits(base), outputs)


def test_unload_gives_the_packed_model_back(tmp_path):
    base = quantized("bert-cls", tmp_path)
    outputs = logits(base)
    model = _randomized(get_peft_model(base, _lora()))
    assert not torch.equal(logits(model), outputs)
    with model.disable_adapter():
        assert torch.equal(logits(model), outputs)
    again = model.unload()
    assert torch.equal(logits(again), outputs)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(again).from_pretrained(tmp_path / "saved")), outputs)


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
def test_adapter_is_saved_and_loaded(tmp_path, name):
    base = quantized(name, tmp_path)
    base.save_pretrained(tmp_path / "base")
    model = _randomized(get_peft_model(base, _lora()))
    outputs = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in key for key in tensors)
    fresh = type(base).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), outputs)


def test_adapter_through_transformers(tmp_path):
    """add_adapter, save_pretrained (adapter only), and from_pretrained of the adapter's folder, which finds the base."""
    quantized("llama-tied", tmp_path).save_pretrained(tmp_path / "base")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(model)
    model.add_adapter(_lora(task_type="CAUSAL_LM"))
    _randomized(model)
    outputs = logits(model)
    assert not torch.equal(outputs, plain)
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapter").iterdir()}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), outputs)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), outputs)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), outputs)
    again.delete_adapter("default")
    assert torch.equal(logits(again), plain)


def test_packed_base_is_untouched_by_training_an_adapter(tmp_path):
    """Saved after the adapter is unloaded, the base is the checkpoint it was."""
    quantized("bert-cls", tmp_path).save_pretrained(tmp_path / "base")
    base = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, _lora(target_modules=["query", "value"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs(model))[0].pow(2).mean().backward()
    optimizer.step()
    model.unload().save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key].view(torch.uint8), again[key].view(torch.uint8)) for key in first)


def test_prepare_model_for_kbit_training(tmp_path):
    """It casts float parameters to float32 and freezes the rest; a float32 model's numbers stay."""
    model = quantized("llama-tied", tmp_path)
    outputs = logits(model)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert torch.equal(logits(model), outputs)
    assert not [p for p in model.parameters() if p.requires_grad]
    model = get_peft_model(model, _lora()).train()
    model(**inputs(model))[0].pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_on_a_fake_quantized_model_keeps_the_quantizer(tmp_path):
    """LoRA calls the layer, so its output is that of the quantized weight; zero at the start."""
    model = quantized("bert-cls", tmp_path, packed=False)
    outputs = logits(model)
    assert torch.equal(logits(get_peft_model(model, _lora(target_modules=["query", "value"]))), outputs)
