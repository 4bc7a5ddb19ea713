"""Reloading a packed checkpoint in every way that `from_pretrained` offers: the numbers are those that were saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_models import logits, make, make_tokenizer, quantized, token_ids
from torch import Tensor, nn

from optimum_zsaq import LowBitConfig, PreQuantConfig
from optimum_zsaq.integrations.checkpoint import CheckpointError
from optimum_zsaq.layers import PackedLinear
from optimum_zsaq.surgery import low_bit_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder of a packed checkpoint, outputs of the model that was saved, its class)."""
    made = {}

    def get(name: str, **settings) -> tuple[Path, Tensor, type]:
        key = (name, *settings.items())
        if key not in made:
            root = tmp_path_factory.mktemp(name)
            model = quantized(name, root, **settings)
            model.save_pretrained(root / "saved")
            made[key] = root / "saved", logits(model), type(model)
        return made[key]

    return get


# Another class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls", "head"),
    [
        ("bert", tf.BertForSequenceClassification, "classifier"),
        ("llama", tf.LlamaForSequenceClassification, "score"),
        ("llama", tf.LlamaForCausalLM, "lm_head"),
        ("opt-tied", tf.OPTForSequenceClassification, "score"),
        ("gpt2-tied", tf.GPT2ForSequenceClassification, "score"),
        ("t5-tied", tf.T5ForSequenceClassification, "classification_head.dense"),
        ("t5-tied", tf.T5ForQuestionAnswering, "qa_outputs"),
        ("bart-tied", tf.BartForSequenceClassification, "classification_head.dense"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_reload_with_a_new_head(saved, tmp_path, name, cls, head):
    """The head is new, float and finite; the codes are those of the checkpoint, also when saved again."""
    folder, _, _ = saved(name)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    new = model.get_submodule(head)
    assert type(new) is nn.Linear
    assert new.weight.requires_grad
    assert info["missing_keys"]
    assert all(key.split(".")[0] == head.split(".")[0] for key in info["missing_keys"])
    assert torch.isfinite(logits(model)).all()
    body = tf.AutoModel.from_pretrained(folder)
    inner = model.base_model if model.base_model is not model else model
    codes = {n: t for n, t in body.state_dict().items() if n.endswith("weight_codes")}
    found = inner.state_dict()
    assert codes
    assert all(torch.equal(found[n], t) for n, t in codes.items())
    model.save_pretrained(tmp_path)
    assert head in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]["float"]
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "name", ["bert-cls", "bert-mlm-tied", "llama-tied", "opt-tied", "gpt2-tied", "t5-tied", "bart-cls"]
)
def test_reload_as_the_base_model(saved, name):
    folder, _, cls = saved(name)
    full = cls.from_pretrained(folder)
    base, info = tf.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert all(key.startswith("pooler.dense.") for key in info["missing_keys"])
    assert name == "bert-mlm-tied" or not info["missing_keys"]
    decoder = {"decoder_input_ids": token_ids()} if base.config.is_encoder_decoder else {}
    part = full if full.base_model is full else full.base_model
    with torch.no_grad():
        expected = part(input_ids=token_ids(), output_hidden_states=True, **decoder)
        found = base(input_ids=token_ids(), output_hidden_states=True, **decoder)
    states = "decoder_hidden_states" if decoder else "hidden_states"
    assert all(torch.equal(a, b) for a, b in zip(found[states], expected[states], strict=True))


def test_base_checkpoint_saved_from_a_head_model_and_back(saved, tmp_path):
    """SeqCls -> AutoModel -> saved -> SeqCls: the codes stay, the classifier is new."""
    folder, outputs, cls = saved("bert-cls")
    tf.AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    original = cls.from_pretrained(folder)
    model.classifier = original.classifier
    assert torch.equal(logits(model), outputs)


def test_missing_pooler_on_reload_is_float_and_said(saved, caplog):
    folder, _, _ = saved("bert-mlm-tied")
    model = tf.BertForSequenceClassification.from_pretrained(folder)
    assert type(model.bert.pooler.dense) is nn.Linear
    assert "newly initialised and left float: bert.pooler.dense" in caplog.text
    assert torch.isfinite(logits(model)).all()


def test_another_number_of_labels(saved):
    folder, _, cls = saved("bert-cls")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        cls.from_pretrained(folder, num_labels=5)
    model = cls.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert logits(model).shape == (2, 5)
    assert isinstance(model.bert.pooler.dense, PackedLinear)


# Configs --------------------------------------------------------------------------------------------------------------


def test_config_of_a_loaded_model(saved):
    folder, outputs, cls = saved("bert-cls")
    first = cls.from_pretrained(folder)
    again = cls.from_pretrained(folder, config=first.config)
    assert torch.equal(logits(again), outputs)
    assert torch.equal(logits(cls.from_pretrained(folder, config=tf.AutoConfig.from_pretrained(folder))), outputs)


@pytest.mark.parametrize("runtime", ["fast", "small"])
def test_runtime_of_a_passed_config_is_honoured(saved, runtime):
    """The rest of the passed config is ignored, and transformers says so."""
    folder, outputs, cls = saved("bert-cls")
    config = PreQuantConfig(weight_bits=8, runtime=runtime)
    with pytest.warns(UserWarning, match="already has a `quantization_config`.*loading attributes"):
        model = cls.from_pretrained(folder, quantization_config=config)
    assert {layer.runtime for _, layer in low_bit_layers(model)} == {runtime}
    assert {layer.spec.weight.bits for _, layer in low_bit_layers(model)} == {4, 8}
    assert torch.equal(logits(model), outputs)


