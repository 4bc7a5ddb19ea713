import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCABULARY, make
from torch import nn

from optimum_zsaq import PreQuantConfig, calibrate, pack, prepare
from optimum_zsaq.algorithms.distance import discrepancy
from optimum_zsaq.algorithms.forms import SequenceForm
from optimum_zsaq.algorithms.generators import Generator, PriorSource, token_prior
from optimum_zsaq.algorithms.minimax import Execution, Minimax, MinimaxSettings, keep_signs, warm_cosine
from optimum_zsaq.algorithms.sharpness import SharpnessSettings
from optimum_zsaq.surgery import low_bit_layers


SAM = SharpnessSettings(rho=0.05)
FORM = SequenceForm(first=(1,), last=(2,), shortest=5, longest=12)
GAIN = {"llama-tied": 3, "t5-tied": 1, "bart-tied": 15}  # new weights are so small that layers hardly change what passes
FAMILIES = ["bert", "bert-cls", "roberta-mlm-tied", "opt-tied", "gpt2-tied", "llama-tied", "t5-tied", "bart-tied"]


def training(name: str = "bert-cls", bits: int = 2, seed: int = 0, **settings) -> Minimax:
    teacher = make(name)
    for p in teacher.parameters():
        if p.dim() > 1:
            p.data *= GAIN.get(name, 6)
    student = prepare(copy.deepcopy(teacher), PreQuantConfig(weight_bits=bits, embedding_bits=4).scheme())
    table = teacher.get_input_embeddings().weight
    prior = token_prior(table, [0, 1, 2], 0.0)
    generator = Generator(PriorSource(prior), table, prior, FORM, candidates=64, width=8, seed=seed)

    def complete(batch):
        if not teacher.config.is_encoder_decoder:
            return batch
        return {**batch, "decoder_input_ids": batch["input_ids"].roll(1, dims=1)}

    settings = {"batch_size": 4, "steps": 20, "learning_rate": 1e-3, "scale_learning_rate": 3e-4, **settings}
    settings = MinimaxSettings(**{"output": "none" if name == "bert" else "kl", **settings})
    return Minimax(teacher, student, generator, settings, lambda m, ids: m.get_input_embeddings()(ids), complete)


def training_static() -> Minimax:
    """A run whose inputs have one stored range a layer."""
    run = training()
    scheme = PreQuantConfig(weight_bits=2, embedding_bits=4, activations="static").scheme()
    student = prepare(copy.deepcopy(run.teacher).requires_grad_(True), scheme)
    with torch.no_grad():
        calibrate(student, [run.generator.sample(8)])
    return Minimax(run.teacher, student, run.generator, run.settings, run.embed)


def advance(run: Minimax, steps: int) -> list[dict[str, float]]:
    """Steps as `from_pretrained` makes them."""
    figures = []
    for _ in range(steps):
        figures.append(run.step())
        run.update()
    return figures


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def measure(run: Minimax) -> float:
    """D on a batch that is always the same."""
    ids = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(7))
    batch = run.complete({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    settings = MinimaxSettings(hidden_weight=1.0)
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True) for model in (run.teacher, run.student)]
    return discrepancy(*outputs, batch, settings).item()


