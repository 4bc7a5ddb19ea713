"""The life of a layer and of a model, exactly: fake-quantized == packed == reloaded == duplicated, `torch.equal`."""

import copy
import io
import pickle

import pytest
import torch
from conformance import (
    DTYPES,
    DYNAMIC,
    LAYERS,
    SCHEMES,
    STATIC,
    ToyModel,
    assert_same_state,
    check_packed_equals_fake,
    exactly,
    outputs,
    reload,
    spec_id,
    tensors,
    toy_inputs,
    toy_prepared,
    weight_specs,
)
from tolerances import KERNEL, KERNEL_MODEL, relative_error
from torch import nn

from optimum_zsaq.layers.common import INTEGERS, SCALES
from optimum_zsaq.spec import LayerSpec, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, pack, prepare, set_runtime, unpack


pytestmark = pytest.mark.usefixtures("toy_kinds")
WITH_EXTRAS = {
    "dynamic-8": LayerSpec(QuantSpec(4), DYNAMIC),
    "dynamic-3": LayerSpec(QuantSpec(3, "group", 5, symmetric=False), QuantSpec(3, "token", symmetric=False)),
    "static-8": LayerSpec(QuantSpec(4, "tensor"), STATIC),
    "static-4": LayerSpec(QuantSpec(8, symmetric=False), QuantSpec(4, "tensor", symmetric=False)),
    "outliers": LayerSpec(QuantSpec(3), outliers=0.1),
    "outliers-group": LayerSpec(QuantSpec(4, "group", 5, symmetric=False), DYNAMIC, 0.1),
    "outliers-ternary": LayerSpec(QuantSpec(2, "group", 5, ternary=True), None, 0.1),
}


class TestLayersOverHundredSeeds:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("spec", weight_specs(), ids=spec_id)
    def test_packed_equals_fake(self, spec, dtype):
        check_packed_equals_fake("linear", LayerSpec(spec), dtype)

    @pytest.mark.parametrize("name", ["transposed", "embedding"])
    @pytest.mark.parametrize("spec", weight_specs(), ids=spec_id)
    def test_packed_equals_fake_in_other_kinds(self, name, spec):
        check_packed_equals_fake(name, LayerSpec(spec), *DTYPES)

    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("extra", WITH_EXTRAS)
    def test_packed_equals_fake_with_extras(self, name, extra):
        spec = WITH_EXTRAS[extra]
        if name == "embedding":
            spec = LayerSpec(spec.weight, None, spec.outliers)
        check_packed_equals_fake(name, spec, *DTYPES)


