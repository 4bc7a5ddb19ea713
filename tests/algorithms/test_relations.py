import pytest
import torch

from optimum_zsaq.algorithms.relations import (
    INNER_RELATIONS,
    PAIR_RELATIONS,
    check_shares,
    draw_relations,
    relate,
    relate_within,
)


ROWS, FIRST, SECOND = 400, 9, 7
COPIES = [name for name in PAIR_RELATIONS if name not in ("follows", "unrelated")]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def segments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First segments of tokens 100 to 108, what follows them (200 to 206), and what others hold (300 to 306)."""
    return tuple(start + torch.arange(n).repeat(ROWS, 1) for start, n in ((100, FIRST), (200, SECOND), (300, SECOND)))


def related(relation: str, seed: int = 0, nearest=lambda tokens: tokens + 1000) -> torch.Tensor:
    return relate(*segments(), [relation] * ROWS, random(seed), nearest)


class TestRelate:
    @pytest.mark.parametrize("relation", COPIES)
    def test_a_copy_keeps_none_to_all(self, relation):
        second = related(relation)
        assert second.shape == (ROWS, SECOND)
        copied = ((second >= 100) & (second < 109)).float().mean(dim=1)
        assert copied.min() == 0.0
        assert copied.max() == 1.0
        assert 0.45 < copied.mean() < 0.55

    @pytest.mark.parametrize("relation", [name for name in COPIES if name != "neighbours"])
    def test_what_is_not_copied_comes_from_others(self, relation):
        second = related(relation)
        fresh = (second < 100) | (second >= 109)
        assert torch.equal(second[fresh], segments()[2][fresh])

    def test_neighbours_stand_for_what_is_not_kept(self):
        second = related("neighbours")
        assert torch.equal(second % 1000, segments()[0][:, :SECOND])
        assert (second >= 1100).any()

    @pytest.mark.parametrize(("relation", "moves"), [("copy", {0}), ("shifted", {1, 2}), ("part", set(range(FIRST)))])
    def test_places_of_a_copy(self, relation, moves):
        second = related(relation)
        copied = (second >= 100) & (second < 109)
        moved = (second - 100 - torch.arange(SECOND)) % FIRST
        assert set(moved[copied].tolist()) == moves

    def test_inserted_is_one_place_off_from_some_place_on(self):
        second = related("inserted")
        copied = (second >= 100) & (second < 109)
        moved = (second - 100 - torch.arange(SECOND)) % FIRST
        assert set(moved[copied].tolist()) == {0, 1, FIRST - 1}

    def test_shuffled_keeps_the_tokens(self):
        whole = related("shuffled")
        whole = whole[((whole >= 100) & (whole < 109)).all(dim=1)]
        assert len(whole)
        assert torch.equal(whole.sort(dim=1).values, segments()[0][: len(whole), :SECOND])
        assert not torch.equal(whole, segments()[0][: len(whole), :SECOND])

    @pytest.mark.parametrize(("relation", "place"), [("follows", 1), ("unrelated", 2)])
    def test_no_copy(self, relation, place):
        assert torch.equal(related(relation), segments()[place])

    def test_each_sequence_has_its_own(self):
        relations = ["follows", "unrelated"] * (ROWS // 2)
        second = relate(*segments(), relations, random(), lambda tokens: tokens)
        assert torch.equal(second[::2], segments()[1][::2])
        assert torch.equal(second[1::2], segments()[2][1::2])

    def test_a_longer_second_segment_begins_again(self):
        first, others = torch.tensor([[5, 6]]).repeat(64, 1), torch.full((64, 5), 9)
        second = relate(first, others, others, ["copy"] * 64, random(), lambda tokens: tokens)
        assert [5, 6, 5, 6, 5] in second.tolist()


def about(texts: torch.Tensor) -> torch.Tensor:
    return texts + 1000


class TestRelateWithin:
    text = torch.arange(24).repeat(200, 1)

    def test_none(self):
        assert torch.equal(relate_within(self.text, ["none"] * 200, random(), about), self.text)

    def test_a_topic_takes_none_to_all(self):
        found = relate_within(self.text, ["topic"] * 200, random(), about)
        assert torch.equal(found % 1000, self.text)
        share = (found >= 1000).float().mean(dim=1)
        assert share.min() == 0.0
        assert share.max() == 1.0

    def test_a_phrase_comes_again(self):
        found = relate_within(self.text, ["repeat"] * 200, random(), about)
        again = [24 - len(set(row)) for row in found.tolist()]
        assert min(again) >= 1
        assert max(again) >= 10

    def test_keys_keep_their_values(self):
        for row in relate_within(self.text, ["keys"] * 200, random(), about).tolist():
            values = dict(zip(row[::2], row[1::2], strict=True))
            assert all(values[key] == value for key, value in zip(row[::2], row[1::2], strict=True))
            assert len(values) <= 6

    def test_a_list_has_one_separator(self):
        for row in relate_within(self.text, ["list"] * 200, random(), about).tolist():
            assert max(row.count(token) for token in row) >= 24 // 5

    @pytest.mark.parametrize("relation", INNER_RELATIONS)
    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
    def test_short_texts(self, relation, length):
        text = torch.arange(length).repeat(50, 1)
        assert relate_within(text, [relation] * 50, random(), about).shape == (50, length)

    def test_leaves_what_it_was_given(self):
        text = self.text.clone()
        relate_within(text, ["repeat"] * 200, random(), about)
        assert torch.equal(text, self.text)


class TestShares:
    def test_are_drawn(self):
        drawn = draw_relations({"copy": 3.0, "follows": 1.0}, 4000, random())
        assert 0.72 < drawn.count("copy") / 4000 < 0.78

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ({"copied": 1.0}, "'copied' is no relation; use some of"),
            ({"copy": -1.0}, "the share of 'copy' is -1.0; use a number of at least 0"),
            ({"copy": float("nan")}, "the share of 'copy' is nan"),
            ({"copy": 0.0}, "no relation has a share above 0"),
        ],
    )
    def test_that_are_none(self, shares, message):
        with pytest.raises(ValueError, match=message):
            check_shares(shares, PAIR_RELATIONS)
