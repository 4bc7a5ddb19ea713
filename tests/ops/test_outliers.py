import pytest
import torch
from conformance import random_weight

from optimum_zsaq.ops import (
    add_outliers,
    gather_outlier_rows,
    largest_of_rows,
    largest_positions,
    outliers,
    sum_at_positions,
    union_of_positions,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 7, 50, 51])
def test_largest_positions_are_those_of_topk(count, dtype, device):
    for seed in range(20):
        weight = random_weight(3, 17, seed, dtype)
        found = largest_positions(weight.to(device), count).cpu()
        assert (found.dtype, len(found)) == (torch.int32, count)
        assert torch.equal(found, found.unique())  # ascending, none twice
        magnitudes = weight.float().abs().flatten()
        assert torch.equal(magnitudes[found.long()].sort().values, magnitudes.topk(count).values.sort().values)


@pytest.mark.parametrize("chunk", [2**22, 8])
def test_of_equal_magnitudes_the_first_are_taken(chunk, monkeypatch, device):
    monkeypatch.setattr(outliers, "_CHUNK", chunk)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-3, 4, (5, 13), generator=generator).float()
        for count in (1, 9, 40, 65):
            order = sorted(range(65), key=lambda i: (-abs(weight.flatten()[i].item()), i))
            assert largest_positions(weight.to(device), count).tolist() == sorted(order[:count]), (seed, count)


def test_weights_that_are_not_finite_come_first():
    weight = torch.tensor([[1.0, torch.nan, 3.0, -torch.inf]])
    assert largest_positions(weight, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_chunks_give_the_same_positions(count, monkeypatch):
    weight = random_weight(5, 13, 0)
    expected = weight.abs().flatten().topk(count).indices.sort().values
    monkeypatch.setattr(outliers, "_CHUNK", 8)
    assert torch.equal(largest_positions(weight, count).long(), expected)


def test_largest_positions_of_a_strided_weight_count_in_its_own_rows():
    weight = random_weight(13, 3, 0).t()
    assert torch.equal(largest_positions(weight, 5), largest_positions(weight.contiguous(), 5))


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize("count", [1, 4, 5, 9, 15, 40, 64, 65])
def test_largest_of_rows_are_those_of_sorted_rows(count, levels, monkeypatch, device):
    for seed in range(20):
        monkeypatch.setattr(outliers, "_CHUNK", (2**22, 30)[seed % 2])
        weight = random_weight(5, 13, seed)
        if levels:
            weight = torch.randint(-levels, levels + 1, (5, 13), generator=torch.Generator().manual_seed(seed)).float()
        each, rest = divmod(count, 5)
        sizes = weight.abs().tolist()
        orders = [sorted(range(13), key=lambda i, row=row: (-row[i], i)) for row in sizes]
        expected = [13 * n + i for n, order in enumerate(orders) for i in order[:each]]
        if rest:
            rows = sorted(range(5), key=lambda n: (-sizes[n][orders[n][each]], n))[:rest]
            expected += [13 * n + orders[n][each] for n in rows]
        found = largest_of_rows(weight.to(device), count)
        assert found.dtype == torch.int32
        assert found.tolist() == sorted(expected), seed


def test_largest_of_rows_with_what_is_not_finite_and_strided():
    weight = torch.tensor([[1.0, torch.nan, 3.0], [2.0, -torch.inf, 5.0]])
    assert largest_of_rows(weight, 2).tolist() == [1, 4]
    assert largest_of_rows(weight.t(), 3).tolist() == [1, 2, 5]


def test_too_many_weights_for_int32():
    weight = torch.empty(2**16, 2**15, device="meta")
    with pytest.raises(ValueError, match=f"a matrix of {2**31} weights is too large for int32 outlier positions"):
        largest_positions(weight, 1)
    with pytest.raises(ValueError, match="too large for int32 outlier positions"):
        largest_of_rows(weight, 1)


def test_add_outliers_is_the_loop(device):
    weight = random_weight(3, 17, 1).to(device)
    before = weight.clone()
    positions, values = torch.tensor([0, 4, 16, 17, 50], dtype=torch.int32), torch.randn(5)
    expected = weight.cpu().clone()
    for position, value in zip(positions.tolist(), values.tolist(), strict=True):
        expected[position // 17, position % 17] += value
    assert torch.equal(add_outliers(weight, positions.to(device), values.to(device)).cpu(), expected)
    assert torch.equal(weight, before)
    strided = weight.t().contiguous().t()
    assert torch.equal(add_outliers(strided, positions.to(device), values.to(device)).cpu(), expected)


def test_add_outliers_is_differentiable_in_both():
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([1, 4, 9], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda w, v: add_outliers(w, positions, v), (weight, values))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([0, 1, 2, 3, 4], id="all"),
        pytest.param([4, 0, 4, 2, 2], id="repeated"),
        pytest.param([1], id="empty-row"),
        pytest.param([], id="none"),
    ],
)
def test_gathered_rows_are_those_of_the_dense_matrix(rows, device):
    """Row 1 has no outlier, row 2 nothing but outliers; the first and the last weight are among them."""
    positions = torch.tensor([0, 7, *range(26, 39), 40, 64], dtype=torch.int32, device=device)
    values = torch.randn(len(positions), device=device)
    dense = add_outliers(torch.zeros(5, 13, device=device), positions, values)
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    assert torch.equal(gather_outlier_rows(index, 13, positions, values), dense[index])


def test_gathered_rows_are_differentiable_in_the_values():
    positions = torch.tensor([0, 5, 6, 11], dtype=torch.int32)
    values = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([3, 1, 1])
    assert torch.autograd.gradcheck(lambda v: gather_outlier_rows(rows, 3, positions, v), (values,))


@pytest.mark.parametrize("sizes", [(5,), (5, 5), (0, 4), (3, 0, 9), (12, 1), (0, 0)], ids=str)
def test_sums_at_the_union_of_positions_are_those_of_dense_vectors(sizes, device):
    parts = [torch.randperm(40)[:size].sort().values.to(torch.int32).to(device) for size in sizes]
    values = [torch.randn(size, device=device) for size in sizes]
    dense = sum(torch.zeros(40, device=device).index_add(0, p.long(), v) for p, v in zip(parts, values, strict=True))
    everything, where = union_of_positions(parts)
    assert everything.dtype == torch.int32
    assert everything.tolist() == sorted({p for part in parts for p in part.tolist()})
    found = sum_at_positions(values, where, len(everything))
    assert torch.equal(found, dense[everything.long()])


def test_equal_positions_are_taken_as_they_are():
    positions = torch.tensor([1, 4], dtype=torch.int32)
    everything, where = union_of_positions([positions, positions.clone()])
    assert everything is positions
    assert where == [None, None]
