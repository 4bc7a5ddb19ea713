import copy
import gc
import io
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conformance import DYNAMIC, SCHEMES, fake_and_packed, outputs, random_weight, toy_inputs, toy_prepared
from kernel_cases import packed_weight
from torch import nn

from optimum_zsaq.kernels import drop_prepacked, int8, packed_linear
from optimum_zsaq.kernels.prepacked import _ENTRIES, TensorTable, prepacked
from optimum_zsaq.spec import LayerSpec, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, pack, set_runtime


SPECS = {
    "row": LayerSpec(QuantSpec(4), DYNAMIC),
    "zero": LayerSpec(QuantSpec(8, symmetric=False), DYNAMIC),
    "group": LayerSpec(QuantSpec(3, "group", 32, symmetric=False), DYNAMIC),
    "outliers": LayerSpec(QuantSpec(3), DYNAMIC, 0.02),
}


def make(spec: LayerSpec = SPECS["row"], seed: int = 0, rows: int = 33, columns: int = 64):
    """A packed layer of the kernel that keeps most; the second value is a batch for it."""
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows)
    layer.weight = nn.Parameter(random_weight(rows, columns, 5 * seed))
    x = torch.randn(20, columns)
    packed = fake_and_packed(layer, spec, x, "minmax")[1]
    packed.set_runtime("fast", "int8")
    return packed, x


def entry(layer) -> dict:
    """What is kept for a layer."""
    return _ENTRIES.get(layer.weight_codes, (None, {}))[1]


