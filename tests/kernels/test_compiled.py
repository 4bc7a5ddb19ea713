"""Packed layers in graphs. Compiling is slow: a graph has one layer of every scheme; models are in the slow suite."""

import copy
import subprocess
import sys

import pytest
import torch
from conformance import DYNAMIC, STATIC, ToyModel
from kernel_cases import INPUTS, packed_weight
from tolerances import KERNEL, relative_error
from torch import Tensor, library, nn
from torch._dynamo.utils import counters

from optimum_zsaq.kernels import compiled, int8, integer_inputs, packed_linear
from optimum_zsaq.kernels.native import runs
from optimum_zsaq.layers import PackedEmbedding, PackedLinear
from optimum_zsaq.spec import LayerSpec, QuantSpec
from optimum_zsaq.surgery import low_bit_layers


W4, GROUP = QuantSpec(4), QuantSpec(3, "group", 32, symmetric=False)
LAYERS = {  # spec, runtime, kernel
    "w8a8-dynamic": (LayerSpec(QuantSpec(8), DYNAMIC), "fast", None),
    "w8a8-static": (LayerSpec(QuantSpec(8), STATIC), "fast", None),
    "w4a4-dynamic": (LayerSpec(QuantSpec(4, symmetric=False), QuantSpec(4, "token", symmetric=False)), "fast", None),
    "w8a8-zero": (LayerSpec(QuantSpec(8, symmetric=False), DYNAMIC), "fast", None),
    "tensor-static": (LayerSpec(QuantSpec(2, "tensor", ternary=True), STATIC), "fast", None),
    "weight-only": (LayerSpec(W4), "fast", None),
    "group": (LayerSpec(GROUP, DYNAMIC), "fast", None),
    "outliers": (LayerSpec(W4, DYNAMIC, 0.02), "fast", None),
    "minimum": (LayerSpec(QuantSpec(4, symmetric=False, minimum=True), DYNAMIC), "fast", None),
    "minimum-groups": (LayerSpec(QuantSpec(4, "group", 32, False, minimum=True, scale_bits=16), DYNAMIC), "fast", None),
    "small": (LayerSpec(W4, DYNAMIC), "small", None),
    "small-static": (LayerSpec(GROUP, STATIC, 0.02), "small", None),
    "reference": (LayerSpec(W4, DYNAMIC), "fast", "reference"),
}


def packed_layer(spec: LayerSpec, runtime: str = "fast", kernel: str | None = None, rows=33, columns=64, seed=0):
    """A packed layer of random codes."""
    layer = PackedLinear(columns, rows, True, spec)
    tensors = packed_weight(rows, columns, spec, seed=seed)
    for name in ("codes", "scale", "outlier_positions", "outlier_values"):
        layer._set_tensor(f"weight_{name}", getattr(tensors, name))
    layer._set_tensor("weight_minimum" if spec.weight.minimum else "weight_zero_point", tensors.shift)
    for name in ("input_scale", "input_zero_point"):
        layer._set_tensor(name, getattr(tensors, name))
    layer.bias = nn.Parameter(torch.randn(rows, generator=torch.Generator().manual_seed(seed)))
    layer.set_runtime(runtime, kernel)
    return layer


class Side(nn.Module):
    """A layer of every scheme beside each other, so that each can be compared; a table with outliers in front."""

    def __init__(self):
        super().__init__()
        self.table = PackedEmbedding(11, 64, LayerSpec(QuantSpec(5), outliers=0.02))
        table = packed_weight(11, 64, LayerSpec(QuantSpec(5), outliers=0.02))
        for name in ("codes", "scale", "outlier_positions", "outlier_values"):
            self.table._set_tensor(f"weight_{name}", getattr(table, name))
        self.layers = nn.ModuleList(packed_layer(*row, seed=seed) for seed, row in enumerate(LAYERS.values()))

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = torch.tanh(self.table(ids))
        return [torch.nn.functional.gelu(layer(x)) for layer in self.layers]


