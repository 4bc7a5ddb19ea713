"""The bench: statistics, what is timed, contestants, processes that fail or die; with real models in
`tests/commands/test_bench.py`. No test looks at a time."""

import json
import os
import sys
import textwrap

import numpy as np
import pytest
import torch
from tiny_models import make

from optimum_zsaq.report import bench_process, contestants
from optimum_zsaq.report import bench_worker as bw
from optimum_zsaq.report.bench import BenchSettings, Entry, run_bench, shuffled_orders, summarize
from optimum_zsaq.report.bench_plot import draw, values
from optimum_zsaq.report.bench_process import WorkerProcess
from optimum_zsaq.report.bench_statistics import median_interval, paired_ratio
from optimum_zsaq.report.contestants import CONTESTANTS, Contestant, find_contestant, why_skipped
from optimum_zsaq.report.machine import describe_machine, too_little_memory
from optimum_zsaq.report.workloads import (
    KINDS,
    Runner,
    Workload,
    check_outputs,
    kind_of_model,
    parse_batch,
    token_batch,
    workloads,
)


class TestStatistics:
    def test_median_and_interval(self):
        values = np.random.default_rng(0).normal(10.0, 1.0, 400)
        median, low, high = median_interval(values)
        assert median == np.median(values)
        assert low < median < high
        assert 0.15 < high - low < 0.35  # 2 * 1.96 * 1.2533 / sqrt(400) = 0.246
        assert median_interval(values) == (median, low, high)
        assert median_interval([3.0]) == (3.0, 3.0, 3.0)

    def test_median_of_nothing(self):
        with pytest.raises(ValueError, match="at least one value"):
            median_interval([])

    def test_ratios_pair_the_rounds(self):
        """Rounds that are slow for both leave the ratio alone; unpaired, the two medians would say 3."""
        baseline = {0: 1.0, 1: 10.0, 2: 1.0, 3: 10.0, 4: 1.0}
        times = {round_number: 0.5 * time for round_number, time in baseline.items()}
        assert paired_ratio(times, baseline) == (0.5, 0.5, 0.5)
        assert paired_ratio({0: 3.0, 7: 99.0}, baseline) == (3.0, 3.0, 3.0)
        assert paired_ratio({7: 99.0}, baseline) is None

    def test_summary(self):
        def samples(*cpu):
            return {"a": [{"round": r, "calls": 2, "cpu": 2 * c, "wall": 9.0} for r, c in enumerate(cpu)]}

        entries = {"base": Entry("b", samples=samples(2.0, 4.0, 6.0)), "fast": Entry("f", samples=samples(1.0, 2.0, 3.0))}
        settings = BenchSettings(shape="bert-base", contestants=("torch-fp32", "torch-ao"))
        object.__setattr__(settings, "contestants", ("base", "fast"))
        summarize(entries, settings)
        assert entries["fast"].results["a"]["seconds"] == 2.0
        assert entries["fast"].results["a"]["ratio"] == 0.5
        entries["base"].fail("failed", "why")
        entries["base"].results.clear()
        summarize(entries, settings)
        assert entries["fast"].results["a"]["ratio"] is None
        assert entries["fast"].results["a"]["ratio_interval"] is None
        assert entries["base"].results == {}

    def test_tokens_a_second(self):
        found = {"seconds": 0.5, "interval": [0.25, 1.0]}
        assert values(found, {"rate": True, "steps": 10}) == (20.0, 10.0, 40.0)
        assert values(found, {"rate": False, "steps": 0}) == (500.0, 250.0, 1000.0)


def test_orders_are_shuffled_and_repeat_with_the_seed():
    orders = shuffled_orders(["a", "b", "c", "d"], 2, 20, 0)
    assert [len(order) for order in orders] == [2] * 20
    assert all(sorted(names) == ["a", "b", "c", "d"] for order in orders for names in order)
    assert len({tuple(names) for order in orders for names in order}) > 10
    assert orders == shuffled_orders(["a", "b", "c", "d"], 2, 20, 0)
    assert orders != shuffled_orders(["a", "b", "c", "d"], 2, 20, 1)


