import copy

import pytest
import torch
from torch import nn

from optimum_zsaq.algorithms.forms import SequenceForm
from optimum_zsaq.algorithms.generators import Generator, PriorSource, Source, WrittenSource, token_prior
from optimum_zsaq.layers import FakeQuantEmbedding
from optimum_zsaq.spec import LayerSpec, QuantSpec


VOCABULARY, WIDTH = 50, 8
FORM = SequenceForm(first=(1,), last=(2,), shortest=4, longest=9)


@pytest.fixture
def table() -> torch.Tensor:
    """Tokens 0 to 2 are special, 40 to 49 were hardly trained."""
    torch.manual_seed(0)
    table = nn.functional.normalize(torch.randn(VOCABULARY, WIDTH), dim=1)
    table[40:] *= 0.1
    return table


def make_generator(
    table: torch.Tensor, form: SequenceForm = FORM, seed: int = 0, source: Source | None = None
) -> Generator:
    prior = token_prior(table, [0, 1, 2])
    return Generator(source or PriorSource(prior), table, prior, form, candidates=64, width=8, seed=seed)


@pytest.fixture
def generator(table) -> Generator:
    return make_generator(table)


def push(generator: Generator, by: float = 0.5) -> Generator:
    """A generator whose network says something."""
    nn.init.normal_(generator.network[-1].weight, std=by)
    return generator


class TestTokenPrior:
    def test_is_zipfs_law_over_trained_plain_tokens(self, table):
        prior = token_prior(table, [0, 1, 2], exponent=0.7)
        expected = torch.zeros(VOCABULARY)
        for rank, token in enumerate(range(3, 40)):
            expected[token] = 1.0 / (rank + 10.0) ** 0.7
        torch.testing.assert_close(prior, expected / expected.sum())

    def test_exponent_zero_is_uniform(self, table):
        prior = token_prior(table, [0, 1, 2], exponent=0.0)
        assert prior[3:40].unique().numel() == 1

    def test_needs_a_plain_token(self, table):
        with pytest.raises(ValueError, match="all 50 tokens of the vocabulary are special"):
            token_prior(table, list(range(VOCABULARY)))


@pytest.mark.parametrize(("shortest", "longest"), [(2, 9), (9, 4), (0, 0)])
def test_impossible_lengths(shortest, longest):
    with pytest.raises(ValueError, match="are not possible with 2 special ones; use lengths of at least 3"):
        SequenceForm((1,), (2,), shortest, longest)