class Residual(nn.Module):
    """Square layers one after the other: their inputs' memory is reused for what comes after."""

    def __init__(self, spec: LayerSpec, runtime: str):
        super().__init__()
        self.layers = nn.ModuleList(packed_layer(spec, runtime, None, 64, 64, seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(torch.relu(x))
            x = torch.nn.functional.gelu(h) / 10 + h / 100
        return x


def ids_of(batch: int) -> Tensor:
    return torch.randint(11, (batch, 3), generator=torch.Generator().manual_seed(batch))


pytestmark = pytest.mark.usefixtures("fresh_graphs")


@pytest.fixture
def builds(monkeypatch) -> list[type]:
    """Which layouts of the libraries were built, by layers that our own kernels leave to them."""
    monkeypatch.setattr("optimum_zsaq.kernels.native.runs", lambda: False)
    made, init = [], int8._IntegerWeight.__init__
    monkeypatch.setattr(int8._IntegerWeight, "__init__", lambda self, packed: made.append(type(self)) or init(self, packed))
    return made


class TestCompile:
    @torch.no_grad()
    def test_every_scheme_in_one_graph(self, builds):
        """No graph break; the numbers of eager layers; kept weights are found again in later calls."""
        model = Side().eval()
        expected = {batch: model(ids_of(batch)) for batch in (4, 7, 14)}
        for _, layer in low_bit_layers(model):
            layer.drop_prepacked()
        builds.clear()
        graph = torch.compile(model, fullgraph=True, dynamic=True)
        for batch in (4, 7, 14, 7):
            found = graph(ids_of(batch))
            for name, a, b in zip(LAYERS, found, expected[batch], strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert relative_error(a, b) <= KERNEL[torch.float32], (name, batch)
            if batch == 4:
                count = len(builds)
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 1
        fast = sum(runtime == "fast" and kernel is None for _, runtime, kernel in LAYERS.values())
        assert count == len(builds) == fast

    @pytest.mark.parametrize(
        ("inputs", "runtime", "dtype"),
        [
            ("float", "fast", torch.float32),
            pytest.param("dynamic-8", "small", torch.float32, marks=pytest.mark.slow),
            pytest.param("float", "small", torch.bfloat16, marks=pytest.mark.slow),
            pytest.param("dynamic-8", "fast", torch.bfloat16, marks=pytest.mark.slow),
        ],
    )
    @torch.no_grad()
    def test_reused_memory_is_read_anew(self, inputs, runtime, dtype):
        """Compiled code writes into tensors without counting it as a write."""
        model = Residual(LayerSpec(W4, INPUTS[inputs]), runtime).to(dtype).eval()
        graph = torch.compile(model, fullgraph=True)
        for _ in range(3):
            x = torch.randn(20, 64, dtype=dtype)
            assert relative_error(graph(x), model(x)) <= (1e-5 if inputs == "float" and dtype == torch.float32 else 2e-2)

    @pytest.mark.parametrize("row", LAYERS)
    def test_gradients(self, row):
        """A LoRA-like matrix before the layer and the layer's bias learn what they learn without a graph."""
        layer, found = packed_layer(*LAYERS[row]), []
        adapter = nn.Linear(64, 64)

        def loss(x: Tensor) -> Tensor:
            return layer(x + adapter(x)).square().mean()

        x = torch.randn(5, 64)
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            adapter.zero_grad()
            layer.bias.grad = None
            function(x).backward()
            found.append([p.grad.clone() for p in (adapter.weight, adapter.bias, layer.bias)])
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(*reversed(found), strict=True))

    @pytest.mark.slow
    def test_training_step(self):
        layer, found = packed_layer(*LAYERS["group"]), []
        for compile_it in (False, True):
            torch.manual_seed(0)
            adapter, x = nn.Linear(64, 64), torch.randn(20, 64)
            optimizer = torch.optim.SGD([*adapter.parameters()], lr=0.01)

            def loss(x: Tensor, adapter=adapter) -> Tensor:
                return layer(x + adapter(x)).square().mean()

            step = torch.compile(loss, fullgraph=True) if compile_it else loss
            for _ in range(3):
                optimizer.zero_grad()
                step(x).backward()
                optimizer.step()
            found.append(adapter.weight.detach().clone())
        assert relative_error(*reversed(found)) <= 1e-4

    @torch.no_grad()
    def test_autocast(self):
        layer = packed_layer(*LAYERS["w8a8-dynamic"])
        graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 64)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = layer(x), graph(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert relative_error(found, expected) <= KERNEL[torch.bfloat16]

    @torch.no_grad()
    @pytest.mark.parametrize("row", LAYERS)
    def test_edges(self, row):
        """No rows, one row, one axis, rows that are not finite."""
        layer = packed_layer(*LAYERS[row])
        graph = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
        bad = torch.randn(3, 64)
        bad[1, 3] = torch.nan
        shapes = ((0, 64), (2, 0, 64), (64,), (1, 64))
        for x in (*map(torch.randn, shapes), torch.zeros(2, 64), bad, bad[1:2]):
            found, expected = graph(x), layer(x)
            assert found.shape == expected.shape
            sound = x.isfinite().all(dim=-1)
            assert relative_error(found[sound], expected[sound]) <= KERNEL[torch.float32]
            if layer.spec.inputs is not None and layer.spec.inputs.granularity == "token":
                assert found[~sound].isnan().all()

    @torch.no_grad()
    def test_weights_loaded_after_compiling_are_used(self):
        for row in ("w8a8-dynamic", "weight-only", "w8a8-static"):
            torch._dynamo.reset()
            layer, other = packed_layer(*LAYERS[row]), packed_layer(*LAYERS[row], seed=1)
            graph, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(5, 64)
            graph(x)
            layer.load_state_dict(copy.deepcopy(other.state_dict()))
            assert relative_error(graph(x), other(x)) <= KERNEL[torch.float32]


EXPORT = """
import sys
import torch
from test_compiled import LAYERS, Side, ids_of

torch.manual_seed(0)
model = Side().eval()
shapes = {"ids": {0: torch.export.Dim("batch", min=1, max=64)}}
program = torch.export.export(model, (ids_of(4),), dynamic_shapes=shapes, strict=False)
torch.export.save(program, sys.argv[1] + "/program.pt2")
with torch.no_grad():
    torch.save({batch: model(ids_of(batch)) for batch in (1, 4, 14)}, sys.argv[1] + "/expected.pt")
from optimum_zsaq.kernels import choose_kernel
x = torch.randn(2, 64)
print([choose_kernel(x, layer.packed()).name for layer in model.layers])
"""

LOAD = """
import sys
import torch
import optimum_zsaq.kernels

program = torch.export.load(sys.argv[1] + "/program.pt2").module()
found = {}
with torch.no_grad():
    for batch in (1, 4, 14):
        ids = torch.randint(11, (batch, 3), generator=torch.Generator().manual_seed(batch))
        found[batch] = program(ids)
torch.save(found, sys.argv[1] + "/found.pt")
print("transformers" in sys.modules)
"""


def run(code: str, *arguments: str, path=()) -> str:
    """What a Python process prints."""
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_exported_program_runs_in_another_process(tmp_path, pytestconfig):
    """Exported before any forward, for any batch; the kernels are then chosen by their own check, not by the tracer's."""
    tests = pytestconfig.rootpath / "tests"
    chosen = run(EXPORT, str(tmp_path), path=(tests, tests / "kernels"))
    ours = "native" if runs() else "int8"
    names = ["reference" if kernel else ours for _, _, kernel in LAYERS.values()]
    assert chosen == str(names)
    assert run(LOAD, str(tmp_path), path=()) == "False"
    found, expected = torch.load(tmp_path / "found.pt"), torch.load(tmp_path / "expected.pt")
    for batch, outputs in expected.items():
        for name, a, b in zip(LAYERS, found[batch], outputs, strict=True):
            assert relative_error(a, b) <= KERNEL[torch.float32], (name, batch)


class TestOperators:
    """What PyTorch demands of operators: schema, shapes under a tracer, no aliasing, gradients."""

    @pytest.mark.parametrize("row", LAYERS)
    def test_packed_linear(self, row):
        layer = packed_layer(*LAYERS[row])
        packed = layer.packed()
        for shape, gradient in (((64,), False), ((2, 3, 64), True)):
            x, bias = torch.randn(shape, requires_grad=gradient), torch.randn(33, requires_grad=gradient)
            text = compiled._spec_text(packed.spec)
            tensors = [None if t is None else t.detach() for t in compiled._tensors(packed)]
            arguments = (x, bias, *tensors, text, 64, packed.runtime, packed.kernel)
            library.opcheck(torch.ops.zsaq.packed_linear.default, arguments)

    @pytest.mark.parametrize("row", ["w8a8-dynamic", "w8a8-static", "w4a4-dynamic"])
    def test_parts_of_int8(self, row):
        packed = packed_layer(*LAYERS[row]).packed()
        zero = None if packed.shift is None else packed.shift.detach()
        weight = (packed.codes.detach(), packed.scale.detach(), zero, compiled._spec_text(packed.spec), 64)
        for rows in (0, 1, 5, 40):
            codes = torch.randint(256, (rows, 64)).to(torch.uint8)
            for ranges in (torch.tensor([[0.02]]), torch.rand(rows, 1)):
                zeros = torch.full_like(ranges, 7.0)
                for bias in (None, torch.randn(33)):
                    library.opcheck(torch.ops.zsaq.integer_linear.default, (codes, ranges, zeros, bias, *weight))

    def test_outlier_rows(self):
        packed = packed_weight(7, 64, LayerSpec(W4, None, 0.05))
        rows = torch.tensor([0, 6, 6, 3])
        arguments = (rows, 64, packed.outlier_positions, packed.outlier_values)
        library.opcheck(torch.ops.zsaq.outlier_rows.default, arguments)

    @pytest.mark.parametrize("row", LAYERS)
    def test_spec_survives_as_text(self, row):
        spec = LAYERS[row][0]
        again = compiled._spec(compiled._spec_text(spec))
        assert (again.weight, again.inputs) == (spec.weight, spec.inputs)

    def test_an_operator_shares_no_inputs(self):
        """See `test_reused_memory_is_read_anew`, without the compiler: memory that changes unseen."""
        packed = packed_weight(33, 64, LayerSpec(W4))
        x = torch.randn(5, 64)
        arguments = (None, *compiled._tensors(packed), compiled._spec_text(packed.spec), 64, "fast", "")
        torch.ops.zsaq.packed_linear(x, *arguments)
        assert getattr(integer_inputs._LAST, "value", None) is None
        x.data.mul_(2)
        assert torch.equal(torch.ops.zsaq.packed_linear(x, *arguments), packed_linear(x.clone(), packed))


@pytest.mark.usefixtures("toy_kinds")
def test_toy_model_with_tied_layers_compiles():
    from conformance import SCHEMES, outputs, toy_inputs, toy_prepared

    from optimum_zsaq.surgery import pack

    for row in ("w4a8e4-row", "w3a4e6-outliers"):
        model = pack(toy_prepared(SCHEMES[row], tied=True))
        assert isinstance(model, ToyModel)
        expected = outputs(model, toy_inputs())
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(outputs(graph, toy_inputs()), expected) <= 1e-2
