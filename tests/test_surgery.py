import copy
import functools
import pickle

import pytest
import torch
from conformance import (
    DYNAMIC,
    STATIC,
    ToyModel,
    TransposedLinear,
    assert_same_state,
    build_transposed,
    outputs,
    toy_inputs,
)
from tolerances import KERNEL_MODEL, relative_error
from torch import nn

from optimum_zsaq import kinds, surgery
from optimum_zsaq.layers import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    FakeQuantTransposedLinear,
    PackedEmbedding,
    PackedLinear,
    PackedTransposedLinear,
)
from optimum_zsaq.ops import RANGES, find_ranges
from optimum_zsaq.spec import LayerSpec, QuantScheme, QuantSpec
from optimum_zsaq.surgery import blocks, matches, pack, prepare, select, set_runtime, skeleton, unpack


pytestmark = pytest.mark.usefixtures("toy_kinds")
W4, E8 = QuantSpec(4), QuantSpec(8)
FULL = QuantScheme(W4, E8, DYNAMIC)


def types(model: nn.Module) -> list[type]:
    return [type(model.get_submodule(name)) for name in ("table", "up", "down", "output", "head")]


class Holder(nn.Module):
    """A model of whatever layers it is given."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        pytest.param("bert.pooler.dense", "pooler", True, id="a-part"),
        pytest.param("bert.pooler.dense", "bert.pooler.dense", True, id="the-whole-name"),
        pytest.param("bert.pooler.dense", "dense", True, id="the-end"),
        pytest.param("encoder.layer.1.output", "layer.1", True, id="a-run-of-parts"),
        pytest.param("encoder.layer.10.output", "layer.1", False, id="whole-parts-only"),
        pytest.param("encoder.layer.10.output", "layer.1?", True, id="question-mark"),
        pytest.param("encoder.layer.3.output", "layer.*.output", True, id="star"),
        pytest.param("encoder.layer.3.attention.output", "layer.*.output", False, id="a-star-is-one-part"),
        pytest.param("encoder.layer", "layer.3", False, id="longer-than-the-name"),
        pytest.param("Encoder.layer", "encoder", False, id="case"),
        pytest.param("pooler", "", False, id="empty"),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) is expected


class TestSelect:
    def test_rows_in_the_order_of_the_model(self):
        table = select(ToyModel(tied=False), FULL)
        linear = LayerSpec(W4, DYNAMIC)
        expected = {"table": LayerSpec(E8), "up": linear, "down": linear, "output": linear, "head": linear}
        assert list(table.items()) == list(expected.items())

    def test_a_tied_layer_gets_the_row_of_its_table(self):
        assert select(ToyModel(), FULL)["output"] == LayerSpec(E8)

    def test_a_tied_layer_stays_float_with_its_table(self):
        assert list(select(ToyModel(), QuantScheme(W4))) == ["up", "down", "head"]
        assert list(select(ToyModel(), QuantScheme(W4, E8, skip=("table",)))) == ["up", "down", "head"]

    def test_outliers_are_in_every_row(self):
        table = select(ToyModel(), QuantScheme(W4, E8, outliers=0.01))
        assert {row.outliers for row in table.values()} == {0.01}

    def test_skipped_layers_stay_float(self):
        table = select(ToyModel(tied=False), QuantScheme(W4, E8, skip=("head", "o*t")))
        assert list(table) == ["table", "up", "down"]

    def test_a_tied_layer_cannot_be_skipped_alone(self):
        with pytest.raises(ValueError, match="'output' shares its weight with the embedding 'table'"):
            select(ToyModel(), QuantScheme(W4, E8, skip=("output",)))

    def test_tied_linear_layers_both_get_the_row_of_linear_layers(self):
        model = Holder(a=nn.Linear(5, 5), b=nn.Linear(5, 5))
        model.b.weight = model.a.weight
        table = select(model, FULL)
        assert table["b"] == table["a"] == FULL.linear

    def test_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match=r"'outputs', which matches no Linear or embedding layer; .*\['output'"):
            select(ToyModel(), QuantScheme(W4, skip=("head", "outputs")))

    def test_nothing_to_quantize(self):
        with pytest.raises(ValueError, match="nothing to quantize in LayerNorm: it has 0 Linear and embedding layers"):
            select(nn.LayerNorm(3), FULL)
        with pytest.raises(ValueError, match="it has 5 Linear and embedding layers and all of them are heads or named"):
            select(ToyModel(), QuantScheme(W4, skip=("up", "down", "head")))

    @pytest.mark.parametrize(
        "table",
        [
            pytest.param(nn.Embedding(7, 5, max_norm=1.0), id="max-norm"),
            pytest.param(type("Shifted", (nn.Embedding,), {})(7, 5), id="subclass"),
        ],
    )
    def test_table_with_an_unknown_forward(self, table, monkeypatch):
        class Reader(kinds.ModelReader):
            def facts(self, model):
                return kinds.ModelFacts(tables=frozenset({"table"}))

        kinds.register_reader(Reader())
        model = Holder(table=table, linear=nn.Linear(5, 5))
        with pytest.raises(TypeError, match=f"the input embedding 'table' is a {type(table).__name__}, whose forward"):
            select(model, FULL)
        assert list(select(model, QuantScheme(W4))) == ["linear"]

    def test_heads_and_other_embeddings_stay_float(self):
        """What a registered reader says of a model is used, and the newest reader is asked first."""

        class Reader(kinds.ModelReader):
            def reads(self, model):
                return isinstance(model, ToyModel)

            def facts(self, model):
                return kinds.ModelFacts(frozenset(), {}, frozenset({"head", "output"}))

        reader = Reader()
        kinds.register_reader(reader)
        assert kinds.reader_of(ToyModel()) is reader
        assert kinds.reader_of(nn.Linear(2, 2)) is not reader
        assert list(select(ToyModel(tied=False), FULL)) == ["up", "down"]


class TestPrepare:
    def test_types_and_shared_parameters(self):
        model = ToyModel()
        weights = {name: model.get_submodule(name).weight for name in ("table", "up", "down", "output", "head")}
        bias = model.up.bias
        assert prepare(model, FULL, "minmax") is model
        assert types(model) == [
            FakeQuantEmbedding,
            FakeQuantLinear,
            FakeQuantTransposedLinear,
            FakeQuantLinear,
            FakeQuantLinear,
        ]
        assert all(model.get_submodule(name).weight is weight for name, weight in weights.items())
        assert model.up.bias is bias
        assert model.output.owner is model.table

    @pytest.mark.parametrize("ranges", ["minmax", "mse", "lsq"])
    def test_ranges_are_those_of_the_method(self, ranges):
        model = ToyModel()
        expected = find_ranges(model.up.weight, W4, ranges)[0], find_ranges(model.down.weight.t(), W4, ranges)[0]
        prepare(model, FULL, ranges)
        assert torch.equal(model.up.weight_scale, expected[0])
        assert torch.equal(model.down.weight_scale, expected[1])

    def test_a_method_registered_by_a_test_is_used_end_to_end(self, monkeypatch):
        monkeypatch.setitem(RANGES, "ones", lambda slices, spec: (torch.ones(len(slices)), None))
        model = pack(prepare(ToyModel(), FULL, "ones"))
        assert torch.equal(model.up.weight_scale, torch.ones(ToyModel.INNER, 1))

    def test_ternary_model_searches_the_ranges_of_its_wider_tables(self):
        model = ToyModel()
        scale = find_ranges(model.table.weight, E8, "mse")[0]
        prepare(model, QuantScheme(QuantSpec(2, ternary=True), E8), "ternary")
        assert torch.equal(model.table.weight_scale, scale)
        assert set(model.up.quantized_weight().div(model.up.weight_scale).unique().tolist()) == {-1, 0, 1}

    def test_twice_is_once(self):
        model = prepare(ToyModel(), FULL, "minmax")
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        with torch.no_grad():
            model.up.weight_scale.mul_(2)  # a learned scale is not searched again
        before["up.weight_scale"] *= 2
        prepare(model, FULL, "lsq")
        assert list(model.modules()) == modules
        assert_same_state(model.state_dict(), before)

    def test_layers_skipped_first_can_be_prepared_later(self):
        model = prepare(ToyModel(), QuantScheme(W4, E8, skip=("head",)), "minmax")
        up = model.up
        prepare(model, FULL, "minmax")
        assert type(model.head) is FakeQuantLinear
        assert model.up is up

    def test_packed_model(self):
        model = pack(prepare(ToyModel(), FULL, "minmax"))
        with pytest.raises(ValueError, match=r"the model is packed .*; call unpack\(model\) first"):
            prepare(model, FULL)

    @pytest.mark.parametrize("weights", [W4, QuantSpec(2, ternary=True)], ids=["uniform", "ternary"])
    def test_unknown_ranges(self, weights):
        with pytest.raises(ValueError, match="ranges='best' is unknown; use one of"):
            prepare(ToyModel(), QuantScheme(weights), "best")

    def test_ternary_ranges_of_other_codes(self):
        with pytest.raises(ValueError, match=r"ranges='ternary' needs ternary weights; use QuantSpec\(bits=2, ternary"):
            prepare(ToyModel(), FULL, "ternary")

    @pytest.mark.parametrize("outliers", [0.0, 0.05], ids=["plain", "outliers"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_weight_that_is_not_finite_is_named(self, bad, outliers):
        """Also where the bad weight is among the outliers, which the ranges do not see."""
        model = ToyModel()
        model.down.weight.data[3, 4] = bad
        with pytest.raises(ValueError, match="down: a weight is NaN or infinite"):
            prepare(model, QuantScheme(W4, E8, outliers=outliers))

    def test_can_be_repeated_after_an_error(self):
        """A second call must not take layers without ranges for prepared ones."""
        model, good = ToyModel(), ToyModel()
        good.load_state_dict(model.state_dict())
        model.down.weight.data[3, 4] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            prepare(model, FULL, "minmax")
        with torch.no_grad():
            model.down.weight.copy_(good.down.weight)
        assert_same_state(prepare(model, FULL, "minmax").state_dict(), prepare(good, FULL, "minmax").state_dict())

    def test_a_bare_layer_has_no_model_to_change(self):
        """`prepare` works in place: it must say that it cannot, not fail half-way."""
        with pytest.raises((TypeError, ValueError), match="Linear"):
            prepare(nn.Linear(5, 3), FULL)

    def test_buffers_attributes_and_mode_are_carried_over(self):
        model = ToyModel().train()
        model.head.eval()
        model.up.register_buffer("seen", torch.tensor([3.0]))
        model.up.register_buffer("hidden", torch.tensor([4.0]), persistent=False)
        model.up.note = "kept"
        for change in (lambda m: prepare(m, FULL, "minmax"), pack, unpack):
            change(model)
            assert model.up.note == "kept"
            assert model.up.seen.item() == 3.0
            assert ("up.seen" in model.state_dict(), "up.hidden" in model.state_dict()) == (True, False)
            assert model.up.training
            assert not model.head.training

    def test_a_forward_put_on_the_float_layer_does_not_hide_the_new_one(self):
        """accelerate's hooks wrap `layer.forward` as an attribute; carried over, it would run the float layer."""
        model = Holder(linear=nn.Linear(17, 3))
        plain = copy.deepcopy(model)
        model.linear.forward = functools.partial(nn.Linear.forward, model.linear)
        x = torch.randn(2, 17)
        expected = prepare(plain, QuantScheme(QuantSpec(2)), "minmax").linear(x)
        prepare(model, QuantScheme(QuantSpec(2)), "minmax")
        assert torch.equal(model.linear(x), expected)


