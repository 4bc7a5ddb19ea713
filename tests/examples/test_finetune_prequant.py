"""The example, from a float model to two adapters on one base."""

import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import make, make_tokenizer

from optimum_zsaq.integrations.outlier_layer import VALUES


SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_prequant.py"

pytestmark = [
    # PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("finetune_prequant", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, labels):
    """Sentences of three words."""
    lines = [f"w{5 + label} w{20 + n % 50} w{30 + n % 7}\t{label}" for n, label in enumerate(labels)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def test_two_tasks_share_one_base(example, tmp_path, monkeypatch, capsys):
    make("bert").save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    write(tmp_path / "one.tsv", [n % 2 for n in range(64)])
    write(tmp_path / "two.tsv", [n % 3 for n in range(64)])
    files = {}
    for task in ("one", "two"):
        data = str(tmp_path / f"{task}.tsv")
        options = ["--model", str(tmp_path / "float"), "--base", str(tmp_path / "base"), "--train", data, "--dev", data]
        options += ["--adapter", str(tmp_path / task), "--epochs", "1", "--learning-rate", "0.02"]
        monkeypatch.setattr(sys, "argv", ["finetune_prequant.py", *options])
        assert example.main() == 0
        printed = capsys.readouterr().out
        assert "KiB" in printed
        assert "accuracy 0." in printed
        values = [t for key, t in load_file(tmp_path / task / "adapter_model.safetensors").items() if key.endswith(VALUES)]
        assert len(values) == 13
        assert all(value.any() for value in values)
        base = {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir() if f.is_file()}
        assert files in ({}, base)
        files = base
    monkeypatch.setattr(sys, "argv", ["finetune_prequant.py", *options, "--bits", "2"])
    with pytest.raises(SystemExit):
        example.main()
    assert "base is there already: leave it out, or name another --base" in capsys.readouterr().err
