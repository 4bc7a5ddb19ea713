import gc
import threading
import weakref

import pytest
import torch
from conformance import DTYPES
from kernel_cases import INPUTS, packed_weight
from tolerances import relative_error

from optimum_zsaq.kernels import KERNELS, integer_inputs
from optimum_zsaq.kernels.integer_inputs import IntegerInputs, static_range
from optimum_zsaq.ops import fake_quantize, fake_quantize_tokens
from optimum_zsaq.spec import LayerSpec, QuantSpec


def read(x: torch.Tensor, inputs: str = "dynamic-8", **fields) -> IntegerInputs:
    """The input of a layer."""
    packed = packed_weight(2, x.shape[-1], LayerSpec(QuantSpec(4), INPUTS[inputs]))
    for name, value in fields.items():
        setattr(packed, name, value)
    return integer_inputs.integer_inputs(x, packed)


def rows_of_every_kind(dtype: torch.dtype) -> list[torch.Tensor]:
    """One row, some, and more than are quantized at a time; one-sided, zero, tiny, huge, with ties."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(40, 129, generator=generator)
    kinds = [some, some[:1], some[:2].abs(), -some[:3].abs(), 0 * some[:2], 0 * some[:1], 1e4 * some, 1e-4 * some[:1]]
    kinds += [
        torch.linspace(-3, 3, 129).expand(2, 129),
        some[:, :1].expand(40, 129),
        torch.arange(-64.0, 65.0).view(1, 129),
    ]
    kinds += [torch.randint(-8, 8, (20, 129), generator=generator) / 2, torch.randn(1, 17, generator=generator)]
    kinds.append(torch.randn(3, 5, 129, generator=generator))
    return [x.to(dtype) for x in kinds]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestCodes:
    @pytest.mark.parametrize("inputs", ["dynamic-8", "dynamic-4"])
    def test_dynamic_are_those_of_the_scheme(self, dtype, inputs):
        for case, x in enumerate(rows_of_every_kind(dtype)):
            expected = fake_quantize_tokens(x, INPUTS[inputs]).flatten(0, -2)
            assert torch.equal(read(x, inputs).dense(), expected), case

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_of_every_width(self, dtype, bits, monkeypatch):
        monkeypatch.setitem(INPUTS, "this", QuantSpec(bits, "token", symmetric=False))
        for rows in (1, 20):
            x = torch.randn(rows, 129, dtype=dtype)
            assert torch.equal(read(x, "this").dense(), fake_quantize_tokens(x, INPUTS["this"]))

    def test_of_many_random_rows(self, dtype):
        """One at a time, where the range is found in Python, and all at once."""
        x = (torch.randn(2000, 33) * torch.logspace(-6, 4, 2000)[:, None]).to(dtype)
        x = x[x.abs().sum(dim=1) > 0]
        expected = fake_quantize_tokens(x, INPUTS["dynamic-8"])
        assert torch.equal(read(x).dense(), expected)
        for row, values in zip(x[::7], expected[::7], strict=True):
            assert torch.equal(read(row[None]).dense()[0], values)

    @pytest.mark.parametrize("inputs", ["static-8", "static-4"])
    def test_static_are_those_of_the_scheme(self, dtype, inputs):
        spec = INPUTS[inputs]
        for scale, point in ((0.02, 40), (1.0, 0), (0.3, spec.highest), (1e-3, 7)):
            fields = {
                "input_scale": torch.tensor([[scale]]),
                "input_zero_point": torch.tensor([[min(point, spec.highest)]], dtype=torch.uint8),
            }
            for case, x in enumerate(rows_of_every_kind(dtype)):
                expected = fake_quantize(x, fields["input_scale"], fields["input_zero_point"], spec).flatten(0, -2)
                assert torch.equal(read(x, inputs, **fields).dense(), expected), (case, scale)

    def test_float_inputs_lose_less_than_their_dtype(self, dtype):
        for case, x in enumerate(rows_of_every_kind(dtype)):
            found = read(x, "float").dense()
            resolution = x.flatten(0, -2).float().abs().amax(dim=-1, keepdim=True) * torch.finfo(dtype).eps
            assert ((found - x.flatten(0, -2).float()).abs() <= resolution).all(), case

    def test_block_by_block_is_the_same(self, dtype, monkeypatch):
        x = torch.randn(40, 129, dtype=dtype)
        for inputs in ("dynamic-8", "dynamic-4", "static-8"):
            expected = read(x.clone(), inputs).codes
            with monkeypatch.context() as context:
                context.setattr(integer_inputs, "_BLOCK", 7 * 129)
                assert torch.equal(read(x.clone(), inputs).codes, expected)

    def test_levels_are_codes_less_the_point(self, dtype):
        for inputs in INPUTS:
            for rows in (1, 3):
                x = torch.randn(rows, 129, dtype=dtype)
                levels, found = read(x.clone(), inputs).levels, read(x.clone(), inputs)
                assert torch.equal((levels + found.point).clamp(0, 255).to(torch.uint8), found.codes)


class TestSharing:
    def test_layers_that_read_a_tensor_alike_share(self):
        x = torch.randn(3, 5, 64)
        for inputs in INPUTS:
            assert read(x, inputs) is read(x, inputs)

    def test_not_in_another_way(self):
        x = torch.randn(20, 64)
        found = [read(x, inputs) for inputs in INPUTS]
        assert len({id(inputs) for inputs in found}) == len(INPUTS)
        assert not torch.equal(read(x, "dynamic-8").dense(), read(x, "dynamic-4").dense())

    def test_not_with_another_static_range(self):
        x = torch.randn(20, 64)
        first = read(x, "static-8", input_scale=torch.tensor([[0.1]]))
        assert read(x, "static-8", input_scale=torch.tensor([[0.1]])) is first
        assert read(x, "static-8", input_scale=torch.tensor([[0.2]])) is not first
        first = read(x, "static-8", input_zero_point=torch.tensor([[3]], dtype=torch.uint8))
        assert read(x, "static-8", input_zero_point=torch.tensor([[4]], dtype=torch.uint8)) is not first

    @pytest.mark.parametrize(
        "write",
        [
            pytest.param(lambda x: x.zero_(), id="method"),
            pytest.param(lambda x: x[0].fill_(9.0), id="through-a-view"),
            pytest.param(lambda x: x.__setitem__((0, 0), 9.0), id="item"),
            pytest.param(lambda x: torch.add(x, 1, out=x), id="out"),
            pytest.param(lambda x: x.detach().mul_(2), id="through-detach"),
        ],
    )
    @pytest.mark.parametrize("rows", [1, 20])
    def test_not_after_a_write(self, write, rows):
        for inputs in INPUTS:
            x = torch.randn(rows, 64)
            read(x, inputs)
            write(x)
            assert torch.equal(read(x, inputs).dense(), read(x.clone(), inputs).dense())

    def test_not_with_a_new_tensor_in_the_same_memory(self):
        for inputs in INPUTS:
            memory = torch.randn(20, 64)
            for _ in range(20):
                x = memory.view(20, 64)
                read(x, inputs)
                del x
                memory.normal_()
                x = memory.view(20, 64)
                assert torch.equal(read(x, inputs).dense(), read(memory.clone(), inputs).dense())

    def test_not_between_freed_and_new_tensors(self):
        for _ in range(50):
            x = torch.randn(20, 64)
            assert torch.equal(read(x).dense(), fake_quantize_tokens(x, INPUTS["dynamic-8"]))
            del x

    def test_not_in_inference_mode(self):
        with torch.inference_mode():
            x = torch.randn(20, 64)
            read(x)
            x.zero_()
            assert not read(x).dense().any()

    def test_dies_with_the_tensor(self):
        for inputs in INPUTS:
            x = torch.randn(20, 64)
            kept = weakref.ref(read(x, inputs).codes)
            assert kept() is not None
            del x
            gc.collect()
            assert kept() is None

    def test_another_tensor_takes_its_place(self):
        x, other = torch.randn(20, 64), torch.randn(20, 64)
        kept = weakref.ref(read(x).codes)
        read(other)
        assert kept() is None

    def test_each_thread_has_its_own(self):
        x, found = torch.randn(20, 64), []
        expected = read(x)
        thread = threading.Thread(target=lambda: found.append(read(x)))
        thread.start()
        thread.join()
        assert found[0] is not expected
        assert torch.equal(found[0].dense(), expected.dense())

    def test_keeps_no_graph_alive(self):
        x = torch.randn(20, 64, requires_grad=True) * 2
        assert not read(x).x.requires_grad


def test_static_range_follows_what_is_written_to_it():
    packed = packed_weight(2, 64, LayerSpec(QuantSpec(4), INPUTS["static-8"]))
    scale = packed.input_scale.item()
    assert static_range(packed) == (scale, 85)
    packed.input_scale.mul_(2)
    assert static_range(packed) == (2 * scale, 85)
    packed.input_zero_point.fill_(3)
    assert static_range(packed) == (2 * scale, 3)
    with torch.inference_mode():
        packed.input_scale = torch.tensor([[0.5]])
        assert static_range(packed) == (0.5, 3)
        packed.input_scale.fill_(0.25)
        assert static_range(packed) == (0.25, 3)


def test_q_k_and_v_quantize_their_input_once(monkeypatch):
    made = []
    monkeypatch.setattr(integer_inputs, "_tokens", lambda *args, make=integer_inputs._tokens: made.append(1) or make(*args))
    layers = [packed_weight(33, 64, LayerSpec(QuantSpec(4), INPUTS["dynamic-8"]), seed=seed) for seed in range(3)]
    x = torch.randn(2, 9, 64)
    found = [KERNELS["int8"](x, packed, None) for packed in layers]
    assert len(made) == 1
    for packed, y in zip(layers, found, strict=True):
        assert torch.equal(KERNELS["int8"](x.clone(), packed, None), y)
    assert relative_error(found[0], KERNELS["reference"](x, layers[0], None)) < 1e-5
