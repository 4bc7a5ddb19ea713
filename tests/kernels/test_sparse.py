"""The products of outliers without a dense matrix, compared with the dense matrix."""

import gc
import weakref

import pytest
import torch

from optimum_zsaq.kernels import OutlierProducts, drop_outlier_matrix
from optimum_zsaq.kernels.sparse import _MATRICES, outlier_matrix, value_gradient
from optimum_zsaq.ops import add_outliers


def outliers(rows, columns, count, dtype=torch.float32):
    positions = torch.randperm(rows * columns)[:count].sort().values.to(torch.int32)
    return positions, torch.randn(count, dtype=dtype)


def dense(positions, values, rows, columns):
    return add_outliers(torch.zeros(rows, columns, dtype=values.dtype), positions, values)


CASES = [(7, 13, 9), (13, 7, 1), (3, 5, 0), (1, 40, 40), (64, 2, 128)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (40,)], ids=str)
def test_products_and_gradients_are_those_of_the_dense_matrix(case, shape, device):
    rows, columns, count = case
    positions, values = (tensor.to(device) for tensor in outliers(*case, dtype=torch.float64))
    x = torch.randn(*shape, columns, dtype=torch.float64, device=device)
    found, expected = [], []
    for results in (found, expected):
        a, v = x.clone().requires_grad_(), values.clone().requires_grad_()
        if results is found:
            y = OutlierProducts.apply(a, v, positions, rows)
        else:
            y = a @ add_outliers(x.new_zeros(rows, columns), positions, v).t()
        (y * torch.arange(y.numel(), device=device).view_as(y)).sum().backward()
        results += [y, a.grad, v.grad]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("many", [63, 64, 129, 300])
def test_products_of_many_inputs_are_the_dense_matrix_s_too(case, many, device):
    """They are computed another way, in blocks; the tolerance is that of another order of float32 sums."""
    rows, columns, _ = case
    positions, values = (tensor.to(device) for tensor in outliers(*case))
    x = torch.randn(columns, many, device=device).t().requires_grad_()
    y = OutlierProducts.apply(x, values.requires_grad_(), positions, rows)
    expected = x.detach().cpu() @ dense(positions.cpu(), values.detach().cpu(), rows, columns).t()
    assert torch.allclose(y.cpu(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert (x.grad.shape, values.grad.shape) == (x.shape, values.shape)


def test_gradcheck():
    positions, values = outliers(5, 7, 6, torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: OutlierProducts.apply(x, v, positions, 5), (x, values.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda x, v: OutlierProducts.apply(x, v, positions, 5), (x, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_multiplied_in_float32(dtype, device):
    positions, values = (tensor.to(device) for tensor in outliers(7, 13, 20))
    x = torch.randn(4, 13, device=device).to(dtype).requires_grad_()
    values.requires_grad_()
    y = OutlierProducts.apply(x, values, positions, 7)
    assert y.dtype == torch.float32
    assert torch.allclose(y, x.float() @ dense(positions.cpu(), values.cpu(), 7, 13).to(device).t(), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert (x.grad.dtype, values.grad.dtype) == (dtype, torch.float32)


def test_no_dense_matrix_is_made():
    """Neither in the forward nor in the backward pass: no tensor is as large as the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            strided = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
            sizes.extend(tensor.numel() for tensor in strided)
            return result

    positions, values = outliers(300, 400, 600)
    x = torch.randn(8, 400, requires_grad=True)
    with Sizes():
        OutlierProducts.apply(x, values.requires_grad_(), positions, 300).sum().backward()
    assert values.grad is not None
    assert max(sizes) == 8 * 400


def test_value_gradient_in_graphs_is_the_same(monkeypatch):
    positions, _ = outliers(7, 13, 20)
    grad, x = torch.randn(2, 5, 7), torch.randn(2, 5, 13)
    expected = value_gradient(grad, x, positions)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(value_gradient(grad, x, positions), expected, rtol=1e-5, atol=1e-5)


class TestMatrix:
    def test_is_kept_and_sees_writes(self):
        positions, values = outliers(7, 13, 20)
        matrix = outlier_matrix(positions, values, 7, 13)
        assert outlier_matrix(positions, values, 7, 13) is matrix
        values.mul_(2.0)
        assert torch.equal(outlier_matrix(positions, values, 7, 13).to_dense(), dense(positions, values, 7, 13))
        positions.copy_(outliers(7, 13, 20)[0])
        assert torch.equal(outlier_matrix(positions, values, 7, 13).to_dense(), dense(positions, values, 7, 13))

    def test_other_values_share_the_structure(self):
        positions, values = outliers(7, 13, 20)
        first = outlier_matrix(positions, values, 7, 13)
        second = outlier_matrix(positions, torch.ones(20), 7, 13)
        assert first.crow_indices().data_ptr() == second.crow_indices().data_ptr()
        assert torch.equal(second.to_dense(), dense(positions, torch.ones(20), 7, 13))

    def test_values_made_anew_at_the_same_place_are_seen(self):
        """A training step frees the last step's values; the next may lie in the same memory."""
        positions, values = outliers(7, 13, 20)
        parameter = values.clone().requires_grad_()
        for _ in range(20):
            total = values + parameter
            matrix = outlier_matrix(positions, total, 7, 13)
            assert torch.equal(matrix.to_dense(), dense(positions, total.detach(), 7, 13))
            del total, matrix
            with torch.no_grad():
                parameter.add_(1.0)

    def test_can_keep_nothing_and_is_freed_with_the_positions(self):
        positions, values = outliers(7, 13, 20)
        outlier_matrix(positions, values, 7, 13, keep=False)
        assert positions not in _MATRICES
        kept = weakref.ref(outlier_matrix(positions, values, 7, 13))
        assert kept() is not None
        drop_outlier_matrix(positions)
        gc.collect()
        assert kept() is None
        kept = weakref.ref(outlier_matrix(positions, values, 7, 13))
        del positions
        gc.collect()
        assert kept() is None
