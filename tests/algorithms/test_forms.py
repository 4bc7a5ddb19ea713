import pytest
import torch
from torch import nn

from optimum_zsaq.algorithms.forms import InputMixture, SequenceForm
from optimum_zsaq.algorithms.generators import Generator, PriorSource, token_prior


SINGLE = SequenceForm((1,), (2,), 5, 20, types=(0, 0, 0), padding=0)
PAIR = SequenceForm((1,), (2,), 6, 20, middle=(2, 2), types=(0, 0, 0, 0, 1, 1), padding=0)


def generator(mixture: InputMixture, seed: int = 0) -> Generator:
    torch.manual_seed(0)
    table = torch.randn(50, 8)
    prior = token_prior(table, [0, 1, 2], 0.0)
    return Generator(PriorSource(prior), table, prior, mixture, candidates=64, width=8, seed=seed)


class TestAPair:
    def test_is_written_as_the_tokenizer_would(self):
        batch = PAIR.finish(torch.tensor([[7, 8, 9]]), torch.tensor([[5, 6]]))
        assert batch["input_ids"].tolist() == [[1, 7, 8, 9, 2, 2, 5, 6, 2]]
        assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]

    def test_special_places(self):
        assert PAIR.special_places(3, 9).nonzero().flatten().tolist() == [0, 4, 5, 8]

    @pytest.mark.parametrize("inner", [2, 3, 9, 16])
    def test_no_segment_is_empty(self, inner):
        random = torch.Generator().manual_seed(0)
        splits = {PAIR.draw_split(inner, random) for _ in range(100)}
        assert min(splits) >= 1
        assert max(splits) <= inner - 1

    @pytest.mark.parametrize("options", [{"shortest": 5, "longest": 9}, {"shortest": 9, "longest": 6}])
    def test_needs_room_for_both(self, options):
        with pytest.raises(ValueError, match="with 4 special ones; use lengths of at least 6"):
            SequenceForm((1,), (2,), middle=(2, 2), **options)

    def test_needs_a_type_for_each_piece(self):
        with pytest.raises(ValueError, match=r"types=\(0, 1\) are 2; use 6"):
            SequenceForm((1,), (2,), 6, 9, middle=(2, 2), types=(0, 1))


class TestShorten:
    batch = PAIR.finish(torch.tensor([[7, 8, 9]] * 3), torch.tensor([[5, 6, 4]] * 3))

    def test_cuts_the_last_segment_and_fills_up_behind(self):
        found = PAIR.shorten(self.batch, torch.tensor([10, 9, 1]), 3)
        assert found["input_ids"].tolist() == [
            [1, 7, 8, 9, 2, 2, 5, 6, 4, 2],
            [1, 7, 8, 9, 2, 2, 5, 6, 2, 0],
            [1, 7, 8, 9, 2, 2, 5, 2, 0, 0],
        ]
        assert found["attention_mask"].sum(dim=1).tolist() == [10, 9, 8]
        assert found["token_type_ids"][2].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]

    def test_fills_up_before_where_the_tokenizer_does(self):
        left = SequenceForm((1,), (2,), 5, 20, padding=0, left=True)
        found = left.shorten(left.finish(torch.tensor([[7, 8, 9]])), torch.tensor([4]), 3)
        assert found["input_ids"].tolist() == [[0, 1, 7, 8, 2]]
        assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 1]]


class TestTheMixture:
    def test_has_its_shares(self):
        made = generator(InputMixture((SINGLE, PAIR), (0.25, 0.75)))
        pairs = [bool((made.sample(2)["input_ids"] == 2).sum() > 2) for _ in range(600)]
        assert 0.70 < sum(pairs) / 600 < 0.80

    def test_pads_its_share(self):
        made = generator(InputMixture((SINGLE,), padded=0.5))
        padded = [made.sample(6).get("attention_mask") for _ in range(400)]
        found = [mask for mask in padded if mask is not None]
        assert 0.43 < len(found) / 400 < 0.57
        assert any((mask.sum(dim=1) < mask.shape[1]).any() for mask in found)

    def test_is_kept_by_the_climbing_network(self):
        """Special tokens and padding stay where they are, whatever the network wants."""
        made = generator(InputMixture((PAIR,), padded=1.0, pairs={"copy": 1.0}))
        nn.init.normal_(made.network[-1].weight, std=9.0)
        replaced = 0
        for _ in range(40):
            drawn = made.soft_sample(4)
            ids, special = drawn.batch["input_ids"], drawn.written < 3
            assert torch.equal(ids[special], drawn.written[special])
            assert (ids[~special] >= 3).all()
            replaced += (ids != drawn.written).sum().item()
        assert replaced > 0

    def test_says_what_it_is(self):
        told = InputMixture((SINGLE, PAIR), (0.3, 0.7), 0.1, {"copy": 1.0}, {"none": 1.0}).describe()
        assert told["forms"] == {"single text": 0.3, "pair": 0.7}
        assert told["lengths"] == [5, 20]
        assert told["between"] == {"copy": 1.0}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shares": (1.0,)}, r"2 forms have shares=\(1.0,\)"),
            ({"shares": (0.0, 0.0)}, "give each a number of at least 0"),
            ({"shares": (1.0, 1.0), "padded": 2.0}, "padded=2.0 is no share"),
            ({"shares": (1.0, 1.0), "inner": {"copy": 1.0}}, "'copy' is no relation"),
        ],
    )
    def test_that_is_none(self, options, message):
        with pytest.raises(ValueError, match=message):
            InputMixture((SINGLE, PAIR), **options)