class TestSample:
    def test_has_the_form(self, generator):
        lengths = set()
        for _ in range(60):
            ids = generator.sample(20)["input_ids"]
            assert (len(ids), ids.dtype) == (20, torch.int64)
            assert (ids[:, 0] == 1).all()
            assert (ids[:, -1] == 2).all()
            assert ((ids[:, 1:-1] >= 3) & (ids[:, 1:-1] < 40)).all()
            lengths.add(ids.shape[1])
        assert lengths == {4, 5, 6, 7, 8, 9}

    def test_short_sequences_are_as_frequent_as_long_ones_on_a_log_scale(self):
        random, form = torch.Generator().manual_seed(0), SequenceForm(shortest=4, longest=31)
        drawn = torch.tensor([form.draw_length(random) for _ in range(4000)]).float()
        assert 0.45 < (drawn < 11.3).float().mean().item() < 0.55  # sqrt(4 * 32) = 11.3

    def test_starts_as_the_prior(self, generator, table):
        ids = torch.cat([generator.sample(16)["input_ids"].flatten() for _ in range(400)])
        counts = torch.bincount(ids[ids > 2], minlength=VOCABULARY).float()
        prior = token_prior(table, [0, 1, 2])
        assert (counts / counts.sum() - prior).abs().sum() < 0.08  # 25,000 draws of 37 tokens

    @pytest.mark.parametrize("pushed", [False, True])
    def test_a_seed_is_a_sequence_of_batches(self, table, pushed):
        generators = [make_generator(table, seed=seed) for seed in (3, 3, 4)]
        if pushed:
            for generator in generators:
                torch.manual_seed(1)
                push(generator)
        first, second, other = ([g.sample(5)["input_ids"] for _ in range(3)] for g in generators)
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
        assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))

    def test_leaves_the_global_random_numbers_alone(self, table):
        before = torch.get_rng_state()
        generator = make_generator(table)
        generator.sample(3)
        generator.soft_sample(3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_goes_on_from_its_state(self, generator, table):
        push(generator).sample(3)
        other = make_generator(table, seed=9)
        other.load_state_dict(generator.state_dict())
        assert torch.equal(generator.sample(5)["input_ids"], other.sample(5)["input_ids"])

    def test_no_special_tokens(self, table):
        generator = make_generator(table, SequenceForm(shortest=3, longest=3))
        assert (generator.sample(40)["input_ids"] > 2).all()


class TestWrittenSource:
    def test_gives_pieces_of_its_rows(self, table):
        written = torch.arange(3, 17).view(2, 7)
        batches = [make_generator(table, source=WrittenSource(written), seed=s).sample(8)["input_ids"] for s in range(20)]
        for ids in batches:
            inner = ids[:, 1:-1]
            assert (inner.diff(dim=1) == 1).all()
            assert torch.isin(inner, written).all()
            assert ((inner - 3) // 7 == (inner[:, :1] - 3) // 7).all()  # no piece goes on in the next row
        assert len({ids.shape[1] for ids in batches}) > 3

    def test_gives_answers_with_whole_rows(self, table):
        written, decoder = torch.arange(3, 17).view(2, 7), torch.tensor([[0, 5, 2], [0, 6, 2]])
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        batch = make_generator(table, source=WrittenSource(written, decoder, mask)).sample(9)
        rows = (batch["input_ids"][:, 1] - 3) // 7
        assert torch.equal(batch["input_ids"][:, 1:-1], written[rows])
        assert torch.equal(batch["decoder_input_ids"], decoder[rows])
        assert torch.equal(batch["decoder_attention_mask"], mask[rows])

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="no sequence was written, so there is nothing to train on"):
            WrittenSource(torch.empty(0, 5, dtype=torch.int64))

    def test_is_a_source(self):
        assert isinstance(WrittenSource(torch.ones(1, 5, dtype=torch.int64)), Source)
        assert isinstance(PriorSource(torch.ones(5)), Source)
        assert not isinstance("noise", Source)


class TestSoftSample:
    def test_is_exactly_one_hot(self, generator):
        soft = generator.soft_sample(6)
        length = soft.written.shape[1]
        assert soft.choice.shape == (6, length, 65)
        assert torch.equal(soft.choice.detach(), nn.functional.one_hot(soft.choice.argmax(dim=-1), 65).float())
        assert soft.entropy.item() == pytest.approx(1.0, abs=1e-5)
        assert soft.batch["input_ids"].shape == (6, length)

    def test_starts_with_one_token_in_nine_replaced(self, generator):
        found = [generator.soft_sample(64) for _ in range(40)]
        replaced = torch.cat([(soft.choice[:, 1:-1, 0] == 0).flatten() for soft in found]).float().mean()
        assert replaced.item() == pytest.approx(1.0 / (1.0 + 2.71828**2), abs=0.01)

    def test_special_tokens_stay(self, generator):
        for _ in range(10):
            ids = push(generator, 5.0).soft_sample(16).batch["input_ids"]
            assert (ids[:, 0] == 1).all()
            assert (ids[:, -1] == 2).all()

    def test_a_token_can_be_made_likelier(self, generator, table):
        """Ascent on how long the embeddings' first coordinate is, with real tokens in the end."""
        optimizer = torch.optim.Adam(generator.parameters(), 0.01, maximize=True)

        def mean_of(batches: int) -> float:
            ids = torch.cat([generator.sample(32)["input_ids"].flatten() for _ in range(batches)])
            return table[ids[ids > 2], 0].mean().item()

        before = mean_of(20)
        for _ in range(100):
            optimizer.zero_grad()
            generator.soft_sample(32).embed(lambda ids: table[ids])[..., 0].mean().backward()
            optimizer.step()
        assert mean_of(20) > before + 0.2

    def test_parts(self, generator):
        soft = generator.soft_sample(6)
        part = soft.part(slice(2, 4))
        assert torch.equal(part.batch["input_ids"], soft.batch["input_ids"][2:4])
        assert torch.equal(part.choice, soft.choice[2:4])


@pytest.mark.parametrize("low_bit", [False, True])
def test_a_model_reads_a_soft_sample_as_the_tokens_it_is(generator, table, low_bit):
    embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=table.clone())
    if low_bit:
        embedding = FakeQuantEmbedding.from_float(embedding, LayerSpec(QuantSpec(3)))
        embedding.find_ranges("minmax")
    soft = push(generator).soft_sample(6)
    embedded = soft.embed(embedding)
    assert (soft.choice[..., 0] == 0).any()
    assert torch.equal(embedded, embedding(soft.batch["input_ids"]))
    (embedded * torch.arange(WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert generator.network[-1].weight.grad.abs().sum() > 0


def test_the_gradient_of_a_choice_is_that_of_the_mixture(generator, table):
    """d/dlogits of sum over tokens of p_c E_c, by hand."""
    soft = copy.copy(push(generator).soft_sample(2))
    upstream = torch.randn(*soft.written.shape, WIDTH)
    (found,) = torch.autograd.grad((soft.embed(lambda ids: table[ids]) * upstream).sum(), soft.choice, retain_graph=True)
    options = torch.cat(
        [table[soft.written].unsqueeze(2), table[soft.candidates].expand(*soft.written.shape, -1, -1)], dim=2
    )
    torch.testing.assert_close(found, (options * upstream.unsqueeze(2)).sum(dim=-1))
