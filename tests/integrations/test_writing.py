"""Written sequences: their shapes, vocabularies and seeds, and what is said when nothing can be written."""

import pytest
import torch
import transformers as tf
from tiny_models import VOCABULARY, make, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from optimum_zsaq.algorithms.forms import SequenceForm
from optimum_zsaq.algorithms.generators import WrittenSource
from optimum_zsaq.integrations.data import find_tokenizer, tokenizer_or_none
from optimum_zsaq.integrations.forms import input_mixture
from optimum_zsaq.integrations.writing import (
    answer_inputs,
    describe_generator,
    load_generator,
    write_continuations,
    write_texts,
)


FORM = SequenceForm((1,), (2,), 6, 14)
PLAIN = SequenceForm((), (), 12, 12)
SMALL = 60  # tokens of the other vocabulary
SPECIAL = {0, 1, 2, 3, 4}


def other_tokenizer() -> tf.PreTrainedTokenizerBase:
    """The words "w5" to "w48" and a few of its own, at other ids."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(48, 4, -1)), *(f"own{i}" for i in range(12))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def saved(folder, name: str, tokenizer=None, **options) -> tf.PreTrainedModel:
    """A model that was loaded from a folder, with a tokenizer beside it if one is given."""
    made = make(name, **options)
    made.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return type(made).from_pretrained(folder)


class Watch:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, more: int) -> None:
        self.told.append(more)


@pytest.fixture
def teacher(tmp_path):
    """An encoder with a tokenizer."""
    return saved(tmp_path / "teacher", "bert-cls", make_tokenizer())


@pytest.fixture
def writer(tmp_path):
    """A decoder of another vocabulary, with its tokenizer."""
    return saved(tmp_path / "writer", "llama-tied", other_tokenizer(), vocab_size=SMALL)


def has_special(ids: Tensor, special=SPECIAL) -> bool:
    return bool(torch.isin(ids, torch.tensor(sorted(special))).any())


class TestContinuations:
    def test_shapes_and_progress(self):
        watch = Watch()
        source = write_continuations(make("llama-tied"), PLAIN, 70, 0, watch)
        assert (source.written.shape, source.written.dtype) == ((70, 12), torch.int64)
        assert source.written.min() >= 0
        assert source.written.max() < VOCABULARY
        assert sum(watch.told) == 70
        assert len(watch.told) == 2
        assert source.decoder is None
        drawn = source.draw(5, 12, torch.Generator().manual_seed(0))["input_ids"]
        assert drawn.shape == (5, 12)

    def test_room_for_special_tokens(self):
        assert write_continuations(make("gpt2-tied"), FORM, 3, 0, Watch()).written.shape == (3, 12)

    @pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "opt-tied"])
    def test_seeds(self, name):
        """As often as it is written, whatever the global random state is, which is left alone."""
        model, found = make(name), []
        for seed in (0, 0, 1):
            torch.manual_seed(len(found))
            before = torch.get_rng_state()
            found.append(write_continuations(model, PLAIN, 6, seed, Watch()).written)
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_parts_are_not_alike(self, monkeypatch):
        """Each has a seed of its own: from the same first tokens they go on otherwise."""
        monkeypatch.setattr("optimum_zsaq.integrations.writing.openings", lambda *_: torch.full((128, 1), 7))
        written = write_continuations(make("llama-tied"), PLAIN, 128, 0, Watch()).written
        assert not torch.equal(written[:64], written[64:])

    def test_first_token_is_not_special_and_no_sequence_ends(self):
        written = write_continuations(make("llama-tied"), PLAIN, 200, 0, Watch()).written
        assert not has_special(written[:, 0], {0, 1, 2})  # without a tokenizer, those that the config names
        assert not has_special(written, {2})
        assert len(written[:, 0].unique()) > 50

    def test_what_a_tokenizer_puts_first_is_read_and_not_written(self, tmp_path, monkeypatch):
        model, read = saved(tmp_path, "llama-tied", make_tokenizer(special=True)), []
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda ids, **rest: read.append(ids) or generate(ids, **rest))
        form = input_mixture(model, find_tokenizer(model), 12).forms[0]
        written = write_continuations(model, form, 3, 0, Watch()).written
        assert tuple(read[0].shape) == (3, len(form.first))
        assert read[0][0].tolist() == list(form.first)
        assert written.shape == (3, 12 - form.special)

    def test_its_own_distribution(self):
        """What is sampled follows the model's probabilities."""
        model = make("gpt2-tied")
        with torch.no_grad():
            model.transformer.wte.weight[7] = model.transformer.wte.weight[8:].norm(dim=1).mean() * 30
        written = write_continuations(model, PLAIN, 20, 0, Watch()).written
        with torch.no_grad():
            likely = model(written).logits[:, :-1].softmax(dim=-1)
        likely = likely.index_fill(-1, torch.tensor([2]), 0.0)  # it may not end
        expected = (likely[..., 7] / likely.sum(dim=-1)).mean().item()
        assert (written[:, 1:] == 7).float().mean().item() == pytest.approx(expected, abs=0.15)

    def test_longer_than_its_positions(self):
        form = SequenceForm((), (), 81, 81)
        with pytest.raises(ValueError, match="81 tokens are to be written and LlamaForCausalLM has 80 positions"):
            write_continuations(make("llama-tied"), form, 2, 0, Watch())
        assert write_continuations(make("llama-tied"), SequenceForm((), (), 80, 80), 2, 0, Watch()).written.shape == (2, 80)