class TestPackAndUnpack:
    def test_types(self):
        model = pack(prepare(ToyModel(), FULL, "minmax"))
        assert types(model) == [PackedEmbedding, PackedLinear, PackedTransposedLinear, PackedLinear, PackedLinear]
        assert model.output.owner is model.table

    def test_pack_twice_is_once(self):
        model = pack(prepare(ToyModel(), FULL, "minmax"))
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        assert pack(model) is model
        assert list(model.modules()) == modules
        assert_same_state(model.state_dict(), before)

    def test_pack_leaves_a_float_model_alone(self):
        model = ToyModel()
        modules = list(model.modules())
        assert list(pack(model).modules()) == modules

    def test_learned_scales_and_input_ranges_are_packed(self):
        model = prepare(ToyModel(), QuantScheme(W4, E8, STATIC), "minmax")
        with torch.no_grad():
            model.up.weight_scale.mul_(1.5)
        model.up.set_input_range(torch.tensor([[0.25]]), torch.tensor([[7]], dtype=torch.uint8))
        scale = model.up.weight_scale.clone()
        pack(model)
        assert torch.equal(model.up.weight_scale, scale)
        assert (model.up.input_scale.item(), model.up.input_zero_point.item()) == (0.25, 7)

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_unpack_gives_float_layers_with_the_dequantized_weight(self, tied, packed):
        model = prepare(ToyModel(tied), QuantScheme(W4, QuantSpec(3)), "minmax").eval()
        if packed:
            pack(model)
        ids = toy_inputs()
        expected = {name: layer.quantized_weight() for name, layer in surgery.low_bit_layers(model)}
        y = outputs(model, ids)
        assert unpack(model) is model
        assert types(model) == [nn.Embedding, nn.Linear, TransposedLinear, nn.Linear, nn.Linear]
        for name, weight in expected.items():
            found = model.get_submodule(name).weight
            assert found.requires_grad
            assert torch.equal(found.t() if name == "down" else found, weight)
        assert (model.output.weight is model.table.weight) is tied
        assert torch.allclose(outputs(model, ids), y, rtol=1e-5, atol=1e-5)  # the transposed layer sums in another order
        assert model.table.padding_idx == 0

    def test_unpack_to_a_dtype(self):
        model = unpack(pack(prepare(ToyModel().bfloat16(), FULL, "minmax")))
        assert model.up.weight.dtype == torch.bfloat16
        model = unpack(pack(prepare(ToyModel().bfloat16(), FULL, "minmax")), torch.float32)
        assert model.up.weight.dtype == model.table.weight.dtype == torch.float32

    def test_an_unpacked_model_can_be_prepared_again(self):
        """The grid survives: 8-bit codes of a weight that has 4 bits are exact where the scales allow it."""
        model = pack(prepare(ToyModel(), QuantScheme(W4, W4), "minmax"))
        before = {name: layer.quantized_weight() for name, layer in surgery.low_bit_layers(model)}
        prepare(unpack(model), QuantScheme(W4, W4), "mse")
        for name, layer in surgery.low_bit_layers(model):
            assert torch.allclose(layer.quantized_weight(), before[name], rtol=1e-5, atol=0)
        assert model.output.owner is model.table

    def test_a_layer_held_twice_stays_one(self):
        shared = nn.Linear(5, 5)
        model = Holder(a=shared, b=nn.Sequential(shared, nn.ReLU()))
        for change in (lambda m: prepare(m, FULL, "minmax"), pack, unpack):
            change(model)
            assert model.a is model.b[0]
        assert type(model.a) is nn.Linear


