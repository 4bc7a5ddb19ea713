"""SQuATTrainer: its steps against plain loops written here, in parts, on two processes, resumed, saved packed."""

import copy
import functools
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import logits, make, token_ids
from tolerances import relative_error
from torch import nn
from trainers.processes import command, finish, kill_after_a_checkpoint
from trainers.squat_run import BY_HAND, PLAIN, RATES, model, samples, trainer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from optimum_zsaq import (
    PreQuantConfig,
    SQuATArguments,
    SQuATConfig,
    SQuATSeq2SeqArguments,
    SQuATSeq2SeqTrainer,
    SQuATTrainer,
    pack,
    prepare,
)
from optimum_zsaq.layers import PackedEmbedding, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


SCRIPT = Path(__file__).with_name("squat_run.py")
script = partial(command, SCRIPT)
SAVED = {"save_strategy": "steps", "save_steps": 2}
CLOSE = 1e-5  # of what three steps changed: float32 sums in another order


def step_sizes(of: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in of.named_parameters() if n.endswith(("weight_scale", "input_scale"))}


def gradient_scale(of: nn.Module, name: str) -> float:
    """LSQ's 1 / sqrt(N Qp), from the shapes."""
    layer = of.get_submodule(name.rpartition(".")[0])
    if name.endswith("input_scale"):
        return (layer.weight.shape[1] * 255) ** -0.5
    shared = layer.weight.numel() / layer.weight_scale.numel()
    return (shared * (2 ** (layer.spec.weight.bits - 1) - 1)) ** -0.5


