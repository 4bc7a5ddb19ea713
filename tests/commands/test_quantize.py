"""`optimum-cli zsaq quantize` and `inspect` as a user runs them, in this process for speed and once as a process."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from optimum.commands.optimum_cli import main
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from optimum_zsaq.algorithms.minimax import Minimax


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a good bad film was the not very".split()]
SIZES = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def cli(monkeypatch, *arguments) -> int:
    """Run the command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "zsaq", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_quantize_then_inspect(monkeypatch, capsys, bert, tmp_path):
    out = tmp_path / "new" / "out"
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", out, "--weight-bits", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 14
    assert result["float_layers"] == ["embeddings.position_embeddings", "embeddings.token_type_embeddings", "classifier"]
    assert sorted(f.name for f in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert 'from_pretrained("out")' in (out / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.quantization_config.weight_bits == 3
    assert cli(monkeypatch, "inspect", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    parts = report["bytes"]
    on_disk = (out / "model.safetensors").stat().st_size
    assert parts["on_disk"] == on_disk
    assert on_disk == sum(parts[p] for p in ("codes", "scales", "float", "markers", "headers"))
    query = next(layer for layer in report["layers"] if layer["name"].endswith("0.attention.self.query"))
    assert query["bits"] == 3
    assert query["kernel"] in ("native", "int8")
    assert query["inputs"] == "A8 dynamic"
    assert query["bytes"] == 32 * 12 + 32 * 4 + 32 * 4  # codes of 3 bits, scales, bias
    assert cli(monkeypatch, "inspect", out) == 0
    shown = capsys.readouterr().out
    assert "bert.encoder.layer.*.attention.self.query" in shown
    assert cli(monkeypatch, "inspect", out, "--all") == 0
    assert "bert.encoder.layer.1.attention.self.query" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--granularity", "group", "--group-size", "16"], "group_size", 16),
        (["--asymmetric"], "symmetric", False),
        (["--embedding-bits", "none"], "embedding_bits", None),
        (["--activation-bits", "none"], "activation_bits", None),
        (["--weight-bits", "2", "--ranges", "ternary"], "ranges", "ternary"),
        (["--activations", "static", "--calibration-samples", "4"], "activations", "static"),
        (["--modules-to-not-convert", "pooler"], "modules_to_not_convert", ["pooler"]),
        (["--outliers", "0.01"], "outliers", 0.01),
        (["--outliers", "0.01", "--outlier-scope", "row"], "outlier_scope", "row"),
        (["--smoothing", "0.5"], "smoothing", 0.5),
    ],
)
def test_every_option_reaches_the_checkpoint(monkeypatch, bert, tmp_path, arguments, field, value):
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out", *arguments) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored[field] == value


def test_calibration_data_from_a_file_leaves_no_text(monkeypatch, bert, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\nthe film was not very bad\n")
    options = ["--activations", "static", "--calibration-data", texts]
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out", *options) == 0
    stored = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(stored)["quantization_config"]["recipe"]["calibration"]["count"] == 2
    assert "film" not in stored + (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_tokenizer(monkeypatch, capsys, tmp_path):
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path / "llama")
    assert cli(monkeypatch, "quantize", "--model", tmp_path / "llama", "--output", tmp_path / "out") == 0
    assert "no tokenizer was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-bits", "9"], "weight_bits=9 is not a width"),
        (["--granularity", "group", "--group-size", "1"], "needs a group size"),
        (["--granularity", "column"], "granularity='column' is not allowed"),
        (["--granularity", "row", "--group-size", "8"], "has no meaning with granularity='row'"),
        (["--modules-to-not-convert", "poller"], "the nearest names are"),
        (["--task", "text-painting"], "task='text-painting' is unknown"),
        (["--dtype", "int8"], "--dtype int8 is unknown"),
        (["--outliers", "2"], "outliers=2.0 is not a share"),
        (["--calibration-data", "x.txt"], "calibration_data measures static input ranges"),
        (["--calibration-data", "missing.txt", "--activations", "static"], "there is no file missing.txt"),
    ],
)
def test_errors_say_what_to_type(monkeypatch, capsys, bert, tmp_path, arguments, message):
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_left_alone(monkeypatch, capsys, bert, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_no_model_there(monkeypatch, capsys, tmp_path, command):
    where = tmp_path / "nothing"
    arguments = ["--model", where, "--output", tmp_path / "out"] if command == "quantize" else [where]
    assert cli(monkeypatch, command, *arguments) == 1
    assert "there is no model at" in capsys.readouterr().err


def test_quantized_model_is_not_quantized_again(monkeypatch, capsys, bert, tmp_path):
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out") == 0
    assert cli(monkeypatch, "quantize", "--model", tmp_path / "out", "--output", tmp_path / "again") == 1
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_while_saving_leaves_nothing(monkeypatch, capsys, bert, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    code = cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert list(tmp_path.iterdir()) == []
    assert ("interrupted" if code == 130 else "No space left") in capsys.readouterr().err


def test_inspect_a_float_model(monkeypatch, capsys, bert):
    assert cli(monkeypatch, "inspect", bert) == 0
    assert "BertForSequenceClassification, float" in capsys.readouterr().out


def test_inspect_a_damaged_file(monkeypatch, capsys, bert, tmp_path):
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out") == 0
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert cli(monkeypatch, "inspect", tmp_path / "out") == 1
    assert "is damaged" in capsys.readouterr().err


def test_as_a_process_from_another_folder(bert, tmp_path):
    command = [os.path.join(os.path.dirname(sys.executable), "optimum-cli"), "zsaq"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        done = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert run("quantize", "--model", bert, "--output", "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    code, text = run("quantize", "--model", bert)
    assert code == 2
    assert "--output" in text
    code, text = run("quantize", "--help")
    assert code == 0
    assert "examples:" in text


def test_training_without_data(monkeypatch, capsys, bert, tmp_path):
    out = tmp_path / "out"
    options = ["--algorithm", "zsaq", "--weight-bits", 2, "--steps", 3, "--batch-size", 2, "--rho", 0.05]
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", out, *options, "--generator-every", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["algorithm"] == "zsaq"
    config = AutoModelForSequenceClassification.from_pretrained(out).config.quantization_config
    assert (config.algorithm, config.steps, config.batch_size, config.rho, config.generator_every) == (
        "zsaq",
        3,
        2,
        0.05,
        2,
    )
    assert config.recipe["calibration"]["count"] == 6


def test_training_ends_with_what_was_won(monkeypatch, capsys, bert, tmp_path):
    options = ["--algorithm", "zsaq", "--weight-bits", 2, "--steps", 3, "--batch-size", 2]
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", tmp_path / "out", *options) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    saved = next(i for i, line in enumerate(lines) if line.startswith("saved to "))
    told = (
        r"single text: distance from the float model \d\.\d{4} rounded, \d\.\d{4} now; equal answers [\d.]+ %, now [\d.]+ %"
    )
    assert re.match(told, lines[saved + 1])
    assert lines[-2].startswith("kept: ")
    assert lines[-1].startswith("6 generated sequences, ")


def test_dry_run_says_what_it_would_take(monkeypatch, capsys, bert, tmp_path):
    out, options = tmp_path / "out", ["--algorithm", "zsaq", "--steps", 500, "--batch-size", 2]
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", out, *options, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "training 500 steps: " in text
    assert "peak memory" in text
    assert not out.exists()
    assert cli(monkeypatch, "quantize", "--model", bert, "--output", out, "--dry-run") != 0
    assert "--dry-run is for --algorithm zsaq and got --algorithm prequant" in capsys.readouterr().err


def test_an_interrupted_training_goes_on(monkeypatch, capsys, bert, tmp_path):
    """Ctrl-C at step 30 of 40; what comes out then is what an uninterrupted run gives, bit for bit."""
    options = ["--model", bert, "--algorithm", "zsaq", "--weight-bits", 2, "--steps", 40, "--batch-size", 2, "--rho", 0.05]
    assert cli(monkeypatch, "quantize", *options, "--output", tmp_path / "whole") == 0
    state = tmp_path / "training.pt"
    options += ["--output", tmp_path / "out", "--state", state]
    step = Minimax.step

    def interrupted(run):
        if run.done == 30:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Minimax, "step", interrupted)
        assert cli(patch, "quantize", *options) == 130
    assert f"the training is kept in {state}, run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli(monkeypatch, "quantize", *options) == 0
    assert not state.exists()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_options_of_training_need_an_algorithm_that_trains(monkeypatch, capsys, bert, tmp_path):
    options = ["--model", bert, "--output", tmp_path / "out", "--rho", 0.1, "--learning-rate", 1e-4]
    assert cli(monkeypatch, "quantize", *options) != 0
    message = "--learning-rate, --rho is for training and --algorithm prequant does none; add --algorithm zsaq"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(5, 25)))
    return file


class TestReconstruction:
    OPTIONS = ["--algorithm", "mrem", "--weight-bits", 2, "--steps", 3, "--batch-size", 4, "--stages", 2]

    @pytest.mark.parametrize("parallel", [[], ["--parallel"]], ids=["sequential", "parallel"])
    def test_from_texts(self, monkeypatch, capsys, bert, texts, tmp_path, parallel):
        out = tmp_path / "out"
        options = ["--model", bert, "--output", out, *self.OPTIONS, "--calibration-data", texts, *parallel]
        assert cli(monkeypatch, "quantize", *options) == 0
        lines = capsys.readouterr().out.strip().splitlines()
        assert re.match(r"error of each stage's outputs.*: stage 1 of 2: \d\.\d{4} to .*; stage 2 of 2: ", lines[-2])
        assert lines[-1].startswith("20 sequences (file), ")
        config = AutoModelForSequenceClassification.from_pretrained(out).config.quantization_config
        assert (config.algorithm, config.stages, config.steps, config.parallel) == ("mrem", 2, 3, bool(parallel))
        assert (config.recipe["calibration"]["count"], config.calibration_samples) == (20, 1024)

    def test_without_data(self, monkeypatch, capsys, bert, tmp_path):
        options = ["--model", bert, "--output", tmp_path / "out", *self.OPTIONS]
        assert cli(monkeypatch, "quantize", *options) != 0
        assert "MREM learns from texts and got no calibration_data" in capsys.readouterr().err
        options += ["--calibration-data", "zero-shot", "--calibration-samples", 8]
        assert cli(monkeypatch, "quantize", *options) == 0
        assert capsys.readouterr().out.strip().splitlines()[-1].startswith("8 sequences (generated token sequences), ")

    def test_only_the_first_process_saves(self, monkeypatch, capsys, bert, texts, tmp_path):
        monkeypatch.setenv("RANK", "1")
        options = ["--model", bert, "--output", tmp_path / "out", *self.OPTIONS, "--calibration-data", texts]
        assert cli(monkeypatch, "quantize", *options) == 0
        assert capsys.readouterr().out == ""
        assert not (tmp_path / "out").exists()

    def test_options_of_another_algorithm(self, monkeypatch, capsys, bert, tmp_path):
        options = ["--model", bert, "--output", tmp_path / "out", *self.OPTIONS, "--rho", 0.1]
        assert cli(monkeypatch, "quantize", *options) != 0
        assert (
            "--rho is for training and --algorithm mrem has no such option; add --algorithm zsaq" in capsys.readouterr().err
        )
        options = ["--model", bert, "--output", tmp_path / "out", "--stages", 2]
        assert cli(monkeypatch, "quantize", *options) != 0
        assert "--algorithm prequant does none; add --algorithm mrem" in capsys.readouterr().err