class TestWorkloads:
    @pytest.mark.parametrize("text", ["8", "x128", "0x4", "8x", "8x-1", "axb", "1x2x3"])
    def test_wrong_batch(self, text):
        with pytest.raises(ValueError, match=f"--batch {text} is no batch; write rows x tokens"):
            parse_batch(text)

    def test_names(self):
        assert parse_batch("8X128") == (8, 128)
        assert [w.name for w in workloads("encoder", ["1x8", "2x8", "1x8"], 1)] == ["1x8", "2x8"]
        assert [w.name for w in workloads("decoder", ["1x8"], 5)] == ["decode 5", "prefill 1x8"]
        assert [w.name for w in workloads("encoder-decoder", ["1x8"], 5)] == ["1x8 + 5 tokens"]

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("bert", "encoder"),
            ("bert-mlm-tied", "encoder"),
            ("llama-tied", "decoder"),
            ("llama-cls", "encoder"),
            ("gpt2-tied", "decoder"),
            ("t5-tied", "encoder-decoder"),
            ("bart-cls", "encoder"),
        ],
    )
    def test_kind_and_running(self, name, kind):
        model = make(name)
        model.config.architectures = [type(model).__name__]
        assert kind_of_model(model.config) == kind
        with torch.no_grad():
            outputs = check_outputs(model, kind, model.config, 0)
            assert outputs.dim() == 1
            assert outputs.dtype == torch.float32
            assert torch.equal(outputs, check_outputs(model, kind, model.config, 0))
            for workload in workloads(kind, ["2x9"], 3):
                runner = Runner(model, workload, model.config, 0)
                for _ in range(2):
                    runner.reset()
                    runner.run()

    def test_decoding_starts_again_from_the_prompt(self):
        model = make("llama-tied")
        runner = Runner(model, Workload("decode", "decode", 1, 6, 3), model.config, 0)
        with torch.no_grad():
            for _ in range(3):
                runner.reset()
                assert runner.cache.get_seq_length() == 6
                runner.run()
                assert runner.cache.get_seq_length() == 9

    def test_cached_steps_are_part_of_the_check(self):
        """A decoder's outputs step by step are those of one forward."""
        model = make("llama-tied").eval()
        with torch.no_grad():
            found = check_outputs(model, "decoder", model.config, 0)
            ids = token_batch(model.config, 2, 24, 0)["input_ids"]
            assert (ids == 2).nonzero().tolist() == [[0, 23], [1, 23]]
            torch.testing.assert_close(found, model(input_ids=ids).logits.flatten(), rtol=0, atol=1e-5)


class TestContestants:
    def test_entries(self):
        for name, contestant in CONTESTANTS.items():
            assert contestant.title
            assert set(contestant.kinds) <= set(KINDS), name
        assert {"torch-ao", "zsaq-w8a8", "zsaq-w2a8-small"} <= set(contestants.default_contestants())
        assert not any("compiled" in name for name in contestants.default_contestants())

    def test_same_checkpoint_whatever_the_runtime(self):
        assert CONTESTANTS["zsaq-w4a8"].checkpoint == CONTESTANTS["zsaq-w4a8-small"].checkpoint
        assert CONTESTANTS["zsaq-w4a8"].checkpoint != CONTESTANTS["zsaq-w4a8-bf16"].checkpoint

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"torch-a0 is unknown; did you mean torch-ao\?"):
            find_contestant("torch-a0")
        with pytest.raises(ValueError, match="module:ATTRIBUTE"):
            find_contestant("no_such_module:MINE")
        with pytest.raises(ValueError, match="is a dict; it must be a Contestant"):
            find_contestant("optimum_zsaq.report.contestants:CONTESTANTS")

    def test_missing_package_and_wrong_kind_are_told(self):
        contestant = Contestant("t", lambda folder, job: None, packages=("json", "no_such.package"), kinds=("encoder",))
        assert why_skipped(contestant, "encoder") == "no_such.package is not installed; run: pip install no_such.package"
        assert "on encoder models only here, and this is a decoder model" in why_skipped(contestant, "decoder")
        assert why_skipped(CONTESTANTS["torch-ao"], "decoder") is None


