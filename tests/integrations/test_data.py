"""Calibration data: every kind that a user may give, errors that say what to give, and sampled sequences."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict
from tiny_models import HIDDEN, VOCABULARY, make, make_tokenizer, quantized

from optimum_zsaq import PreQuantConfig, calibrate
from optimum_zsaq.integrations.data import (
    complete_batch,
    continue_sequences,
    describe_data,
    find_tokenizer,
    read_file,
    read_texts,
    text_batches,
)
from optimum_zsaq.integrations.forms import sampled_batches
from optimum_zsaq.surgery import low_bit_layers


TEXTS = ["w5 w6", "w7", "w8 w9 w10"]
ROWS = [{"text": text} for text in TEXTS]


def _files(folder) -> dict:
    contents = {
        "a.txt": "\n".join(TEXTS) + "\n",
        "a.csv": "text,label\n" + "".join(f"{text},1\n" for text in TEXTS),
        "a.tsv": "text\tlabel\n" + "".join(f"{text}\t1\n" for text in TEXTS),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "a.json": json.dumps(ROWS),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return {name: folder / name for name in (*contents, "a.parquet")}


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("kind", [str, None], ids=["str", "path"])
def test_files(tmp_path, name, kind):
    path = _files(tmp_path)[name]
    assert read_texts(kind(path) if kind else path, 10) == ROWS
    assert read_texts(path, 2) == ROWS[:2]
    assert describe_data(path, 10) == {**describe_data(TEXTS, 10), "kind": "file"}


KINDS = {
    "strings": TEXTS,
    "tuple": tuple(TEXTS),
    "dicts": ROWS,
    "sentence": [{"sentence": text} for text in TEXTS],
    "more columns": [{"text": text, "label": 1, "idx": i} for i, text in enumerate(TEXTS)],
    "dataset": Dataset.from_list(ROWS),
    "dataset of sentences": Dataset.from_list([{"sentence": text} for text in TEXTS]),
    "blank lines": ["", *TEXTS, "   "],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    assert read_texts(KINDS[kind], 10) == ROWS
    described = describe_data(KINDS[kind], 10)
    assert described["count"] == 3
    assert described["sha256"] == describe_data(TEXTS, 10)["sha256"]
    assert not [text for text in TEXTS if text in json.dumps(described)]


def test_pairs():
    pairs = [{"text": "w5", "text_pair": "w6"}, {"text": "w7", "text_pair": None}]
    assert read_texts(pairs, 5) == [{"text": "w5", "text_pair": "w6"}, {"text": "w7"}]
    assert read_texts(Dataset.from_list(pairs), 5) == [{"text": "w5", "text_pair": "w6"}, {"text": "w7"}]


def test_quotes_in_a_tsv_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"w5 w6\t1\nw7 "w8"\t0\n')
    assert [row["text"] for row in read_texts(tmp_path / "a.tsv", 5)] == ['"w5 w6', 'w7 "w8"']


def test_limit_is_taken_from_the_beginning():
    assert read_texts(TEXTS, 2) == ROWS[:2]
    assert read_texts(Dataset.from_list(ROWS), 1) == ROWS[:1]
    assert read_texts(TEXTS, 99) == ROWS


def test_the_hash_sees_the_text_and_its_order():
    assert describe_data(TEXTS, 3)["sha256"] != describe_data(TEXTS[::-1], 3)["sha256"]
    assert describe_data(TEXTS, 3)["sha256"] != describe_data(TEXTS, 2)["sha256"]


ERRORS = {
    "nothing": ([], ValueError, "holds no text; give at least one sentence"),
    "blank": (["", " "], ValueError, "holds no text"),
    "numbers": ([1, 2], ValueError, "a sample without text: 1; use strings or dicts with 'text'"),
    "no text column": ([{"label": 1}], ValueError, r"a sample without text: \{'label': 1\}"),
    "text is a number": ([{"text": 5}], ValueError, "a sample without text"),
    "another dataset": (Dataset.from_list([{"words": "a"}]), ValueError, "a sample without text.*'words'"),
    "splits": (DatasetDict({"train": Dataset.from_list(ROWS)}), (TypeError, ValueError), "DatasetDict|split"),
    "stream": (Dataset.from_list(ROWS).to_iterable_dataset(), TypeError, "IterableDataset"),
    "generator": ((text for text in TEXTS), TypeError, "calibration_data is a generator; use a list of strings"),
    "mapping": ({"text": TEXTS}, TypeError, "calibration_data is a dict; use a list of strings"),
    "number": (3, TypeError, "calibration_data is a int"),
    "no file": ("missing.txt", FileNotFoundError, "there is no file missing.txt"),
    "a text, not a list": ("w5 w6 w7", FileNotFoundError, "there is no file w5 w6 w7"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    data, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        read_texts(data, 10)


def test_errors_of_files(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"a.pdf is of no kind we read; use a file that ends with one of \['.csv'"):
        read_file(tmp_path / "a.pdf")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_file(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "a.txt", 5)


# Tokenizers -------------------------------------------------------------------------------------------------------------


def test_texts_become_batches(tmp_path):
    model = make("bert-cls")
    make_tokenizer().save_pretrained(tmp_path)
    model.config.name_or_path = str(tmp_path)
    batches = list(text_batches(model, [*TEXTS * 6, "w11 w12"], 19))
    assert [len(batch["input_ids"]) for batch in batches] == [16, 3]
    assert batches[0]["input_ids"][0].tolist() == [1, 5, 6, 2, 0]
    assert batches[0]["attention_mask"][0].tolist() == [1, 1, 1, 1, 0]


def test_pairs_become_batches(tmp_path):
    model = make("bert-cls")
    make_tokenizer().save_pretrained(tmp_path)
    model.config.name_or_path = str(tmp_path)
    alone, pair = text_batches(model, [{"text": "w5", "text_pair": "w6 w7"}, {"text": "w8"}], 5)
    assert pair["input_ids"].tolist() == [[1, 5, 2, 6, 7, 2]]
    assert alone["input_ids"].tolist() == [[1, 8, 2]]  # without the separator of a partner


@pytest.mark.parametrize("limit", [80, int(1e30)], ids=["told", "untold"])
@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls"])
def test_long_texts_fit_the_model(tmp_path, name, limit):
    """The models have 80 positions, RoBERTa two less; not every tokenizer says so."""
    make(name).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(tmp_path)
    config = PreQuantConfig(activations="static", calibration_data=["w5 " * 300])
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert model.config.quantization_config.recipe["calibration"]["count"] == 1


@pytest.mark.parametrize("name", ["bert-cls", "opt-tied", "gpt2-tied", "llama-tied", "qwen2-tied", "t5-tied", "bart-tied"])
def test_no_tokenizer(tmp_path, name):
    """transformers makes up an empty tokenizer for many families: every text would become unknown tokens, or nothing."""
    make(name).save_pretrained(tmp_path)
    model = make(name)
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer was found at .*save the model's tokenizer there, or call"):
        find_tokenizer(model)
    config = PreQuantConfig(activations="static", calibration_data=TEXTS)
    with pytest.raises(ValueError, match="no tokenizer was found"):
        type(model).from_pretrained(tmp_path, quantization_config=config)


def test_no_tokenizer_of_a_model_in_memory():
    with pytest.raises(ValueError, match="no tokenizer was found at ''"):
        find_tokenizer(make("bert-cls"))


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = make("llama-tied")
    model.config.name_or_path = str(tmp_path)
    assert find_tokenizer(model).pad_token == "[SEP]"


# Static ranges ------------------------------------------------------------------------------------------------------------


def _ranges(model) -> dict:
    return {n: layer.input_scale.item() for n, layer in low_bit_layers(model) if layer.input_scale is not None}


@pytest.mark.parametrize("kind", ["strings", "dicts", "dataset", "a.txt", "a.parquet"])
def test_calibrated_on_load_as_by_hand(tmp_path, kind):
    """`calibration_data` is `calibrate` on the batches of its texts."""
    make("bert-cls").save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    data = KINDS[kind] if kind in KINDS else _files(tmp_path)[kind]
    cls = tf.BertForSequenceClassification
    config = PreQuantConfig(activations="static", calibration_data=data, calibration_samples=2)
    loaded = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    model = cls.from_pretrained(
        tmp_path / "float", quantization_config=PreQuantConfig(activations="static", calibration_samples=1)
    )
    before = _ranges(model)
    calibrate(model, list(text_batches(model, TEXTS, 2)))
    assert _ranges(model) == _ranges(loaded) != before
    expected = "file" if kind.startswith("a.") else "dataset" if kind == "dataset" else "list"
    assert loaded.config.quantization_config.recipe["calibration"] == {**describe_data(TEXTS, 2), "kind": expected}


def test_the_texts_do_not_stay_in_the_model(tmp_path):
    """Of data only its kind, count and hash are kept: a pickled model must not carry the texts."""
    make("bert-cls").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = PreQuantConfig(activations="static", calibration_data=["w77 w78 secret"])
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert b"w77 w78 secret" not in pickle.dumps(model)
    assert config.calibration_data == ["w77 w78 secret"]


def test_ranges_follow_the_data(tmp_path):
    make("bert-cls").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = []
    for texts in (["w5"], ["w6 w7 w8 w9"]):
        config = PreQuantConfig(activations="static", calibration_data=texts)
        found.append(_ranges(tf.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)))
    assert found[0].keys() == found[1].keys()
    assert found[0] != found[1]


# Sampled sequences --------------------------------------------------------------------------------------------------------


def _loaded(tmp_path, name, tokenizer):
    model = make(name)
    model.save_pretrained(tmp_path)
    if tokenizer:
        make_tokenizer().save_pretrained(tmp_path)
    model.config.name_or_path = str(tmp_path)
    return model


@pytest.mark.parametrize("tokenizer", [False, True], ids=["bare", "tokenizer"])
@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls", "llama", "llama-tied", "gpt2-tied", "t5-tied", "bart-cls"])
def test_sampled_batches(tmp_path, name, tokenizer):
    model = _loaded(tmp_path, name, tokenizer)
    first, again, other = (list(sampled_batches(model, 40, seed)) for seed in (0, 0, 1))
    sizes = [len(batch["input_ids"]) for batch in first]
    assert (sum(sizes), max(sizes)) == (40, 16 if name in ("llama-tied", "gpt2-tied") else 4)
    for batch, same in zip(first, again, strict=True):
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[key], same[key]) for key in batch)
        assert batch["input_ids"].shape[1] <= 64
        assert batch["input_ids"].min() >= 0
        assert batch["input_ids"].max() < VOCABULARY
        assert ("decoder_input_ids" in batch) == model.config.is_encoder_decoder
        with torch.no_grad():
            assert torch.isfinite(model(**batch)[0]).all()
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    tokens = torch.cat([batch["input_ids"].flatten() for batch in first])
    assert len(tokens.unique()) > 60  # not one token over and over


@pytest.mark.parametrize("tokenizer", [False, True], ids=["bare", "tokenizer"])
def test_sampled_batches_are_of_every_form(tmp_path, tokenizer):
    model = _loaded(tmp_path, "bert-cls", tokenizer)
    separators = set()
    for batch in sampled_batches(model, 320, 0):
        assert not (batch["input_ids"] == model.config.pad_token_id).any()
        if tokenizer:
            assert (batch["input_ids"][:, 0] == 1).all()
            assert (batch["input_ids"][:, -1] == 2).all()
            separators.add(int((batch["input_ids"] == 2).sum(dim=1).max()))
    assert separators == ({1, 2} if tokenizer else set())


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
def test_the_global_random_state_is_left_alone(tmp_path, name):
    model = _loaded(tmp_path, name, True)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(sampled_batches(model, 4, 0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_quantizing_leaves_the_global_random_state_alone(tmp_path):
    make("llama-tied").save_pretrained(tmp_path / "float")
    torch.manual_seed(5)
    config = PreQuantConfig(activations="static", calibration_samples=2)
    tf.LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls", "gpt2-tied", "opt-tied", "bart-tied"])
def test_models_with_few_positions(tmp_path, name):
    """Less positions than the 64 tokens of a sampled sequence."""
    field = "n_positions" if name.startswith("gpt2") else "max_position_embeddings"
    model = make(name, **{field: 24})
    model.save_pretrained(tmp_path)
    config = PreQuantConfig(activations="static", calibration_samples=2)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert all(scale > 0 for scale in _ranges(loaded).values())


@pytest.mark.parametrize("name", ["llama-cls", "llama-tied"])
def test_models_with_several_end_tokens(tmp_path, name):
    """As Llama 3 has them: `eos_token_id` is a list."""
    model = make(name, eos_token_id=[2, 3])
    (batch,) = sampled_batches(model, 2, 0)
    assert len(batch["input_ids"]) == 2
    with torch.no_grad():
        assert torch.isfinite(model(**batch)[0]).all()


def test_complete_batch():
    ids = torch.tensor([[5, 6, 7]])
    assert complete_batch(make("bert-cls"), {"input_ids": ids}).keys() == {"input_ids"}
    batch = complete_batch(make("bart-tied"), {"input_ids": ids})
    assert batch["decoder_input_ids"].tolist() == [[2, 5, 6]]
    given = complete_batch(make("bart-tied"), {"input_ids": ids, "decoder_input_ids": ids})
    assert given["decoder_input_ids"] is ids or torch.equal(given["decoder_input_ids"], ids)


def test_one_sided_inputs_use_all_codes(tmp_path):
    """After OPT's ReLU the inputs are never negative: the zero point is 0."""
    model = quantized("opt-tied", tmp_path, activations="static", calibration_samples=4)
    for name, layer in low_bit_layers(model):
        if name.endswith("fc2"):
            assert layer.input_zero_point.item() == 0
        elif name.endswith("fc1"):
            assert 0 < layer.input_zero_point.item() < 255
    assert HIDDEN == 32


def test_what_a_model_writes_is_its_own_distribution_whatever_its_generation_config_says():
    plain, configured = make("llama-tied"), make("llama-tied")
    configured.generation_config.update(temperature=0.1, repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1)
    first = torch.arange(3, 9).view(6, 1)
    assert torch.equal(continue_sequences(plain, first, 12, seed=1), continue_sequences(configured, first, 12, seed=1))
