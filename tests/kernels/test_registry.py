import pytest
import torch
from conformance import random_weight

from optimum_zsaq.kernels import (
    KERNELS,
    PackedTensors,
    choose_kernel,
    packed_linear,
    register_kernel,
    registry,
)
from optimum_zsaq.ops import find_ranges, pack_codes, quantize
from optimum_zsaq.spec import LayerSpec, QuantSpec


class OnlyFourBits:
    """Answers with a constant, so that one sees who computed."""

    def __init__(self, name: str, answer: float):
        self.name, self.answer = name, answer

    def serves(self, x, packed):
        return packed.spec.weight.bits == 4

    def __call__(self, x, packed, bias):
        return x.new_full((*x.shape[:-1], len(packed.codes)), self.answer)


@pytest.fixture
def kernels(monkeypatch):
    """The registry, put back after the test."""
    monkeypatch.setattr(registry, "KERNELS", dict(KERNELS))
    return registry.KERNELS


def packed_weight(bits: int) -> PackedTensors:
    spec, weight = QuantSpec(bits), random_weight(3, 17, 0)
    scale, _ = find_ranges(weight, spec, "minmax")
    return PackedTensors(LayerSpec(spec), 17, pack_codes(quantize(weight, scale, None, spec), bits), scale)


def test_the_newest_kernel_that_serves_computes(kernels):
    before = list(kernels)
    first, second = OnlyFourBits("first", 1.0), OnlyFourBits("second", 2.0)
    register_kernel(first)
    register_kernel(second)
    assert list(kernels) == ["second", "first", *before]
    x = torch.randn(2, 17)
    assert choose_kernel(x, packed_weight(4)) is second
    assert packed_linear(x, packed_weight(4)).tolist() == [[2.0] * 3] * 2


def test_what_no_other_kernel_serves_falls_to_the_reference(kernels):
    x, packed = torch.randn(2, 17), packed_weight(3)
    expected = packed_linear(x, packed)
    register_kernel(OnlyFourBits("four", 1.0))
    assert choose_kernel(x, packed).name != "four"
    assert torch.equal(packed_linear(x, packed), expected)
    assert list(kernels)[-1] == "reference"


def test_a_taken_name_raises(kernels):
    with pytest.raises(ValueError, match="a kernel named 'reference' is registered already; give yours another name"):
        register_kernel(OnlyFourBits("reference", 1.0))
    assert kernels["reference"].serves(None, packed_weight(3))
