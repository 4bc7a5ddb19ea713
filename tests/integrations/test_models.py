"""What is read of a transformers model: its tables, its ties, its heads."""

import pytest
import torch
import transformers as tf
from conformance import exactly
from tiny_models import MODELS, logits, make
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_zsaq import PreQuantConfig, pack, prepare, unpack
from optimum_zsaq.integrations.models import TransformersReader
from optimum_zsaq.layers import PackedLinear, PackedTransposedLinear
from optimum_zsaq.surgery import reader_of


HEADS = {
    "bert": set(),
    "bert-cls": {"classifier"},
    "bert-mlm-tied": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "roberta-cls": {"classifier.dense", "classifier.out_proj"},
    "distilbert-cls": {"pre_classifier", "classifier"},
    "electra-cls": {"classifier.dense", "classifier.out_proj"},
    "deberta-cls": {"pooler.dense", "classifier"},
    "opt-tied": {"lm_head"},
    "llama-untied": {"lm_head"},
    "gpt2-cls": {"score"},
    "t5-tied": {"lm_head"},
    "bart-cls": {"classification_head.dense", "classification_head.out_proj"},
    "bart-tied": {"lm_head"},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    model = make(name)
    facts = reader_of(model).facts(model)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert facts.heads & linear == HEADS[name]


TABLES = {
    "bert-cls": {"bert.embeddings.word_embeddings"},
    "opt-tied": {"model.decoder.embed_tokens"},
    "gpt2-tied": {"transformer.wte"},
    "deberta-cls": {"deberta.embeddings.word_embeddings"},
    "t5-tied": {"shared"},
    "bart-tied": {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """Only what is read by token ids: no positions, no token types, no relative positions."""
    model = make(name)
    tables = reader_of(model).facts(model).tables
    assert tables <= TABLES[name] | {"encoder.embed_tokens", "decoder.embed_tokens"}
    assert TABLES[name] & tables


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith(("-tied", "-untied"))])
def test_ties(name):
    model = make(name)
    facts, output = reader_of(model).facts(model), model.get_output_embeddings()
    names = {id(module): n for n, module in model.named_modules()}
    tied = names[id(output)] in facts.tied
    assert tied == (output.weight is model.get_input_embeddings().weight)


def test_the_reader_reads_transformers_models_only():
    reader = TransformersReader()
    assert reader.reads(make("bert-cls"))
    assert not reader.reads(nn.Linear(2, 2))
    assert isinstance(reader_of(make("bert-cls")), TransformersReader)
    assert not isinstance(reader_of(nn.Sequential()), TransformersReader)


def test_conv1d_comes_back():
    """GPT-2's (I, O) weights: packed as (O, I), unpacked as they were."""
    model = make("gpt2-tied")
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    prepare(model, PreQuantConfig(weight_bits=8).scheme())
    pack(model)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, PackedTransposedLinear)
    assert layer.weight_codes.shape == (96, 32)
    unpack(model)
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is Conv1D
    assert (layer.nf, layer.nx) == (96, 32)
    assert layer.weight.shape == before.shape
    assert (layer.weight - before).abs().max() < 0.01 * before.abs().max()


def test_scaled_embeddings_keep_their_scale():
    """BART multiplies what it looks up by sqrt(d_model); the packed table does too."""
    plain, model = make("bart-tied"), make("bart-tied")
    prepare(model, PreQuantConfig(weight_bits=8, embedding_bits=8).scheme())
    pack(model)
    table = model.model.encoder.embed_tokens
    assert table.embed_scale == plain.model.encoder.embed_tokens.embed_scale == 32**0.5
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        expected = plain.model.encoder.embed_tokens(ids)
        assert (table(ids) - expected).norm() < 0.01 * expected.norm()
    unpack(model)
    assert type(model.model.encoder.embed_tokens) is type(plain.model.encoder.embed_tokens)
    assert (logits(model) - logits(plain)).norm() < 0.05 * logits(plain).norm()


def test_embedding_subclasses_with_a_forward_of_their_own():
    """An input embedding of a type that we do not know is refused by name; without the table it is left alone."""

    class Odd(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model = make("bert-cls")
    model.bert.embeddings.word_embeddings = Odd(99, 32)
    with pytest.raises(TypeError, match="'bert.embeddings.word_embeddings' is a Odd, whose forward.*embedding_bits=None"):
        prepare(model, PreQuantConfig().scheme())
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear
    prepare(model, PreQuantConfig(embedding_bits=None).scheme())
    assert type(model.bert.embeddings.word_embeddings) is Odd


def test_composite_models():
    """An encoder-decoder of two models: both bodies are read, the heads inside stay float."""
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(MODELS["bert"][1](), MODELS["bert"][1]())
    torch.manual_seed(0)
    model = tf.EncoderDecoderModel(config).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    prepare(model, PreQuantConfig().scheme())
    fake = logits(model)
    assert torch.equal(logits(exactly(pack(model))), fake)
    assert isinstance(model.encoder.encoder.layer[0].output.dense, PackedLinear)
    assert isinstance(model.decoder.bert.encoder.layer[0].output.dense, PackedLinear)
    assert type(model.decoder.cls.predictions.transform.dense) is nn.Linear
