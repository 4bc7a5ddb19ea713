"""Every tolerance of the tests, with its reason. What is not here is compared with `torch.equal`."""

import torch
from torch import Tensor


# Relative error of one matmul of about 30 terms against float64: a few units in the last place of the result's dtype
# (2^-24, 2^-8 and 2^-11 for a rounding), sums cancel at random, hence the factor of about 8.
MATMUL = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-14}

# A kernel against the reference on the same codes. Integer products and sums are exact: what is left in float32 is the
# order of a few float sums; in the others one rounding of the result, and of the weight, which only the reference rounds.
KERNEL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# Whole models on two kernels: an input code at a tie may fall the other way in the next layer, one step of 255, or of 15.
KERNEL_MODEL = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# The "mse" search walks a geometric grid of 8 % steps and then fits the scale: how much squared error it may leave
# against an exhaustive search over scales (and zero points).
MSE_SEARCH = 1.02

# Two float32 sums of the same few hundred squares in another order.
SUM_OF_SQUARES = 1e-5

# Formulas in float64 against autograd in float64.
FORMULA = 1e-12

# A scale that was found by division and one that was found by another division of equal values, float32.
ONE_DIVISION = 2e-7


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, 2-norms: sees a wrong scale, unlike a cosine."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