class TestTexts:
    def test_in_the_vocabulary_of_the_teacher(self, teacher, writer):
        watch = Watch()
        source = write_texts(writer, teacher, FORM, 70, 0, watch)
        assert source.written.shape[1] == FORM.longest - FORM.special
        assert source.written.dtype == torch.int64
        assert 0.5 * 70 < len(source.written) < 2 * 70
        assert sum(watch.told) == 70
        tokens = set(make_tokenizer().convert_ids_to_tokens(source.written.flatten().tolist()))
        assert tokens <= {"[UNK]", *(f"w{i}" for i in range(5, 49))}  # the words they share, and what it does not know
        assert len(tokens) > 30
        assert not has_special(source.written, {0, 1, 2, 4})

    def test_the_text_is_what_the_writer_wrote(self, teacher, writer, monkeypatch):
        """Long texts are cut, short ones put together, and its special tokens left out."""
        words = {f"w{i}": 52 - i for i in range(5, 49)}  # its ids
        long = [words[f"w{5 + i}"] for i in range(13)]
        short = [words["w40"], 2, 1, words["w41"], *[0] * 9]
        unknown = [50, *[words["w9"]] * 7, *[0] * 5]
        given = torch.tensor([long, short, unknown, short, unknown, short])
        monkeypatch.setattr("optimum_zsaq.integrations.writing.continue_sequences", lambda *_: given)
        written = write_texts(writer, teacher, SequenceForm((), (), 4, 11), 6, 0, Watch()).written
        expected = [40, 41, 3, *[9] * 7, 40], [41, 3, *[9] * 7, 40, 41]  # [UNK] is 3
        assert written.tolist() == [list(range(5, 16)), *expected]

    @pytest.mark.parametrize("given", ["object", "path", "string"])
    def test_ways_to_name_it(self, teacher, writer, tmp_path, given):
        generator = {"object": writer, "path": tmp_path / "writer", "string": str(tmp_path / "writer")}[given]
        expected = write_texts(writer, teacher, FORM, 6, 0, Watch()).written
        assert torch.equal(write_texts(generator, teacher, FORM, 6, 0, Watch()).written, expected)

    def test_seeds(self, teacher, writer):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(found))
            before = torch.get_rng_state()
            found.append(write_texts(writer, teacher, FORM, 6, seed, Watch()).written)
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found[0], found[1])
        assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])

    @pytest.mark.parametrize("missing", ["both", "writer", "teacher"])
    def test_same_vocabulary_without_tokenizers(self, tmp_path, missing):
        teacher = saved(tmp_path / "a", "bert-cls", make_tokenizer() if missing == "writer" else None)
        writer = saved(tmp_path / "b", "llama-tied", make_tokenizer(False) if missing == "teacher" else None)
        source = write_texts(writer, teacher, FORM, 9, 0, Watch())
        assert source.written.shape == (9, 12)
        assert not has_special(source.written[:, 0], {0, 2})

    @pytest.mark.parametrize("missing", ["writer", "teacher"])
    def test_other_vocabulary_without_a_tokenizer(self, tmp_path, missing):
        teacher = saved(tmp_path / "teacher", "bert-cls", make_tokenizer() if missing == "writer" else None)
        tokenizer = other_tokenizer() if missing == "teacher" else None
        writer = saved(tmp_path / "writer", "llama-tied", tokenizer, vocab_size=SMALL)
        text = rf"generator has 60 tokens and the model 99, and there is no tokenizer beside '.*/{missing}' to translate"
        with pytest.raises(ValueError, match=text):
            write_texts(writer, teacher, FORM, 4, 0, Watch())

    def test_texts_too_short(self, teacher, writer, monkeypatch):
        padding = torch.zeros(2, 16, dtype=torch.int64)
        monkeypatch.setattr("optimum_zsaq.integrations.writing.continue_sequences", lambda *_: padding)
        with pytest.raises(ValueError, match="2 texts of the generator are fewer than 12 tokens .* smaller sequence_len"):
            write_texts(writer, teacher, FORM, 2, 0, Watch())

    def test_longer_than_its_positions(self, teacher, writer):
        """It writes a quarter more than is wanted, because its tokens are not the teacher's."""
        with pytest.raises(ValueError, match="88 tokens are to be written and LlamaForCausalLM has 80 positions"):
            write_texts(writer, teacher, SequenceForm((), (), 70, 70), 2, 0, Watch())


