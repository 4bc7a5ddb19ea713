"""Tiny random models of every supported family, with sizes that divide by nothing: `make("llama-tied")`.

A name is a family and a head, and "-tied" or "-untied" where the family's output embedding can be either.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel


VOCABULARY, HIDDEN, INNER, HEADS, LABELS = 99, 32, 37, 4, 3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def _bert(**options) -> tf.PreTrainedConfig:
    return tf.BertConfig(**{**_COMMON, **options})


def _roberta(**options) -> tf.PreTrainedConfig:
    return tf.RobertaConfig(**{**_COMMON, **_TOKENS, **options})


def _distilbert(**options) -> tf.PreTrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": INNER, "n_layers": 2, "n_heads": HEADS}
    return tf.DistilBertConfig(**{**sizes, "max_position_embeddings": 80, "seq_classif_dropout": 0.0, **options})


def _electra(**options) -> tf.PreTrainedConfig:
    return tf.ElectraConfig(**{**_COMMON, "embedding_size": 16, **options})


def _deberta(**options) -> tf.PreTrainedConfig:
    return tf.DebertaV2Config(**{**_COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], **options})


def _opt(**options) -> tf.PreTrainedConfig:
    sizes = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
    return tf.OPTConfig(**{**sizes, **_TOKENS, "ffn_dim": INNER, "word_embed_proj_dim": 16, **options})


def _gpt2(**options) -> tf.PreTrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": HEADS, "n_positions": 80}
    return tf.GPT2Config(**{**sizes, **_TOKENS, "pad_token_id": 0, **options})


def _llama(**options) -> tf.PreTrainedConfig:
    return tf.LlamaConfig(**{**_COMMON, **_TOKENS, "num_key_value_heads": 2, **options})


def _qwen(**options) -> tf.PreTrainedConfig:
    return tf.Qwen2Config(**{**_COMMON, **_TOKENS, "num_key_value_heads": 2, **options})


def _t5(**options) -> tf.PreTrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": HEADS}
    return tf.T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, **options})


def _bart(**options) -> tf.PreTrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "max_position_embeddings": 80, "scale_embedding": True}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": INNER}
    tokens = {**_TOKENS, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return tf.BartConfig(**{**sizes, **tokens, **options})


_LABELS = {"num_labels": LABELS}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

MODELS: dict[str, tuple[type[PreTrainedModel], Callable[..., tf.PreTrainedConfig], dict]] = {
    "bert": (tf.BertModel, _bert, {}),
    "bert-cls": (tf.BertForSequenceClassification, _bert, _LABELS),
    "bert-mlm-tied": (tf.BertForMaskedLM, _bert, _TIED),
    "bert-mlm-untied": (tf.BertForMaskedLM, _bert, _UNTIED),
    "roberta-cls": (tf.RobertaForSequenceClassification, _roberta, _LABELS),
    "roberta-mlm-tied": (tf.RobertaForMaskedLM, _roberta, _TIED),
    "roberta-mlm-untied": (tf.RobertaForMaskedLM, _roberta, _UNTIED),
    "distilbert-cls": (tf.DistilBertForSequenceClassification, _distilbert, _LABELS),
    "distilbert-mlm-tied": (tf.DistilBertForMaskedLM, _distilbert, _TIED),
    "electra-cls": (tf.ElectraForSequenceClassification, _electra, _LABELS),
    "electra-mlm-tied": (tf.ElectraForMaskedLM, _electra, _TIED),
    "electra-mlm-untied": (tf.ElectraForMaskedLM, _electra, _UNTIED),
    "deberta-cls": (tf.DebertaV2ForSequenceClassification, _deberta, _LABELS),
    "deberta-mlm-tied": (tf.DebertaV2ForMaskedLM, _deberta, _TIED),
    "opt-cls": (tf.OPTForSequenceClassification, _opt, _LABELS),
    "opt-tied": (tf.OPTForCausalLM, _opt, _TIED),
    "opt-untied": (tf.OPTForCausalLM, _opt, _UNTIED),
    "gpt2-cls": (tf.GPT2ForSequenceClassification, _gpt2, _LABELS),
    "gpt2-tied": (tf.GPT2LMHeadModel, _gpt2, _TIED),
    "gpt2-untied": (tf.GPT2LMHeadModel, _gpt2, _UNTIED),
    "llama": (tf.LlamaModel, _llama, {}),
    "llama-cls": (tf.LlamaForSequenceClassification, _llama, _LABELS),
    "llama-tied": (tf.LlamaForCausalLM, _llama, _TIED),
    "llama-untied": (tf.LlamaForCausalLM, _llama, _UNTIED),
    "qwen2-tied": (tf.Qwen2ForCausalLM, _qwen, _TIED),
    "qwen2-untied": (tf.Qwen2ForCausalLM, _qwen, _UNTIED),
    "t5-tied": (tf.T5ForConditionalGeneration, _t5, _TIED),
    "t5-untied": (tf.T5ForConditionalGeneration, _t5, _UNTIED),
    "bart-cls": (tf.BartForSequenceClassification, _bart, _LABELS),
    "bart-tied": (tf.BartForConditionalGeneration, _bart, _TIED),
    "bart-untied": (tf.BartForConditionalGeneration, _bart, _UNTIED),
}


def make(name: str, seed: int = 0, **options) -> PreTrainedModel:
    """A model of `MODELS` with random weights, in evaluation mode; `options` go to its config.

    Biases and norms are random too: as zeros and ones they would hide a tensor that was lost and made anew.
    """
    cls, config, fixed = MODELS[name]
    torch.manual_seed(seed)
    model = cls(config(**{**fixed, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.empty(parameter.shape).uniform_(-0.2, 0.2)
    return model


def quantized(
    name: str, folder: Path, model_seed: int = 0, dtype: torch.dtype | None = None, **settings
) -> PreTrainedModel:
    """A model of `MODELS`, saved float as `folder / "float"` and quantized on load.

    `settings` are PreQuantConfig's, but for `ranges="minmax"` by default, which takes a fraction of the time.
    """
    from optimum_zsaq import PreQuantConfig

    make(name, model_seed).save_pretrained(folder / "float")
    config = PreQuantConfig(**{"ranges": "minmax", **settings})
    return MODELS[name][0].from_pretrained(folder / "float", quantization_config=config, dtype=dtype)


def token_ids(rows: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    """Token ids without special tokens; the last is the end token, which some classification heads look for."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 2
    return ids


def inputs(model: PreTrainedModel, ids: Tensor | None = None) -> dict[str, Tensor]:
    """What `model` is called with."""
    ids = token_ids() if ids is None else ids
    decoder = model.config.is_encoder_decoder and not type(model).__name__.endswith("Classification")
    return {"input_ids": ids, **({"decoder_input_ids": ids} if decoder else {})}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """The first output of a model: logits, or hidden states where it has no head."""
    return model(**inputs(model, ids))[0]


def make_tokenizer(special: bool = True) -> tf.PreTrainedTokenizerBase:
    """A tokenizer of the 99 tokens: "w5" to "w98" are words; with `special` also [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*names, *(f"w{i}" for i in range(5, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    if special:
        pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        pieces = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", pair, special_tokens=pieces)
        roles = {**roles, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=80, **roles)