def gradients(of: nn.Module, rows: list[dict]) -> dict[str, torch.Tensor]:
    of.zero_grad()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    of(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def reference(
    of: nn.Module, turn: list[str], rho: float, adaptive: bool = False, perturb: str = "quantized", clip: float = math.inf
) -> nn.Module:
    """Whole batches of 8, SGD, everything by its formula; `turn` says whose each step is."""
    of.eval()
    scales = step_sizes(of)
    for p in scales.values():
        p.requires_grad_(True)
    layers = {f"{name}.weight": layer for name, layer in low_bit_layers(of) if layer.owner is layer}
    slots = layers if perturb == "quantized" else {}
    for step, objective in enumerate(turn):
        rows = samples()[8 * step : 8 * step + 8]
        at_weights = gradients(of, rows)
        stretched = {}
        for name, g in at_weights.items():
            if name not in scales:
                value = slots[name].quantized_weight().detach() if name in slots else of.get_parameter(name).detach()
                stretch = value.abs() + 0.01 if adaptive and g.dim() > 1 else torch.ones_like(g)
                stretched[name] = (stretch, g)
        norm = sum((t * g).double().square().sum() for t, g in stretched.values()).sqrt()
        kept = copy.deepcopy(of.state_dict())
        with torch.no_grad():
            for name, (t, g) in stretched.items():
                eps = (rho * t**2 * g / norm).float()
                if name in slots:
                    slots[name].perturbation = eps
                else:
                    of.get_parameter(name).add_(eps)
        sharp = gradients(of, rows)
        for layer in slots.values():
            layer.perturbation = None
        of.load_state_dict(kept)
        followed = {}
        for name, g in sharp.items():
            if name in scales and objective != "weights":
                found = at_weights[name] if objective in ("split", "step sizes") else g
                followed[name] = gradient_scale(of, name) * found
            elif name not in scales and objective != "step sizes":
                followed[name] = at_weights[name] if objective == "plain" else g
        size = sum(g.double().square().sum() for g in followed.values()).sqrt()
        rate = 0.5 * min(1.0, clip / float(size))
        with torch.no_grad():
            for name, g in followed.items():
                p = of.get_parameter(name)
                p.copy_(torch.maximum(p - rate * g, p / 2) if name in scales else p - rate * g)
    of.zero_grad()
    return of


def assert_same_movement(found: dict, expected: dict, start: dict, close: float = CLOSE) -> None:
    """Of all tensors together. A key's bias adds the same to all scores of a query: its gradient is noise."""
    expected = {name: value for name, value in expected.items() if not name.endswith("key.bias")}
    names = [name for name, value in expected.items() if value.is_floating_point() and not torch.equal(value, start[name])]
    assert len(names) > 20
    moves = [torch.cat([(of[name] - start[name]).double().reshape(-1) for name in names]) for of in (found, expected)]
    assert relative_error(*moves) < close
    kept = [name for name, value in expected.items() if name not in names]
    assert [name for name in kept if not torch.equal(found[name], start[name])] == []


def different(found: dict, expected: dict) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def losses(run: Trainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


NO_DROPOUT = {
    "bert-cls": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5-tied": {"dropout_rate": 0.0},
    "llama-tied": {},
}
TURNS = {
    "none": ["both"] * 3,
    "step": ["split"] * 3,
    "batch": ["weights", "step sizes", "weights"],
}


def orthogonal(sharp: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of `sharp` has no share in `plain`, both as one long vector."""
    share = sum((s.double() * plain[n].double()).sum() for n, s in sharp.items())
    share = share / sum(g.double().square().sum() for g in plain.values())
    return {name: (s - share * plain[name]).float() for name, s in sharp.items()}


@functools.cache
def expected_of(alternate: str) -> dict[str, torch.Tensor]:
    return reference(model(), TURNS[alternate], rho=0.5).state_dict()


class TestTheSteps:
    @pytest.mark.parametrize("alternate", TURNS)
    @pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4])
    def test_are_those_of_a_plain_loop(self, tmp_path, alternate, parts):
        start = copy.deepcopy(model().state_dict())
        expected = expected_of(alternate)
        batches = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        run = trainer(tmp_path, max_steps=3, rho=0.5, alternate=alternate, **BY_HAND, **RATES, **batches)
        run.train()
        assert_same_movement(run.model.state_dict(), expected, start)

    @pytest.mark.parametrize("options", [{"adaptive": True}, {"perturb": "latent"}], ids=str)
    def test_of_other_perturbations(self, tmp_path, options):
        start = copy.deepcopy(model().state_dict())
        expected = reference(model(), TURNS["step"], rho=0.5, **options).state_dict()
        run = trainer(tmp_path, max_steps=3, rho=0.5, alternate="step", **options, **BY_HAND, **RATES)
        run.train()
        assert_same_movement(run.model.state_dict(), expected, start)

    def test_are_clipped_at_the_end(self, tmp_path):
        """One norm over all gradients that are followed, those of step sizes with LSQ's factor."""
        start = copy.deepcopy(model().state_dict())
        expected = reference(model(), TURNS["step"], rho=0.5, clip=0.05).state_dict()
        batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        options = {**BY_HAND, **RATES, **batches, "max_grad_norm": 0.05}
        run = trainer(tmp_path, max_steps=3, rho=0.5, alternate="step", **options)
        run.train()
        assert min(entry["grad_norm"] for entry in losses(run)) > 0.1
        assert_same_movement(run.model.state_dict(), expected, start)

    def test_without_radius_are_lsq(self, tmp_path):
        start = copy.deepcopy(model().state_dict())
        expected = reference(model(), ["plain"] * 3, rho=0.0).state_dict()
        for alternate in ("batch", "none"):
            run = trainer(tmp_path, max_steps=3, rho=0.0, alternate=alternate, **BY_HAND, **RATES)
            run.train()
            assert_same_movement(run.model.state_dict(), expected, start)
            assert all("sharp_loss" not in entry for entry in losses(run))

    def test_learn_the_step_sizes_of_inputs(self, tmp_path):
        start = copy.deepcopy(model(static=True).state_dict())
        for turn, options in (("plain", {"rho": 0.0}), ("split", {"rho": 1e-9, "alternate": "step"})):
            expected = reference(model(static=True), [turn], rho=0.0).state_dict()
            run = trainer(tmp_path, model(static=True), max_steps=1, **options, **BY_HAND, **RATES)
            run.train()
            assert_same_movement(run.model.state_dict(), expected, start)
            assert all(not torch.equal(value, start[n]) for n, value in expected.items() if n.endswith("input_scale"))

    @pytest.mark.parametrize("alternate", [pytest.param("none", marks=pytest.mark.slow), "step"])
    def test_of_a_radius_that_vanishes_become_those_of_lsq(self, tmp_path, alternate):
        start = copy.deepcopy(model().state_dict())
        found = []
        for rho in (1e-7, 0.0):
            run = trainer(tmp_path, max_steps=3, rho=rho, alternate=alternate, **BY_HAND, **RATES)
            run.train()
            found.append(run.model.state_dict())
        assert_same_movement(*found, start)

    @pytest.mark.slow
    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("alternate", TURNS)
    def test_on_two_processes_are_those_of_a_plain_loop(self, tmp_path, parts, alternate):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        batches = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        options = {"max_steps": 3, "rho": 0.5, "alternate": alternate, **BY_HAND, **RATES, **batches}
        finish(script(tmp_path, tmp_path / "out.pt", launcher, **options))
        found = torch.load(tmp_path / "out.pt")
        assert found["world"] == 2
        start = copy.deepcopy(model().state_dict())
        assert_same_movement(found["model"], expected_of(alternate), start)
        assert packed_layers(tmp_path / "packed") > 10

    @pytest.mark.slow
    @pytest.mark.parametrize(("parts", "options"), [(2, {}), (1, {"adaptive": True}), (2, {"perturb": "latent"})])
    def test_of_a_sharded_model_are_those_of_a_plain_loop(self, tmp_path, parts, options):
        """FSDP2, which transformers shards a model with while it loads."""
        model().save_pretrained(tmp_path / "whole")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        batches = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        fields = {"max_steps": 3, "rho": 0.5, "alternate": "step", **options, **BY_HAND, **RATES, **batches}
        arguments = [str(tmp_path / "whole"), str(tmp_path), str(tmp_path / "out.pt"), json.dumps(fields)]
        finish([sys.executable, *launcher, str(SCRIPT.with_name("squat_fsdp_run.py")), *arguments])
        found = torch.load(tmp_path / "out.pt")
        assert found["world"] == 2
        assert {name for name, p in model().named_parameters() if p.is_floating_point()} <= set(found["sharded"])
        expected = reference(model(), TURNS["step"], rho=0.5, **options)
        assert_same_movement(found["model"], expected.state_dict(), model().state_dict())
        one = trainer(tmp_path / "one", **{**fields, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
        one.train()
        for figure in ("loss", "sharpness", "scale_drift", "clipped"):
            assert found["figures"][-1][figure] == pytest.approx(losses(one)[-1][figure], rel=1e-4)
        trained = model()
        trained.load_state_dict(found["model"])
        assert packed_layers(tmp_path / "packed", trained) > 10

    @pytest.mark.parametrize("alternate", ["batch", "none"])
    def test_reuse_a_climb(self, tmp_path, alternate):
        """LookSAM, of the formula: the second sharpness-aware step takes no climb of its own."""
        of, turn = model(), {"batch": ["weights", "step sizes", "weights"], "none": ["both"] * 2}[alternate]
        start = copy.deepcopy(of.state_dict())
        reference(of, turn[:-1], rho=0.5)
        first, last = samples()[:8], samples()[8 * len(turn) - 8 : 8 * len(turn)]
        other = model().eval()
        at_weights = gradients(other, first)
        moved = reference(model(), ["both"], rho=0.5).state_dict()
        weights = [name for name in at_weights if name not in step_sizes(of)]
        sharp = {name: (start[name] - moved[name]) / 0.5 for name in weights}
        kept = orthogonal(sharp, {name: at_weights[name] for name in weights})
        found = gradients(of, last)
        size, length = (sum(g[n].double().square().sum() for n in weights).sqrt() for g in (found, kept))
        with torch.no_grad():
            for name, g in found.items():
                p = of.get_parameter(name)
                if name in weights:
                    p.sub_(0.5 * (g + 0.2 * size / length * kept[name]))
                elif alternate == "none":
                    p.copy_(torch.maximum(p - 0.5 * gradient_scale(of, name) * g, p / 2))
        run = trainer(tmp_path, max_steps=len(turn), rho=0.5, alternate=alternate, climb_every=2, **BY_HAND, **RATES)
        run.train()
        assert_same_movement(run.model.state_dict(), of.state_dict(), start, close=1e-4)
        climbed = [False, False] if alternate == "batch" else [False]
        assert ["sharp_loss" in entry for entry in losses(run)] == [True, *climbed]

    def test_of_epochs_alternate(self, tmp_path):
        """48 samples are 6 steps."""
        run = trainer(tmp_path, max_steps=14, alternate="epoch", **BY_HAND, **RATES)
        run.train()
        assert ["sharp_loss" in entry for entry in losses(run)] == [True] * 6 + [False] * 6 + [True] * 2

    def test_replay_the_same_dropout(self, tmp_path):
        """At a radius of nothing the two losses of a step are the same."""
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "alternate": "none"}
        run = trainer(tmp_path, model(dropout=0.3), rho=1e-12, **options)
        run.train()
        assert [entry["sharpness"] for entry in losses(run)] == [0.0] * 6
        assert len({entry["loss"] for entry in losses(run)}) == 6

    def test_train_and_log(self, tmp_path):
        run = trainer(tmp_path, max_steps=40, rho=0.1, learning_rate=3e-3, logging_steps=10, scale_learning_rate=0.1)
        run.train()
        first, *_, last = losses(run)
        assert last["loss"] < 0.9 * first["loss"]
        assert all(entry["sharpness"] > 0 for entry in losses(run))
        assert 0 < first["scale_drift"] < last["scale_drift"]
        assert all(0 < entry["clipped"] < 1 for entry in losses(run))
        assert all((p > 0).all() for p in step_sizes(run.model).values())

    def test_log_what_it_says(self, tmp_path):
        run = trainer(tmp_path, max_steps=2, rho=0.1, alternate="none", **RATES)
        start = {name: p.detach().clone() for name, p in step_sizes(run.model).items()}
        run.train()
        drift = torch.cat([((p - start[n]).abs() / start[n]).reshape(-1) for n, p in step_sizes(run.model).items()])
        outside = []
        for _, layer in low_bit_layers(run.model):
            ratio = layer.weight / layer.weight_scale
            outside.append(((ratio > layer.spec.weight.highest) | (ratio < layer.spec.weight.lowest)).reshape(-1))
        assert losses(run)[-1]["scale_drift"] == pytest.approx(drift.mean().item(), rel=1e-5)
        assert losses(run)[-1]["clipped"] == pytest.approx(torch.cat(outside).float().mean().item(), rel=1e-5)

    def test_in_bfloat16_and_with_gradient_checkpointing_are_near(self, tmp_path):
        start = copy.deepcopy(model().state_dict())
        found = []
        for options in ({}, {"activation_checkpointing": True}, {"bf16": True}):
            run = trainer(tmp_path, max_steps=3, rho=0.5, alternate="step", **BY_HAND, **RATES, **options)
            run.train()
            found.append(copy.deepcopy(run.model.state_dict()))
        assert_same_movement(found[1], found[0], start)
        assert_same_movement(found[2], found[0], start, close=0.2)
        assert len(different(found[2], found[0])) > 20

    @pytest.mark.parametrize("name", ["gpt2-cls", "t5-tied"])
    def test_of_every_kind_of_model(self, tmp_path, name):
        start = prepare(make(name), PreQuantConfig(weight_bits=3, embedding_bits=4).scheme())
        rows = [{"input_ids": row, "labels": row if "tied" in name else row[0] % 3} for row in token_ids(16, 7)]
        before = copy.deepcopy(start.state_dict())
        run = trainer(tmp_path, start, data=rows, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        run.train()
        assert len(different(start.state_dict(), before)) > 10

    @pytest.mark.parametrize("name", ["bert-cls", "llama-tied"])
    def test_in_parts_count_each_sample_once(self, tmp_path, name):
        """The stock Trainer multiplies the loss of heads that ignore `num_items_in_batch` by the number of parts."""
        found = []
        for parts in (1, 2):
            start = prepare(make(name, **NO_DROPOUT[name]), PreQuantConfig(weight_bits=3, activation_bits=None).scheme())
            rows = [{"input_ids": row, "labels": row if "tied" in name else row[0] % 3} for row in token_ids(16, 7)]
            batches = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            run = trainer(tmp_path, start, data=rows, max_steps=1, rho=0.01, **batches)
            run.train()
            found.append(losses(run)[0])
        for figure in ("loss", "grad_norm", "sharp_loss"):
            assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-4)

    def test_in_parts_of_which_the_first_has_no_target(self, tmp_path):
        """How a model counts is not to be told from a batch of which nothing counts."""
        start = prepare(make("llama-tied"), PreQuantConfig(weight_bits=3, activation_bits=None).scheme())
        rows = [{"input_ids": row, "labels": row.clone()} for row in token_ids(8, 7)]
        rows[0]["labels"].fill_(-100)
        options = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "train_sampling_strategy": "sequential",
        }
        run = trainer(tmp_path, start, data=rows, max_steps=2, rho=0.01, **options)
        run.train()
        whole = [torch.stack([row[key] for row in rows[:4]]) for key in ("input_ids", "labels")]
        other = prepare(make("llama-tied"), PreQuantConfig(weight_bits=3, activation_bits=None).scheme())
        with torch.no_grad():
            expected = other(input_ids=whole[0], labels=whole[1]).loss.item()
        assert losses(run)[0]["loss"] == pytest.approx(expected, rel=1e-4)

    def test_that_end_with_the_data_are_not_mixed_into_the_next(self, tmp_path):
        """Five batches an epoch, two a step, and a dataset that does not say how many it has."""

        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(samples(10))

        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        run = trainer(tmp_path, data=Rows(), max_steps=4, rho=0.1, **batches)
        finish, errors = run.alternation.finish, []

        def checked(step, epoch, replay):
            """The gradients that are there are those of the step's own batches."""
            there = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
            run.model.zero_grad()
            replay()
            errors.extend(
                relative_error(p.grad, there[n]) for n, p in run.model.named_parameters() if n == "classifier.weight"
            )
            for name, p in run.model.named_parameters():
                p.grad = there.get(name)
            finish(step, epoch, replay)

        run.alternation.finish = checked
        run.train()
        assert len(errors) == 4
        assert max(errors) < 1e-5

    def test_of_a_loss_of_the_user(self, tmp_path):
        class Own(SQuATTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                targets = inputs.pop("target")
                outputs = model(**inputs)
                loss = nn.functional.cross_entropy(outputs.logits, targets)
                return (loss, outputs) if return_outputs else loss

        found = []
        rows = [{"input_ids": row["input_ids"], "target": row["labels"]} for row in samples()]
        for parts in (1, 2):
            batches = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            args = SQuATArguments(
                str(tmp_path), max_steps=1, remove_unused_columns=False, label_names=["target"], **PLAIN, **batches
            )
            run = Own(model(), args, train_dataset=rows)
            run.model_accepts_loss_kwargs = False  # as `compute_loss` does not take the count
            run.train()
            found.append(losses(run)[0])
        for figure in ("loss", "sharp_loss"):
            assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-4)

    def test_stop_at_a_loss_that_is_not_finite(self, tmp_path):
        run = trainer(tmp_path, rho=0.1, **SAVED)

        def spoil(_, args, kwargs):
            if run.state.global_step == 3:
                return args, {**kwargs, "inputs_embeds": torch.full((8, 7, 32), torch.nan), "input_ids": None}

        run.model.register_forward_pre_hook(spoil, with_kwargs=True)
        with pytest.raises(FloatingPointError, match="became nan at step 4 of 6; the weights are those of step 3"):
            run.train()
        again = trainer(tmp_path, rho=0.1, **SAVED)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 6

    @pytest.mark.parametrize("clipping", [1.0, 0.0])
    def test_stop_at_a_gradient_that_is_not_finite(self, tmp_path, clipping):
        run = trainer(tmp_path, rho=0.0, max_grad_norm=clipping)
        start = {}

        def spoil(gradient):
            if run.state.global_step == 2:
                start.update(copy.deepcopy(run.model.state_dict()))
                return gradient * torch.nan
            return gradient

        run.model.classifier.weight.register_hook(spoil)
        with pytest.raises(FloatingPointError, match="norm of the gradient became nan at step 3 of 6; .* of step 2"):
            run.train()
        assert different(run.model.state_dict(), start) == []

    def test_a_step_size_that_is_pushed_down_for_ever_stays_usable(self, tmp_path):
        run = trainer(tmp_path, max_steps=1)
        optimizer, scales = run.create_optimizer(), list(step_sizes(run.model).values())
        for p in scales[1:]:
            p.data.fill_(1e-3)
        tiny = scales[0].detach().fill_(1e-9).clone()
        for _ in range(200):
            for p in scales:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert torch.equal(scales[0], tiny)
        assert all((p == torch.finfo(torch.float32).eps).all() for p in scales[1:])
        assert torch.isfinite(run.model(**{k: v[None] for k, v in samples()[0].items()}).loss)


class TestTheTeacher:
    def test_is_followed(self, tmp_path):
        """The loss is the mixture, computed here from the logits."""
        teacher = make("bert-cls", seed=5)
        run = trainer(tmp_path, teacher=teacher, distillation=0.3, max_steps=1, train_sampling_strategy="sequential")
        batch = {key: torch.stack([row[key] for row in samples()[:8]]) for key in ("input_ids", "labels")}
        with torch.no_grad():
            outputs = run.model.eval()(**batch)
            wanted, found = teacher(**batch).logits.log_softmax(-1), outputs.logits.log_softmax(-1)
        distance = (wanted.exp() * (wanted - found)).sum(-1).mean()
        run.train()
        assert losses(run)[0]["loss"] == pytest.approx((0.7 * outputs.loss + 0.3 * distance).item(), rel=1e-5)
        assert not any(p.requires_grad for p in teacher.parameters())

    @pytest.mark.parametrize("name", ["llama-tied", "t5-tied"])
    def test_is_followed_in_parts(self, tmp_path, name):
        found = []
        for parts in (1, 2):
            start = prepare(make(name, **NO_DROPOUT[name]), PreQuantConfig(weight_bits=3, activation_bits=None).scheme())
            rows = [{"input_ids": row, "labels": row if "tied" in name else row[0] % 3} for row in token_ids(16, 7)]
            batches = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
            run = trainer(tmp_path, start, data=rows, max_steps=1, rho=0.01, teacher=make(name, seed=5), **batches)
            run.train()
            found.append(losses(run)[0])
        for figure in ("loss", "grad_norm", "sharp_loss"):
            assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-4)

    def test_of_several_labels_is_followed_label_by_label(self, tmp_path):
        """To add the same to all logits changes each label's probability."""
        start, teacher = model(), make("bert-cls", seed=5)
        start.config.problem_type = "multi_label_classification"
        rows = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in samples()]
        options = {"max_steps": 1, "train_sampling_strategy": "sequential", "distillation": 1.0}
        batch = torch.stack([row["input_ids"] for row in rows[:8]])
        with torch.no_grad():
            wanted, found = teacher(batch).logits.sigmoid(), start.eval()(batch).logits.sigmoid()
        distance = (wanted * (wanted / found).log() + (1 - wanted) * ((1 - wanted) / (1 - found)).log()).mean()
        run = trainer(tmp_path, start, data=rows, teacher=teacher, **options)
        run.train()
        assert losses(run)[0]["loss"] == pytest.approx(distance.item(), rel=1e-4)

    def test_without_logits_is_refused(self, tmp_path):
        run = trainer(tmp_path, teacher=make("bert"), max_steps=1)
        with pytest.raises(ValueError, match="a teacher that returns .* without logits does not go with SQuATTrainer"):
            run.train()

    def test_is_not_asked_while_evaluating(self, tmp_path):
        teacher = make("bert-cls", seed=5)
        run = trainer(tmp_path, teacher=teacher, max_steps=1)
        alone = trainer(tmp_path, run.model)
        assert run.evaluate(samples())["eval_loss"] == alone.evaluate(samples())["eval_loss"]


class TestTheOptimizer:
    def test_has_groups_of_weights_and_step_sizes(self, tmp_path):
        run = trainer(tmp_path, weight_decay=0.1)
        decayed, kept, scales = run.create_optimizer().param_groups
        assert [group["lr"] for group in (decayed, kept, scales)] == [1e-3, 1e-3, 3e-4]
        assert [group["weight_decay"] for group in (decayed, kept, scales)] == [0.1, 0.0, 0.0]
        assert {id(p) for p in scales["params"]} == {id(p) for p in step_sizes(run.model).values()}
        assert sum(len(g["params"]) for g in (decayed, kept, scales)) == sum(
            p.requires_grad for p in run.model.parameters()
        )

    def test_leaves_frozen_layers_alone(self, tmp_path):
        start = model()
        start.bert.embeddings.requires_grad_(False)
        before = copy.deepcopy(start.state_dict())
        trainer(tmp_path, start, max_steps=2).train()
        changed = different(start.state_dict(), before)
        assert changed
        assert not [name for name in changed if "embeddings" in name]

    def test_leaves_the_step_sizes_of_frozen_weights_alone(self, tmp_path):
        """Loaded with SQuATConfig they are trainable, whatever becomes of the weight."""
        start = model()
        for p in step_sizes(start).values():
            p.requires_grad_(True)
        frozen = (start.get_input_embeddings(), start.bert.encoder.layer[0].attention.self.query)
        for layer in frozen:
            layer.weight.requires_grad_(False)
        before = [layer.weight_scale.detach().clone() for layer in frozen]
        run = trainer(tmp_path, start, max_steps=2, learning_rate=0.01, weight_decay=0.1)
        run.train()
        assert all(torch.equal(layer.weight_scale, value) for layer, value in zip(frozen, before, strict=True))
        assert {p.requires_grad for p in step_sizes(start).values()} == {True, False}

    def test_of_the_user_is_taken(self, tmp_path):
        start = model()
        optimizer = torch.optim.SGD([*start.parameters()], lr=1e4)
        args = SQuATArguments(str(tmp_path), max_steps=2, rho=0.1, lr_scheduler_type="constant", **PLAIN)
        run = SQuATTrainer(start, args, train_dataset=samples(), optimizers=(optimizer, None))
        run.train()
        assert run.optimizer.optimizer is optimizer
        assert all((p > 0).all() for p in step_sizes(start).values())

    def test_of_the_user_for_a_sharded_model_is_refused(self, tmp_path, monkeypatch):
        start = model()
        monkeypatch.setattr(type(start), "is_distributed_loading_by_transformers", True, raising=False)
        optimizer = torch.optim.SGD([*start.parameters()], lr=0.1)
        with pytest.raises(ValueError, match="an optimizer for a model that is sharded does not go with SQuATTrainer"):
            SQuATTrainer(start, SQuATArguments(str(tmp_path), **PLAIN), optimizers=(optimizer, None))
        saved = {
            "load_best_model_at_end": True,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_only_model": True,
        }
        args = SQuATArguments(str(tmp_path), **{**PLAIN, **saved})
        with pytest.raises(ValueError, match="load_best_model_at_end=True with a model that is sharded does not go with"):
            SQuATTrainer(start, args, eval_dataset=samples())

    def test_with_groups_of_its_own_is_refused(self, tmp_path):
        run = trainer(tmp_path)
        run.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1, "params": []})
        with pytest.raises(ValueError, match="optim=.* does not go with SQuATTrainer; use optim='adamw_torch'"):
            run.train()


