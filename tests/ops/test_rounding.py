import pytest
import torch

from optimum_zsaq.ops import round_ste
from optimum_zsaq.ops.rounding import replace_value, round_scaled


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 65280), (torch.float16, 63488)], ids=["bfloat16", "float16"])
def test_every_half_precision_value_rounds_exactly(dtype, count, device):
    values = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    assert len(values) == count
    assert torch.equal(round_ste(values), values.round())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float_values_round_exactly(dtype, device):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (100_000,), generator=generator)
    values = torch.ldexp(torch.randn(100_000, generator=generator, dtype=dtype), exponents).to(device)
    neighbours = torch.nextafter(values.round() + 0.5, values)
    for x in (values, neighbours):
        assert torch.equal(round_ste(x), x.round())


def test_halves_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997])
    assert round_ste(x).tolist() == [-2, -2, 0, 0, 2, 2, 0]


def test_gradient_is_that_of_the_identity(device):
    x = torch.tensor([-7.3, -0.5, 0.0, 0.2, 1e9], device=device, requires_grad=True)
    upstream = torch.arange(1.0, 6.0, device=device)
    (gradient,) = torch.autograd.grad(round_ste(x), x, upstream)
    assert torch.equal(gradient, upstream)


def test_replaced_value_is_exact_and_keeps_the_gradient(device):
    x = torch.tensor([1e20, -3.0, 0.1, torch.inf], device=device, requires_grad=True)
    value = torch.tensor([1e-20, 0.3, -7.0, 5.0], device=device, requires_grad=True)
    replaced = replace_value(x, value)
    assert torch.equal(replaced, value)
    (gradient,) = torch.autograd.grad(replaced.sum(), x, retain_graph=True)
    assert gradient.tolist() == [1, 1, 1, 1]
    assert torch.autograd.grad(replaced.sum(), value, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
def test_gradients_at_the_bounds_and_the_next_numbers(dtype, as_tensors, device):
    bounds = torch.tensor([-2.0, 1.0], dtype=dtype, device=device)
    outside = torch.nextafter(bounds, 2 * bounds)
    x = torch.cat([outside[:1], bounds, outside[1:], torch.tensor([-0.75, 50.0], dtype=dtype, device=device)])
    x.requires_grad_()
    scale = torch.ones(len(x), dtype=dtype, device=device, requires_grad=True)
    upstream = torch.arange(1.0, 7.0, dtype=dtype, device=device)
    low, high = bounds if as_tensors else bounds.tolist()
    of_x, of_scale = torch.autograd.grad(round_scaled(x, scale, low, high), (x, scale), upstream)
    assert of_x.tolist() == [0, 2, 3, 0, 5, 0]
    assert of_scale.tolist() == [-2, 0, 0, 4, -0.25 * 5, 6]


def test_compiled_gradients_are_the_same():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scale = torch.full((8, 1), 0.5, requires_grad=True)
    compiled = torch.compile(round_scaled, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(x, scale, -2.0, 1.0).square().sum(), (x, scale)) for f in (round_scaled, compiled)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_is_kept_but_what_there_was():
    """A layer's weight and scales are there anyway: a training that keeps more needs copies of all its weights."""
    x = torch.randn(8, 4, 16, requires_grad=True)
    scale, minimum = torch.full((8, 4, 1), 0.5, requires_grad=True), torch.randn(8, 4, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        round_scaled(x, scale, 0.0, 15.0, minimum)
    assert set(kept) == {x.data_ptr(), scale.data_ptr(), minimum.data_ptr()}


def test_beside_a_minimum():
    x = torch.tensor([-3.0, -2.0, -1.4, 0.9, 9.0], requires_grad=True)
    scale, minimum = torch.full((1,), 0.5, requires_grad=True), torch.tensor([-2.0])
    found = round_scaled(x, scale, 0.0, 7.0, minimum)
    assert found.tolist() == [-2.0, -2.0, -1.5, 1.0, 1.5]
    of_x, of_scale = torch.autograd.grad(found.sum(), (x, scale))
    assert of_x.tolist() == [0, 1, 1, 1, 0]
    terms = [0.0, 0.0, 1 - (-1.4 + 2) / 0.5, 6 - (0.9 + 2) / 0.5, 7.0]
    torch.testing.assert_close(of_scale, torch.tensor([sum(terms)]))
