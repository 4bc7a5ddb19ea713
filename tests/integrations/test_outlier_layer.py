"""One suite over outlier adapters on packed, fake-quantized and float bases of every family."""

import copy

import pytest
import torch
import transformers as tf
from outlier_adapters import BASES, base_model, config, layers, randomized, same, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import MODELS, inputs, logits, make, quantized
from tolerances import KERNEL_MODEL, relative_error
from transformers.pytorch_utils import Conv1D

from optimum_zsaq import OutlierConfig
from optimum_zsaq.integrations.outlier_layer import BIASES, POSITIONS, SCALES, VALUES
from optimum_zsaq.integrations.peft import default_targets
from optimum_zsaq.kinds import KINDS, kind_of


# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIRS = (("packed", "llama-tied"), ("packed-without", "bert-cls"), ("fake", "t5-tied"), ("float", "gpt2-tied"))
FAMILIES = ("bert-cls", "llama-tied", "t5-tied", "gpt2-tied")


def oriented(weight, layer):
    """A float layer's weight as (O, I)."""
    return weight.t() if kind_of(layer.base_layer) is KINDS[Conv1D] else weight


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", BASES)
class TestConformance:
    def test_starts_as_the_base_and_is_it_again_when_disabled(self, kind, name, tmp_path):
        base = base_model(kind, name, tmp_path)
        expected = logits(base)
        model = get_peft_model(base, config())
        assert len(layers(model)) == len(default_targets(model.model))
        # a kernel sums in another order where a base without outliers gets some
        assert same(logits(model), expected) if kind == "packed-without" else torch.equal(logits(model), expected)
        randomized(model)
        assert relative_error(logits(model), expected) > 0.01
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model.unload()), expected)

    def test_trains_its_values_alone(self, kind, name, tmp_path):
        model = get_peft_model(base_model(kind, name, tmp_path), config())
        before = {n: p.clone() for n, p in (*model.named_parameters(), *model.named_buffers())}
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {f"{n}.{VALUES}.default" for n in layers(model)}
        losses, _ = train(model)
        assert losses[-1] < losses[0]
        after = dict((*model.named_parameters(), *model.named_buffers()))
        assert {n for n in before if not torch.equal(before[n], after[n])} == trainable

    def test_is_saved_and_loaded(self, kind, name, tmp_path):
        model = randomized(get_peft_model(base_model(kind, name, tmp_path), config(train_biases=True)))
        expected = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {key.rpartition(".")[2] for key in saved} == {POSITIONS, VALUES, BIASES} - (
            {BIASES} if name in ("llama-tied", "t5-tied") else set()
        )
        assert all(t.dtype == (torch.int32 if key.endswith(POSITIONS) else torch.float32) for key, t in saved.items())
        fresh = base_model(kind, name, tmp_path)
        again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=name == "t5-tied")
        assert torch.equal(logits(again), expected)
        assert not [n for n, p in again.named_parameters() if p.requires_grad]
        states = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=map("-".join, PAIRS))