class TestSettings:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "give one of --model and --shape; shapes are bert-base, llama-450m, smollm2-135m, t5-small"),
            ({"shape": "bert-base", "model": "x"}, "give one of --model and --shape"),
            ({"shape": "bert"}, "--shape bert is unknown; use one of bert-base"),
            ({"shape": "bert-base", "threads": 0}, "--threads 0 is no count; use 1 or more"),
            ({"shape": "bert-base", "rounds": -1}, "--rounds -1 is no count"),
            ({"shape": "bert-base", "new_tokens": 0}, "--new-tokens 0 is no count"),
            ({"shape": "bert-base", "min_seconds": -0.1}, "--min-seconds -0.1 is too short; use 0 or more"),
            ({"shape": "bert-base", "timeout": 0}, "--timeout 0 is too short"),
            ({"shape": "bert-base", "batches": ("8y128",)}, "--batch 8y128 is no batch"),
            ({"shape": "bert-base", "contestants": ("nobody",)}, "--contestants nobody is unknown"),
            ({"shape": "bert-base", "baseline": "nobody"}, "--baseline nobody takes no part"),
        ],
    )
    def test_wrong(self, fields, message):
        with pytest.raises(ValueError, match=message):
            BenchSettings(**fields)

    def test_baseline(self):
        assert BenchSettings(shape="bert-base").baseline_name == "torch-ao"
        assert BenchSettings(shape="bert-base", contestants=("zsaq-w8a8", "torch-fp32")).baseline_name == "zsaq-w8a8"
        assert BenchSettings(shape="bert-base", threads=2).clock == "wall"


def test_machine():
    found = describe_machine()
    assert found["processor"]
    assert found["cores"] >= 1
    assert {"torch", "transformers", "optimum-zsaq"} <= found["versions"].keys()
    json.dumps(found)


def test_too_little_memory_is_told():
    assert too_little_memory(10**9, lambda: 100 * 2**30) is None
    assert too_little_memory(10**9, lambda: None) is None
    assert "8.2 GiB and 2.0 GiB are free" in too_little_memory(10**9, lambda: 2 * 2**30)


# Processes -----------------------------------------------------------------------------------------------------------

