"""The study of language models: its cells, a run of one, and its tables."""

import subprocess
import sys
from pathlib import Path

import pytest
from studies import STUDY, load_study
from tiny_models import make, make_tokenizer


ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch):
    return load_study(monkeypatch, "language_models")


def test_every_cell_is_there_once(study):
    cells = [cell.id for cell in study.cells()]
    assert len(cells) == len(set(cells)) == 2 + 2 * 10 * 3 + 2 * 6 + 3 + 3


def test_a_cell_measures_the_model_that_it_names(study, tmp_path, monkeypatch):
    folder = tmp_path / "models/smollm2"
    make("llama-untied").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/test.txt").write_text("\n".join(["the cat sat on a mat and the dog ran"] * 30))
    monkeypatch.setattr(study, "MODELS", {"smollm2": ("models/smollm2", 32)})
    monkeypatch.setattr(study, "TOKENS", 128)
    float_row = study.run_cell(study.Cell("float", "float32", "smollm2"), tmp_path)
    found = study.run_cell(study.Cell("rounding-energy", "w3", "smollm2"), tmp_path)
    assert found["kl"] > 0.0
    assert found["perplexity"] != float_row["perplexity"]
    assert 3.0 < found["bits"] < 5.0  # rows of 32 and 37: 32 bits of scale and minimum for as many
    (tmp_path / "wikitext-2/train.txt").write_text("the cat sat on a mat and the dog ran\n" * 300)
    monkeypatch.setattr(study, "WORDS", 5)
    trained = study.run_cell(study.Cell("mrem", "w3", "smollm2"), tmp_path)
    assert trained["bits"] == found["bits"]
    assert 0.0 < trained["kl"] != found["kl"]
    assert trained["long_perplexity"] != trained["perplexity"]


def test_tables(study):
    row = {"perplexity": 22.0, "kl": 0.1, "agreement": 0.8, "bits": 4.5, "cpu_seconds": 60.0}
    rows = {"smollm2/float/float32/0": {"perplexity": 20.0}, "smollm2/rounding-energy/w4/0": row}
    lines = study._table(rows, "smollm2", study.SCHEMES, study.RANGES).splitlines()
    assert lines[-1] == "| w4 | energy | 4.50 | 22.00 | 1.100 | 0.1000 | 80.0 | 60 |"
    assert len(lines) == 4
    rows["smollm2/float/float32/0"]["long_perplexity"] = 10.0
    rows["smollm2/mrem/w4/0"] = {**row, "long_perplexity": 11.5, "peak_gib": 3.14}
    line = study._trained_table(rows).splitlines()[-1]
    assert line == "| w4 | MREM | 4.50 | 22.00 | 1.100 | 1.150 | 0.1000 | 80.0 | 60 | 3.1 |"


def test_tables_in_the_docs_are_those_of_the_results():
    studies = ["language_models", "language_model_peers"]
    command = [sys.executable, STUDY / "tables.py", *studies, "--results", ROOT / "docs/results", "--check"]
    page = ROOT / "docs/methods/language_models.md"
    done = subprocess.run([*command, "--write", page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