class TestRegistration:
    def test_each_transposed_type_comes_back_as_itself(self):
        """Two types share the low-bit layers' code, not their float type."""

        class Other(TransposedLinear):
            pass

        def build_other(layer, weight):
            new = Other(layer.in_features, layer.out_features)
            new.weight, new.bias = nn.Parameter(weight.t().contiguous()), layer.bias
            return new

        kinds.register_transposed(Other, build_other)
        model = Holder(first=TransposedLinear(5, 3), second=Other(5, 3))
        unpack(pack(prepare(model, FULL, "minmax")))
        assert [type(model.first), type(model.second)] == [TransposedLinear, Other]

    def test_embedding_subclass_keeps_its_forward(self):
        model = Holder(table=ScaledTable(7, 5), linear=nn.Linear(5, 5))
        assert list(select(model, FULL)) == ["linear"]
        kinds.register_embedding(ScaledTable)
        kinds.register_embedding(ScaledTable)  # twice is once
        ids = torch.tensor([1, 6])
        prepare(model, FULL, "minmax")
        assert isinstance(model.table, FakeQuantEmbedding)
        assert isinstance(model.table, ScaledTable)
        expected = model.table(ids)
        assert torch.equal(expected, model.table.quantized_weight()[ids] * 3.0)
        pack(model)
        assert isinstance(model.table, PackedEmbedding)
        assert torch.equal(model.table(ids), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model.table))(ids), expected)
        unpack(model)
        assert type(model.table) is ScaledTable
        assert torch.equal(model.table(ids), expected)

    def test_kinds_in_every_state(self):
        model = ToyModel(tied=False)
        found = [kinds.kind_of(model.get_submodule(name)) for name in ("table", "up", "down")]
        for change in (lambda m: prepare(m, FULL, "minmax"), pack):
            change(model)
            assert [kinds.kind_of(model.get_submodule(name)) for name in ("table", "up", "down")] == found
        assert kinds.kind_of(nn.LayerNorm(3)) is None

    def test_readers_are_told_of_every_change(self):
        told = []

        class Reader(kinds.ModelReader):
            def changed(self, model):
                told.append(types(model)[1])

        kinds.register_reader(Reader())
        unpack(pack(prepare(ToyModel(), FULL, "minmax")))
        assert told == [FakeQuantLinear, PackedLinear, nn.Linear]


