"""Whole models in graphs: torch.compile, torch.export, generation with a static cache. Slow but for one of each."""

import pytest
import torch
import transformers as tf
from tiny_models import inputs, logits, quantized, token_ids
from tolerances import KERNEL_MODEL, relative_error
from torch import nn
from torch._dynamo.utils import counters

from optimum_zsaq import PreQuantConfig
from optimum_zsaq.kernels.prepacked import _ENTRIES
from optimum_zsaq.surgery import low_bit_layers


SCHEMES = {
    "default": {},
    "w8a8": {"weight_bits": 8},
    "static": {"weight_bits": 8, "activations": "static", "calibration_samples": 2},
    "weight-only": {"activation_bits": None},
    "small": {"runtime": "small"},
    "outliers": {"outliers": 0.02, "embedding_bits": 4},
    "group": {"granularity": "group", "group_size": 16, "symmetric": False, "weight_bits": 3},
    "reference": {"kernel": "reference"},
}
MODELS = ("bert-cls", "llama-tied", "t5-tied")
CASES = [(model, scheme) for model in MODELS for scheme in SCHEMES]
DEFAULT = ("bert-cls", "default")


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def slow(cases):
    return [pytest.param(*case, id="-".join(case), marks=[] if case == DEFAULT else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "scheme"), slow(CASES))
def test_compiled_model_is_the_eager_one(tmp_path, name, scheme):
    model = quantized(name, tmp_path, **SCHEMES[scheme])
    call = {**inputs(model), **({"use_cache": False} if name != "bert-cls" else {})}
    with torch.no_grad():
        expected = model(**call)[0]
        found = torch.compile(model, fullgraph=True)(**call)[0]
    assert not counters["graph_break"]
    assert relative_error(found, expected) <= KERNEL_MODEL[torch.float32]
    assert logits(model).dtype == found.dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_model_in_bfloat16(tmp_path, name):
    model = quantized(name, tmp_path, dtype=torch.bfloat16, activation_bits=None)
    call = {**inputs(model), **({"use_cache": False} if name != "bert-cls" else {})}
    with torch.no_grad():
        expected = model(**call)[0]
        assert relative_error(torch.compile(model, fullgraph=True)(**call)[0], expected) <= KERNEL_MODEL[torch.bfloat16]


@pytest.mark.slow
def test_kept_weights_are_built_once(tmp_path):
    model = quantized("bert-cls", tmp_path)
    graph = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        graph(token_ids(4, 9))
        kept = [_ENTRIES[layer.weight_codes] for _, layer in low_bit_layers(model) if layer.weight_codes in _ENTRIES]
        assert kept
        for rows in (5, 6, 4):
            graph(token_ids(rows, 9))
        again = [_ENTRIES[layer.weight_codes] for _, layer in low_bit_layers(model) if layer.weight_codes in _ENTRIES]
    assert all(a is b for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(("name", "scheme"), slow([("bert-cls", s) for s in SCHEMES]))
def test_exported_model_serves_any_batch(tmp_path, name, scheme):
    model = quantized(name, tmp_path, **SCHEMES[scheme])
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {"input_ids": token_ids(3)}, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 3, 7):
        with torch.no_grad():
            found = again(input_ids=token_ids(rows))["logits"]
        assert relative_error(found, logits(model, token_ids(rows))) <= KERNEL_MODEL[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["default", "weight-only", "small"])
@pytest.mark.parametrize("name", ["llama-tied", "t5-tied"])
def test_generation_with_a_static_cache(tmp_path, name, scheme):
    """The same tokens as eager generation; transformers compiles the decoding step by itself where the quantizer allows."""
    model = quantized(name, tmp_path, **SCHEMES[scheme])
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    expected = model.generate(token_ids(2, 7), **options)
    found = model.generate(token_ids(2, 7), cache_implementation="static", **options)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_generation_compiled_by_hand(tmp_path):
    model = quantized("llama-tied", tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12, "cache_implementation": "static"}
    expected = model.generate(token_ids(2, 7), **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(token_ids(2, 7), **options), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it by its old name
def test_training_an_adapter_in_a_graph(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = quantized("bert-cls", tmp_path)
    torch.manual_seed(0)
    model, gradients = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "dense"])).eval(), []
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        forward(**inputs(base))[0].pow(2).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) <= 5e-2, name


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_small_model_takes_what_its_file_takes(tmp_path, bits):
    """At widths of real layers, the tensors of a loaded runtime="small" model take at most 5 % more than on disk."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.BertConfig(vocab_size=2000, max_position_embeddings=64, num_labels=2, **sizes)
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    quantization = PreQuantConfig(weight_bits=bits, embedding_bits=bits, ranges="minmax")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "float", quantization_config=quantization)
    model.save_pretrained(tmp_path / "packed")
    loaded = tf.BertForSequenceClassification.from_pretrained(
        tmp_path / "packed", quantization_config=PreQuantConfig(runtime="small")
    )
    logits(loaded)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*loaded.parameters(), *loaded.buffers())}
    assert sum(held.values()) <= 1.05 * (tmp_path / "packed" / "model.safetensors").stat().st_size
    kept = [name for _, layer in low_bit_layers(loaded) for name in _ENTRIES.get(layer.weight_codes, ((), {}))[1]]
    assert set(kept) <= {"native"}  # which keeps addresses