class TestResuming:
    @pytest.mark.parametrize("alternate", ["batch", pytest.param("epoch", marks=pytest.mark.slow)])
    def test_is_exact(self, tmp_path, alternate):
        options = {**SAVED, "rho": 0.1, "alternate": alternate, "gradient_accumulation_steps": 2, "max_steps": 8}
        options |= {"climb_every": 2} if alternate == "batch" else {}
        whole = trainer(tmp_path, model(static=True, dropout=0.2), **options)
        whole.train()
        for step in (2, 6) if alternate == "epoch" else (2,):
            start = model(static=True, dropout=0.2)
            for p in start.parameters():
                if p.is_floating_point():
                    p.data.mul_(1.1)
            resumed = trainer(tmp_path / "again", start, **options)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert different(resumed.model.state_dict(), whole.model.state_dict()) == []
            assert losses(resumed) == losses(whole)

    def test_with_another_reuse_of_climbs(self, tmp_path):
        trainer(tmp_path, max_steps=3, rho=0.1, save_strategy="steps", save_steps=3).train()
        again = trainer(tmp_path / "again", max_steps=6, rho=0.1, climb_every=5)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert ["sharp_loss" in entry for entry in losses(again)] == [True] * 4 + [False, True]

    def test_of_other_weights_is_refused(self, tmp_path):
        trainer(tmp_path, max_steps=3, rho=0.1, climb_every=2, save_strategy="steps", save_steps=3).train()
        start = model()
        start.bert.embeddings.requires_grad_(False)
        again = trainer(tmp_path / "again", start, max_steps=6, rho=0.1, climb_every=2)
        with pytest.raises(ValueError, match="last climb was of .* tensors, and .* are trained now"):
            again.alternation.load_state_dict(torch.load(tmp_path / "checkpoint-3" / "squat.pt"))
        trainer(tmp_path, start, rho=0.1).alternation.load_state_dict(torch.load(tmp_path / "checkpoint-3" / "squat.pt"))

    def test_a_second_training_begins_anew(self, tmp_path):
        run = trainer(tmp_path, max_steps=3, rho=0.1, climb_every=2)
        run.train()
        run.train()
        assert ["sharp_loss" in entry for entry in losses(run)] == [True, False, True]
        assert losses(run)[0]["scale_drift"] < 0.01

    @pytest.mark.slow
    def test_is_exact_after_a_kill(self, tmp_path):
        options = {**SAVED, "rho": 0.1, "dropout": 0.2, "static": True, "gradient_accumulation_steps": 2}
        finish(script(tmp_path / "whole", tmp_path / "whole.pt", **options))
        folder, out = tmp_path / "killed", tmp_path / "killed.pt"
        kill_after_a_checkpoint(script(folder, out, slow=True, **options), folder, tmp_path / "log")
        assert not out.exists()
        finish(script(folder, out, resume=True, **options))
        found, expected = torch.load(out), torch.load(tmp_path / "whole.pt")
        assert different(found["model"], expected["model"]) == []
        assert found["figures"] == expected["figures"]