class ScaledTable(nn.Embedding):
    """An embedding with a forward of its own, as some models have."""

    factor = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.factor


class TestSkeleton:
    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "fake"])
    def test_has_the_keys_and_types_of_the_model(self, packed):
        scheme = QuantScheme(QuantSpec(3, "group", 5, symmetric=False), E8, STATIC, outliers=0.05)
        model = prepare(ToyModel(), scheme, "minmax")
        if packed:
            pack(model)
        with torch.device("meta"):
            empty = ToyModel()
        table = {name: layer.spec for name, layer in surgery.low_bit_layers(model)}
        assert skeleton(empty, table, packed) is empty
        assert types(empty) == types(model)
        assert empty.output.owner is empty.table
        shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == shapes
        assert all(t.is_meta for t in empty.parameters())

    def test_quantize_weight_gives_what_prepare_and_pack_give(self):
        for scheme, ranges in ((QuantScheme(W4, E8, DYNAMIC, outliers=0.05), "mse"), (FULL, "lsq")):
            model = ToyModel(tied=False)
            weights = {name: model.get_submodule(name).weight.detach().clone() for name in select(model, scheme)}
            empty = skeleton(copy.deepcopy(model), select(model, scheme))
            pack(prepare(model, scheme, ranges))
            for name, weight in weights.items():
                layer = empty.get_submodule(name)
                before = copy.deepcopy(layer.state_dict())
                found = surgery.quantize_weight(layer, weight, ranges)
                expected = model.get_submodule(name).state_dict()
                assert_same_state(found, {key: expected[key] for key in found})
                assert set(expected) - set(found) <= {"weight", "bias"}
                assert_same_state(layer.state_dict(), before)


