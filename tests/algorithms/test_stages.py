"""Stage after stage is the same as all at once, bit for bit, and every tensor has its stage."""

import copy

import pytest
import torch
from tiny_models import make, token_ids
from torch import nn

from optimum_zsaq.algorithms.stages import cut, read_by_later, run_stage
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import blocks, low_bit_layers, prepare


SCHEME = QuantScheme(QuantSpec(3), QuantSpec(4), QuantSpec(8, "token", symmetric=False))
FAMILIES = {
    "bert": {"num_hidden_layers": 3},
    "bert-cls": {"num_hidden_layers": 3},
    "distilbert-cls": {},
    "deberta-cls": {"num_hidden_layers": 3, "conv_kernel_size": 3},
    "opt-tied": {},
    "gpt2-tied": {},
    "llama": {},
    "llama-tied": {"num_hidden_layers": 4},
    "t5-tied": {"num_layers": 3, "num_decoder_layers": 2},
    "bart-tied": {"encoder_layers": 2, "decoder_layers": 2},
    "bart-cls": {"encoder_layers": 2, "decoder_layers": 2},
}


@pytest.fixture(autouse=True)
def known_models(plain_kinds):
    register_models()


def prepared(name: str, **options) -> nn.Module:
    return prepare(make(name, **{**FAMILIES.get(name, {}), **options}), SCHEME, "minmax")


def padded_batch(model: nn.Module) -> dict:
    """Two sequences, the first shorter by three tokens."""
    ids = token_ids(seed=2)
    mask = torch.ones_like(ids)
    ids[0, -3:], mask[0, -3:], ids[0, -4] = 0, 0, 2
    return uncached_batch(model, {"input_ids": ids, "attention_mask": mask})


def whole_pass(model: nn.Module, batch: dict) -> tuple[dict, tuple]:
    """What each block returns in one forward pass, and what the model does."""
    states = {}

    def note(name):
        return lambda _, __, out: states.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    hooks = [block.register_forward_hook(note(name)) for name, block in blocks(model).items()]
    with torch.no_grad():
        output = model(**batch)
    for hook in hooks:
        hook.remove()
    return states, output


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_stages_give_what_a_whole_pass_gives(self, name, count):
        model = prepared(name)
        if count > len(blocks(model)):
            pytest.skip("fewer blocks")
        batch = padded_batch(model)
        expected, output = whole_pass(model, batch)
        memory, found = {}, {}
        for stage in cut(model, batch, count):
            with torch.no_grad():
                states, memory = run_stage(model, stage, batch, memory)
            assert set(stage.blocks) <= set(states)
            found |= states
        assert memory == {}
        assert all(torch.equal(found[block], state) for block, state in expected.items())
        for own in set(found) - set(expected):
            assert torch.equal(found[own], output[own])
        assert "logits" in found or name in ("bert", "llama")

    def test_without_outputs_the_pass_ends_after_the_last_block(self, name):
        model = prepared(name)
        batch = padded_batch(model)
        expected, _ = whole_pass(model, batch)
        memory, ran = {}, []
        model.register_forward_hook(lambda *_: ran.append(True))
        for stage in cut(model, batch, 2, outputs=False):
            ran.clear()  # `cut` runs the model
            with torch.no_grad():
                states, memory = run_stage(model, stage, batch, memory)
            assert set(states) == set(stage.blocks)
            assert all(torch.equal(state, expected[block]) for block, state in states.items())
            assert not ran

    def test_every_tensor_has_one_stage(self, name):
        model = prepared(name)
        stages = cut(model, padded_batch(model), 2)
        staged = [parameter for stage in stages for parameter in stage.parameters]
        assert len(staged) == len(set(staged))
        assert set(staged) <= {n for n, _ in model.named_parameters()}
        for n, layer in low_bit_layers(model):
            assert layer.owner is not layer or f"{n}.weight" in staged
        left = {n for n, _ in model.named_parameters()} - set(staged)
        assert not left

    def test_the_table_goes_with_the_first_stage_and_the_head_with_the_last(self, name):
        model = prepared(name)
        first, last = cut(model, padded_batch(model), 2)
        names = {id(p): n for n, p in model.named_parameters()}
        assert names[id(model.get_input_embeddings().weight)] in first.parameters
        for part in ("classifier.weight", "pooler.dense.weight", "lm_head.weight", "score.weight"):
            assert not any(n.endswith(part) for n in first.parameters)
        assert any(n.startswith(last.blocks[-1]) for n in last.parameters)

    def test_leaves_the_model_as_it_was(self, name):
        model = prepared(name)
        batch = padded_batch(model)
        before = whole_pass(model, batch)[1][0]
        memory = {}
        for stage in cut(model, batch, 2):
            _, memory = run_stage(model, stage, batch, memory)
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
        assert torch.equal(whole_pass(model, batch)[1][0], before)


