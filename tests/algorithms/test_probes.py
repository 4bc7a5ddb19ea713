import copy
import errno
from unittest.mock import Mock

import torch
from algorithms.test_minimax import advance, training

from optimum_zsaq.algorithms.forms import InputMixture, SequenceForm
from optimum_zsaq.algorithms.generators import PriorSource, WrittenSource
from optimum_zsaq.algorithms.probes import ROUNDED, Guard, RepeatedSource, ReversedSource, hold_out, make_probes


def watched(**settings):
    run = training(**settings)
    guard = Guard(run, make_probes(run.generator, run.generator.source, 7))
    guard.measure(ROUNDED)
    return run, guard


def weights(run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.trained]


def equal(one: list, other: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def spoil(run, by: float = 5.0) -> None:
    with torch.no_grad():
        for p in run.weights:
            p.add_(by * torch.randn_like(p))


class TestProbes:
    def test_are_of_every_kind_and_not_the_trainings(self):
        run = training()
        probes = {probe.name: probe for probe in make_probes(run.generator, run.generator.source, 7)}
        assert list(probes) == [
            "single text",
            "single text, reversed text",
            "single text, a flatter prior",
            "single text, uniform tokens",
            "single text, repeated tokens",
        ]
        assert [probe.name for probe in probes.values() if not probe.unlike] == ["single text"]
        for batch in probes["single text, repeated tokens"].batches:
            inner = batch["input_ids"][:, 1:-1]
            assert torch.equal(inner, inner[:, :1].expand_as(inner))

    def test_of_sequences_of_one_length_with_special_tokens(self):
        """As a decoder's that begins with a token: what was written is shorter than the sequences."""
        run = training()
        form = SequenceForm((1,), (), 12, 12)
        source = WrittenSource(torch.randint(3, 90, (40, 11)))
        probes = make_probes(run.generator.another(source, InputMixture((form,)), 0), source, 7)
        assert [batch["input_ids"].shape for batch in probes[0].batches] == [(8, 8), (8, 12), (8, 12)]

    def test_do_not_move_the_trainings_random_numbers(self):
        run = training()
        before = run.generator.random.get_state()
        make_probes(run.generator, run.generator.source, 7)
        assert torch.equal(run.generator.random.get_state(), before)

    def test_of_written_sequences_are_kept_from_training(self):
        own, other = hold_out(WrittenSource(torch.arange(64)[:, None].expand(-1, 5)))
        assert set(own.written.flatten().tolist()) | set(other.written.flatten().tolist()) == set(range(64))
        assert not set(own.written.flatten().tolist()) & set(other.written.flatten().tolist())
        prior = PriorSource(torch.ones(5))
        assert hold_out(prior) == (prior, prior)

    def test_sources(self):
        random = torch.Generator().manual_seed(0)
        written = WrittenSource(torch.arange(9)[None])
        assert ReversedSource(written).draw(1, 9, random)["input_ids"].tolist() == [list(range(8, -1, -1))]
        drawn = RepeatedSource(torch.ones(40)).draw(9, 4, random)["input_ids"]
        assert torch.equal(drawn, drawn[:, :1].expand(9, 4))
        assert drawn[:, 0].unique().numel() > 3


class TestTheGuard:
    def test_gives_back_what_training_reached(self):
        run, guard = watched()
        advance(run, 20)
        guard.measure("trained")
        after = weights(run)
        assert not guard.worse["trained"]
        assert guard.distance("trained") < 1.0
        assert guard.restore() == "trained"
        assert equal(weights(run), after)

    def test_gives_back_rounding_if_nothing_else_is_as_good(self):
        run, guard = watched()
        before = weights(run)
        spoil(run)
        guard.measure("trained")
        assert guard.worse["trained"]
        assert guard.restore() == ROUNDED
        assert equal(weights(run), before)

    def test_gives_back_a_state_on_the_way(self):
        run, guard = watched()
        advance(run, 20)
        guard.measure("step 20")
        good = weights(run)
        spoil(run)
        guard.measure("trained")
        assert guard.restore() == "step 20"
        assert equal(weights(run), good)

    def test_what_is_not_finite_is_worse(self):
        run, guard = watched()
        with torch.no_grad():
            run.weights[0].fill_(float("nan"))
        guard.measure("trained")
        assert guard.restore() == ROUNDED
        assert all(torch.isfinite(p).all() for p in run.trained)
        assert guard.measured["trained"]["single text"].means()["output"] is None

    def test_one_probe_decides(self):
        """A state that is nearer on all inputs of training, and farther on one that it never saw, is not kept."""
        run, guard = watched()
        advance(run, 20)
        found = guard.measure("trained")
        name = "single text, repeated tokens"
        found[name].output.add_(1.0)
        guard._best = ROUNDED
        other = Guard(run, guard.probes)
        other.measured[ROUNDED] = guard.measured[ROUNDED]
        other._found = lambda probe: found[probe.name]
        other.measure("trained")
        assert other.worse["trained"] == [name]
        assert other.chosen == ROUNDED

    def test_goes_on_from_its_state(self):
        run, guard = watched()
        advance(run, 20)
        guard.measure("step 20")
        kept = copy.deepcopy(guard.state_dict())
        other = Guard(run, guard.probes)
        other.load_state_dict(kept)
        assert other.chosen == "step 20"
        assert other.distance("step 20") == guard.distance("step 20")
        good = weights(run)
        spoil(run)
        other.restore()
        assert equal(weights(run), good)

    def test_keeps_its_state_in_memory_where_the_disk_is_full(self, monkeypatch, caplog):
        run, guard = watched()
        advance(run, 20)
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(guard._kept._file, "write", Mock(side_effect=full), raising=False)
        guard.measure("step 20")
        assert "No space left on device" in caplog.text
        good = weights(run)
        spoil(run)
        assert guard.restore() == "step 20"
        assert equal(weights(run), good)

    def test_asks_for_more_than_a_small_gain(self, monkeypatch):
        run, guard = watched()
        advance(run, 20)
        gained = guard._found
        guard.measure("trained")
        share = guard.distance("trained")
        assert guard.chosen == "trained"
        hidden = guard.discrepancy("trained")
        monkeypatch.setattr("optimum_zsaq.algorithms.probes._ANYWHERE", 1.0)
        cases = [(share * 0.99, 1.0, ROUNDED), (share * 1.01, hidden * 1.01, "trained"), (1.0, hidden * 0.99, "trained")]
        for below, half, chosen in (*cases, (share * 1.01, hidden * 0.99, ROUNDED)):
            monkeypatch.setattr("optimum_zsaq.algorithms.probes._HALF", half)
            other = Guard(run, guard.probes, below=below)
            other.measured[ROUNDED] = guard.measured[ROUNDED]
            other._found = gained
            other.measure("trained")
            assert other.chosen == chosen

    def test_asks_it_of_the_hidden_states_on_each_probe_alone(self, monkeypatch):
        """What a source that writes one thing only wins is won on that thing."""
        run, guard = watched()
        advance(run, 20)
        found = guard.measure("trained")
        monkeypatch.setattr("optimum_zsaq.algorithms.probes._HALF", 1.0)
        widest = max(guard.discrepancy("trained", [probe.name]) for probe in guard.probes)
        assert guard.distance("trained") < 0.99 > widest > guard.discrepancy("trained")
        cases = [(0.99, 1.01 * widest, "trained"), (0.99, 0.99 * widest, ROUNDED), (1.0, 0.99 * widest, "trained")]
        for below, anywhere, chosen in cases:
            monkeypatch.setattr("optimum_zsaq.algorithms.probes._ANYWHERE", anywhere)
            other = Guard(run, guard.probes, below=below)
            other.measured[ROUNDED] = guard.measured[ROUNDED]
            other._found = lambda probe: found[probe.name]
            other.measure("trained")
            assert other.chosen == chosen

    def test_that_keeps_nothing_still_measures(self):
        run, _ = watched()
        guard = Guard(run, make_probes(run.generator, run.generator.source, 7), keeps=False)
        guard.measure(ROUNDED)
        advance(run, 20)
        guard.measure("trained")
        assert guard.distance("trained") < 1.0
        assert guard.chosen == ROUNDED

    def test_of_a_model_without_outputs(self):
        run, guard = watched(name="bert")
        assert set(guard.measured[ROUNDED]["single text"].means()) == {"discrepancy"}
        advance(run, 20)
        guard.measure("trained")
        assert guard.distance("trained") < 1.0