class TestMore:
    def test_gradients_are_those_of_the_dense_weight(self, kind, name, tmp_path):
        """Against a float model whose weights are parameters, with inputs that are not quantized."""
        settings = BASES[kind]
        if settings is None:
            base = make(name)
            dense = copy.deepcopy(base)
        else:
            base = quantized(name, tmp_path, activation_bits=None, kernel="reference", **settings)
            dense = copy.deepcopy(base).dequantize()
        model = randomized(get_peft_model(base, config()))
        for key, layer in layers(model).items():
            weight = oriented(dense.get_submodule(key.removeprefix("base_model.model.")).weight, layer)
            at = getattr(layer, POSITIONS)["default"].long()
            weight.data[at // layer.in_features, at % layer.in_features] += getattr(layer, VALUES)["default"].data
        for parameter in dense.parameters():
            parameter.requires_grad_(True)
        found, expected = model(**inputs(base))[0], dense(**inputs(dense))[0]
        assert relative_error(found, expected) < 1e-5
        found.pow(2).mean().backward()
        expected.pow(2).mean().backward()
        for key, layer in layers(model).items():
            gradient = oriented(dense.get_submodule(key.removeprefix("base_model.model.")).weight.grad, layer)
            at = getattr(layer, POSITIONS)["default"].long()
            wanted = gradient[at // layer.in_features, at % layer.in_features]
            assert torch.allclose(getattr(layer, VALUES)["default"].grad, wanted, rtol=1e-3, atol=1e-6), key

    def test_several_adapters(self, kind, name, tmp_path):
        """Added, switched between, active together, deleted."""
        base = base_model(kind, name, tmp_path)
        plain = logits(base)
        model = randomized(get_peft_model(base, config(criterion="magnitude"), "one"), 1, "one")
        one = logits(model)
        model.add_adapter("two", config(criterion="random", fraction=0.1))
        assert torch.equal(logits(model), one)
        randomized(model, 2, "two")
        assert torch.equal(logits(model), one)
        model.set_adapter("two")
        two = logits(model)
        assert relative_error(two, one) > 0.01
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
        model.set_adapter("one")
        assert torch.equal(logits(model), one)
        model.base_model.set_adapter(["one", "two"])
        both = logits(model)
        assert relative_error(both, one) > 0.01
        model.base_model.set_adapter("one")
        model.delete_adapter("two")
        assert torch.equal(logits(model), one)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    def test_both_adapters_together_are_their_sum(self, kind, name, tmp_path):
        model = randomized(get_peft_model(base_model(kind, name, tmp_path), config(criterion="magnitude"), "one"), 1, "one")
        model.add_adapter("two", config(criterion="random", fraction=0.1))
        randomized(model, 2, "two")
        model.base_model.set_adapter(["one", "two"])
        both = logits(model)
        for layer in layers(model).values():
            dense = torch.zeros(layer.out_features * layer.in_features)
            for adapter in ("one", "two"):
                at, values = getattr(layer, POSITIONS)[adapter].long(), getattr(layer, VALUES)[adapter].data
                dense.index_add_(0, at, values)
            getattr(layer, POSITIONS)["one"] = dense.nonzero().view(-1).to(torch.int32)
            getattr(layer, VALUES)["one"] = torch.nn.Parameter(dense[dense != 0])
        model.base_model.set_adapter("one")
        assert same(logits(model), both)

    @pytest.mark.parametrize("biases", [False, True], ids=["outliers", "biases"])
    def test_leaving_peft_with_the_outliers_inside(self, kind, name, biases, tmp_path):
        model = randomized(get_peft_model(base_model(kind, name, tmp_path), config(train_biases=biases)))
        expected = logits(model)
        served = model.store_and_unload()
        assert type(served) is MODELS[name][0]
        assert not [m for m in served.modules() if isinstance(m, BaseTunerLayer)]
        found = logits(served)
        if kind.startswith("packed") and not biases:
            assert torch.equal(found, expected)
        assert relative_error(found, expected) <= KERNEL_MODEL[torch.float32]
        served.save_pretrained(tmp_path / "served")
        again = MODELS[name][0].from_pretrained(tmp_path / "served")
        assert torch.equal(logits(again), found)

    def test_half_precision_models(self, kind, name, tmp_path):
        base = base_model(kind, name, tmp_path).to(torch.bfloat16)
        expected = logits(base)
        model = get_peft_model(base, config())
        assert {getattr(layer, VALUES)["default"].dtype for layer in layers(model).values()} == {torch.float32}
        assert relative_error(logits(model).float(), expected.float()) < 0.02
        losses, _ = train(model)
        assert losses[-1] < losses[0]
        assert logits(model).dtype == torch.bfloat16

    def test_autocast(self, kind, name, tmp_path):
        model = randomized(get_peft_model(base_model(kind, name, tmp_path), config()))
        expected = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs(model))[0]
            outputs.float().pow(2).mean().backward()
        assert relative_error(outputs.float(), expected) < 0.05
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_gradient_checkpointing_and_copies(self, kind, name, tmp_path):
        model = randomized(get_peft_model(base_model(kind, name, tmp_path), config()))
        expected = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), expected)
        twin.get_base_model().activation_checkpointing_enable()
        gradients = []
        for one in (model.train(), twin.train()):
            torch.manual_seed(0)
            one(**inputs(one))[0].pow(2).mean().backward()
            gradients.append([p.grad for p in one.parameters() if p.requires_grad])
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))  # use_cache is off in one


