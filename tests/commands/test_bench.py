"""`optimum-cli zsaq bench` on tiny models: real contestants in real processes, and what is written."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from optimum.commands.optimum_cli import main
from tiny_models import make

from optimum_zsaq.report import bench


FAST = ("--rounds", 2, "--min-seconds", 0)


def cli(monkeypatch, *arguments) -> int:
    """Run the command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "zsaq", "bench", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("bert-cls", ("--batch", "1x9", "2x7"), ["1x9", "2x7"]),
        pytest.param(
            "llama-tied",
            ("--batch", "1x9", "--new-tokens", 3),
            ["decode 3", "prefill 1x9"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_end_to_end(monkeypatch, capsys, tmp_path, name, options, names):
    model, out = tmp_path / "model", tmp_path / "new" / "out"
    make(name).save_pretrained(model)
    who = ("--contestants", "torch-ao", "zsaq-w8a8")
    assert cli(monkeypatch, "--model", model, "--output", out, *FAST, *options, *who) == 0
    shown = capsys.readouterr().out
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert "bench.json" in [f.name for f in out.iterdir()]
    result = json.loads((out / "bench.json").read_text())
    assert [workload["name"] for workload in result["workloads"]] == names
    assert result["command"].startswith("optimum-cli zsaq bench --model ")
    assert "--output" not in result["command"]
    assert result["model"]["parameters"] == sum(p.numel() for p in make(name).parameters())
    for contestant, entry in result["contestants"].items():
        assert (entry["status"], entry["reason"]) == ("ok", None), contestant
        assert contestant in shown
        assert 0 < entry["error"] < 0.1
        assert entry["disk_bytes"] > 0
        assert list(entry["results"]) == names
        for samples in entry["samples"].values():
            assert [sample["round"] for sample in samples] == [0, 1]
    ours, theirs = result["contestants"]["zsaq-w8a8"], result["contestants"]["torch-ao"]
    assert ours["disk_bytes"] < theirs["disk_bytes"]
    assert (ours["quantizes_on_load"], theirs["quantizes_on_load"]) == (False, True)
    assert theirs["results"][names[0]]["ratio"] == 1.0
    assert "x torch-ao" in shown
    assert f"saved to {out}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --model and --shape"),
        (("--shape", "bert"), "--shape bert is unknown; use one of bert-base, llama-450m, smollm2-135m, t5-small"),
        (("--shape", "bert-base", "--batch", "8"), "--batch 8 is no batch; write rows x tokens, such as 1x128"),
        (("--shape", "bert-base", "--contestants", "zsaq-w8"), "did you mean zsaq-w8a8"),
        (("--shape", "bert-base", "--threads", "0"), "--threads 0 is no count"),
        (
            ("--model", "no/such/model", "--contestants", "torch-ao"),
            "the float model does not run: ValueError: there is no model at 'no/such/model'",
        ),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, message):
    assert cli(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(monkeypatch, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert cli(monkeypatch, "--shape", "bert-base", "--output", tmp_path / "out") == 1
    assert "exists and is not empty; nothing is overwritten, choose another --output" in capsys.readouterr().err


ENTRY = {
    "title": "t", "quantizes_on_load": False, "status": "ok", "reason": None, "traceback": None,
    "prepare_seconds": 1.0, "disk_bytes": 2048, "load_seconds": {"wall": 1.0, "cpu": 1.0}, "memory": None, "error": 0.5,
    "samples": {}, "results": {"1x9": {"seconds": 0.1234, "interval": [0.1, 0.2], "ratio": None, "ratio_interval": None}},
}  # fmt: skip
MACHINE = {"system": "s", "python": "3.11", "load_average_before": 0.1, "load_average_after": 0.2}
MISSING = {**ENTRY, "status": "skipped", "reason": "torchao is not installed; run: pip install torchao", "results": {}}


@pytest.fixture
def canned(monkeypatch):
    """A result without measuring."""
    result = {
        "format": 1,
        "model": {"name": "m", "kind": "encoder", "random_weights": True, "parameters": 10**6, "architecture": "M"},
        "settings": {"baseline": "torch-ao", "threads": 2, "clock": "wall", "rounds": 3},
        "machine": {"processor": "p", "flags": ["avx2"], "cores": 2, "versions": {"torch": "2"}, **MACHINE},
        "workloads": [{"name": "1x9", "rate": False, "steps": 0}],
        "contestants": {"zsaq-w8a8": ENTRY, "torchao-int8": MISSING},
        "seconds": 3.0,
    }
    monkeypatch.setattr(bench, "run_bench", lambda settings: result)
    return result


def test_who_is_missing_is_shown(monkeypatch, capsys, canned):
    assert cli(monkeypatch, "--shape", "bert-base") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  torchao-int8: skipped, torchao is not installed; run: pip install torchao" in lines
    assert lines[0] == "m: M, 1.0 M parameters, random weights"
    assert any(line.split()[:4] == ["zsaq-w8a8", "123", "100-200", "-"] for line in lines)
    assert "2 threads, wall time" in lines[1]


def test_json(monkeypatch, capsys, canned):
    assert cli(monkeypatch, "--shape", "bert-base", "--json", "--batch", "1x9", "2x9") == 0
    result = json.loads(capsys.readouterr().out)
    assert "--shape bert-base --batch 1x9 2x9 --threads 1" in result["command"]


def test_without_matplotlib_only_the_figure_is_missing(monkeypatch, capsys, canned, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli(monkeypatch, "--shape", "bert-base", "--output", tmp_path / "out") == 0
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["bench.json"]
    assert "no bench.png: the figure needs matplotlib; run: pip install" in capsys.readouterr().err


def test_interrupted_writing_leaves_nothing(monkeypatch, capsys, canned, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_zsaq.report.bench_plot.draw", interrupted)
    assert cli(monkeypatch, "--shape", "bert-base", "--output", tmp_path / "out") == 130
    assert list(tmp_path.iterdir()) == []


def test_page_for_the_documentation(monkeypatch, capsys, canned, tmp_path):
    """`examples/study/performance.py` writes the page of saved results and says whether it is up to date."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "study"))
    for name in ("bootstrap", "prequant_tables", "performance"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    performance = importlib.import_module("performance")
    assert cli(monkeypatch, "--shape", "bert-base", "--output", tmp_path / "out") == 0
    page = tmp_path / "performance.md"

    def write(*options) -> int:
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "out" / "bench.json"), "--write", str(page), *options])
        return performance.main()

    assert write("--check") == 1
    assert not page.exists()
    assert write() == 0
    assert write("--check") == 0
    text = page.read_text()
    assert "| **zsaq-w8a8** | 123 [100, 200] | – |" in text
    assert "- `torchao-int8`: skipped, torchao is not installed" in text
    assert "optimum-cli zsaq bench --shape bert-base" in text
    assert str(tmp_path) not in text
    (tmp_path / "out" / "bench.json").write_text("[]")
    with pytest.raises(ValueError, match="is no result of `optimum-cli zsaq bench`"):
        write()
