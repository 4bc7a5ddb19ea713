import pytest
import torch
from torch import nn

from optimum_zsaq.algorithms.generators import NoiseGenerator, SequenceForm, soft_embeddings, token_prior
from optimum_zsaq.layers import FakeQuantEmbedding
from optimum_zsaq.spec import LayerSpec, QuantSpec


VOCABULARY, WIDTH = 50, 8
FORM = SequenceForm(first=(1,), last=(2,), shortest=4, longest=9, padding=0)


@pytest.fixture
def table() -> torch.Tensor:
    """Tokens 0 to 2 are special, 40 to 49 were hardly trained."""
    torch.manual_seed(0)
    table = nn.functional.normalize(torch.randn(VOCABULARY, WIDTH), dim=1)
    table[40:] *= 0.1
    return table


@pytest.fixture
def generator(table) -> NoiseGenerator:
    return NoiseGenerator(table, token_prior(table, [0, 1, 2]), FORM, candidates=64, width=8)


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
        batch = generator.sample(200)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape == (200, 9)
        assert ids.dtype == mask.dtype == torch.int64
        lengths = mask.sum(dim=1)
        assert set(lengths.tolist()) == {4, 5, 6, 7, 8, 9}
        for row, kept, length in zip(ids, mask, lengths.tolist(), strict=True):
            assert kept.tolist() == [1] * length + [0] * (9 - length)
            assert (row[0], row[length - 1]) == (1, 2)
            assert not row[length:].any()
            assert ((row[1 : length - 1] >= 3) & (row[1 : length - 1] < 40)).all()

    def test_starts_as_the_prior(self, generator, table):
        ids = torch.cat([generator.sample(16)["input_ids"].flatten() for _ in range(400)])
        counts = torch.bincount(ids[ids > 2], minlength=VOCABULARY).float()
        prior = token_prior(table, [0, 1, 2])
        assert (counts / counts.sum() - prior).abs().sum() < 0.08  # 25,000 draws of 37 tokens

    def test_a_seed_is_a_sequence_of_batches(self, table):
        first, second, other = (NoiseGenerator(table, token_prior(table, [0]), FORM, seed=seed) for seed in (3, 3, 4))
        for _ in range(3):
            assert torch.equal(first.sample(5)["input_ids"], second.sample(5)["input_ids"])
        assert not torch.equal(first.sample(5)["input_ids"], other.sample(5)["input_ids"])

    def test_leaves_the_global_random_numbers_alone(self, table):
        before = torch.get_rng_state()
        generator = NoiseGenerator(table, token_prior(table, [0]), FORM)
        generator.sample(3)
        generator.soft_sample(3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_goes_on_from_its_state(self, generator, table):
        generator.sample(3)
        other = NoiseGenerator(table, token_prior(table, [0, 1, 2]), FORM, candidates=64, width=8, seed=9)
        other.load_state_dict(generator.state_dict())
        assert torch.equal(generator.sample(5)["input_ids"], other.sample(5)["input_ids"])

    def test_no_special_tokens(self, table):
        generator = NoiseGenerator(table, token_prior(table, [0]), SequenceForm(shortest=3, longest=3))
        assert (generator.sample(40)["input_ids"] > 0).all()


class TestSoftSample:
    def test_is_exactly_one_hot(self, generator):
        batch, candidates, one_hot, entropy = generator.soft_sample(6)
        assert one_hot.shape == (6, 9, 64)
        assert torch.equal(one_hot.detach(), nn.functional.one_hot(one_hot.argmax(dim=-1), 64).float())
        assert entropy.item() == pytest.approx(1.0, abs=1e-5)
        assert batch["input_ids"].shape == (6, 9)

    def test_a_token_can_be_made_likelier(self, generator, table):
        """Ascent on how long the embeddings' first coordinate is, with real tokens in the end."""
        optimizer = torch.optim.Adam(generator.parameters(), 0.01, maximize=True)

        def mean_of(batches: int) -> float:
            ids = torch.cat([generator.sample(32)["input_ids"].flatten() for _ in range(batches)])
            return table[ids[ids > 2], 0].mean().item()

        before = mean_of(20)
        for _ in range(60):
            batch, candidates, one_hot, _ = generator.soft_sample(32)
            embedded = soft_embeddings(lambda ids: table[ids], batch, candidates, one_hot)
            optimizer.zero_grad()
            embedded[..., 0].mean().backward()
            optimizer.step()
        assert mean_of(20) > before + 0.2


@pytest.mark.parametrize("low_bit", [False, True])
def test_a_model_reads_a_soft_sample_as_the_tokens_it_is(generator, table, low_bit):
    embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=table.clone())
    if low_bit:
        embedding = FakeQuantEmbedding.from_float(embedding, LayerSpec(QuantSpec(3)))
        embedding.find_ranges("minmax")
    batch, candidates, one_hot, _ = generator.soft_sample(6)
    embedded = soft_embeddings(embedding, batch, candidates, one_hot)
    assert torch.equal(embedded, embedding(batch["input_ids"]))
    (embedded * torch.arange(WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert generator.network[-1].weight.grad.abs().sum() > 0
