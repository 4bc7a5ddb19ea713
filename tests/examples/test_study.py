"""The study runner: resume, torn lines, failing and dying cells, Ctrl-C; the docs' tables are those of the results."""

import ast
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "study"

TOY = """
import os, time
from pathlib import Path
from runner import Cell

def cells():
    return [Cell("toy", f"n{n}", "count", settings={"n": n}) for n in range(5)]

def run_cell(cell, data):
    (data / "ran").open("a").write(cell.id + "\\n")
    n = cell.settings["n"]
    if (data / f"fail{n}").exists():
        raise ValueError("this cell does not work")
    if (data / f"die{n}").exists():
        os._exit(7)
    if (data / f"wait{n}").exists():
        time.sleep(60)
    return {"square": n * n}

def tables(rows):
    return {"squares": "\\n".join(f"| {row['square']} |" for _, row in sorted(rows.items()))}
"""
IDS = [f"count/toy/n{n}/0" for n in range(5)]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The runner's modules, a study "toy" beside them, and an empty data folder."""
    for name in ("bootstrap", "prequant", "prequant_tables", "runner", "tables", "toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "data").mkdir()
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.syspath_prepend(str(tmp_path))
    import runner

    def run(workers: int = 1) -> int:
        return runner.run_study("toy", tmp_path / "data", tmp_path / "toy.jsonl", workers)

    runner.start = run
    return runner


def ran(folder: Path) -> list[str]:
    """The cells that ran, each time they did."""
    return sorted((folder / "data" / "ran").read_text().split())


def test_cells_run_once_and_are_described(study, tmp_path):
    assert study.start(workers=2) == 0
    rows = study.read_results(tmp_path / "toy.jsonl")
    assert {name: row["square"] for name, row in rows.items()} == {name: n * n for n, name in enumerate(IDS)}
    row = rows[IDS[3]]
    assert (row["method"], row["scheme"], row["task"], row["seed"]) == ("toy", "n3", "count", 0)
    assert row["machine"]["threads"] == 1
    assert {"python", "torch", "transformers", "optimum_zsaq"} == set(row["versions"])
    assert {"cpu", "threads"} == set(row["machine"])
    assert {"seconds", "date", "commit"} < set(row)
    assert study.start() == 0
    assert ran(tmp_path) == IDS


def test_a_torn_line_is_run_again(study, tmp_path):
    file = tmp_path / "toy.jsonl"
    whole = [json.dumps({"cell": name, "square": -1}) for name in IDS[:3]]
    file.write_text("\n".join(whole)[:-5])
    assert set(study.read_results(file)) == set(IDS[:2])
    assert study.start() == 0
    assert ran(tmp_path) == IDS[2:]
    lines = file.read_text().splitlines()
    assert lines[:2] == whole[:2]
    assert {json.loads(line)["cell"] for line in lines} == set(IDS)


def test_a_line_that_is_no_result(study, tmp_path):
    (tmp_path / "toy.jsonl").write_text('{"square": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no result: .*; delete that line"):
        study.start()


@pytest.mark.parametrize(("kind", "message"), [("fail", "this cell does not work"), ("die", "ended with exit code 7")])
def test_a_cell_that_fails_loses_no_other(study, tmp_path, capsys, kind, message):
    (tmp_path / "data" / f"{kind}1").touch()
    assert study.start() == 1
    assert message in capsys.readouterr().out
    assert set(study.read_results(tmp_path / "toy.jsonl")) == {*IDS[:1], *IDS[2:]}
    (tmp_path / "data" / f"{kind}1").unlink()
    assert study.start() == 0
    assert set(study.read_results(tmp_path / "toy.jsonl")) == set(IDS)


def test_two_cells_with_one_id(study, tmp_path):
    (tmp_path / "toy.py").write_text(TOY.replace('f"n{n}"', '"n"'))
    with pytest.raises(ValueError, match="two cells with the same id"):
        study.start()


def test_interrupted_run_keeps_what_is_finished(study, tmp_path):
    (tmp_path / "data" / "wait2").touch()
    for file in ("run.py", "runner.py"):
        (tmp_path / file).write_text((STUDY / file).read_text())
    command = [sys.executable, "run.py", "toy", "--data", "data", "--results", ".", "--workers", "1"]
    # whoever started the tests in the background of a script has SIGINT ignored, which a child would inherit
    options = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **options)
    marker, deadline = tmp_path / "data" / "ran", time.monotonic() + 60
    while not (marker.exists() and IDS[2] in marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; finished cells are kept" in said
    assert set(study.read_results(tmp_path / "toy.jsonl")) == set(IDS[:2])


def test_unknown_study(tmp_path):
    command = [sys.executable, STUDY / "run.py", "nothing", "--data", tmp_path, "--results", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no study 'nothing'" in done.stderr


# Tables


def test_fill_replaces_what_is_between_markers(study):
    import tables

    text = "a\n<!-- table:one -->\nold\n<!-- /table -->\nb\n"
    filled = tables.fill(text, {"one": "new"})
    assert filled == "a\n<!-- table:one -->\nnew\n<!-- /table -->\nb\n"
    assert tables.fill(filled, {"one": "new"}) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:one -->\n", "has no <!-- /table --> after it"),
        ("<!-- table:one -->\n<!-- table:two -->\n<!-- /table -->\n", "has no <!-- /table --> after it"),
        ("<!-- table:two -->\n<!-- /table -->\n", r"marks tables \['two'\] that .* lacks markers for \['one'\]"),
    ],
)
def test_fill_errors(study, text, message):
    import tables

    with pytest.raises(ValueError, match=message):
        tables.fill(text, {"one": "new"})


STUDIES = ["prequant", "zsaq", "mrem", "weight_only", "autoround", "squat"]


@pytest.mark.parametrize("name", STUDIES)
def test_tables_in_the_docs_are_those_of_the_results(name):
    command = [sys.executable, STUDY / "tables.py", name, "--results", ROOT / "docs/results", "--check", "--write"]
    done = subprocess.run([*command, ROOT / f"docs/methods/{name}.md"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STUDIES)
def test_results_are_of_cells_that_the_study_has(study, name):
    """All of them, but for the studies that still grow."""
    rows = study.read_results(ROOT / f"docs/results/{name}.jsonl")
    cells = {cell.id for cell in importlib.import_module(name).cells()}
    assert set(rows) == cells if name == "prequant" else set(rows) <= cells


# Paired bootstrap


def test_interval_of_a_constant_difference(study):
    from bootstrap import paired_interval

    assert paired_interval([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == (0.5, 0.5, 0.5)


def test_interval_is_that_of_the_normal_distribution(study):
    """For 4,000 paired differences the percentile interval is mean ± 1.96 standard errors within a few percent."""
    from bootstrap import paired_interval

    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 4000))
    mean, low, high = paired_interval(a, b, resamples=4000)
    error = 1.96 * (a - b).std() / 4000**0.5
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.05 * error)
    assert paired_interval(a, b, resamples=4000) == (mean, low, high)


def test_interval_needs_pairs(study):
    from bootstrap import paired_interval

    with pytest.raises(ValueError, match="there are 2 and 1; measure the same samples"):
        paired_interval([1.0, 2.0], [1.0])


def test_bitmap_round_trip(study):
    from bootstrap import from_bitmap, to_bitmap

    scores = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1.0])
    assert to_bitmap(scores) == "b1a0"
    assert from_bitmap("b1a0", 11).tolist() == scores.tolist()


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.py")), ids=lambda file: file.stem)
def test_examples_import_only_what_there_is(file):
    """Also inside functions, which run minutes after an example was started."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_zsaq"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name
