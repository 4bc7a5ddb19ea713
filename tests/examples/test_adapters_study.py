"""The study of adapters: its cells, a cell from data to figures on a tiny model, and the tables in the docs."""

import json
import sys
from pathlib import Path

import pytest
from tiny_models import make, make_tokenizer


ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "study"
AROUND = {"commit": "x", "date": "2026-01-01", "seconds": 1.0, "machine": {"cpu": "x", "threads": 1}, "versions": {}}
RESULTS, DOCUMENT = ROOT / "docs/results/adapters.jsonl", ROOT / "docs/methods/prequant_adapters.md"

# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def study(monkeypatch):
    """The study's module."""
    for name in [file.stem for file in STUDY.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(STUDY))
    import adapters

    return adapters


def test_cells_have_names_of_their_own_and_the_deciding_ones_come_first(study):
    ids = [cell.id for cell in study.cells()]
    assert len(ids) == len(set(ids))
    assert ids[:4] == [f"sst2/{m}/w4a8e4/0" for m in ("outliers", "random")] + ["sst2/full/float32/0", "sst2/lora/w4a8e4/0"]
    assert {"cola/outliers/w3a8e3/2", "sst2/by-error/w3a8e3/0", "cola/share-0.02/w4a8e4/0"} <= set(ids)


@pytest.fixture
def data(tmp_path, study, monkeypatch):
    """A tiny model and a few sentences in the places of the real ones."""
    make("bert").save_pretrained(tmp_path / study.MODEL)
    make_tokenizer().save_pretrained(tmp_path / study.MODEL)
    lines = [f"w{5 + n % 2} w{20 + n % 50}\t{n % 2}" for n in range(40)]
    (tmp_path / "glue/SST-2").mkdir(parents=True)
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "glue/SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        rows = [f"x\t{line.split(chr(9))[1]}\t\t{line.split(chr(9))[0]}" for line in lines]
        (tmp_path / "glue/CoLA" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    for name, value in (("SEARCH_STEPS", {"sst2": 1, "cola": 1}), ("HELD_OUT", 8), ("BATCH", 8)):
        monkeypatch.setattr(study, name, value)
    return tmp_path


@pytest.mark.parametrize(
    "cell",
    [
        "sst2/outliers/w4a8e4/0",
        "cola/full/float32/0",
        "sst2/lora/w3a8e3/1",
        "cola/bitfit/w4a8e4/0",
        "sst2/by-error/w4a8e4/0",
    ],
)
def test_a_cell(cell, study, data):
    wanted = next(one for one in study.cells() if one.id == cell)
    figures = study.run_cell(wanted, data)
    json.dumps(figures)
    assert figures["samples"] == 40
    assert figures["steps"] == 4 * study.EPOCHS[wanted.task]
    assert figures["rate"] in study.RATES[wanted.settings["kind"]]
    assert figures["trained"] > 0
    assert ("bytes" in figures) == (wanted.settings["kind"] in ("outlier", "lora"))
    tables = study.tables({cell: {**AROUND, "cell": cell, **figures}})
    assert set(tables) == {"methods", "paired", "sweeps", "writers", "circumstances"}


@pytest.mark.parametrize("method", ["base", "outliers", "random"])
def test_a_model_that_writes(method, study, tmp_path, monkeypatch):
    import adapters_writers as writers

    folder = tmp_path / "models" / "wikitext-opt"
    make("opt-tied", max_position_embeddings=300).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "wikitext-2").mkdir()
    for part in ("train", "test"):
        text = "\n".join(f"w{5 + n % 90} w{6 + n % 80}" for n in range(1000))
        (tmp_path / "wikitext-2" / f"{part}.txt").write_text(text)
    for name, value in (("STEPS", 2), ("SEARCH_STEPS", 1), ("HELD_OUT", {"wikitext": 1}), ("BATCH", {"wikitext": 2})):
        monkeypatch.setattr(writers, name, value)
    cell = next(cell for cell in study.cells() if cell.id == f"wikitext/{method}/w4a8e4/0")
    figures = study.run_cell(cell, tmp_path)
    json.dumps(figures)
    assert figures["perplexity"] > 1.0
    assert ("trained" in figures) == (method != "base")
    table = study.tables({cell.id: {**AROUND, "cell": cell.id, **figures}})["writers"]
    assert f"{figures['perplexity']:.2f}" in table
    assert table.count("\n") == 2


def test_tables_in_the_docs_are_those_of_the_results(study):
    import tables
    from runner import read_results

    text = DOCUMENT.read_text(encoding="utf-8")
    assert tables.fill(text, study.tables(read_results(RESULTS))) == text
