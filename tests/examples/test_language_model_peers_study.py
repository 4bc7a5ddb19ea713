"""The study of other packages on a language model: its cells, its layers, what is said of missing peers, its tables."""

import sys
from pathlib import Path

import pytest
import torch
from studies import load_study
from tiny_models import make, make_tokenizer


@pytest.fixture
def study(monkeypatch):
    return load_study(monkeypatch, "language_model_peers")


@pytest.fixture
def quantizers(study):
    return sys.modules["language_model_quantizers"]


def save_data(folder, monkeypatch, study):
    """A tiny model and two texts in the place of SmolLM2 and WikiText-2."""
    for module in (study, sys.modules["language_model_quantizers"]):
        monkeypatch.setattr(module, "MODELS", {"smollm2": ("models/smollm2", 32)})
    monkeypatch.setattr(study, "TOKENS", 128)
    monkeypatch.setattr(study, "MANY_TOKENS", 200)
    monkeypatch.setattr(sys.modules["language_models"], "WORDS", 5)
    make("llama-untied").save_pretrained(folder / "models/smollm2")
    make_tokenizer().save_pretrained(folder / "models/smollm2")
    (folder / "wikitext-2").mkdir()
    for name in ("test.txt", "train.txt"):
        (folder / "wikitext-2" / name).write_text("the cat sat on a mat and the dog ran\n" * 60)


def test_every_cell_is_there_once_and_has_a_title(study):
    cells = study.cells()
    assert len({cell.id for cell in cells}) == len(cells) == 1 + 2 + 9 + 4 + 2 + 6 + 6
    assert {cell.method for cell in cells} == {"float", *study.TITLES}
    assert {cell.scheme for cell in cells} == {"float32", *study.SCHEMES}
    assert set(study.ANSWERED) <= {f"{cell.method}/{cell.scheme}" for cell in cells}


def test_our_cells_leave_embeddings_float(study, quantizers, tmp_path, monkeypatch):
    save_data(tmp_path, monkeypatch, study)
    monkeypatch.setattr(study, "ANSWERED", {})
    row = study.run_cell(study.Cell("rounding", "w3-g64", "smollm2"), tmp_path)
    assert row["kl"] > 0.0
    assert "long_perplexity" not in row
    assert 3.0 < row["bits"] < 5.0
    model, reference = (
        quantizers.quantized(study.Cell(m, "w3-g64", "smollm2"), tmp_path)[0] for m in ("rounding", "float")
    )
    assert torch.equal(model.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    assert study.run_cell(study.Cell("float", "float32", "smollm2"), tmp_path)["long_perplexity"] > 0.0


def test_a_peer_replaces_the_layers_of_the_blocks(study, quantizers, tmp_path, monkeypatch):
    save_data(tmp_path, monkeypatch, study)
    half = {"hqq": lambda cell: lambda weight: (weight / 2, weight.numel())}
    monkeypatch.setattr(quantizers, "WEIGHTWISE", half)
    monkeypatch.setattr(quantizers, "PACKAGES", {})
    cell = study.Cell("hqq", "w4-g64", "smollm2")
    model, bits, more = quantizers.quantized(cell, tmp_path)
    reference = quantizers.load(tmp_path)
    names = set(quantizers._layers(reference, cell))
    assert bits == 8.0
    assert not more
    for name, weight in reference.named_parameters():
        divisor = 2 if name.removesuffix(".weight") in names else 1
        assert torch.equal(model.get_parameter(name), weight / divisor)
    with pytest.raises(ValueError, match="quantized other layers"):
        quantizers._put(model, cell, {})


def test_the_samples_are_those_of_mrem(study, quantizers, tmp_path, monkeypatch):
    save_data(tmp_path, monkeypatch, study)
    monkeypatch.setattr(quantizers, "LENGTH", 16)
    model = quantizers.load(tmp_path)
    texts = quantizers.samples(model, tmp_path)
    assert {tuple(batch["input_ids"].shape) for batch in texts} == {(1, 16)}
    importance = quantizers._importance(model, study.Cell("llama.cpp-imatrix", "q4_0", "smollm2"), tmp_path)
    layers = quantizers._layers(model, study.Cell("hqq", "w4-g64", "smollm2"))
    assert {name: len(values) for name, values in importance.items()} == {n: m.in_features for n, m in layers.items()}


@pytest.mark.parametrize(
    ("method", "module", "package"),
    [("nf4", "bitsandbytes", "bitsandbytes"), ("hqq", "hqq.core.quantize", "hqq"), ("sinq", "sinq.sinqlinear", "sinq")],
)
def test_missing_peer(study, quantizers, monkeypatch, method, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        quantizers.WEIGHTWISE[method](study.Cell(method, "w4-g64", "smollm2"))


def test_missing_autoround(study, quantizers, tmp_path, monkeypatch):
    save_data(tmp_path, monkeypatch, study)
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(ImportError, match="pip install auto-round"):
        quantizers.quantized(study.Cell("autoround", "w3-g64", "smollm2"), tmp_path)


def test_missing_llama_cpp(study, monkeypatch):
    gguf = __import__("language_model_gguf")
    monkeypatch.setenv("LLAMA_CPP", str(Path(__file__).parent))
    with pytest.raises(ImportError, match=r"no libllama\*\.so"):
        gguf.version()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        gguf.quantize_gguf(None, "q4_0")


def test_tables_leave_unfinished_cells_out(study):
    row = {"perplexity": 22.0, "kl": 0.1, "agreement": 0.8, "bits": 4.5, "cpu_seconds": 60.0, "peak_gib": 1.23}
    rows = {"smollm2/float/float32/0": {"perplexity": 20.0}, "smollm2/hqq/w4-g64/0": row}
    assert study._peers(rows).splitlines()[2:] == ["| w4-g64 | HQQ | 4.50 | 22.00 | 1.100 |  | 0.1000 | 80.0 | 60 | 1.2 |"]
    assert len(study._equal_time(rows).splitlines()) == 2
    rows["smollm2/mrem/w2-g64/0"], rows["smollm2/autoround-equal/w2-g64/0"] = row, {**row, "kl": 0.2, "iterations": 80}
    assert study._equal_time(rows).splitlines()[2:] == ["| w2-g64 | 0.1000 | 60 | 0.2000 | 80 | 60 | 0.50 | yes |"]
    rows["smollm2/float/float32/0"]["answers"] = ["a\nb", "c", "d|e"]
    assert study._written(rows).splitlines()[-1].endswith("| float | d\\|e |")
