"""Unit by unit is the same as all at once, bit for bit, and the model is left as it was."""

import pytest
import torch
import transformers as tf
from tiny_models import VOCABULARY, make, token_ids
from torch import nn
from torch.utils._pytree import tree_leaves

from optimum_zsaq.algorithms.replay import Replay, layer_inputs, linear_layers, run, units
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import blocks, low_bit_layers, pack, prepare


INPUTS = QuantSpec(8, "token", symmetric=False)
SCHEME = QuantScheme(QuantSpec(3), QuantSpec(4), INPUTS)
FAMILIES = {
    "bert-cls": {},
    "roberta-cls": {},
    "distilbert-cls": {},
    "deberta-cls": {},
    "opt-tied": {},
    "gpt2-tied": {},
    "llama-tied": {},
    "qwen2-tied": {},
    "t5-tied": {"num_layers": 3, "num_decoder_layers": 2},
    "bart-tied": {"encoder_layers": 2, "decoder_layers": 2},
    "bart-cls": {"encoder_layers": 2, "decoder_layers": 2},
}


@pytest.fixture(autouse=True)
def known_models(plain_kinds):
    register_models()


def prepared(name: str, **options) -> nn.Module:
    return prepare(make(name, **{**FAMILIES.get(name, {}), **options}), SCHEME, "minmax")


def batch(model: nn.Module, seed: int = 1, padded: int = 0) -> dict:
    """Two sequences, the first shorter by `padded` tokens."""
    ids = token_ids(seed=seed)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, -padded:], mask[0, -padded:] = 0, 0
        ids[0, -padded - 1] = 2
    return uncached_batch(model, {"input_ids": ids, "attention_mask": mask})


def batches(model: nn.Module) -> list[dict]:
    return [batch(model, 1), batch(model, 2, padded=3)]


