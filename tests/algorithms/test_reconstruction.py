"""Stage-wise training is what a plain loop over whole passes computes, bit for bit."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tiny_models import make, token_ids
from torch import nn

from optimum_zsaq.algorithms.calibration import calibrate
from optimum_zsaq.algorithms.compensation import compensate
from optimum_zsaq.algorithms.parallel import ParallelReconstruction, mix
from optimum_zsaq.algorithms.reconstruction import (
    ReconstructionSettings,
    batch_order,
    reconstruction_error,
    start_batches,
)
from optimum_zsaq.algorithms.sequential import SequentialReconstruction
from optimum_zsaq.algorithms.stages import cut, run_stage
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.spec import QuantScheme, QuantSpec
from optimum_zsaq.surgery import blocks, low_bit_layers, pack, prepare


INPUTS = QuantSpec(8, "token", symmetric=False)
SCHEME = QuantScheme(QuantSpec(2), QuantSpec(4), INPUTS)
GAIN = {"llama-tied": 3, "t5-tied": 1, "bart-tied": 15}
QUICK = {"steps": 10, "learning_rate": 1e-3, "scale_learning_rate": 1e-3, "stages": 2, "start": "rounding"}


@pytest.fixture(autouse=True)
def known_models(plain_kinds):
    register_models()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Toy(nn.Module):
    """A table, four blocks and a head, with nothing between them."""

    def __init__(self):
        super().__init__()
        self.table, self.blocks = nn.Embedding(30, 8), nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def toy_batches(count: int = 5) -> list[dict]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(3, 6, dtype=torch.long)
        mask[0, 4:] = 0
        found.append({"input_ids": torch.randint(30, (3, 6), generator=generator), "attention_mask": mask})
    return found


def toys(scheme: QuantScheme = SCHEME) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    teacher = Toy()
    return teacher, prepare(copy.deepcopy(teacher), scheme, "minmax")


def advance(run) -> list[tuple[str, float]]:
    return [(stage.title, loss) for stage, loss in run.steps()]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class PlainTraining:
    """Adam with decoupled decay 0, a clipped gradient and a schedule, written out."""

    def __init__(self, weights: list, scales: list, settings: ReconstructionSettings):
        self.groups, self.settings, self.done = (weights, scales), settings, 0
        self.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in (*weights, *scales)}

    def step(self, loss: torch.Tensor) -> None:
        everything = [p for group in self.groups for p in group]
        gradients = torch.autograd.grad(loss, everything)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        shrink = min(1.0, self.settings.max_norm / (norm.item() + 1e-6))
        gradients = dict(zip(map(id, everything), (g * shrink for g in gradients), strict=True))
        warm, steps = max(1, self.settings.steps // 10), self.settings.steps
        share = (self.done + 1) / warm
        if self.done >= warm:
            share = 0.5 * (1.0 + math.cos(math.pi * (self.done - warm) / max(1, steps - warm)))
        self.done += 1
        rates = (self.settings.learning_rate, self.settings.scale_learning_rate)
        with torch.no_grad():
            for group, rate, scales in zip(self.groups, rates, (False, True), strict=True):
                for p in group:
                    first, second = self.moments[id(p)]
                    g, before = gradients[id(p)], p.clone()
                    first.mul_(0.9).add_(0.1 * g)
                    second.mul_(0.999).add_(0.001 * g * g)
                    hat = first / (1 - 0.9**self.done), second / (1 - 0.999**self.done)
                    p.sub_(rate * share * hat[0] / (hat[1].sqrt() + 1e-8))
                    if scales:
                        p.copy_(torch.maximum(p, before * 0.5))


def plain_error(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Position by position, in loops."""
    error, size = [], []
    for row in range(len(mask)):
        for place in range(mask.shape[1]):
            if mask[row, place]:
                error.append((found[row, place] - wanted[row, place]).square().sum())
                size.append(wanted[row, place].square().sum())
    return torch.stack(error).sum() / torch.stack(size).sum()


def plain_parts(model: Toy, count: int) -> list[tuple[list, list, Callable]]:
    """Each stage's weights, its step sizes, and what it computes: state -> (states that are learned, state)."""
    size, parts = 4 // count, []
    for n in range(count):
        own = list(model.blocks[n * size : (n + 1) * size])
        modules = [m for block in own for m in (block.inner, block.outer)]
        modules += [model.table] if n == 0 else []
        modules += [model.head] if n == count - 1 else []

        def run(x, n=n, own=own):
            learned, x = [], model.table(x) if n == 0 else x
            for block in own:
                x = block(x)
                learned.append(x)
            return ([*learned, model.head(x)] if n == count - 1 else learned), x

        weights = [p for m in modules for p in (m.weight, getattr(m, "bias", None)) if p is not None]
        parts.append((weights, [m.weight_scale for m in modules if hasattr(m, "weight_scale")], run))
    return parts