def test_a_config_of_another_class_is_refused(saved):
    folder, _, cls = saved("bert-cls")
    with pytest.raises(ValueError, match="quantized with PreQuantConfig but you are passing a LowBitConfig"):
        cls.from_pretrained(folder, quantization_config=LowBitConfig())


def test_runtime_is_not_stored(tmp_path):
    model = quantized("bert-cls", tmp_path, runtime="small")
    assert {layer.runtime for _, layer in low_bit_layers(model)} == {"small"}
    model.save_pretrained(tmp_path / "saved")
    assert "runtime" not in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    again = type(model).from_pretrained(tmp_path / "saved")
    assert {layer.runtime for _, layer in low_bit_layers(again)} == {"fast"}


def test_auto_class_from_config_is_not_quantized(saved):
    """A config alone has no codes; the class method builds a float model, as for every quantizer."""
    folder, _, _ = saved("bert-cls")
    model = tf.AutoModelForSequenceClassification.from_config(tf.AutoConfig.from_pretrained(folder))
    assert not list(low_bit_layers(model))


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
def test_device_map(saved, name, device_map):
    folder, outputs, cls = saved(name)
    assert torch.equal(logits(cls.from_pretrained(folder, device_map=device_map)), outputs)


LLAMA_PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def _offloaded(*disk: str) -> dict[str, str]:
    return {part: "disk" if part in disk else "cpu" for part in LLAMA_PARTS}


@pytest.mark.parametrize("disk", [["model.layers.0"], ["model.embed_tokens", "lm_head"]], ids=["layer", "table"])
def test_disk_offload_is_refused(saved, tmp_path, disk):
    """A tied head would read codes that are on no device; quantizing onto disk would read float weights again."""
    folder, _, cls = saved("llama-tied")
    with pytest.raises(ValueError, match="cannot be offloaded to disk .*use device_map='cpu'"):
        cls.from_pretrained(folder, device_map=_offloaded(*disk), offload_folder=tmp_path / "offload")


# Dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reload_in_another_dtype(saved, dtype):
    """The codes and scales are the same; the rest is as if the float32 model had been cast."""
    folder, _, cls = saved("bert-cls")
    model = cls.from_pretrained(folder, dtype=dtype)
    expected = cls.from_pretrained(folder).to(dtype)
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(expected))
    assert all(layer.owner.weight_scale.dtype == torch.float32 for _, layer in low_bit_layers(model))


def test_dtype_is_written_to_the_config(tmp_path):
    model = quantized("bert-cls", tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


# Shards ---------------------------------------------------------------------------------------------------------------


def test_shards(saved, tmp_path):
    folder, outputs, cls = saved("llama-tied")
    model = cls.from_pretrained(folder)
    counts = []
    for size in ("4KB", "9KB", "1GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
        counts.append(len(files))
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        if len(files) > 1:
            assert set(json.loads(index.read_text())["weight_map"].values()) == set(files)
        again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(again), outputs)
    assert counts[0] > counts[1] > counts[2] == 1


def test_shards_hold_the_tensors_of_the_whole_file(saved, tmp_path):
    folder, _, cls = saved("t5-tied")
    cls.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="10KB")
    parts = {}
    for file in tmp_path.glob("*.safetensors"):
        parts.update(load_file(file))
    whole = load_file(folder / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)


def test_shards_of_two_checkpoints(saved, tmp_path):
    """Each shard is whole, but they do not belong together: same scheme, other weights."""
    for seed in (0, 1):
        model = quantized("bert-cls", tmp_path / str(seed), model_seed=seed)
        model.save_pretrained(tmp_path / f"saved{seed}", max_shard_size="10KB")
    second = sorted((tmp_path / "saved1").glob("*.safetensors"))[1]
    shutil.copy(second, tmp_path / "saved0" / second.name)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint.*take all files from the same checkpoint"):
        type(model).from_pretrained(tmp_path / "saved0")


def test_variant(saved, tmp_path):
    folder, outputs, cls = saved("bert-cls")
    cls.from_pretrained(folder).save_pretrained(tmp_path, variant="low")
    assert (tmp_path / "model.low.safetensors").exists()
    assert torch.equal(logits(cls.from_pretrained(tmp_path, variant="low")), outputs)


# Running --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "opt-tied", "gpt2-tied", "qwen2-untied", "t5-tied", "bart-tied"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(saved, name, beams):
    folder, _, cls = saved(name)
    ids = token_ids()[:, :-1]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    first, second = (cls.from_pretrained(folder).generate(ids, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[1] > 1


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-untied", "t5-tied"])
def test_generate_with_and_without_cache(saved, name):
    """Dynamic input ranges are per token, so a cache changes nothing but the order of sums in attention."""
    folder, _, cls = saved(name)
    model, ids = cls.from_pretrained(folder), token_ids()[:, :-1]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_pipeline(saved, tmp_path):
    folder, _, cls = saved("bert-cls")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    make_tokenizer().save_pretrained(tmp_path)
    pipe = tf.pipeline("text-classification", str(tmp_path))
    assert list(low_bit_layers(pipe.model))
    found = pipe(["w5 w6 w7", "w9 w10"], top_k=None)
    with torch.no_grad():
        tokens = make_tokenizer()(["w5 w6 w7"], return_tensors="pt")
        expected = cls.from_pretrained(folder)(**tokens).logits.softmax(dim=-1)[0]
    scores = {entry["label"]: entry["score"] for entry in found[0]}
    assert all(abs(scores[f"LABEL_{i}"] - expected[i].item()) < 1e-6 for i in range(3))


def test_float_checkpoint_is_untouched_by_the_plugin(tmp_path):
    model = make("bert-cls")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not list(low_bit_layers(again))
    assert not getattr(again, "is_quantized", False)
    assert "save_pretrained" not in vars(again)
    assert torch.equal(logits(again), logits(model))
