"""What the few outlier weights of a matrix add to a layer's output, without a dense matrix of them, and their gradients.

A CSR matrix of the residuals multiplies the inputs. Its structure belongs to the tensor of positions and is built once; the
matrix itself shares the memory of the values, so that a write to them is seen. Many float32 inputs on a CPU are multiplied
as an embedding bag, whose kernel is faster: the columns of the inputs are its table, the rows of the matrix its bags.
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .packed_tensors import PackedTensors
from .prepacked import TensorTable, stamp


_BLOCK = 128  # inputs that are transposed together: both sides of their product stay in the second cache
_MANY = 64  # inputs from which transposing them pays
_MATRICES = TensorTable()  # positions -> (stamp and width, structure, stamp of the values, matrix)


def outlier_matrix(positions: Tensor, values: Tensor, rows: int, columns: int, keep: bool = True) -> Tensor:
    """The residuals as a CSR matrix. Shapes: positions (k,) int32 ascending, values (k,) float32 -> (rows, columns).

    `keep=False` keeps nothing for the next call.
    """
    if not keep:
        return _csr(_structure(positions, rows, columns), values, rows, columns)
    wanted, kept = (stamp(positions), rows, columns), _MATRICES.get(positions)
    structure = kept[1] if kept is not None and kept[0] == wanted else _structure(positions, rows, columns)
    if kept is not None and kept[1] is structure and kept[2] == stamp(values):
        return kept[3]
    matrix = _csr(structure, values, rows, columns)
    _MATRICES[positions] = (wanted, structure, stamp(values), matrix)
    return matrix


def drop_outlier_matrix(positions: Tensor) -> None:
    """Forget what is kept for these positions; the next call builds it again."""
    _MATRICES.pop(positions)


def _structure(positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    starts = torch.arange(rows + 1, device=positions.device) * columns
    return torch.searchsorted(positions.long(), starts).to(torch.int32), positions % columns


def _csr(structure: tuple[Tensor, Tensor], values: Tensor, rows: int, columns: int) -> Tensor:
    _warn_once_unseen()
    return torch.sparse_csr_tensor(*structure, values.detach(), (rows, columns), check_invariants=False)


@lru_cache
def _warn_once_unseen() -> None:
    """PyTorch warns once a process that these tensors are new, which nobody asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0])


def add_outliers(y: Tensor, x: Tensor, packed: PackedTensors) -> Tensor:
    """Add what the outliers' residuals contribute, in place. Shapes: y (M, O) float32, x (M, I) float32 -> (M, O)."""
    keep = packed.runtime != "small"
    matrix = outlier_matrix(packed.outlier_positions, packed.outlier_values, packed.rows, packed.columns, keep)
    return _add_product(y, x, matrix)


def _add_product(y: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """y += x @ matrix.T. Shapes: y (M, O), x (M, I), matrix (O, I) CSR -> (M, O)."""
    if len(x) < _MANY or x.device.type != "cpu" or x.dtype != torch.float32:
        return y.t().addmm_(matrix, x.t()).t()  # transposed alike: the library then reads and writes along the rows
    columns, starts, values = matrix.col_indices(), matrix.crow_indices(), matrix.values()
    for some, into in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
        table = some.t().contiguous()
        sums = embedding_bag(columns, table, starts, mode="sum", per_sample_weights=values, include_last_offset=True)
        into.add_(sums.t().contiguous())
    return y


def value_gradient(grad: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """The gradient of the residuals: grad.T @ x at their positions alone.

    Shapes: grad (..., O), x (..., I), positions (k,) int32 ascending -> (k,) float32, or float64 of float64 inputs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad, x = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # the latter: gradients of gradients
        positions = positions.long()
        return (grad[:, positions // x.shape[1]] * x[:, positions % x.shape[1]]).sum(dim=0)
    pattern = outlier_matrix(positions, grad.new_zeros(len(positions)), grad.shape[1], x.shape[1], keep=False)
    return torch.sparse.sampled_addmm(pattern, grad.t(), x, beta=0.0).values()


class OutlierProducts(torch.autograd.Function):
    """x @ S.T with the residuals S (rows, I), and its gradients to x and to the residuals.

    Shapes: x (..., I) float, values (k,) float32, positions (k,) int32 ascending -> (..., rows) float32, or float64.
    """

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, positions: Tensor, rows: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, values, positions)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        matrix = outlier_matrix(positions, values.to(dtype), rows, x.shape[-1])
        return _add_product(flat.new_zeros(len(flat), rows), flat, matrix).view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        x, values, positions = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            flat = grad.reshape(-1, grad.shape[-1])
            grad_x = flat.new_zeros(len(flat), x.shape[-1])
            if torch.is_grad_enabled():  # gradients of gradients
                rows, columns = positions.long() // x.shape[-1], positions.long() % x.shape[-1]
                grad_x = grad_x.index_add(1, columns, flat[:, rows] * values.to(flat.dtype))
            else:
                matrix = outlier_matrix(positions, values.to(flat.dtype), flat.shape[1], x.shape[-1])
                grad_x = grad_x.t().addmm_(matrix.t(), flat.t()).t()
            grad_x = grad_x.view_as(x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = value_gradient(grad, x, positions).to(values.dtype)
        return grad_x, grad_values, None, None