def float_parts(model: Toy, count: int) -> list[Callable]:
    """As `plain_parts`, of a float model."""
    return [run for _, _, run in plain_parts(model, count)]


def plain_loss(found: list, wanted: list, mask: torch.Tensor) -> torch.Tensor:
    return sum(plain_error(f, w.detach(), mask) for f, w in zip(found, wanted, strict=True))


def plain_sequential(teacher, student, batches, settings) -> None:
    """MREM-S with a whole pass for every step."""
    parts, floats = plain_parts(student, settings.stages), float_parts(teacher, settings.stages)
    for n, (weights, scales, run) in enumerate(parts):
        for p in (*weights, *scales):
            p.requires_grad_(True)
        training, order = PlainTraining(weights, scales, settings), batch_order(len(batches), settings.seed)
        for _ in range(settings.steps):
            batch = batches[next(order)]
            x = y = batch["input_ids"]
            for m in range(n):
                x, y = parts[m][2](x)[1].detach(), floats[m](y)[1]
            training.step(plain_loss(run(x)[0], floats[n](y)[0], batch["attention_mask"]))


def plain_parallel(teacher, student, batches, settings) -> None:
    """MREM-P with a book of everything that was ever put into a queue: (stage, step) -> (batch, float, quantized)."""
    parts, floats = plain_parts(student, settings.stages), float_parts(teacher, settings.stages)
    trainings = []
    for weights, scales, _ in parts:
        for p in (*weights, *scales):
            p.requires_grad_(True)
        trainings.append(PlainTraining(weights, scales, settings))
    order, book, t0 = batch_order(len(batches), settings.seed), {}, settings.queue
    for k in range(t0):
        b = next(order)
        x = y = batches[b]["input_ids"]
        for n in range(settings.stages):
            x, y = parts[n][2](x)[1].detach(), floats[n](y)[1].detach()
            book[n, k - t0] = b, y, x
    for t in range(settings.steps):
        share = max(1 - t / (settings.forcing * settings.steps), 0) if settings.forcing else 0
        for n in range(settings.stages):
            if n == 0:
                b = next(order)
                y = mixed = batches[b]["input_ids"]
            else:
                b, y, x = book[n - 1, t - t0]
                mixed = share * y + (1 - share) * x
            learned, after = parts[n][2](mixed)
            wanted, float_after = floats[n](y)
            book[n, t] = b, float_after.detach(), after.detach()
            trainings[n].step(plain_loss(learned, wanted, batches[b]["attention_mask"]))


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.float(), q.float(), atol=2e-5), (name, (p - q).abs().max())


class TestAgainstPlainLoops:
    """In float64: in float32 the order of a sum, which a processor chooses, moves a weight from one code to the next."""

    @pytest.mark.parametrize("stages", [1, 2, 4])
    def test_sequential(self, stages):
        settings = ReconstructionSettings(**{**QUICK, "stages": stages})
        teacher, student = (model.double() for model in toys())
        plain = copy.deepcopy(student)
        before = copy.deepcopy(student)
        plain_sequential(teacher, plain, toy_batches(), settings)
        advance(SequentialReconstruction(teacher, student, toy_batches(), settings))
        assert_close(student, plain)
        assert not torch.allclose(student.blocks[3].inner.weight, before.blocks[3].inner.weight, atol=1e-3)

    @pytest.mark.parametrize("stages", [1, 2, 4])
    @pytest.mark.parametrize(("queue", "forcing"), [(1, 0.0), (3, 0.5), (7, 1.0)])
    def test_parallel(self, stages, queue, forcing):
        settings = ReconstructionSettings(**{**QUICK, "stages": stages}, queue=queue, forcing=forcing)
        teacher, student = (model.double() for model in toys())
        plain = copy.deepcopy(student)
        plain_parallel(teacher, plain, toy_batches(), settings)
        advance(ParallelReconstruction(teacher, student, toy_batches(), settings))
        assert_close(student, plain)

    def test_one_stage_is_the_same_in_both(self):
        """There is no queue to take from; the warm-up only passes over some batches."""
        settings = ReconstructionSettings(**{**QUICK, "stages": 1}, queue=5)
        runs = []
        for kind in (SequentialReconstruction, ParallelReconstruction):
            teacher, student = toys()
            advance(kind(teacher, student, toy_batches(5)[:1], settings))
            runs.append(student)
        assert equal(state(runs[0]), state(runs[1]))