def copied(value):
    """A tensor as it is now, whatever is written to it later."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def whole_pass(model: nn.Module, names: list[str], data: dict) -> dict[str, tuple]:
    """What each unit is called with and returns in one forward pass, and what the model does: name -> leaves."""
    seen, returned = {}, {}

    def before(name):
        return lambda _, args, kwargs: seen.__setitem__(name, [copied(v) for v in tree_leaves((args, kwargs))])

    def after(name):
        return lambda _, args, output: returned.__setitem__(name, [copied(v) for v in tree_leaves(output)])

    hooks = [model.get_submodule(n).register_forward_pre_hook(before(n), with_kwargs=True) for n in names]
    hooks += [model.get_submodule(n).register_forward_hook(after(n)) for n in names]
    with torch.no_grad():
        model(**data)
    for hook in hooks:
        hook.remove()
    return {name: (seen[name], returned[name]) for name in names}


def assert_same_leaves(found, expected: list, where: object) -> None:
    found = tree_leaves(found)
    assert len(found) == len(expected), where
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), where
        else:
            assert a is b or a == b, where


def tensors(leaves) -> int:
    return sum(isinstance(v, torch.Tensor) for v in leaves)


def untouched(model: nn.Module) -> bool:
    """No forward of its own and no hook anywhere."""
    return not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
class TestWholeModels:
    def test_units_cover_every_layer_once_in_the_order_in_which_they_run(self, name):
        model = prepared(name)
        order = units(model, lambda: model(**batch(model)))
        assert untouched(model)
        parts = [[f"{unit}.{n}".rstrip(".") for n in linear_layers(model.get_submodule(unit))] for unit in order]
        layers = [layer for part in parts for layer in part]
        assert len(layers) == len(set(layers))
        own = {n for n, m in low_bit_layers(model) if m.owner is m and not isinstance(m, nn.Embedding)}
        assert set(layers) == own
        in_blocks = [unit for unit in order if unit in blocks(model)]
        assert in_blocks == list(blocks(model))  # an encoder's come before a decoder's
        ran = []
        hooks = [model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n in order]
        with torch.no_grad():
            model(**batch(model))
        for hook in hooks:
            hook.remove()
        assert ran == order

    def test_every_unit_gets_and_gives_what_it_does_in_a_whole_pass(self, name):
        model = prepared(name)
        data = batches(model)
        order = units(model, lambda: model(**data[0]))
        expected = [whole_pass(model, order, one) for one in data]
        state = {n: t.clone() for n, t in model.state_dict().items()}
        replay = Replay(model, data)
        for unit in order:
            calls = replay.inputs(unit)
            assert untouched(model), unit
            assert len(calls) == len(data)
            returned = run(model.get_submodule(unit), calls)
            for i, (call, output) in enumerate(zip(calls, returned, strict=True)):
                seen, gave = expected[i][unit]
                assert tensors(seen) > 0
                assert_same_leaves(call, seen, (unit, i))
                assert_same_leaves(output, gave, (unit, i))
            replay.finish(unit, returned)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())

    def test_finished_units_do_not_run_again(self, name):
        model = prepared(name)
        data = [batch(model)]
        order = units(model, lambda: model(**data[0]))
        replay, ran = Replay(model, data), []
        parts = [linear_layers(model.get_submodule(unit)) for unit in order[:-1]]
        layers = [layer for part in parts for n, layer in part.items() if n]  # a lone layer is called, and answers
        for unit in order[:-1]:
            replay.finish(unit, run(model.get_submodule(unit), replay.inputs(unit)))
        hooks = [layer.register_forward_pre_hook(lambda *_: ran.append(1)) for layer in layers]
        replay.inputs(order[-1])
        for hook in hooks:
            hook.remove()
        assert ran == []


def test_cross_attention_and_position_bias_are_among_the_inputs():
    model = prepared("t5-tied")
    data = [batch(model)]
    replay = Replay(model, data)
    for unit in units(model, lambda: model(**data[0])):
        calls = replay.inputs(unit)
        if unit == "decoder.block.1":
            shapes = [tuple(v.shape) for v in tree_leaves(calls[0]) if isinstance(v, torch.Tensor)]
            assert shapes.count((2, 11, 32)) == 2  # its own input, and the encoder's output
            assert shapes.count((1, 4, 11, 11)) + shapes.count((2, 4, 11, 11)) >= 2  # biases of both attentions
        replay.finish(unit, run(model.get_submodule(unit), calls))


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
def test_models_that_collect_hidden_states(name):
    """Such a config has transformers put hooks or forwards of its own on the blocks."""
    model = prepared(name)
    model.config.output_hidden_states = True
    data = [batch(model)]
    order = units(model, lambda: model(**data[0]))
    expected = whole_pass(model, order, data[0])
    before = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    replay = Replay(model, data)
    for unit in order:
        calls = replay.inputs(unit)
        assert_same_leaves(calls[0], expected[unit][0], unit)
        replay.finish(unit, run(model.get_submodule(unit), calls))
    assert not any("forward" in vars(m) for m in model.modules())
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == before
    assert len(model(**data[0]).to_tuple()) >= 2


class Chain(nn.Module):
    """Blocks in a row; a lone layer before, another behind; `again` runs the first block a second time."""

    def __init__(self, again: bool = False, spare: bool = False):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(2)])
        self.last = nn.Linear(5, 3)
        self.spare = nn.Linear(5, 3) if spare else None
        self.again = again

    def forward(self, x, fail: bool = False, spare: bool = False):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if fail:
            raise KeyboardInterrupt("in the middle")
        x = self.blocks[0](x) if self.again else x
        return self.last(x) + (self.spare(x) if spare else 0)


def chain(**options) -> tuple[nn.Module, dict]:
    model = prepare(Chain(**options).eval(), QuantScheme(QuantSpec(3)), "minmax")
    return model, {"x": torch.randn(4, 6)}


def finish_all(replay: Replay, order: list[str]) -> None:
    for unit in order:
        replay.finish(unit, run(replay.model.get_submodule(unit), replay.inputs(unit)))


class TestFinish:
    def test_units_of_a_stack_share_what_the_last_returned(self):
        """So that one tensor a batch is kept, however many blocks there are."""
        model, data = chain()
        replay = Replay(model, [data])
        order = ["first", "blocks.0", "blocks.1"]
        finish_all(replay, order)
        with torch.no_grad():
            expected = model.blocks[1](model.blocks[0](model.first(data["x"])))
        (args, kwargs), kept = replay.inputs("last")[0], list(tree_leaves(list(vars(replay).values())))
        assert kwargs == {}
        assert torch.equal(args[0], expected)
        assert len({id(v) for v in kept if isinstance(v, torch.Tensor)} - {id(data["x"])}) == 2

    def test_it_answers_what_it_is_told(self):
        """A unit may have changed since its inputs were seen."""
        model, data = chain()
        replay = Replay(model, [data])
        replay.finish("first", [torch.full((4, 5), 7.0)])
        (args, _) = replay.inputs("blocks.0")[0]
        assert torch.equal(args[0], torch.full((4, 5), 7.0))

    def test_no_gradient(self):
        model, data = chain()
        replay = Replay(model, [data])
        (args, _) = replay.inputs("blocks.0")[0]
        assert not args[0].requires_grad
        assert not run(model.blocks[0], [(args, {})])[0].requires_grad


class Numbered(nn.Module):
    """Layers with numbers for names that are no stack: each has another shape, and a norm is between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 2))

    def forward(self, x):
        return self.layers(x)