FAKE = """
import json, os, signal, sys, time
name, samples = None, 0
for line in sys.stdin:
    request = json.loads(line)
    do, name = request["do"], request.get("contestant", name)
    reply = {"reference": {"parameters": 7, "architecture": "Fake"}, "prepare": {"seconds": 0.5}}.get(do, {})
    if do == "describe":
        config = json.load(open(request["model"] + "/config.json"))
        reply = {"kind": "decoder", "longest": 80, "quantized": "quantization_config" in config}
    if do == "prepare":
        os.mkdir(request["folder"])
    if do == "load":
        print("a warning", file=sys.stderr, flush=True)
        if name == "torch-bf16":
            reply = {"failed": "ValueError: it does not fit " + request["folder"], "traceback": "where"}
        elif name == "torchao-int8":
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            reply = {"disk_bytes": 5, "load_seconds": {"wall": 1.0, "cpu": 1.0}, "memory": None}
    if do == "warm":
        reply = {"error": 0.25, "memory": None}
    if do == "sample":
        samples += 1
        if name == "torch-fp32" and samples == 3:
            sys.exit("no more")
        if name == "zsaq-w8a8" and os.environ.get("FAKE_HANGS"):
            time.sleep(60)
        reply = {"calls": 2, "cpu": 0.5, "wall": 1.0}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Workers that answer at once, and a folder with a config."""
    (tmp_path / "fake_worker.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(bench_process, "WORKER", "fake_worker")
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: object())
    for name in ("model", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def run(*names, **settings):
        fields = {"batches": ("1x8",), "rounds": 4, "min_seconds": 0.0, "timeout": 30.0, **settings}
        return run_bench(BenchSettings(model=str(tmp_path / "model"), contestants=names, **fields), tmp_path / "run")

    run.folder = tmp_path / "run"
    return run


def test_those_that_fail_are_told_and_the_others_go_on(fake):
    names = ("zsaq-w8a8", "torch-bf16", "torchao-int8", "torch-fp32", "onnxruntime-fp32", "torch-ao")
    result = fake(*names)
    found = result["contestants"]
    assert list(found) == list(names)
    states = {name: (entry["status"], entry["reason"]) for name, entry in found.items()}
    assert states["zsaq-w8a8"] == states["torch-ao"] == ("ok", None)
    assert states["torch-bf16"] == ("failed", "ValueError: it does not fit checkpoint-1")
    assert states["torchao-int8"] == (
        "failed",
        "its process died (SIGKILL, often too little memory) | a warning | last words",
    )
    assert states["torch-fp32"] == ("failed", "its process died (exit code 1) | a warning | no more")
    assert states["onnxruntime-fp32"][0] == "skipped"
    assert [w["name"] for w in result["workloads"]] == ["decode 32", "prefill 1x8"]
    assert [len(part) for part in found["zsaq-w8a8"]["samples"].values()] == [4, 4]
    assert {s["position"] for s in found["zsaq-w8a8"]["samples"]["decode 32"]} <= set(range(3))
    assert found["zsaq-w8a8"]["results"]["decode 32"]["seconds"] == 0.25
    assert found["zsaq-w8a8"]["results"]["decode 32"]["ratio"] == 1.0
    assert found["torch-fp32"]["results"] == {}
    assert result["settings"]["clock"] == "cpu"
    assert list(fake.folder.iterdir()) == []
    json.dumps(result)


def test_one_that_hangs_is_ended(fake, monkeypatch):
    monkeypatch.setenv("FAKE_HANGS", "1")
    result = fake("zsaq-w8a8", "torch-ao", timeout=2.0)
    assert "gave no answer within 2 s; --timeout" in result["contestants"]["zsaq-w8a8"]["reason"]
    assert result["contestants"]["torch-ao"]["status"] == "ok"


def test_interrupt_leaves_nothing_behind(fake, monkeypatch):
    started = []
    ask = WorkerProcess.ask

    def interrupted(self, **request):
        started.append(self._process)
        if request["do"] == "sample":
            raise KeyboardInterrupt
        return ask(self, **request)

    monkeypatch.setattr(WorkerProcess, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fake("zsaq-w8a8", "torch-ao")
    assert len(set(started)) == 4
    assert all(process.poll() is not None for process in started)
    assert list(fake.folder.iterdir()) == []


def test_lengths_that_the_model_does_not_read(fake):
    with pytest.raises(ValueError, match="--new-tokens 70 after 16 is more than the 80 tokens"):
        fake("torch-ao", new_tokens=70)
    with pytest.raises(ValueError, match="--batch 1x81 is more than the 80 tokens"):
        fake("torch-ao", batches=("1x81",))
    assert list(fake.folder.iterdir()) == []


def test_a_model_that_is_quantized_already(fake, tmp_path):
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match="is quantized already; give --model the float model"):
        fake("torch-ao")


class TestWorker:
    def test_errors_are_answers(self):
        reply = bw.answer(bw.Worker(), json.dumps({"do": "sample", "workload": 0, "seconds": 0.0}))
        assert reply["failed"] == "IndexError: list index out of range"
        assert reply["traceback"].splitlines()[-1].startswith("optimum_zsaq/report/bench_worker.py:")

    def test_memory(self):
        found = bw.memory()
        if found is None:
            pytest.skip("this system has no /proc")
        assert found["peak"] >= found["resident"] > found["anonymous"] > 0

    def test_disk_bytes(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name, size in (("model.safetensors", 10), ("sub/config.json", 3), ("tokenizer.json", 100), ("README.md", 50)):
            (tmp_path / name).write_bytes(b"x" * size)
        assert bw.disk_bytes(tmp_path) == 13


class TestFigure:
    def result(self, **results):
        return {
            "model": {"name": "m"},
            "machine": {"processor": "p"},
            "settings": {"baseline": "torch-ao", "clock": "cpu", "threads": 1, "rounds": 2},
            "workloads": [{"name": "1x8", "rate": False, "steps": 0}, {"name": "decode 4", "rate": True, "steps": 4}],
            "contestants": results,
        }

    def test_png(self, tmp_path):
        pytest.importorskip("matplotlib")
        times = {name: {"seconds": 0.5, "interval": [0.4, 0.7]} for name in ("1x8", "decode 4")}
        memory = {"warm": 3 * 2**20}
        entries = {"zsaq-w8a8": {"results": times, "memory": memory}, "torch-ao": {"results": times, "memory": None}}
        draw(self.result(**entries, broken={"results": {}, "memory": None}), tmp_path / "b.png")
        assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_to_draw(self, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(self.result(broken={"results": {}, "memory": None}), tmp_path / "b.png")

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        with pytest.raises(ImportError, match=r"pip install 'optimum-zsaq\[bench\]'"):
            draw(self.result(), tmp_path / "b.png")