class TestError:
    def test_padded_positions_do_not_count(self):
        batch, wanted = toy_batches(1)[0], torch.randn(3, 6, 8)
        found = wanted.clone()
        found[0, 4:] = torch.nan
        assert reconstruction_error({"block": found}, {"block": wanted}, batch, 1.0) == 0.0

    def test_is_relative_and_adds_up(self):
        batch, wanted = toy_batches(1)[0], torch.randn(3, 6, 8)
        states = {"one": wanted, "two": wanted, "logits": torch.randn(3, 2)}
        found = {"one": 3 * wanted, "two": 2 * wanted, "logits": 2 * states["logits"]}
        expected = 4.0 + 1.0 + 0.5 * 1.0
        assert reconstruction_error(found, states, batch, 0.5).item() == pytest.approx(expected)

    def test_a_huge_state_outweighs_others_only_where_all_are_one_sum(self):
        batch, wanted = toy_batches(1)[0], torch.randn(3, 6, 8)
        wanted[:, 0] *= 1000.0
        found = wanted.clone()
        found[:, 1:] *= 3.0
        error = {of: reconstruction_error({"b": found}, {"b": wanted}, batch, 1.0, of).item() for of in ("all", "position")}
        counts = batch["attention_mask"].bool()
        expected = torch.tensor([0.0, 4.0, 4.0, 4.0, 4.0, 4.0]).expand(3, 6)[counts].mean().item()
        assert error["all"] < 0.001
        assert error["position"] == pytest.approx(expected, rel=1e-5)

    def test_decoder_positions_have_a_mask_of_their_own(self):
        batch = {"attention_mask": torch.ones(2, 5), "decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]])}
        wanted = torch.ones(2, 3, 4)
        found = wanted + torch.tensor([[0.0, 9, 9], [0, 1, 9]])[..., None]
        assert reconstruction_error({"block": found}, {"block": wanted}, batch, 1.0).item() == pytest.approx(1 / 3)

    def test_mix(self):
        t, s = {"a": (torch.ones(2), None, 3)}, {"a": (torch.zeros(2), None, 3)}
        assert torch.equal(mix(t, s, 0.25)["a"][0], torch.full((2,), 0.25))
        assert mix(t, s, 0.0) == s
        assert mix(t, s, 0.5)["a"][1:] == (None, 3)


def family_batches(model: nn.Module, count: int = 3) -> list[dict]:
    found = []
    for seed in range(count):
        ids = token_ids(seed=seed)
        mask = torch.ones_like(ids)
        ids[0, -3:], mask[0, -3:], ids[0, -4] = 0, 0, 2
        found.append(uncached_batch(model, {"input_ids": ids, "attention_mask": mask}))
    return found


def family(name: str, scheme: QuantScheme = SCHEME) -> tuple[nn.Module, nn.Module, list[dict]]:
    teacher = make(name)
    for p in teacher.parameters():  # new weights are so small that layers hardly change what passes
        if p.dim() > 1:
            p.data *= GAIN.get(name, 6)
    student = prepare(copy.deepcopy(teacher), scheme, "minmax")
    return teacher, student, family_batches(teacher)


def stage_errors(teacher, student, batches, stages: int) -> list[float]:
    """The error of each stage with the whole quantized model before it."""
    found = []
    for stage in cut(student, batches[0], stages):
        total = 0.0
        for batch in batches:
            memories, states = ({}, {}), [{}, {}]
            for earlier in cut(student, batch, stages)[: stage.index + 1]:
                with torch.no_grad():
                    ran = [run_stage(m, earlier, batch, k) for m, k in zip((teacher, student), memories, strict=True)]
                states, memories = [states for states, _ in ran], [memory for _, memory in ran]
            total += reconstruction_error(states[1], states[0], batch, 1.0).item()
        found.append(total / len(batches))
    return found


@pytest.mark.parametrize("kind", [SequentialReconstruction, ParallelReconstruction])
@pytest.mark.parametrize("name", ["bert-cls", "gpt2-tied", "llama-tied", "t5-tied", "bart-tied"])
def test_every_family_learns_in_every_stage(name, kind):
    teacher, student, batches = family(name)
    before, teacher_before = stage_errors(teacher, student, batches, 2), state(teacher)
    run = kind(teacher, student, batches, ReconstructionSettings(**{**QUICK, "steps": 30, "learning_rate": 3e-3}, queue=2))
    losses = advance(run)
    after = stage_errors(teacher, student, batches, 2)
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert len(losses) == run.done == 60
    assert [len(part) for part in run.losses] == [30, 30]
    assert equal(state(teacher), teacher_before)
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())


