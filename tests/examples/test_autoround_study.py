"""The study of MREM-S beside AutoRound: which layers have codes, and what is said when the peer is missing."""

import sys
from pathlib import Path

import pytest
from studies import load_study

from optimum_zsaq.surgery import select


@pytest.fixture
def study(monkeypatch):
    return load_study(monkeypatch, "autoround")


def a_cell(study, method):
    return next(cell for cell in study.cells() if (cell.task, cell.method) == ("sst2", method))


def test_layers_with_codes_are_those_of_the_blocks(study):
    """As AutoRound chooses them: no table, pooler or head."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))
    names = list(select(model, study._config(a_cell(study, "rounding"), Path()).scheme()))
    assert len(names) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in names)


def test_missing_peer(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(ImportError, match="pip install auto-round"):
        study._autoround(None, None, a_cell(study, "autoround"), Path())


def test_tables_leave_unfinished_cells_out(study):
    row = {"perplexity": 60.0, "kl": 0.01, "cpu_seconds": 9.6, "iterations": 200}
    table = study.wikitext({"wikitext/autoround/w3-sym/0": row})
    assert table.splitlines()[2:] == ["| W3 | AutoRound, 200 iterations | 200 | 60.000 | 0.0100 | 10 |"]