class TestBesideTheOutliers:
    def test_norms_are_trained_and_switched_with_the_adapter(self, tmp_path):
        base = quantized("bert-cls", tmp_path, outliers=0.02)
        plain = logits(base)
        model = get_peft_model(base, OutlierConfig(train_norms=True, modules_to_save=["classifier"]))
        assert model.peft_config["default"].modules_to_save == ["LayerNorm", "classifier"]
        _, model = train(model)
        expected = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(quantized("bert-cls", tmp_path, outliers=0.02), tmp_path / "adapter")
        assert torch.equal(logits(again), expected)
        served = again.store_and_unload()
        assert torch.equal(logits(served), expected)
        served.save_pretrained(tmp_path / "served")
        assert torch.equal(logits(tf.BertForSequenceClassification.from_pretrained(tmp_path / "served")), expected)

    def test_norms_of_a_second_adapter(self):
        model = get_peft_model(make("bert-cls"), config(train_norms=True))
        model.add_adapter("two", config(train_norms=True))
        one, two = (
            [name for name, _ in model.named_parameters() if f".modules_to_save.{adapter}." in name]
            for adapter in ("default", "two")
        )
        assert len(one) == len(two) > 0

    def test_norms_alone_are_trained_whatever_their_names(self):
        class Numbered(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
                self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        model = get_peft_model(Numbered(), config(train_norms=True, target_modules=["a.0"]))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "modules_to" in name}
        assert {name.split(".modules_to_save.")[0] for name in trained} == {"base_model.model.a.1"}

    def test_a_module_trained_whole_does_not_make_another_base(self, tmp_path):
        model = get_peft_model(quantized("bert-cls", tmp_path, packed=False), config(modules_to_save=["pooler"]))
        randomized(model).save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(quantized("bert-cls", tmp_path, packed=False), tmp_path / "adapter")
        again.load_adapter(tmp_path / "adapter", "two")
        again.set_adapter("two")
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize(
        "settings", [{"granularity": "row"}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 8}]
    )
    def test_step_sizes(self, settings, tmp_path):
        """A factor of a row's step size is a factor of its products, the outliers' included."""
        base = quantized("bert-cls", tmp_path, outliers=0.02, kernel="reference", symmetric=False, **settings)
        expected = logits(base)
        model = get_peft_model(base, OutlierConfig(train_scales=True))
        assert torch.equal(logits(model), expected)
        losses, model = train(model)
        assert losses[-1] < losses[0]
        scales = [getattr(layer, SCALES)["default"] for layer in layers(model).values()]
        assert all((scale != 1).any() for scale in scales)
        assert all(
            len(scale) == (1 if settings["granularity"] == "tensor" else layer.out_features)
            for scale, layer in zip(scales, layers(model).values(), strict=True)
        )
        expected = logits(model)
        served = model.store_and_unload()
        assert relative_error(logits(served), expected) <= KERNEL_MODEL[torch.float32]

    def test_float_layers_have_no_step_sizes(self):
        with pytest.raises(ValueError, match="train_scales=True trains step sizes, which a float layer has none of"):
            get_peft_model(make("bert-cls"), config(train_scales=True))

    def test_a_new_head_of_a_task(self, tmp_path):
        """PEFT adds it to modules_to_save; outliers never sit on it."""
        model = get_peft_model(quantized("bert-cls", tmp_path), OutlierConfig(task_type="SEQ_CLS"))
        assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
        assert not [name for name in layers(model) if "classifier" in name]
        before = model.base_model.model.classifier.original_module.weight.clone()
        _, model = train(model)
        head = model.base_model.model.classifier
        assert torch.equal(head.original_module.weight, before)
        assert not torch.equal(head.modules_to_save["default"].weight, before)


class TestMerging:
    @pytest.mark.parametrize("name", ["bert-cls", "gpt2-tied"])
    def test_float_weights_take_it_and_give_it_back_exactly(self, name):
        model = randomized(get_peft_model(make(name), config(train_biases=True)))
        before = {n: p.clone() for n, p in model.named_parameters()}
        expected = logits(model)
        model.merge_adapter()
        assert same(logits(model), expected)
        model.unmerge_adapter()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        assert torch.equal(logits(model), expected)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is MODELS[name][0]
        assert same(logits(merged), expected)

    def test_several_merged_adapters_leave_in_turn(self):
        model = randomized(get_peft_model(make("bert-cls"), config(criterion="magnitude"), "one"), 1, "one")
        model.add_adapter("two", config(criterion="magnitude"))
        randomized(model, 2, "two")
        before = {n: p.clone() for n, p in model.named_parameters()}
        model.merge_adapter(["one"])
        model.merge_adapter(["two"])
        model.unmerge_adapter()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    @pytest.mark.parametrize("change", [lambda model: model.double().float(), copy.deepcopy], ids=["cast", "copied"])
    def test_what_is_cast_or_copied_while_merged_gets_its_weights_back(self, change):
        model = get_peft_model(make("bert-cls"), config(train_biases=True))
        plain = logits(model)
        randomized(model).merge_adapter()
        model = change(model)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    def test_another_adapter_waits_until_nothing_is_merged(self):
        model = get_peft_model(make("bert-cls"), config())
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged into the weights; call unmerge_adapter\(\)"):
            model.add_adapter("two", config())

    def test_a_broken_adapter_is_not_merged_safely(self):
        model = get_peft_model(make("bert-cls"), config())
        next(iter(layers(model).values())).get_parameter(f"{VALUES}.default").data[0] = torch.nan
        with pytest.raises(ValueError, match="adapter 'default' makes weights that are not finite"):
            model.merge_adapter(safe_merge=True)

    @pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
    @pytest.mark.parametrize("kind", ["packed", "packed-without", "fake"])
    def test_codes_refuse_and_nothing_is_changed(self, kind, method, tmp_path):
        base = base_model(kind, "bert-cls", tmp_path)
        model = randomized(get_peft_model(base, OutlierConfig(fraction=0.03, train_norms=True)))
        expected = logits(model)
        with pytest.raises(ValueError, match="cannot be merged into integer codes .*store_and_unload()"):
            getattr(model, method)()
        assert torch.equal(logits(model), expected)