@pytest.mark.parametrize("columns", [128, 768, 1023])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_packed_equals_fake_on_wide_layers(name, dtype, columns):
    """Sizes at which matmul libraries choose other routines, by the memory layout of the weight too."""
    layer = LAYERS[name].build(torch.randn(65, columns, dtype=dtype))
    model = prepare(nn.Sequential(layer), SCHEMES["w4a8e4-row"].scheme, "minmax")
    inputs = [torch.randn(n, columns, dtype=dtype) for n in (1, 2, 7, 64)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        exactly(pack(model))
        assert all(torch.equal(model(x), y) for x, y in zip(inputs, expected, strict=True))
        set_runtime(model, "fast")
        assert all(relative_error(model(x), y) <= KERNEL[dtype] for x, y in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("row", SCHEMES.values(), ids=SCHEMES)
class TestModels:
    def test_packed_equals_fake(self, row, tied, dtype):
        for seed in range(3):
            model = toy_prepared(row, tied, dtype, seed)
            expected = outputs(model, toy_inputs(seed))
            assert expected.dtype == dtype
            assert torch.isfinite(expected).all()
            assert torch.equal(outputs(exactly(pack(model)), toy_inputs(seed)), expected)
            for runtime in ("fast", "small"):
                found = outputs(set_runtime(model, runtime), toy_inputs(seed))
                assert found.dtype == dtype
                assert relative_error(found, expected) <= KERNEL_MODEL[dtype]

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
    def test_saved_and_reloaded(self, row, tied, dtype, packed):
        model = toy_prepared(row, tied, dtype)
        if packed:
            pack(model)
        expected = outputs(model, toy_inputs())
        with torch.device("meta"):
            empty = ToyModel(tied).to(dtype)
        again = reload(model, empty, packed)
        assert torch.equal(outputs(again, toy_inputs()), expected)
        assert_same_state(again.state_dict(), model.state_dict())
        assert all(not p.requires_grad for n, p in again.named_parameters() if n.endswith(SCALES + INTEGERS))

    def test_a_forward_leaves_the_state_alone(self, row, tied, dtype):
        for model in (toy_prepared(row, tied, dtype), pack(toy_prepared(row, tied, dtype))):
            before = copy.deepcopy(model.state_dict())
            for runtime in ("fast", "small"):
                outputs(set_runtime(model, runtime), toy_inputs())
                assert_same_state(model.state_dict(), before)

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
    @pytest.mark.parametrize(
        "duplicate",
        [
            pytest.param(copy.deepcopy, id="deepcopy"),
            pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        ],
    )
    def test_duplicates(self, row, tied, dtype, duplicate, packed):
        model = toy_prepared(row, tied, dtype)
        if packed:
            pack(model)
        expected = outputs(model, toy_inputs())
        twin = duplicate(model)
        assert torch.equal(outputs(twin, toy_inputs()), expected)
        assert_same_state(twin.state_dict(), model.state_dict())
        memory = {t.untyped_storage().data_ptr() for t in tensors(model)}
        assert not memory & {t.untyped_storage().data_ptr() for t in tensors(twin)}
        if not packed:
            exactly(pack(twin))
        assert torch.equal(outputs(twin, toy_inputs()), expected)
        with torch.no_grad():
            twin.up.weight_scale.zero_()
        assert torch.equal(outputs(model, toy_inputs()), expected)

    def test_runtimes_are_equal(self, row, tied, dtype):
        """Bit for bit on the reference; a runtime that is chosen again gives what it gave before."""
        model = pack(toy_prepared(row, tied, dtype))
        for kernel in ("reference", None):
            expected = {r: outputs(set_runtime(model, r, kernel), toy_inputs()) for r in ("fast", "small")}
            if kernel == "reference":
                assert torch.equal(expected["fast"], expected["small"])
            assert relative_error(expected["small"], expected["fast"]) <= KERNEL_MODEL[dtype]
            for runtime in ("fast", "small", "fast"):
                assert torch.equal(outputs(set_runtime(model, runtime, kernel), toy_inputs()), expected[runtime])

    def test_cast_keeps_scales_and_codes(self, row, tied, dtype):
        model = pack(toy_prepared(row, tied, dtype))
        before = copy.deepcopy(model.state_dict())
        outputs(model.to(torch.bfloat16), toy_inputs())
        for name, tensor in model.state_dict().items():
            if name.endswith(SCALES + INTEGERS):
                assert tensor.dtype == before[name].dtype
                assert torch.equal(tensor, before[name])
            else:
                assert tensor.dtype == torch.bfloat16
        assert torch.equal(outputs(model.to(dtype), toy_inputs()), outputs(model, toy_inputs()))

    def test_tied_layers_share_one_tensor(self, row, tied, dtype):
        """In every state and copy; packed, the tied layer has nothing but its marker."""
        model = toy_prepared(row, tied, dtype)
        quantized = {name for name, _ in low_bit_layers(model)}
        if not tied or "table" not in quantized:
            assert model.output.weight is not model.table.weight or row.scheme.embeddings is None
            return
        assert model.output.weight is model.table.weight
        assert [name for name in model.state_dict() if name.startswith("output.")] == ["output.weight"]
        pack(model)
        for packed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert packed.output.owner is packed.table
            assert [name for name in packed.state_dict() if name.startswith("output.")] == ["output.weight"]
            expected = packed.table.quantized_weight().to(dtype)
            float_model = unpack(copy.deepcopy(packed))
            assert float_model.output.weight is float_model.table.weight
            assert torch.equal(float_model.table.weight, expected)
            packed.table.weight_codes.data.zero_()
            assert torch.equal(packed.output.quantized_weight(), packed.table.quantized_weight())


def test_codes_dominate_the_memory_of_a_packed_model():
    """No float weight is left behind: what a packed model holds is codes, scales, markers and the float rest."""
    model = pack(toy_prepared(SCHEMES["w4a8e4-row"], tied=True))
    rows = {"table": (11, 13), "up": (33, 13), "down": (13, 33), "head": (2, 13)}
    expected = sum(r * -(-c // 2) + r * 4 + r * 4 for r, c in rows.values())  # codes, scales, markers
    expected += (33 + 13 + 2) * 4 + 2 * 33 * 4  # biases, LayerNorm; the tied layer has nothing of its own
    assert sum(t.numel() * t.element_size() for t in tensors(model)) == expected


def test_torch_save_round_trip():
    model = pack(toy_prepared(SCHEMES["w3a4e6-outliers"], tied=True))
    expected = outputs(model, toy_inputs())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(outputs(torch.load(file, weights_only=False), toy_inputs()), expected)


def test_gradients_of_a_fake_quantized_model_reach_every_float_parameter():
    model = toy_prepared(SCHEMES["w4a8e4-row"], tied=True).train()
    sum(y.square().sum() for y in model(toy_inputs())).backward()
    float_parameters = {n for n, _ in model.named_parameters() if not n.endswith(SCALES + INTEGERS)}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == float_parameters