class TestDiscrepancy:
    def outputs(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        hidden = tuple(torch.randn(2, 3, 4, generator=generator) for _ in range(2))
        return SimpleNamespace(logits=torch.randn(2, 3, 5, generator=generator), hidden_states=hidden)

    def test_is_the_formula(self):
        """Loops over tokens and classes; token 2 of sequence 1 is padding."""
        teacher, student = self.outputs(0), self.outputs(1)
        batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
        kept = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        kl = 0.0
        for i, j in kept:
            p, q = teacher.logits[i, j].double().softmax(0), student.logits[i, j].double().softmax(0)
            kl += sum((p[c] * math.log(p[c] / q[c])).item() for c in range(5)) / len(kept)
        hidden = 0.0
        for t, s in zip(teacher.hidden_states, student.hidden_states, strict=True):
            for i, j in kept:
                error, size = (x.double().square().sum().item() for x in (s[i, j] - t[i, j], t[i, j]))
                hidden += error / size / len(kept) / 2
        found = discrepancy(teacher, student, batch, MinimaxSettings(output_weight=0.5, hidden_weight=2.0))
        assert found.item() == pytest.approx(0.5 * kl + 2.0 * hidden, rel=1e-5)

    def test_is_zero_between_equals(self):
        same, batch = self.outputs(0), {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
        assert discrepancy(same, same, batch, MinimaxSettings(output_weight=1.0)).item() == pytest.approx(0.0, abs=1e-6)

    def test_regression(self):
        teacher, student = (SimpleNamespace(logits=torch.full((4, 1), value)) for value in (1.0, 3.0))
        settings = MinimaxSettings(output="mse", output_weight=1.0, hidden_weight=0.0)
        assert discrepancy(teacher, student, {"input_ids": torch.ones(4, 3)}, settings).item() == 4.0


class TestTraining:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_brings_the_student_nearer_to_its_teacher(self, name):
        run = training(name, generator_every=10, sharpness=SAM, steps=40)
        teacher, before = state(run.teacher), measure(run)
        figures = advance(run, run.settings.steps)
        assert measure(run) < 0.93 * before
        assert equal(state(run.teacher), teacher)
        assert [i for i, f in enumerate(figures) if "ascent" in f] == [10, 20, 30]
        assert all(f["sharp_loss"] > 0 and f["loss"] > 0 for f in figures)
        assert all(layer.perturbation is None for _, layer in low_bit_layers(run.student))
        assert all((scale > 0).all() for scale in run.scales)

    @pytest.mark.parametrize("rho", [0.0, 0.1])
    def test_is_the_slow_reference(self, rho):
        """Three steps by hand: full gradients by autograd, SAM's formula, torch.optim.AdamW unfused."""
        run = training(sharpness=SharpnessSettings(rho), generator_every=0, output_weight=0.5)
        other = training(sharpness=SharpnessSettings(rho), generator_every=0, output_weight=0.5)
        settings, layers = run.settings, {n: m for n, m in low_bit_layers(other.student) if m.owner is m}
        slots = {id(m.weight): m for m in layers.values()}
        optimizer = torch.optim.AdamW([{"params": other.weights}, {"params": other.scales}], weight_decay=0.0)
        for step in range(3):
            advance(run, 1)
            batch = other.generator.sample(settings.batch_size)

            def gradients(batch=batch):
                loss = discrepancy(
                    other.teacher(**batch, output_hidden_states=True),
                    other.student(**batch, output_hidden_states=True),
                    batch,
                    settings,
                )
                return torch.autograd.grad(loss, other.trained, allow_unused=True)

            found = gradients()
            scales = {id(p) for p in other.scales}
            climbing = [(p, g) for p, g in zip(other.trained, found, strict=True) if g is not None and id(p) not in scales]
            norm = math.sqrt(sum(g.double().square().sum().item() for _, g in climbing))
            kept = [(p, p.detach().clone()) for p, _ in climbing if id(p) not in slots]
            if rho:
                for p, g in climbing:
                    if id(p) in slots:
                        slots[id(p)].perturbation = rho * g / norm
                    else:
                        p.data.add_(rho * g / norm)
                found = gradients()
                for layer in layers.values():
                    layer.perturbation = None
                for p, value in kept:
                    p.data.copy_(value)
            total = math.sqrt(sum(g.double().square().sum().item() for g in found if g is not None))
            for p, g in zip(other.trained, found, strict=True):
                p.grad = None if g is None else g * min(1.0, settings.max_norm / (total + 1e-6))
            for group, rate in zip(optimizer.param_groups, (1e-3, 3e-4), strict=True):
                group["lr"] = rate * warm_cosine(other.settings.steps, step)
            optimizer.step()
        for (name, found), expected in zip(run.student.named_parameters(), other.student.parameters(), strict=True):
            if name.endswith("key.bias"):  # adds the same to all scores of a query: its gradient is rounding noise
                continue
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")

    def test_the_generator_climbs(self):
        """With a student that stands still, its inputs become harder."""
        run = training(bits=2, generator_learning_rate=0.02, entropy=0.0, batch_size=16)

        def hardness() -> float:
            found = []
            for _ in range(30):
                batch = run.generator.sample(16)
                with torch.no_grad():
                    outputs = [m(**batch, output_hidden_states=True) for m in (run.teacher, run.student)]
                found.append(discrepancy(*outputs, batch, run.settings).item())
            return sum(found) / len(found)

        before, student = hardness(), state(run.student)
        for _ in range(60):
            run._ascend()
        assert hardness() > 1.05 * before
        assert equal(state(run.student), student)
        assert all(p.requires_grad for p in run.trained)

    def test_a_frozen_generator_stays_as_it_was(self):
        run = training(generator_every=0)
        before = [p.clone() for p in run.generator.parameters()]
        for _ in range(4):
            assert "ascent" not in advance(run, 1)[0]
        assert all(torch.equal(p, q) for p, q in zip(run.generator.parameters(), before, strict=True))

    def test_goes_on_from_its_state_bit_for_bit(self):
        whole = training(generator_every=2, sharpness=SAM)
        first = training(generator_every=2, sharpness=SAM)
        advance(whole, 6)
        advance(first, 3)
        saved = copy.deepcopy(first.state_dict())
        second = training(generator_every=2, sharpness=SAM, seed=5)
        second.load_state_dict(saved)
        assert len(advance(second, 3)) == 3
        assert equal(state(second.student), state(whole.student))
        assert equal(state(second.generator), state(whole.generator))

    def test_sam_may_begin_later(self):
        run = training(sharpness=SAM, steps=4, sharp_from=0.5)
        assert ["sharp_loss" in f for f in advance(run, 4)] == [False, False, True, True]

    @pytest.mark.parametrize("rho", [0.0, 0.1])
    def test_parts_of_a_batch_are_the_batch(self, rho):
        """Two micro-batches of two are one of four, up to the order of sums."""
        whole = training(sharpness=SharpnessSettings(rho), generator_every=2)
        parts = training(sharpness=SharpnessSettings(rho), generator_every=2, batch_size=2)
        parts.execution = Execution(parts.student, parts=2)
        for _ in range(3):  # the third after a step of the generator
            one, two = whole.step(), parts.step()
            assert one.keys() == two.keys()
            assert all(one[name] == pytest.approx(two[name], rel=1e-5) for name in one)
            for p, q in zip(whole.trained, parts.trained, strict=True):
                if p.grad is not None:
                    assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-4 * torch.linalg.vector_norm(p.grad) + 1e-6

    def test_processes_share_a_batch(self):
        """Every process draws the same batch; the mean of their gradients is the whole's."""
        whole, shares = training(), [training(batch_size=2) for _ in range(2)]
        for rank, run in enumerate(shares):
            run.execution = Execution(run.student, rank=rank, world=2)
        losses = [run.step()["loss"] for run in shares]
        assert whole.step()["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        for p, *own in zip(whole.trained, *(run.trained for run in shares), strict=True):
            if p.grad is not None:
                mean = (own[0].grad + own[1].grad) / 2
                assert torch.linalg.vector_norm(p.grad - mean) <= 1e-4 * torch.linalg.vector_norm(p.grad) + 1e-6

    def test_static_inputs_have_learned_step_sizes(self):
        run = training()
        static = training_static()
        assert len(static.scales) > len(run.scales)
        before = [scale.clone() for scale in static.scales]
        advance(static, 3)
        moved = [not torch.equal(scale, old) for scale, old in zip(static.scales, before, strict=True)]
        assert sum(moved) > 0.9 * len(moved)

    def test_a_step_size_is_at_most_halved(self):
        run = training(scale_learning_rate=1e6, steps=1)
        before = [scale.clone() for scale in run.scales]
        advance(run, 1)
        assert all((scale >= 0.5 * old).all() for scale, old in zip(run.scales, before, strict=True))

    def test_a_step_size_keeps_its_sign(self):
        """Of four, two negative, all pushed towards zero and past it."""
        scale = nn.Parameter(torch.tensor([1.0, -1.0, 1e-7, -1e-7]))
        optimizer = torch.optim.SGD([scale], lr=10.0)
        keep_signs(optimizer, [scale])
        scale.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
        optimizer.step()
        assert torch.equal(scale.detach(), torch.tensor([0.5, -0.5, 1e-7, -1e-7]))
        scale.grad = torch.tensor([-1.0, 1.0, -1.0, 1.0])
        optimizer.step()
        assert (scale.detach().sign() == torch.tensor([1.0, -1.0, 1.0, -1.0])).all()
        assert (scale.detach().abs() > 5).all()

    def test_packs_into_what_was_trained(self):
        run = training()
        advance(run, 3)
        batch = run.generator.sample(4)
        with torch.no_grad():
            expected = run.student(**batch).logits
            found = pack(run.student)(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_bfloat16_matmuls_keep_float32_weights(self):
        run = training(autocast=torch.bfloat16)
        before = measure(run)
        advance(run, run.settings.steps)
        assert measure(run) < 0.9 * before
        assert {p.dtype for p in run.trained} == {torch.float32}


class TestBadInput:
    def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(self):
        run = training()
        advance(run, 1)
        before = state(run.student)
        run.teacher.get_parameter("bert.encoder.layer.0.output.dense.bias").data.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="became nan at step 2 of 20; the weights are those of step 1"):
            run.step()
        assert equal(state(run.student), before)
        assert all(layer.perturbation is None for _, layer in low_bit_layers(run.student))

    def test_a_student_without_low_bit_layers(self):
        teacher = make("bert-cls")
        run = training()
        with pytest.raises(ValueError, match="no fake-quantized layer to train; call prepare"):
            Minimax(teacher, copy.deepcopy(teacher), run.generator, run.settings, run.embed)

    def test_a_packed_student(self):
        run = training()
        with pytest.raises(ValueError, match="no fake-quantized layer to train; call prepare"):
            Minimax(make("bert-cls"), pack(run.student), run.generator, run.settings, run.embed)

    def test_a_student_that_is_its_teacher(self):
        teacher, run = make("bert-cls"), training()
        student = copy.copy(teacher)
        prepare(student, PreQuantConfig().scheme())
        with pytest.raises(ValueError, match="teacher and student share weights; make the student from copy.deepcopy"):
            Minimax(teacher, student, run.generator, run.settings, run.embed)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"steps": 0}, "steps=0 is no count; use an integer of at least 1"),
            ({"batch_size": 1.5}, "batch_size=1.5 is no count"),
            ({"generator_every": -1}, r"generator_every=-1 is no count; use 0 \(never\)"),
            ({"learning_rate": 0.0}, "learning_rate=0.0 is not allowed; use a number above 0"),
            ({"max_norm": math.inf}, "max_norm=inf is not allowed"),
            ({"entropy": -0.1}, "entropy=-0.1 is not allowed; use a number of at least 0"),
            ({"sharp_from": 1.5}, "sharp_from=1.5 is no share of the steps; use a number from 0 to 1"),
            ({"output": "l1"}, r"output='l1' is unknown; use one of \('kl', 'mse', 'none'\)"),
            ({"hidden_weight": 0.0}, "nothing to learn from"),
            ({"hidden_weight": 0.0, "output": "none", "output_weight": 1.0}, "nothing to learn from"),
        ],
        ids=lambda v: str(v)[:30],
    )
    def test_settings(self, fields, message):
        with pytest.raises(ValueError, match=message):
            MinimaxSettings(**fields)