class Parallel(nn.Module):
    """Entries of a list that all read the same input; their outputs are summed."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(6, 5) for _ in range(3)])
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        return self.last(sum(branch(x) for branch in self.branches))


class Skipping(nn.Module):
    """Blocks in a row, whose outputs are all read again behind them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.last = nn.Linear(18, 2)

    def forward(self, x):
        found = []
        for block in self.blocks:
            x = torch.tanh(block(x))
            found.append(x)
        return self.last(torch.cat(found, dim=-1))


@pytest.mark.parametrize("build", [Numbered, Parallel, Skipping])
def test_entries_of_a_list_that_do_not_hand_one_state_on(build):
    model = prepare(build().eval(), QuantScheme(QuantSpec(3)), "minmax")
    data = {"x": torch.randn(4, 6)}
    order = units(model, lambda: model(**data))
    expected = whole_pass(model, order, data)
    replay = Replay(model, [data])
    for unit in order:
        calls = replay.inputs(unit)
        assert_same_leaves(calls[0], expected[unit][0], unit)
        replay.finish(unit, run(model.get_submodule(unit), calls))


class TestModelIsLeftAsItWas:
    def test_after_an_exception_in_the_model(self):
        model, data = chain()
        data["fail"] = True
        replay = Replay(model, [data])
        finish_all(replay, ["first", "blocks.0", "blocks.1"])
        with pytest.raises(KeyboardInterrupt, match="in the middle"):
            replay.inputs("last")
        assert untouched(model)
        with pytest.raises(KeyboardInterrupt, match="in the middle"):
            units(model, lambda: model(**data))
        assert untouched(model)

    def test_after_an_exception_in_a_unit(self):
        model, data = chain()
        wrong = [((torch.zeros(4, 9),), {})]
        with pytest.raises(RuntimeError, match="shape"):
            layer_inputs(model.blocks[0], wrong, [model.blocks[0][0]])
        assert untouched(model)

    def test_a_forward_that_a_unit_had_is_given_back(self):
        """As accelerate puts one on the modules of a model with a device map."""
        model, data = chain()
        expected = model(**data)
        own = [nn.Sequential.forward.__get__(block) for block in model.blocks]
        for block, forward in zip(model.blocks, own, strict=True):
            block.forward = forward
        finish_all(Replay(model, [data]), units(model, lambda: model(**data)))
        assert [vars(block).get("forward") for block in model.blocks] == own
        assert torch.equal(model(**data), expected)

    def test_hooks_that_were_there_stay(self):
        model, data = chain()
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
        finish_all(Replay(model, [data]), units(model, lambda: model(**data)))
        seen.clear()
        model(**data)
        assert seen == [1]