class TestLoadGenerator:
    def test_path_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="there is no causal language model at generator='.*/nothing'.*'noise'"):
            load_generator(tmp_path / "nothing")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="there is no causal language model at generator="):
            load_generator(tmp_path)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("bert-cls", "is no causal language model: it has no weights for"),
            ("bert", "is no causal language model: it has no weights for"),
            ("bart-tied", "is no causal language model: it has no weights for"),
            ("llama-cls", "is no causal language model: it has no weights for"),
            ("bert-mlm-tied", "holds a BertForMaskedLM, which writes no text"),
            ("roberta-mlm-untied", "holds a RobertaForMaskedLM, which writes no text"),
            ("electra-mlm-tied", "holds a ElectraForMaskedLM, which writes no text"),
            ("opt-cls", "holds a OPTForSequenceClassification, which writes no text"),
            ("t5-tied", "there is no causal language model at"),
            ("deberta-cls", "there is no causal language model at"),
        ],
    )
    def test_path_of_another_kind_of_model(self, tmp_path, name, text):
        make(name).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=text):
            load_generator(tmp_path)

    @pytest.mark.parametrize("name", ["t5-tied", "bart-tied", "bert-cls", "bert-mlm-tied", "llama"])
    def test_object_that_writes_no_text(self, name):
        model = make(name)
        with pytest.raises(ValueError, match=f"generator is a {type(model).__name__}, which writes no text; use a causal"):
            load_generator(model)

    def test_object_is_itself(self):
        model = make("gpt2-tied")
        assert load_generator(model) is model

    @pytest.mark.parametrize("name", ["gpt2-tied", "opt-untied", "qwen2-tied"])
    def test_path(self, tmp_path, name):
        make(name).save_pretrained(tmp_path)
        model = load_generator(str(tmp_path))
        assert type(model) is type(make(name))
        assert not model.training