def packed_layers(folder: Path, of=None) -> int:
    """How many layers of a saved model are packed, all of them; its answers are those of `of`."""
    from transformers import BertForSequenceClassification

    reloaded = BertForSequenceClassification.from_pretrained(folder)
    layers = [layer for _, layer in low_bit_layers(reloaded)]
    assert all(isinstance(layer, PackedLinear | PackedEmbedding) for layer in layers)
    if of is not None:
        assert torch.equal(logits(reloaded), logits(pack(copy.deepcopy(of)).eval()))
    return len(layers)


class TestCitizenship:
    def test_from_float_checkpoint_to_packed_one(self, tmp_path):
        make("bert-cls").save_pretrained(tmp_path / "float")
        config = SQuATConfig(weight_bits=2, embedding_bits=2, activations="static", calibration_samples=8)
        start = type(make("bert-cls")).from_pretrained(tmp_path / "float", quantization_config=config)
        assert all(p.requires_grad for p in start.parameters() if p.is_floating_point())
        assert all((p > 0).all() for p in step_sizes(start).values())
        assert len(step_sizes(start)) > 20
        run = trainer(tmp_path / "out", start, max_steps=2, **SAVED)
        run.train()
        run.save_model()
        assert packed_layers(tmp_path / "out", run.model) > 10
        stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert (stored["algorithm"], stored["packed"]) == ("squat", True)
        assert stored["recipe"]["training"]["trainer"] == "SQuATTrainer"
        assert run.model.config.quantization_config.packed is False
        again = type(start).from_pretrained(tmp_path / "out" / "checkpoint-2")
        assert all(p.requires_grad for p in again.parameters() if p.is_floating_point())
        assert different(again.state_dict(), run.model.state_dict()) == []

    def test_the_best_model_is_loaded_and_early_stopping_stops(self, tmp_path):
        def accuracy(found):
            return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

        args = SQuATArguments(
            str(tmp_path), max_steps=12, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True, metric_for_best_model="accuracy", learning_rate=0.01,
            **{**PLAIN, "save_strategy": "steps", "save_steps": 1},
        )  # fmt: skip
        run = SQuATTrainer(
            model(), args, train_dataset=samples(), eval_dataset=samples(16), compute_metrics=accuracy,
            callbacks=[EarlyStoppingCallback(2)],
        )  # fmt: skip
        run.train()
        scores = [entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry]
        assert run.evaluate()["eval_accuracy"] == run.state.best_metric == max(scores)
        best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
        assert all(torch.equal(best[name], p) for name, p in run.model.named_parameters() if name in best)
        run.save_model(str(tmp_path / "packed"))
        assert packed_layers(tmp_path / "packed", run.model) > 10

    def test_writers_are_evaluated_on_what_they_write(self, tmp_path):
        start = prepare(make("t5-tied"), PreQuantConfig(weight_bits=3, embedding_bits=4).scheme())
        rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 7)]
        args = SQuATSeq2SeqArguments(
            str(tmp_path), max_steps=2, predict_with_generate=True, generation_max_length=5, rho=0.1, **PLAIN
        )
        seen = []
        run = SQuATSeq2SeqTrainer(
            start, args, train_dataset=rows, eval_dataset=rows,
            compute_metrics=lambda found: seen.append(found.predictions.shape) or {},
        )  # fmt: skip
        run.train()
        run.evaluate()
        assert [shape[0] for shape in seen] == [8]
        assert "sharpness" in losses(run)[0]