class TestLayerInputs:
    def test_inputs_of_several_layers_and_outputs(self):
        model = prepared("llama-tied")
        data = batches(model)
        replay = Replay(model, data)
        calls = replay.inputs("model.layers.0")
        block = model.model.layers[0]
        layers = [block.self_attn.q_proj, block.mlp.down_proj]
        found, outputs = layer_inputs(block, calls, layers)
        assert untouched(model)
        shapes = [[[tuple(x.shape) for x in inputs] for inputs in part] for part in found]
        assert shapes == [[[(2, 11, 32)]] * 2, [[(2, 11, 37)]] * 2]
        for output, expected in zip(outputs, run(block, calls), strict=True):
            assert_same_leaves(output, tree_leaves(expected), "outputs")
        names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
        for i, one in enumerate(data):
            seen = whole_pass(model, names, one)
            for part, name in zip(found, names, strict=True):
                assert torch.equal(part[i][0], seen[name][0][0])
        assert not any(x.requires_grad for part in found for inputs in part for x in inputs)

    def test_a_layer_itself(self):
        """A unit may be a lone layer."""
        layer = nn.Linear(5, 3)
        x = torch.randn(2, 5)
        ([(seen,)],), (output,) = layer_inputs(layer, [((x,), {})], [layer])
        assert torch.equal(seen, x)
        assert torch.equal(output, layer(x))

    def test_input_given_by_name(self):
        layer = nn.Linear(5, 3)
        x = torch.randn(2, 5)
        ([(seen,)],), _ = layer_inputs(layer, [((), {"input": x})], [layer])
        assert torch.equal(seen, x)

    def test_layers_that_run_again_or_not_at_all(self):
        class Routed(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)

            def forward(self, x, often: int):
                for _ in range(often):
                    x = self.one(x)
                return self.two(x) if often else x

        module, x = Routed(), torch.randn(2, 5)
        calls = [((x,), {"often": often}) for often in (2, 0, 1)]
        found, outputs = layer_inputs(module, calls, [module.two, module.one])
        assert [[len(inputs) for inputs in part] for part in found] == [[1, 0, 1], [2, 0, 1]]
        assert torch.equal(found[1][0][1], module.one(x))
        assert len(outputs) == 3


class TestLinearLayers:
    def test_tables_and_layers_tied_to_them_are_left_out(self):
        model = prepared("llama-tied")
        assert model.lm_head.owner is model.model.embed_tokens
        assert set(linear_layers(model)) == {n for n, _ in low_bit_layers(model)} - {"model.embed_tokens", "lm_head"}

    def test_packed_and_float_layers_are_left_out(self):
        assert linear_layers(make("llama-tied")) == {}
        assert linear_layers(pack(prepared("llama-tied"))) == {}

    def test_skipped_layers_make_no_unit(self):
        model = prepare(make("bert-cls"), QuantScheme(QuantSpec(3), skip=("layer.0",)), "minmax")
        assert units(model, lambda: model(**batch(model))) == ["bert.encoder.layer.1", "bert.pooler.dense"]


class TestErrors:
    def test_a_block_that_runs_twice(self):
        model, data = chain(again=True)
        with pytest.raises(ValueError, match=r"\['blocks.0'\] run more than once in a forward pass.*start='rounding'"):
            units(model, lambda: model(**data))
        assert untouched(model)

    def test_layers_that_albert_shares(self):
        sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
        config = tf.AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **sizes)
        model = prepare(tf.AlbertModel(config).eval(), SCHEME, "minmax")
        with pytest.raises(ValueError, match=r"albert_layer_groups.0'\] run more than once in a forward pass"):
            units(model, lambda: model(**batch(model)))

    def test_a_unit_that_does_not_run(self):
        model, data = chain(spare=True)
        assert "spare" not in units(model, lambda: model(**data))
        with pytest.raises(ValueError, match="spare did not run for 1 of 2 batches"):
            Replay(model, [{**data, "spare": True}, data]).inputs("spare")
        assert untouched(model)