ANSWERS = SequenceForm((), (2,), 4, 12)


def prior() -> Tensor:
    weights = torch.ones(VOCABULARY)
    weights[:5] = 0
    return weights / weights.sum()


@pytest.fixture
def answering():
    """Models that end their answers now and then."""

    def build(name: str):
        model = make(name)
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            table.mul_(0.2)  # nearly uniform
        return model

    return build


class TestAnswers:
    @pytest.mark.parametrize("name", ["t5-tied", "bart-tied"])
    def test_shapes(self, name, answering):
        watch = Watch()
        model = answering(name)
        source = answer_inputs(model, prior(), ANSWERS, 40, 0, watch)
        start = model.config.decoder_start_token_id
        assert sum(watch.told) == 40
        assert sorted(source.groups) == [3, 4, 5, 6, 7, 8, 9, 11]  # eight lengths, without the end token
        for length, group in source.groups.items():
            assert group.written.shape == (5, length)
            assert not has_special(group.written)
            assert group.decoder.shape == group.decoder_mask.shape
            assert len(group.decoder) == 5
            assert 1 < group.decoder.shape[1] <= ANSWERS.longest + 1
            assert (group.decoder[:, 0] == start).all()
            assert group.written.dtype == group.decoder.dtype == group.decoder_mask.dtype == torch.int64

    @pytest.mark.parametrize("name", ["t5-tied", "bart-tied"])  # bart's answers start with its end token
    def test_masks_end_at_the_first_end_token(self, name, answering):
        source = answer_inputs(answering(name), prior(), ANSWERS, 400, 0, Watch())
        ended = whole = 0
        for group in source.groups.values():
            for ids, mask in zip(group.decoder.tolist(), group.decoder_mask.tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if i and token == 2), len(ids))
                assert mask == [1] * end + [0] * (len(ids) - end)
                assert set(ids[end + 1 :]) <= {0}
                ended, whole = ended + (end < len(ids) - 1), whole + (end >= len(ids) - 1)
        assert ended > 3
        assert whole > 3

    def test_several_end_tokens_and_none(self, answering):
        model = answering("t5-tied")
        model.generation_config.eos_token_id = [2, 30, 31, 32]
        for group in answer_inputs(model, prior(), ANSWERS, 40, 0, Watch()).groups.values():
            ends = torch.isin(group.decoder[:, 1:], torch.tensor([2, 30, 31, 32])).cumsum(dim=1) > 0
            assert torch.equal(group.decoder_mask[:, 1:], (~ends).long())
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        for group in answer_inputs(model, prior(), ANSWERS, 8, 0, Watch()).groups.values():
            assert group.decoder.shape == (1, 13)
            assert group.decoder_mask.all()

    def test_more_than_are_written_together(self, answering, monkeypatch):
        """Parts whose answers differ in length are padded to one."""
        monkeypatch.setattr("optimum_zsaq.integrations.writing._WRITTEN_TOGETHER", 2)
        watch = Watch()
        source = answer_inputs(answering("t5-tied"), prior(), SequenceForm((), (2,), 6, 6), 7, 0, watch)
        assert watch.told == [2, 2, 2, 1]
        assert source.groups[5].decoder.shape[0] == 7

    def test_seeds(self, answering):
        model, found = answering("t5-tied"), []
        for seed in (0, 0, 1):
            torch.manual_seed(len(found))
            before = torch.get_rng_state()
            found.append(answer_inputs(model, prior(), ANSWERS, 16, seed, Watch()).groups)
            assert torch.equal(torch.get_rng_state(), before)
        for length, group in found[0].items():
            for field in ("written", "decoder", "decoder_mask"):
                assert torch.equal(getattr(group, field), getattr(found[1][length], field))
            assert not torch.equal(group.written, found[2][length].written)

    def test_drawing(self, answering):
        """Answers stay with their inputs, and of the lengths there are the nearest is drawn."""
        source = answer_inputs(answering("t5-tied"), prior(), ANSWERS, 40, 0, Watch())
        random = torch.Generator().manual_seed(0)
        for wanted, length in ((3, 3), (10, 9), (11, 11), (50, 11), (1, 3)):
            batch = source.draw(6, wanted, random)
            assert set(batch) == {"input_ids", "decoder_input_ids", "decoder_attention_mask"}
            assert batch["input_ids"].shape == (6, length)
            group = source.groups[length]
            for row in range(6):
                place = (group.written == batch["input_ids"][row]).all(dim=1).nonzero()[0, 0]
                assert torch.equal(batch["decoder_input_ids"][row], group.decoder[place])
                assert torch.equal(batch["decoder_attention_mask"][row], group.decoder_mask[place])

    def test_one_length(self, answering):
        source = answer_inputs(answering("t5-tied"), prior(), SequenceForm((), (2,), 6, 6), 3, 0, Watch())
        assert {length: len(group.written) for length, group in source.groups.items()} == {5: 3}

    def test_whatever_the_generation_config_says(self, answering):
        """A summarizer searches with beams and repeats nothing; its own distribution is without."""
        found = []
        for options in ({}, {"num_beams": 2, "temperature": 0.1, "no_repeat_ngram_size": 1, "min_length": 13}):
            model = answering("bart-tied")
            for name, value in options.items():
                setattr(model.generation_config, name, value)
            found.append(answer_inputs(model, prior(), ANSWERS, 16, 0, Watch()).groups)
        for length, group in found[0].items():
            assert torch.equal(group.decoder, found[1][length].decoder)