class TestCutting:
    def test_nearly_equal_the_longer_first(self):
        model = prepared("bert-cls", num_hidden_layers=5)
        sizes = [len(stage.blocks) for stage in cut(model, padded_batch(model), 3)]
        assert sizes == [2, 2, 1]

    def test_only_the_last_of_a_row_is_remembered(self):
        model = prepared("t5-tied")
        stages = cut(model, padded_batch(model), 5)
        assert [stage.kept for stage in stages[:-1]] == [
            ("encoder.block.0",),
            ("encoder.block.1",),
            ("encoder.block.2",),
            ("decoder.block.0", "encoder.block.2"),
        ]

    def test_a_state_that_is_changed_between_blocks_is_remembered(self):
        """A convolution stands between the first two blocks, so the first answers with its own state."""
        model = prepared("deberta-cls")
        assert cut(model, padded_batch(model), 3)[1].kept == ("deberta.encoder.layer.1", "deberta.encoder.layer.0")

    def test_what_stands_between_encoder_and_decoder_goes_with_the_decoder(self):
        model = prepared("t5-tied")
        encoder, decoder = cut(model, padded_batch(model), 2)
        assert "encoder.final_layer_norm.weight" in decoder.parameters
        assert all(n.startswith(("encoder.", "shared.")) for n in encoder.parameters)

    @pytest.mark.parametrize(
        ("name", "count", "expected"),
        [
            ("bert-cls", 3, set()),
            ("gpt2-tied", 2, {"transformer.wte.weight", "transformer.wte.weight_scale"}),
            ("llama-tied", 1, set()),
            ("t5-tied", 2, {"shared.weight", "shared.weight_scale"}),
            ("t5-tied", 3, {"shared.weight", "shared.weight_scale", "encoder.final_layer_norm.weight"}),
        ],
    )
    def test_what_later_stages_read(self, name, count, expected):
        model = prepared(name).requires_grad_(False)
        batch = padded_batch(model)
        assert read_by_later(model, cut(model, batch, count), batch) == expected
        assert not any(p.requires_grad for p in model.parameters())

    def test_gradients_never_leave_a_stage(self):
        model = prepared("t5-tied")
        batch, memory = padded_batch(model), {}
        for stage in cut(model, batch, 3):
            model.requires_grad_(False)
            for name in stage.parameters:
                if model.get_parameter(name).is_floating_point():
                    model.get_parameter(name).requires_grad_(True)
            states, memory = run_stage(model, stage, batch, memory)
            sum(state.sum() for state in states.values()).backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("SelfAttention.q.weight"))
        assert not any(value.requires_grad for value in memory.values())

    @pytest.mark.parametrize("count", [0, 4, -1])
    def test_more_stages_than_blocks(self, count):
        model = prepared("bert-cls")
        with pytest.raises(ValueError, match=rf"stages={count} is not possible: .* has 3 blocks .* use 1 to 3"):
            cut(model, padded_batch(model), count)

    def test_a_layer_that_no_pass_reaches(self):
        model = make("bert-cls")
        model.unused = nn.Linear(32, 32)
        model.bert.unused = nn.Linear(32, 32)
        with pytest.raises(ValueError, match=r"reaches \['bert.unused'\], so they belong to no stage"):
            cut(prepare(model, SCHEME, "minmax"), padded_batch(model), 2)

    def test_a_block_that_runs_twice(self):
        model = prepared("bert-cls")
        model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
        with pytest.raises(ValueError, match=r"run more than once in a forward pass"):
            cut(model, padded_batch(model), 1)

    def test_a_copy_can_be_run_with_the_stages_of_another(self):
        """The teacher is run with the student's stages."""
        model = make("bert-cls")
        teacher = copy.deepcopy(model)
        batch = padded_batch(model)
        stages = cut(prepare(model, SCHEME, "minmax"), batch, 2)
        with torch.no_grad():
            memory = run_stage(teacher, stages[0], batch, {})[1]
            states, _ = run_stage(teacher, stages[1], batch, memory)
            assert torch.equal(states["logits"], teacher(**batch).logits)
