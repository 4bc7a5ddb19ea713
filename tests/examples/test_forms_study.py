"""The study of forms: what its tasks are made of, and what its tables make of finished cells."""

import subprocess
import sys
from pathlib import Path

import pytest
from studies import STUDY, load_study


ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch):
    return load_study(monkeypatch, "forms")


@pytest.fixture
def data(tmp_path) -> Path:
    for folder in ("SST-2", "CoLA"):
        (tmp_path / "glue" / folder).mkdir(parents=True)
    texts = [" ".join(f"w{i}x{j}" for j in range(3 + i)) for i in range(24)]
    for part in ("train", "dev"):
        rows = ["sentence\tlabel", *(f"{text} \t{i % 2}" for i, text in enumerate(texts))]
        (tmp_path / "glue/SST-2" / f"{part}.tsv").write_text("\n".join(rows))
        (tmp_path / "glue/CoLA" / f"{part}.tsv").write_text("\n".join(f"a\t{i % 2}\t\tc{t}" for i, t in enumerate(texts)))
    (tmp_path / "glue/SST-2/test.tsv").write_text("\n".join(["index\tsentence", *(f"0\t{text}" for text in texts)]))
    return tmp_path


def test_every_cell_is_there_once(study):
    cells = [cell.id for cell in study.cells()]
    assert len(cells) == len(set(cells))
    assert sum(cell.method == "zsaq" for cell in study.cells()) == 6 * 4 * 3


class TestTasks:
    def labels_of(self, data) -> dict[str, int]:
        import forms_tasks

        return {sample["text"]: sample["labels"] for sample in forms_tasks.samples("sst2", "dev", data)}

    def test_same_and_more(self, study, data):
        import forms_tasks

        label = self.labels_of(data)
        same = forms_tasks.samples("same", "dev", data)
        assert len(same) == 24
        for pair in same:
            assert pair["labels"] == (label[pair["text"]] == label[pair["text_pair"]])
        for pair in forms_tasks.samples("more", "dev", data):
            assert label[pair["text"]] != label[pair["text_pair"]]
            assert pair["labels"] == (label[pair["text"]] > label[pair["text_pair"]])
        assert len(forms_tasks.samples("more", "test", data)) == 24  # no label decides there

    def test_part(self, study, data):
        import forms_tasks

        found = forms_tasks.samples("part", "dev", data)
        assert {pair["labels"] for pair in found} == {0, 1}
        for pair in found:
            assert pair["labels"] == (f" {pair['text_pair']} " in f" {pair['text']} ")

    def test_length_and_four(self, study, data):
        import forms_tasks

        assert max(len(s["text"].split()) for s in forms_tasks.samples("length", "train", data)) == 8
        assert min(len(s["text"].split()) for s in forms_tasks.samples("length", "dev", data)) == 20
        four = forms_tasks.samples("four", "dev", data)
        assert {s["labels"] // 2 for s in four if s["text"].startswith("c")} == {1}
        assert {s["labels"] for s in four} == {0, 1, 2, 3}

    def test_are_the_same_each_time(self, study, data):
        import forms_tasks

        assert forms_tasks.samples("part", "dev", data) == forms_tasks.samples("part", "dev", data)


def row(kl: float, **more) -> dict:
    return {"kl": kl, "kl_error": 0.01, "agreement": 0.9, "accuracy": 0.8, "cpu_seconds": 1.0, **more}


def test_tables(study):
    won = {stage: {"pair, unrelated": {"output": output}} for stage, output in (("rounded", 0.2), ("trained", 0.1))}
    rows = {"same/rounding/w2a8e4-row/0": row(0.4), "more/rounding/w2a8e4-row/0": row(0.4)}
    rows["same/zsaq/w2a8e4-row/0"] = row(0.1, kept="trained", won=won)
    rows["more/zsaq/w2a8e4-row/0"] = row(0.5, kept="trained", won=won)
    import forms_tables

    assert "| same | W2A8E4 row | 0.4000 | 0.1000 | 0.25 |" in forms_tables.settings(rows)
    checks = forms_tables.checks(rows)
    assert "| all | 1 of 2 | **no** |" in checks
    assert "| 0 | 1 of 2 | **no** |" in checks
    assert "| 1 of 2 | **no** |" in checks.splitlines()[-1]  # what was claimed of "more" is not so


def test_tables_in_the_docs_are_those_of_the_results():
    command = [sys.executable, STUDY / "tables.py", "forms", "--results", ROOT / "docs/results", "--check", "--write"]
    done = subprocess.run([*command, ROOT / "docs/methods/zsaq_forms.md"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
