"""The study of SQuAT on a tiny model and tiny data, its tables, and the example script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make, make_tokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study(monkeypatch, tmp_path):
    for name in [file.stem for file in (EXAMPLES / "study").glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(EXAMPLES / "study"))
    import squat

    monkeypatch.setattr(squat.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(squat, "HELD_OUT", 8)
    monkeypatch.setattr(squat, "SUBSET", 40)
    return squat


@pytest.fixture
def data(tmp_path) -> Path:
    """Sentences of either kind of word; the folder as the study wants it."""
    folder = tmp_path / "data"
    for part, count in (("train", 70), ("dev", 20)):
        for task, head in (("SST-2", "sentence\tlabel\n"), ("CoLA", "")):
            (folder / "glue" / task).mkdir(parents=True, exist_ok=True)
            texts = [(f"w{5 + i % 7} w{40 + 20 * (i % 2)} w{9 + i % 5}", i % 2) for i in range(count)]
            lines = [f"{t}\t{n}" if head else f"gj\t{n}\t\t{t}" for t, n in texts]
            (folder / "glue" / task / f"{part}.tsv").write_text(head + "\n".join(lines) + "\n")
    model = make("bert-cls", num_labels=2)
    model.save_pretrained(folder / "models" / "all-MiniLM-L6-v2")
    make_tokenizer().save_pretrained(folder / "models" / "all-MiniLM-L6-v2")
    return folder


def test_cells_take_as_many_evaluations_as_each_other(study, data):
    rows = {}
    for method in ("float", "lsq", "squat", "sam"):
        scheme = "float" if method == "float" else "w2a8e2-row"
        cell = study.Cell(method, scheme, "sst2", settings={"per_device_train_batch_size": 7} if method != "float" else {})
        around = {
            "machine": {"cpu": "one", "threads": 1},
            "versions": {},
            "commit": None,
            "date": "2026-01-01",
            "seconds": 1,
        }
        rows[cell.id] = {**study.run_cell(cell, data), **around, "seed": 0}
    found = {row_id.split("/")[1]: row["evaluations"] for row_id, row in rows.items() if "evaluations" in row}
    assert found == {"lsq": 12, "squat": 12, "sam": 12}
    tables = study.tables(rows)
    assert set(tables) == {"scores", "search", "sharpness", "cost", "writers", "torchao", "circumstances"}
    assert tables["scores"].count("\n") == 5
    assert "SQuAT" in tables["sharpness"]
    assert study.tables({})["scores"] == tables["writers"] == "No cell of these is finished yet."


def test_what_is_tuned_on_is_not_trained_on(study, data):
    for task in ("sst2", "cola"):
        train, held_out = study.sentences(task, data, tuning=True)
        whole, dev = study.sentences(task, data)
        assert (len(held_out), len(dev)) == (8, 20)
        assert len(train) == (40 if task == "sst2" else 62)
        assert len(whole) == (40 if task == "sst2" else 70)


def test_the_deciding_cells_come_first(study):
    cells = study.cells()
    assert len({cell.id for cell in cells}) == len(cells)
    assert {(c.scheme, c.seed) for c in cells[:12]} == {("w2a8e2-row", 0), ("w4a4e4-row", 0)}
    assert (
        len([c for c in cells if c.method in ("lsq", "sam", "squat") and c.task in study.TASKS and "ef-" not in c.scheme])
        == 72
    )


def test_names_of_classes_keep_the_numbers_that_the_model_knows(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune_squat

    rows = {"label": ["entailment", "neutral", "contradiction"]}
    known = {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert finetune_squat.labels_of(rows, "label", known) == ["entailment", "neutral", "contradiction"]
    assert finetune_squat.labels_of(rows, "label", {"LABEL_0": 0}) == ["contradiction", "entailment", "neutral"]
    assert finetune_squat.labels_of({"label": [1, 0, 1]}, "label", known) == [0, 1]
    assert finetune_squat.labels_of({"label": [0.5, 1.0]}, "label", known) is None


@pytest.mark.slow
def test_the_example(data, tmp_path):
    """From a file to a packed model, metrics and a figure."""
    folder = data / "glue" / "SST-2"
    command = [sys.executable, str(EXAMPLES / "finetune_squat.py"), "--model", str(data / "models" / "all-MiniLM-L6-v2")]
    command += [
        "--train-file",
        str(folder / "train.tsv"),
        "--validation-file",
        str(folder / "dev.tsv"),
        "--weight-bits",
        "2",
    ]
    command += ["--output-dir", str(tmp_path / "out"), "--max-steps", "4", "--use-cpu", "True", "--save-strategy", "no"]
    command += ["--activations", "static", "--landscape", str(tmp_path / "figure.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert {"eval_accuracy", "eval_matthews"} <= set(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["packed"] is True
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