class TestDescribe:
    def test_hub_ids_are_kept(self):
        for name in ("gpt2", "org/name", "org/name-1.5_b", "noise", "teacher", "auto"):
            assert describe_generator(name) == name

    def test_a_folder_is_its_name(self, tmp_path, monkeypatch):
        (tmp_path / "secret" / "writer").mkdir(parents=True)
        folder = tmp_path / "secret" / "writer"
        monkeypatch.chdir(tmp_path)
        for path in (folder, str(folder), f"{folder}/", "secret/writer", "./secret/writer", f"{folder}/../writer"):
            assert describe_generator(path) == "writer"
        monkeypatch.chdir(folder)
        for path in (".", "../writer", "./"):
            assert describe_generator(path) == "writer"

    @pytest.mark.parametrize("path", ["/home/me/secret/writer", "~/secret/writer", "../secret/writer", "a/secret/writer"])
    def test_a_folder_that_is_no_more(self, path):
        assert describe_generator(path) == "writer"

    def test_a_model(self, tmp_path):
        folder = tmp_path / "secret" / "writer"
        model = saved(folder, "llama-tied")
        assert "secret" in model.config.name_or_path
        assert describe_generator(model) == "writer"
        model.config.name_or_path = "org/name"
        assert describe_generator(model) == "org/name"
        assert describe_generator(make("llama-tied")) == "LlamaForCausalLM"

    def test_a_source_of_ones_own(self):
        assert describe_generator(WrittenSource(torch.zeros(1, 3))) == "WrittenSource"


class TestTokenizer:
    def test_beside_the_model(self, teacher):
        assert len(tokenizer_or_none(teacher)) == VOCABULARY

    def test_none(self, tmp_path):
        assert tokenizer_or_none(saved(tmp_path, "bert-cls")) is None

    def test_that_lies_in_the_working_directory_is_not_the_models(self, tmp_path, monkeypatch):
        make_tokenizer().save_pretrained(tmp_path)
        monkeypatch.chdir(tmp_path)
        assert tokenizer_or_none(make("bert-cls")) is None

    def test_padding_token(self, tmp_path):
        tokenizer = make_tokenizer(special=False)
        tokenizer.pad_token = None
        assert tokenizer_or_none(saved(tmp_path, "llama-tied", tokenizer)).pad_token == "[SEP]"
