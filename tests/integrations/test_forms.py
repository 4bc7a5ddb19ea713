"""Which inputs a model may meet: what is read off its tokenizer must be what the tokenizer writes."""

import pytest
import torch
from tiny_models import make, make_tokenizer

from optimum_zsaq import ZSAQConfig
from optimum_zsaq.integrations.forms import input_mixture, longest_sequence, missing_forms
from optimum_zsaq.integrations.zero_shot import make_generator


def pair_tokenizer(pair: str, single: str = "[CLS]:0 $A:0 [SEP]:0"):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    pieces = [("[CLS]", 1), ("[SEP]", 2)]
    processor = processors.TemplateProcessing(single, pair, special_tokens=pieces)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


PAIRS = {
    "bert": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
    "roberta": "[CLS]:0 $A:0 [SEP]:0 [SEP]:0 $B:0 [SEP]:0",
    "only between": "$A:0 [SEP]:0 $B:1",
}


@pytest.mark.parametrize("template", PAIRS)
def test_a_pair_is_what_the_tokenizer_writes(template):
    tokenizer = pair_tokenizer(PAIRS[template])
    pair = input_mixture(make("bert-cls"), tokenizer, 20).forms[1]
    expected = tokenizer("w7 w8 w9", "w10 w11", return_tensors="pt")
    found = pair.finish(torch.tensor([[7, 8, 9]]), torch.tensor([[10, 11]]))
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["token_type_ids"], expected["token_type_ids"])


def test_a_single_text_is_what_the_tokenizer_writes():
    tokenizer = make_tokenizer()
    single = input_mixture(make("bert-cls"), tokenizer, 20).forms[0]
    expected = tokenizer("w7 w8 w9", return_tensors="pt")
    assert torch.equal(single.finish(torch.tensor([[7, 8, 9]]))["input_ids"], expected["input_ids"])


def test_types_only_for_models_that_have_some():
    mixture = input_mixture(make("roberta-cls", type_vocab_size=1), make_tokenizer(), 20)
    assert [form.types for form in mixture.forms] == [None, None]


@pytest.mark.parametrize("name", ["llama-tied", "t5-tied", "gpt2-tied"])
def test_models_that_write_read_one_text(name):
    assert len(input_mixture(make(name), make_tokenizer(), 20).forms) == 1


def test_no_pairs_where_nothing_stands_between(tmp_path):
    assert len(input_mixture(make("bert-cls"), pair_tokenizer("$A:0 $B:0"), 20).forms) == 1
    assert len(input_mixture(make("bert-cls"), None, 20).forms) == 1


def test_no_padding_for_a_head_that_cannot_find_its_end():
    """A decoder's classification head looks for the last token that is no padding."""
    model = make("llama-cls", pad_token_id=None)
    assert input_mixture(model, make_tokenizer(), 20).forms[0].padding is None


def test_the_side_of_the_padding_is_the_tokenizers():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    assert input_mixture(make("llama-tied"), tokenizer, 20).forms[0].left


@pytest.mark.parametrize("name", ["bert", "bert-cls", "roberta-mlm-tied", "deberta-cls", "electra-cls", "bart-cls"])
def test_every_family_runs_on_every_form(name, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    model = make(name)
    model.config.name_or_path = str(tmp_path)
    generator = make_generator(model, ZSAQConfig(sequence_length=14))
    kinds = set()
    for _ in range(30):
        batch = generator.sample(3)
        kinds.add((int((batch["input_ids"] == 2).sum(dim=1)[0]), "attention_mask" in batch))
        assert torch.isfinite(model(**batch)[0]).all()
    assert len(kinds) >= 2


@pytest.mark.parametrize(("name", "most"), [("bert-cls", 78), ("roberta-cls", 78), ("bart-tied", 78), ("llama-tied", 80)])
def test_no_longer_than_the_positions(name, most):
    message = f"sequence_length=81 is longer than {type(make(name)).__name__} has positions for; use at most {most}"
    with pytest.raises(ValueError, match=message):
        longest_sequence(make(name), 81)
    assert longest_sequence(make(name), most) == most
    assert longest_sequence(make(name)) == (32 if name == "bart-tied" else 78)


class TestMissingForms:
    """What calibration texts do not show."""

    def missing(self, texts, used_on=None, name="bert-cls", longest=78):
        tokenizer = make_tokenizer()

        def rows(texts):
            return [tokenizer(*(text if isinstance(text, tuple) else (text,)))["input_ids"] for text in texts]

        return missing_forms(make(name), tokenizer, rows(texts), longest, used_on and rows(used_on))

    short, long = "w7 w8 w9", " ".join(["w7"] * 70)

    def test_pairs(self):
        assert self.missing([self.short, self.long]) == ["no pairs of texts, which the model's tokenizer can write"]
        assert self.missing([(self.short, self.short), self.long]) == []
        assert self.missing([self.short, self.long], name="llama-tied") == []

    def test_lengths(self):
        pair = (self.short, self.short)
        assert self.missing([pair]) == ["nothing longer than 9 tokens, of 78 that the model may read"]
        assert self.missing([(self.long, self.short)]) == ["nothing shorter than 76 tokens"]

    def test_against_what_it_will_be_used_on(self):
        assert self.missing([self.short], used_on=[self.short]) == []
        assert len(self.missing([self.short], used_on=[(self.short, self.short)])) == 1
        assert self.missing([self.short], used_on=[self.long]) == [
            "nothing longer than 5 tokens, of 72 that the model may read"
        ]

    def test_padding_is_no_length(self):
        rows = [[1, 7, 2, 7, 2] + [0] * 70]
        found = missing_forms(make("bert-cls"), make_tokenizer(), rows, 78)
        assert found == ["nothing longer than 5 tokens, of 78 that the model may read"]