class TestRuntime:
    def test_reaches_every_packed_layer(self):
        model = pack(prepare(ToyModel(), FULL, "minmax")).eval()
        expected = outputs(model, toy_inputs())
        assert set_runtime(model, "small") is model
        assert {(layer.runtime, layer.kernel) for _, layer in surgery.low_bit_layers(model)} == {("small", "")}
        assert relative_error(outputs(model, toy_inputs()), expected) <= KERNEL_MODEL[torch.float32]
        set_runtime(model, "fast", kernel="reference")
        assert {(layer.runtime, layer.kernel) for _, layer in surgery.low_bit_layers(model)} == {("fast", "reference")}

    def test_a_new_choice_forgets_the_old_kernel(self):
        model = set_runtime(pack(prepare(ToyModel(), FULL, "minmax")), "small", kernel="reference")
        set_runtime(model, "small")
        assert {layer.kernel for _, layer in surgery.low_bit_layers(model)} == {""}

    @pytest.mark.parametrize("state", ["packed", "fake"])
    def test_unknown_kernel(self, state):
        model = prepare(ToyModel(), FULL, "minmax")
        if state == "packed":
            pack(model)
        with pytest.raises(ValueError, match=r"kernel='int5' is unknown; use one of \[.*'int8', .*'reference'\], or None"):
            set_runtime(model, "fast", kernel="int5")
        if state == "packed":
            assert {layer.kernel for _, layer in surgery.low_bit_layers(model)} == {""}

    @pytest.mark.parametrize("state", ["packed", "fake"])
    def test_unknown(self, state):
        model = prepare(ToyModel(), FULL, "minmax")
        if state == "packed":
            pack(model)
        with pytest.raises(ValueError, match="runtime='tiny' is unknown; use one of"):
            set_runtime(model, "tiny")