class TestWhatIsKept:
    @pytest.mark.parametrize("kind", ["packed", "packed-without", "float"])
    def test_a_second_call_works_nothing_out_again(self, kind, tmp_path, monkeypatch):
        model = randomized(get_peft_model(base_model(kind, "bert-cls", tmp_path), config(criterion="random")))
        expected = logits(model)
        monkeypatch.setattr("optimum_zsaq.integrations.outlier_layer.union_of_positions", None)
        monkeypatch.setattr("optimum_zsaq.kernels.sparse._structure", None)
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("kind", ["packed", "packed-without", "float"])
    def test_writes_to_values_and_positions_are_seen(self, kind, tmp_path):
        model = randomized(get_peft_model(base_model(kind, "bert-cls", tmp_path), config(criterion="random")))
        before = logits(model)
        for layer in layers(model).values():
            layer.get_parameter(f"{VALUES}.default").data.mul_(2.0)
        doubled = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), doubled)
        assert not torch.equal(doubled, before)
        for layer in layers(model).values():
            positions = getattr(layer, POSITIONS)["default"]
            moved = torch.randperm(layer.in_features * layer.out_features)[: len(positions)]
            positions.copy_(moved.sort().values.to(torch.int32))
        moved = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), moved)
        assert not torch.equal(moved, doubled)

    def test_under_inference_mode_first_and_in_training_then(self, tmp_path):
        model = randomized(get_peft_model(base_model("packed-without", "bert-cls", tmp_path), config()))
        with torch.inference_mode():
            expected = model(**inputs(model))[0]
        found = model(**inputs(model))[0]
        assert torch.equal(found, expected)
        found.sum().backward()

    @pytest.mark.parametrize("kind", ["packed", "fake", "float"])
    def test_a_compiled_model_sees_other_positions(self, kind, tmp_path, fresh_graphs):
        """Loaded in place, and under the name of a deleted adapter; without any pass before it was compiled."""
        other = randomized(get_peft_model(base_model(kind, "bert-cls", tmp_path), config(criterion="random", seed=7)))
        other.save_pretrained(tmp_path / "other")
        model = get_peft_model(base_model(kind, "bert-cls", tmp_path), config(criterion="random", seed=1))
        compiled = torch.compile(randomized(model, seed=2), backend="eager", fullgraph=True)
        with torch.no_grad():
            assert same(compiled(**inputs(model))[0], model(**inputs(model))[0])
            model.load_adapter(tmp_path / "other", "default")
            assert same(compiled(**inputs(model))[0], other(**inputs(model))[0])
            model.add_adapter("b", config(criterion="random", seed=3))
            model.delete_adapter("b")
            model.load_adapter(tmp_path / "other", "b")
            model.set_adapter("b")
            assert same(compiled(**inputs(model))[0], other(**inputs(model))[0])

    @pytest.mark.parametrize("kind", ["packed", "fake", "float"])
    def test_a_second_adapter_of_the_same_name(self, kind, tmp_path, fresh_graphs):
        base = base_model(kind, "bert-cls", tmp_path)
        expected = [
            logits(randomized(get_peft_model(copy.deepcopy(base), config(criterion="random", seed=s)))) for s in (1, 2)
        ]
        compiled = torch.compile(base, backend="eager", fullgraph=True)
        with torch.no_grad():
            for seed, wanted in zip((1, 2), expected, strict=True):
                randomized(get_peft_model(base, config(criterion="random", seed=seed)))
                assert same(compiled(**inputs(base))[0], wanted)

    def test_nothing_is_kept_of_a_deleted_adapter(self, tmp_path):
        model = get_peft_model(base_model("packed", "bert-cls", tmp_path), config())
        model.add_adapter("two", config(criterion="random"))
        model.set_adapter("two")
        model.set_adapter("default")
        model.delete_adapter("two")
        assert all(set(layer._unions) == {("default",)} for layer in layers(model).values())

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["packed", "float"])
    def test_compiled(self, kind, tmp_path, fresh_graphs):
        model = randomized(get_peft_model(base_model(kind, "bert-cls", tmp_path), config()))
        expected = model(**inputs(model))[0]
        expected.pow(2).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        found = torch.compile(model, fullgraph=True)(**inputs(model))[0]
        assert relative_error(found, expected) < KERNEL_MODEL[torch.float32]
        found.pow(2).mean().backward()
        for one, other in zip(gradients, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
            assert relative_error(other, one) < 1e-3