class TestArguments:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rho": -0.1}, "rho=-0.1 is no radius; use a number of at least 0"),
            ({"perturb": "all"}, "perturb='all' is unknown"),
            ({"alternate": "often"}, "alternate='often' is unknown; use one of"),
            ({"scale_learning_rate": 0.0}, "scale_learning_rate=0.0 is not allowed"),
            ({"climb_every": 0}, "climb_every=0 is no count of steps"),
            ({"reuse_weight": -1.0}, "reuse_weight=-1.0 is not allowed"),
            ({"distillation": 2.0}, "distillation=2.0 is no share"),
        ],
        ids=lambda v: str(v)[:30],
    )
    @pytest.mark.parametrize("kind", [SQuATArguments, SQuATSeq2SeqArguments])
    def test_bad_values(self, tmp_path, fields, message, kind):
        with pytest.raises(ValueError, match=message):
            kind(str(tmp_path), **fields)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("deepspeed", {"zero_optimization": {"stage": 2}}, "deepspeed=.*never whole; use DDP"),
            ("fsdp", True, "fsdp=True does not go with SQuATTrainer; load the model with distributed_config"),
            ("fp16", True, "fp16=True does not go with SQuATTrainer; use bf16=True"),
            ("_n_gpu", 2, "one process for 2 GPUs does not go with SQuATTrainer; start one process a GPU"),
        ],
    )
    def test_that_cannot_be_followed(self, tmp_path, name, value, message):
        args = SQuATArguments(str(tmp_path), **PLAIN)
        args.device  # noqa: B018 -- counts the GPUs
        setattr(args, name, value)
        with pytest.raises(ValueError, match=message):
            SQuATTrainer(model(), args)

    def test_half_precision_that_the_launcher_asks_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        with pytest.raises(ValueError, match="fp16, asked for by the launcher, does not go with .*; use bf16=True"):
            SQuATTrainer(model(), SQuATArguments(str(tmp_path), **PLAIN))

    def test_sharding_that_the_launcher_asks_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(SQuATTrainer, "is_deepspeed_enabled", True, raising=False)
        monkeypatch.setattr(Trainer, "__init__", lambda self, *_, **__: None)
        with pytest.raises(ValueError, match="DeepSpeed or FSDP, asked for by the launcher, does not go with SQuATTrainer"):
            SQuATTrainer(model(), SQuATArguments(str(tmp_path), **PLAIN))

    def test_of_the_stock_trainers(self, tmp_path):
        with pytest.raises(TypeError, match="args is a TrainingArguments; use SQuATArguments"):
            SQuATTrainer(model(), TrainingArguments(str(tmp_path), use_cpu=True))
        with pytest.raises(TypeError, match="args is a SQuATArguments; use SQuATSeq2SeqArguments"):
            SQuATSeq2SeqTrainer(model(), SQuATArguments(str(tmp_path), use_cpu=True))

    def test_a_model_to_be_made_later(self, tmp_path):
        with pytest.raises(ValueError, match="model_init= does not go with SQuATTrainer; give the model"):
            SQuATTrainer(args=SQuATArguments(str(tmp_path), **PLAIN), model_init=model)