class TestSequential:
    def test_teacher_may_share_the_blocks(self):
        settings, students = ReconstructionSettings(**QUICK), []
        for shared in (True, False):
            model = make("t5-tied")
            own = {id(p): p for block in blocks(model).values() for p in block.parameters()} if shared else {}
            teacher = copy.deepcopy(model, own)
            student = prepare(model, SCHEME, "minmax")
            advance(SequentialReconstruction(teacher, student, family_batches(model), settings))
            students.append(student)
        assert equal(state(students[0]), state(students[1]))

    @pytest.mark.parametrize("cache", [0, 2000])
    def test_activations_on_disk_change_nothing(self, cache):
        students = []
        for limit in (None, cache):
            teacher, student, batches = family("t5-tied")
            settings = ReconstructionSettings(**{**QUICK, "stages": 3, "start": "compensated"}, cache=limit)
            advance(SequentialReconstruction(teacher, student, batches, settings))
            students.append(student)
        assert equal(state(students[0]), state(students[1]))

    def test_goes_on_after_a_stage_bit_for_bit(self):
        settings = ReconstructionSettings(**{**QUICK, "stages": 4})
        teacher, student = toys()
        whole = SequentialReconstruction(teacher, student, toy_batches(), settings)
        advance(whole)
        teacher, student = toys()
        first = SequentialReconstruction(teacher, student, toy_batches(), settings)
        for _ in first.steps():
            if first.done == 20:
                break
        kept = copy.deepcopy(first.state_dict())
        teacher, student = toys()
        second = SequentialReconstruction(teacher, student, toy_batches(), settings)
        second.load_state_dict(kept)
        assert second.done == 20
        assert len(advance(second)) == 20
        assert equal(state(second.student), state(whole.student))
        assert second.losses == whole.losses

    def test_last_block_alone(self):
        teacher, student = toys()
        settings = ReconstructionSettings(**QUICK, targets="last", output_weight=0.0)
        before = student.head.weight.clone()
        advance(SequentialReconstruction(teacher, student, toy_batches(), settings))
        assert torch.equal(student.head.weight, before)

    def test_static_input_ranges_are_trained(self):
        static = QuantScheme(QuantSpec(4), QuantSpec(8), QuantSpec(4, "tensor", symmetric=False))
        teacher, student = toys(static)
        calibrate(student, toy_batches())
        before = student.blocks[1].inner.input_scale.clone()
        advance(SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**QUICK)))
        assert not torch.equal(student.blocks[1].inner.input_scale, before)

    def test_outlier_values_and_zero_points_stay(self):
        scheme = QuantScheme(QuantSpec(2, symmetric=False), QuantSpec(4), INPUTS, outliers=0.05)
        teacher, student = toys(scheme)
        names = ("weight_zero_point", "weight_outlier_positions", "weight_outlier_values")
        before = {n: p.clone() for n, p in student.named_parameters() if n.endswith(names)}
        assert before
        advance(SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**QUICK)))
        assert all(torch.equal(student.get_parameter(n), p) for n, p in before.items())

    def test_what_was_trained_is_what_is_packed(self):
        teacher, student, batches = family("bert-cls")
        advance(SequentialReconstruction(teacher, student, batches, ReconstructionSettings(**QUICK)))
        with torch.no_grad():
            expected = student(**batches[0]).logits
            assert torch.allclose(pack(student)(**batches[0]).logits, expected, atol=1e-5)


class TestParallel:
    @pytest.mark.parametrize("at", [1, 6])
    def test_goes_on_bit_for_bit(self, at):
        settings = ReconstructionSettings(**QUICK, queue=3)
        teacher, student = toys()
        whole = ParallelReconstruction(teacher, student, toy_batches(), settings)
        advance(whole)
        teacher, student = toys()
        first = ParallelReconstruction(teacher, student, toy_batches(), settings)
        for _ in first.steps():
            if first.done == 2 * at:
                break
        kept = copy.deepcopy(first.state_dict())
        teacher, student = toys()
        second = ParallelReconstruction(teacher, student, toy_batches(), settings)
        second.load_state_dict(kept)
        advance(second)
        assert equal(state(second.student), state(whole.student))
        assert second.losses == whole.losses

    def test_shared_weights_are_refused(self):
        teacher, _ = toys()
        student = prepare(copy.copy(teacher), SCHEME, "minmax")
        with pytest.raises(ValueError, match="share weights"):
            ParallelReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**QUICK))


