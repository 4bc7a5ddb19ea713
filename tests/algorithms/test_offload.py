"""Blocks in files: what memory does not hold is trained as if it did."""

import copy

import pytest
import torch
from tiny_models import inputs, make, token_ids

from optimum_zsaq.algorithms.offload import OffloadedBlocks
from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings
from optimum_zsaq.algorithms.sequential import SequentialReconstruction
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.layers import PackedLinear
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import blocks, pack, prepare


SCHEME = QuantScheme(QuantSpec(3), QuantSpec(4), QuantSpec(8, "token", symmetric=False))
SETTINGS = ReconstructionSettings(stages=2, steps=6, start_batches=2)


@pytest.fixture(autouse=True)
def known_models(plain_kinds):
    register_models()


def batches(model) -> list[dict]:
    return [uncached_batch(model, inputs(model, token_ids(rows=3, seed=seed))) for seed in range(3)]


def offload(model) -> OffloadedBlocks:
    """Takes the weights of a model's blocks out of it."""
    kept = OffloadedBlocks(blocks(model), "minmax")
    for block in kept.blocks:
        for name, p in model.get_submodule(block).named_parameters():
            kept.put(f"{block}.{name}", p)
        kept.free(block, model)
    return kept


def run_of(model, offloaded: OffloadedBlocks | None = None) -> SequentialReconstruction:
    """A run on a float model, which becomes the student."""
    teacher = copy.deepcopy(model, {id(p): p for block in blocks(model).values() for p in block.parameters()})
    return SequentialReconstruction(teacher, prepare(model, SCHEME, "minmax"), batches(model), SETTINGS, offloaded)


def losses(run: SequentialReconstruction) -> list[float]:
    return [loss for _, loss in run.steps()]


def test_loads_what_was_put_and_frees_it():
    model = make("llama-tied")
    expected = {name: p.clone() for name, p in model.named_parameters()}
    kept = offload(model)
    assert all(p.is_meta == kept.holds(name) for name, p in model.named_parameters())
    for block in kept.blocks:
        kept.load(block, model)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    kept.free(kept.blocks[0], model)
    assert all(p.is_meta for p in model.get_submodule(kept.blocks[0]).parameters())


def test_models_share_what_is_loaded_and_scales_are_those_of_prepare():
    model = make("llama-tied")
    expected = prepare(copy.deepcopy(model), SCHEME, "minmax")
    kept = offload(model)
    teacher = copy.deepcopy(model)
    prepare(model, SCHEME, "minmax")
    for block in kept.blocks:
        kept.load(block, teacher, model)
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in model.named_parameters())
    name = f"{kept.blocks[0]}.mlp.up_proj.weight"
    assert teacher.get_parameter(name) is model.get_parameter(name)


def test_a_checksum_tells_weights_apart():
    one, same, other = (offload(make("llama-tied", seed=seed)).checksum for seed in (0, 0, 1))
    assert one == same != other


def test_passes_need_one_block_at_a_time():
    model = make("llama-tied")
    batch = batches(model)[0]
    expected = model(**batch).logits
    kept, most = offload(model), []
    for block in blocks(model).values():
        block.register_forward_hook(lambda *_: most.append(sum(not p.is_meta for p in model.model.layers.parameters())))
    with kept.passing(model):
        assert torch.equal(model(**batch).logits, expected)
    assert max(most) == len(list(model.model.layers[0].parameters()))
    assert all(p.is_meta for p in model.model.layers.parameters())


@pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied", "bart-tied"])
def test_trains_as_in_memory(name):
    """The first stage exactly; then the next is given what packed layers return, whose sums have another order."""
    whole, model = run_of(make(name)), make(name)
    kept = offload(model)
    run = run_of(model, kept)
    expected, found = losses(whole), losses(run)
    assert found[: SETTINGS.steps] == expected[: SETTINGS.steps]
    assert found == pytest.approx(expected, rel=1e-2)
    assert all(p.is_meta for name, p in run.teacher.named_parameters() if kept.holds(name))
    trained = [m for block in blocks(model).values() for m in block.modules() if isinstance(m, PackedLinear)]
    assert trained
    outputs = [pack(r.student)(**batches(model)[0])[0] for r in (whole, run)]
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()


def test_goes_on_bit_for_bit():
    models = [make("llama-tied") for _ in range(2)]
    whole, broken = (run_of(model, offload(model)) for model in models)
    expected = losses(whole)
    for i, _ in enumerate(broken.steps()):
        if i == SETTINGS.steps:
            break
    state = copy.deepcopy(broken.state_dict())
    assert len(state["finished"]) == 1
    model = make("llama-tied")
    again = run_of(model, offload(model))
    again.load_state_dict(state)
    assert losses(again) == expected[SETTINGS.steps :]
    assert all(torch.equal(p, models[0].get_parameter(name)) for name, p in model.named_parameters())