class TestBadModels:
    def refused(self, tmp_path, message, of, **options):
        with pytest.raises(ValueError, match=message):
            SQuATTrainer(of, SQuATArguments(str(tmp_path), **PLAIN), train_dataset=samples(), **options)

    def test_packed(self, tmp_path):
        self.refused(tmp_path, r"the model is packed and has no weights to train; .*packed=False", pack(model()))

    def test_float(self, tmp_path):
        self.refused(tmp_path, "the model has no fake-quantized layer to train", make("bert-cls"))

    def test_frozen(self, tmp_path):
        start = model()
        start.bert.requires_grad_(False)
        self.refused(tmp_path, "weights of all .* fake-quantized layers of BertForSequenceClassification are frozen", start)

    def test_uncalibrated(self, tmp_path):
        scheme = PreQuantConfig(activations="static").scheme()
        self.refused(tmp_path, "input_scale has no start value; call .*calibrate", prepare(make("bert-cls"), scheme))

    def test_in_bfloat16(self, tmp_path):
        start = model()
        start.classifier.bfloat16()
        self.refused(tmp_path, "the model has weights of .'torch.bfloat16'.*load it with dtype=torch.float32", start)

    def test_with_a_teacher_in_low_bits(self, tmp_path):
        self.refused(tmp_path, "the teacher is in low bits; use the float model", model(), teacher=model())