class TestStart:
    """Errors are compensated stage by stage: with one stage as `compensate` does it for a whole model."""

    STILL = {**QUICK, "steps": 1, "learning_rate": 1e-12, "scale_learning_rate": 1e-12, "start": "compensated"}

    @pytest.mark.parametrize("name", ["bert-cls", "t5-tied"])
    def test_sequential_is_compensation_of_the_whole(self, name):
        for stages in (1, 2):
            teacher, student, batches = family(name)
            plain = compensate(teacher, copy.deepcopy(student), [batches[0], batches[1]])
            settings = ReconstructionSettings(**{**self.STILL, "stages": stages}, start_batches=2)
            advance(SequentialReconstruction(teacher, student, batches[:2], settings))
            for (n, p), q in zip(student.named_parameters(), plain.parameters(), strict=True):
                assert torch.allclose(p.float(), q.float(), atol=1e-6), n

    def test_parallel_looks_at_what_float_stages_return(self):
        teacher, student, batches = family("bert-cls")
        expected = copy.deepcopy(student)
        for number in range(2):  # the other layer is float: nothing before a stage is quantized
            trial = copy.deepcopy(teacher)
            if number == 0:
                trial.bert.embeddings = copy.deepcopy(student.bert.embeddings)
            trial.bert.encoder.layer[number] = copy.deepcopy(student.bert.encoder.layer[number])
            compensate(teacher, trial, batches)
            expected.bert.encoder.layer[number] = trial.bert.encoder.layer[number]
        advance(ParallelReconstruction(teacher, student, batches, ReconstructionSettings(**self.STILL)))
        for one, other in zip(student.bert.encoder.parameters(), expected.bert.encoder.parameters(), strict=True):
            assert torch.allclose(one.float(), other.float(), atol=1e-6)

    def test_ternary_weights_are_refused(self):
        ternary = QuantScheme(QuantSpec(2, ternary=True), None, INPUTS)
        teacher, student = toys()
        student = prepare(copy.deepcopy(teacher), ternary, "ternary")
        with pytest.raises(ValueError, match="is ternary, and its errors cannot be compensated"):
            SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(stages=2))
        advance(SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**QUICK)))

    def test_batches_are_spread(self):
        settings = ReconstructionSettings(start_batches=3)
        assert start_batches(9, settings) == [0, 3, 6]
        assert start_batches(2, settings) == [0, 1]


class TestRefused:
    @pytest.mark.parametrize("kind", [SequentialReconstruction, ParallelReconstruction])
    def test_no_batches_no_low_bit_layers_too_many_stages(self, kind):
        teacher, student = toys()
        settings = ReconstructionSettings(**QUICK)
        with pytest.raises(ValueError, match="no batch to reconstruct"):
            kind(teacher, student, [], settings)
        with pytest.raises(ValueError, match="no fake-quantized layer"):
            kind(teacher, copy.deepcopy(teacher), toy_batches(), settings)
        with pytest.raises(ValueError, match="has 4 blocks .* use 1 to 4"):
            kind(teacher, student, toy_batches(), ReconstructionSettings(**{**QUICK, "stages": 5}))

    def test_an_error_that_is_not_finite_changes_nothing(self):
        teacher, student = toys()
        with torch.no_grad():
            teacher.head.bias[0] = torch.nan
        run = SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**{**QUICK, "stages": 1}))
        before = state(student)
        with pytest.raises(FloatingPointError, match=r"stage 1 of 1: the reconstruction error became nan at step 1 of 10"):
            advance(run)
        assert equal(state(student), before)
        assert not any(p.requires_grad for p in student.parameters())

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("stages", 0),
            ("steps", 1.5),
            ("queue", True),
            ("learning_rate", 0.0),
            ("max_norm", math.inf),
            ("output_weight", -1.0),
            ("forcing", 1.5),
            ("targets", "first"),
            ("start", "nowhere"),
            ("start_batches", 0),
            ("cache", -1),
        ],
    )
    def test_settings(self, field, value):
        with pytest.raises(ValueError, match=rf"{field}={value!r} is"):
            ReconstructionSettings(**{field: value})

    def test_students_without_a_table(self):
        teacher, student = toys(QuantScheme(QuantSpec(4), None, INPUTS))
        assert "table" not in dict(low_bit_layers(student))
        advance(SequentialReconstruction(teacher, student, toy_batches(), ReconstructionSettings(**QUICK)))