def test_reader_of_plain_modules():
    model = ToyModel()
    facts = kinds.reader_of(model).facts(model)
    assert facts == kinds.ModelFacts(frozenset({"table"}), {"output": "table"}, frozenset())
    assert kinds.reader_of(ToyModel(tied=False)).facts(ToyModel(tied=False)).tied == {}


def test_registered_transposed_kind():
    kind = kinds.kind_of(TransposedLinear(5, 3))
    assert (kind.fake, kind.packed) == (FakeQuantTransposedLinear, PackedTransposedLinear)
    assert (kind.build, kind.table) == (build_transposed, False)


class TestBlocks:
    """Found by structure, in whichever state the layers are."""

    @pytest.mark.parametrize("state", ["float", "fake", "packed"])
    def test_names_and_order(self, state):
        lists = {name: nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(11)]) for name in ("b", "a")}
        model = Holder(table=nn.Embedding(7, 5), **lists, head=nn.Linear(5, 2))
        if state != "float":
            prepare(model, FULL, "minmax")
        if state == "packed":
            pack(model)
        found = blocks(model)
        assert list(found) == [f"{name}.{i}" for name in ("b", "a") for i in range(11)]
        assert all(model.get_submodule(name) is block for name, block in found.items())

    def test_encoder_and_decoder(self):
        parts = [Holder(layers=nn.ModuleList([TransposedLinear(5, 5), nn.Linear(5, 5)])) for _ in range(2)]
        model = Holder(encoder=parts[0], decoder=parts[1])
        assert list(blocks(model)) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]

    def test_lists_inside_a_block_are_parts_of_it(self):
        """As T5's layers of a block, and experts."""
        block = Holder(layer=nn.ModuleList([nn.Linear(5, 5), Holder(experts=nn.ModuleList([nn.Linear(5, 5)]))]))
        model = Holder(stack=Holder(block=nn.ModuleList([block, copy.deepcopy(block)])))
        assert list(blocks(model)) == ["stack.block.0", "stack.block.1"]

    def test_a_list_beside_whose_name_begins_alike(self):
        lists = {name: nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]) for name in ("a", "a0")}
        assert list(blocks(Holder(**lists))) == ["a.0", "a.1", "a0.0", "a0.1"]

    @pytest.mark.parametrize(
        "build",
        [
            pytest.param(ToyModel, id="no-list"),
            pytest.param(lambda: Holder(a=nn.ModuleList()), id="empty-list"),
            pytest.param(lambda: Holder(a=nn.ModuleList([nn.LayerNorm(5)]), b=nn.Linear(5, 5)), id="norms"),
            pytest.param(lambda: Holder(a=nn.ModuleList([nn.Embedding(7, 5)])), id="tables"),
            pytest.param(lambda: Holder(a=nn.ModuleList([nn.Linear(5, 5), nn.ReLU()])), id="not-every-entry"),
            pytest.param(lambda: nn.Linear(5, 5), id="a-layer"),
        ],
    )
    def test_none(self, build):
        assert blocks(build()) == {}

    def test_a_list_inside_one_that_is_no_stack(self):
        """An entry without a Linear layer makes the outer list none; the list inside it is one."""
        inner = Holder(layers=nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]))
        assert list(blocks(Holder(parts=nn.ModuleList([nn.ReLU(), inner])))) == ["parts.1.layers.0", "parts.1.layers.1"]