@pytest.fixture
def no_grad():
    """As a served model is called."""
    with torch.no_grad():
        yield


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Which layouts were built."""
    made = []
    for layout in (int8._OneDNN, int8._Fbgemm):

        def counted(self, packed, init=int8._IntegerWeight.__init__):
            made.append(type(self).__name__)
            time.sleep(0.01)
            init(self, packed)

        monkeypatch.setattr(layout, "__init__", counted)
    return made


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.usefixtures("no_grad")
class TestThreads:
    def test_eight_build_once(self, spec, builds):
        layer, x = make(spec)
        start = threading.Barrier(8)

        def call(_):
            start.wait()
            return layer(x)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(call, range(8)))
        assert len(builds) == 1
        assert all(torch.equal(y, found[0]) for y in found)

    def test_batches_of_all_sizes_at_once(self, spec):
        """Layouts are exchanged while others compute with them."""
        layer, _ = make(spec)
        batches = [torch.randn(n, 64) for n in (1, 2, 5, 16, 17, 40, 64, 3)]
        expected = [layer(x) for x in batches]
        for _ in range(5):
            layer.drop_prepacked()
            start = threading.Barrier(8)

            def call(i, start=start):
                start.wait()
                order = [(i + k) % 8 for k in range(8)] * 2
                return all(torch.equal(layer(batches[k]), expected[k]) for k in order)

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(call, range(8)))


@pytest.mark.usefixtures("toy_kinds")
@pytest.mark.parametrize("row", ["w4a8e4-row", "w3a4e6-outliers"])
def test_threads_on_one_model(row):
    model = pack(toy_prepared(SCHEMES[row], tied=True))
    batches = [toy_inputs(seed)[: 1 + seed % 3] for seed in range(8)]
    expected = [outputs(model, ids) for ids in batches]
    set_runtime(model, "fast")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: [outputs(model, batches[(i + k) % 8]) for k in range(8)], range(8)))
    for i, many in enumerate(found):
        assert all(torch.equal(y, expected[(i + k) % 8]) for k, y in enumerate(many))


@pytest.mark.usefixtures("no_grad")
class TestLife:
    def test_is_built_once(self, builds):
        layer, x = make()
        for _ in range(5):
            layer(x)
            layer(x[:17])
        assert builds == ["_OneDNN"]

    def test_few_rows_take_the_place_of_many_once(self, builds):
        layer, x = make()
        for rows in (20, 1, 20, 2, 16, 20):
            layer(x[:rows])
        assert builds == ["_OneDNN", "_Fbgemm"]
        assert list(entry(layer)) == ["fbgemm"]

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda layer: layer.to(torch.bfloat16), id="cast"),
            pytest.param(lambda layer: layer.to("cpu"), id="to-cpu"),
            pytest.param(lambda layer: nn.Sequential(layer).float(), id="of-a-parent"),
            pytest.param(lambda layer: layer.state_dict(), id="state-dict"),
            pytest.param(lambda layer: nn.Sequential(layer).state_dict(), id="state-dict-of-a-parent"),
            pytest.param(lambda layer: layer.set_runtime("small"), id="set-runtime"),
            pytest.param(lambda layer: set_runtime(nn.Sequential(layer), "fast"), id="set-runtime-of-a-model"),
            pytest.param(lambda layer: layer.drop_prepacked(), id="drop"),
            pytest.param(lambda layer: drop_prepacked(layer.weight_codes), id="drop-codes"),
        ],
    )
    def test_is_dropped(self, change):
        layer, x = make()
        layer(x)
        assert entry(layer)
        change(layer)
        assert not entry(layer)

    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    @pytest.mark.parametrize("assign", [True, False], ids=["assigned", "copied"])
    def test_is_made_anew_from_loaded_tensors(self, spec, assign):
        (layer, x), (other, _) = make(spec, 0), make(spec, 1)
        for rows in (20, 1):
            layer(x[:rows])
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        for rows in (20, 1):
            assert torch.equal(layer(x[:rows]), other(x[:rows]))

    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    def test_is_made_anew_after_a_write(self, spec):
        layer, x = make(spec)
        names = ("codes", "scale", "shift", "outlier_positions", "outlier_values")
        for name in names:
            tensor = getattr(layer, f"weight_{name}")
            if tensor is None:
                continue
            for rows in (20, 1):
                before = layer(x[:rows])
                if name == "outlier_positions":
                    tensor.sub_(1).clamp_(min=0)
                else:
                    tensor.copy_(tensor.flip(0) if name == "codes" else tensor + 1)
                fresh = copy.deepcopy(layer)
                assert torch.equal(layer(x[:rows]), fresh(x[:rows])), name
                assert not torch.equal(layer(x[:rows]), before), name

    def test_is_freed_with_the_layer(self):
        gc.collect()
        layer, x = make(SPECS["outliers"])
        layer(x)
        layer(x[:1])
        kept, count = weakref.ref(entry(layer)["fbgemm"]), len(_ENTRIES)
        del layer
        gc.collect()
        assert kept() is None
        assert len(_ENTRIES) == count - 1

    def test_is_freed_with_replaced_tensors(self):
        layer, x = make()
        layer(x)
        kept = weakref.ref(entry(layer)["onednn"])
        layer.weight_codes = nn.Parameter(layer.weight_codes.clone(), requires_grad=False)
        gc.collect()
        assert kept() is None

    def test_goes_into_no_copy_and_no_file(self):
        """Equal sizes before and after a call; copies start without."""
        layer, x = make(SPECS["outliers"])

        def sizes() -> tuple[int, int, int]:
            files = io.BytesIO(), io.BytesIO()
            torch.save(layer, files[0])
            torch.save(layer.state_dict(), files[1])
            return len(pickle.dumps(layer)), files[0].tell(), files[1].tell()

        before = sizes()
        expected = layer(x)
        assert sizes() == before
        layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not entry(twin)
            assert torch.equal(twin(x), expected)
        assert set(vars(layer)) == set(vars(make(SPECS["outliers"])[0]))

    def test_a_failed_build_leaves_nothing(self, monkeypatch):
        layer, x = make()
        expected = layer(x)
        layer.drop_prepacked()

        def fail(*args):
            raise MemoryError("no memory")

        with monkeypatch.context() as context:
            context.setattr(int8._OneDNN, "pack", fail)
            with pytest.raises(MemoryError, match="no memory"):
                layer(x)
        assert not entry(layer)
        assert torch.equal(layer(x), expected)

    def test_layers_of_equal_codes_are_apart(self):
        layer, x = make()
        twin = copy.deepcopy(layer)
        expected = layer(x)
        with torch.no_grad():
            twin.weight_codes.zero_()
        assert not torch.equal(twin(x), expected)
        assert torch.equal(layer(x), expected)

    def test_is_a_byte_a_weight(self):
        packed = packed_weight(256, 512, LayerSpec(QuantSpec(2), DYNAMIC), kernel="int8")
        for rows, name in ((20, "onednn"), (1, "fbgemm")):
            packed_linear(torch.randn(rows, 512), packed)
            assert list(_ENTRIES[packed.codes][1]) == [name]
        packed_linear(torch.randn(20, 512), packed)
        kept = _ENTRIES[packed.codes][1]["fbgemm"]
        small = sum(t.numel() * t.element_size() for t in vars(kept).values() if isinstance(t, torch.Tensor))
        assert small <= 256 * 16


def test_build_is_called_once_a_name():
    packed, made = packed_weight(3, 17, QuantSpec(4)), []

    def build(tensors):
        assert tensors is packed
        made.append(len(made))
        return made[-1]

    assert [prepacked(packed, name, build) for name in ("a", "a", "b", "a")] == [0, 0, 1, 0]
    assert prepacked(packed, "c", build, instead_of="a") == 2
    assert [prepacked(packed, name, build) for name in ("b", "c", "a")] == [1, 2, 3]


def test_inference_tensors():
    """A layer that was made in inference mode cannot count writes; it works all the same."""
    with torch.inference_mode():
        layer, x = make()
        expected = layer(x)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x[:1]), expected[:1]) or (layer(x[:1]) - expected[:1]).abs().max() < 1e-4
        layer.state_dict()
        assert torch.equal(layer(x), expected)


@pytest.mark.usefixtures("toy_kinds")
def test_tied_layers_keep_one():
    model = set_runtime(pack(toy_prepared(SCHEMES["w4a8e4-row"], tied=True)), "fast", kernel="int8")
    outputs(model, toy_inputs())
    assert model.output.owner is model.table
    assert set(entry(model.table)) <= {"onednn", "fbgemm"}
    assert len(entry(model.table)) == 1
    model.output.drop_prepacked()
    assert not entry(model.table)
    assert [name for name, layer in low_bit_layers(model) if layer.owner is layer and entry(layer)] == [
        "up",
        "down",
        "head",
    ]


def test_ranges_of_other_weights(builds):
    """`set_weight` after a forward, many times, memory being reused."""
    layer, x = make()
    for seed in range(1, 6):
        other, _ = make(seed=seed)
        with torch.no_grad():
            for name in ("weight_codes", "weight_scale"):
                layer._set_tensor(name, getattr(other, name).detach().clone())
            layer.bias = other.bias
            assert torch.equal(layer(x), other(x))


def test_a_table_tells_equal_tensors_apart_and_forgets_dead_ones():
    table, one, other = TensorTable(), torch.zeros(3), torch.zeros(3)
    table[one], table[other] = "one", "other"
    table[one] = "again"
    assert (table.get(one), table.get(other), len(table)) == ("again", "other", 2)
    assert table.get(one.view(3), "default") == "default"  # another tensor on the same memory
    table.pop(other)
    table.pop(other)
    assert other not in table
    with pytest.raises(KeyError):
        table[other]
    del one
    assert len(table) == 0


def test_a_table_does_not_take_a_new_tensor_for_a_dead_one():
    table, new = TensorTable(), torch.zeros(3)
    table[new] = "new"
    number, (_, value) = next(iter(table._entries.items()))
    table._entries[number] = (weakref.ref(dead := torch.zeros(3)), value)  # its number is given out again
    del dead
    assert table.get(new) is None
