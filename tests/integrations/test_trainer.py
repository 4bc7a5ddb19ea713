"""The stock Trainer: refuses a packed model, trains a fake-quantized one or an adapter, resumes bit for bit."""

import json

import pytest
import torch
import transformers as tf
from conformance import exactly
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import LABELS, logits, make, quantized, token_ids
from transformers import Trainer, TrainingArguments

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.surgery import low_bit_layers


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PEFT asks for it, and transformers has renamed it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def _samples() -> list[dict]:
    return [{"input_ids": row, "labels": torch.tensor(i % LABELS)} for i, row in enumerate(token_ids(8, 7))]


def _trainer(model, folder, eval_dataset=None, **options) -> Trainer:
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 0.01,
        **options,
    }
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=_samples(), eval_dataset=eval_dataset)


def _prepared(seed: int = 0, **settings):
    return prepare(make("bert-cls", seed, **NO_DROPOUT), PreQuantConfig(**settings).scheme())


def test_packed_model_is_refused(tmp_path):
    for model in (quantized("bert-cls", tmp_path), pack(_prepared())):
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models.*adapters"):
            _trainer(model, tmp_path / "run")


def test_packed_model_can_be_evaluated(tmp_path):
    """Through an adapter's trainer; its predictions are the model's."""
    model = quantized("bert-cls", tmp_path)
    outputs = logits(model, token_ids(8, 7))
    model.add_adapter(LoraConfig(target_modules=["query"]))
    found = _trainer(model, tmp_path / "run").predict(_samples()).predictions
    assert torch.equal(torch.tensor(found), outputs)


@pytest.mark.parametrize("settings", [{}, {"outliers": 0.02, "symmetric": False}], ids=["plain", "outliers"])
def test_fake_quantized_model_trains_and_resumes_exactly(tmp_path, settings):
    model = _prepared(**settings)
    masters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    scales = {n: layer.weight_scale.clone() for n, layer in low_bit_layers(model)}
    _trainer(model, tmp_path / "run").train()
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, masters[n])]
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert all(torch.equal(layer.weight_scale, scales[n]) for n, layer in low_bit_layers(model))

    stored = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(stored[n], p) for n, p in model.named_parameters())
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    assert config["quantization_config"]["packed"] is False

    resumed = _prepared(seed=3, **settings)
    _trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found, expected = resumed.state_dict(), model.state_dict()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    assert torch.equal(logits(resumed.eval()), logits(model.eval()))


def test_best_model_is_loaded_at_the_end(tmp_path):
    model = _prepared()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = _trainer(model, tmp_path / "run", eval_dataset=_samples(), **options)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[n], p) for n, p in model.named_parameters())


def test_checkpoint_of_a_fake_quantized_model_reloads_and_packs(tmp_path):
    model = _prepared()
    _trainer(model, tmp_path / "run").train()
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert again.hf_quantizer.is_qat_trainable
    expected = logits(model.eval())
    assert torch.equal(logits(again), expected)
    pack(again).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(exactly(type(again).from_pretrained(tmp_path / "packed"))), expected)


def test_adapter_on_a_packed_model_trains_and_resumes_exactly(tmp_path):
    quantized("bert-cls", tmp_path).save_pretrained(tmp_path / "base")

    def start(seed: int):
        model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", **NO_DROPOUT)
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(target_modules="all-linear"))

    model = start(0)
    _trainer(model, tmp_path / "run").train()
    files = {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    resumed = start(1)
    _trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval()), logits(model.eval()))
    fresh = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    fresh = PeftModel.from_pretrained(fresh, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(fresh), logits(model))


def test_a_trainers_second_save_of_a_packed_model_is_whole(tmp_path):
    """`trainer.save_model` of a model that was packed after training writes codes, and nothing of the floats is left."""
    model = _prepared()
    trainer = _trainer(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    pack(model.eval())
    trainer.save_model(str(tmp_path / "out"))
    assert any(name.endswith("weight_codes") for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out")), logits(model))
