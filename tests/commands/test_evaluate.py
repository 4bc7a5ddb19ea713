"""`optimum-cli zsaq evaluate` as a user runs it, on tiny random models, in this process."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from optimum.commands.optimum_cli import main
from tiny_models import make, make_tokenizer

from optimum_zsaq import PreQuantConfig
from optimum_zsaq.commands import evaluate
from optimum_zsaq.commands.evaluate import class_of
from optimum_zsaq.report import evaluation as ev


TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w13 w14"]
LABELS = [0, 2, 1, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model folders with tokenizers, "bare" without one, and "empty" without a model."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: make(name) for name in ("bert-cls", "llama-tied", "t5-tied")}
    models["regression"] = make("bert-cls", num_labels=1)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer(special=name != "llama-tied").save_pretrained(folder / name)
    config = PreQuantConfig(weight_bits=2, embedding_bits=2)
    cls = type(models["bert-cls"])
    cls.from_pretrained(folder / "bert-cls", quantization_config=config).save_pretrained(folder / "low-bit")
    make_tokenizer().save_pretrained(folder / "low-bit")
    models["bert-cls"].save_pretrained(folder / "bare")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in zip(TEXTS, LABELS, strict=True)))
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs the command with --json; its result, or its exit code and what it says on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "zsaq", "evaluate", *map(str, arguments), "--json"])
        try:
            main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def sentences(folder, name, data, *more):
    return "--model", folder / name, "--task", "text-classification", "--data", data, *more


def test_classification_equals_the_library(cli, folder, tsv):
    result = cli(*sentences(folder, "low-bit", tsv, "--reference", folder / "bert-cls", "--batch-size", 2))
    model, reference = (ev.load_model(folder / name, "text-classification") for name in ("low-bit", "bert-cls"))
    expected = ev.measure_classification(model, ev.encode(make_tokenizer(), TEXTS), LABELS, reference)
    assert result["metrics"] == expected.metrics
    assert result["reference_metrics"] == expected.reference_metrics
    assert result["comparison"] == pytest.approx(expected.comparison, rel=1e-4)
    assert result["samples"] == 4


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file(cli, folder, tsv, tmp_path, suffix):
    data = Dataset.from_dict({"text": TEXTS, "labels": LABELS})
    path = tmp_path / f"data{suffix}"
    {".csv": data.to_csv, ".parquet": data.to_parquet}.get(suffix, data.to_json)(path)
    expected = cli(*sentences(folder, "bert-cls", tsv))
    assert cli(*sentences(folder, "bert-cls", path))["metrics"] == expected["metrics"]


def test_names_of_classes_and_pairs(cli, folder, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,class\n" + "".join(f"{t},w20,LABEL_{y}\n" for t, y in zip(TEXTS, LABELS, strict=True)))
    columns = ("--text-column", "a", "--text-pair-column", "b", "--label-column", "class")
    result = cli(*sentences(folder, "bert-cls", path, *columns))
    model = ev.load_model(folder / "bert-cls", "text-classification")
    assert (
        result["metrics"]
        == ev.measure_classification(model, ev.encode(make_tokenizer(), TEXTS, ["w20"] * 4), LABELS).metrics
    )


def test_rows_without_labels_are_compared(cli, folder, tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text("index\tsentence\n0\tw5 w6\n1\tw7\n2\tw8\n")
    result = cli(*sentences(folder, "low-bit", path, "--reference", folder / "bert-cls", "--max-samples", 2))
    assert result["metrics"] == {}
    assert set(result["comparison"]) == {"kl", "agreement"}
    assert result["samples"] == 2


def test_regression(cli, folder, tmp_path):
    path = tmp_path / "sts.csv"
    path.write_text("text,score\n" + "".join(f"{t},{y}.5\n" for t, y in zip(TEXTS, LABELS, strict=True)))
    result = cli("--model", folder / "regression", "--task", "text-regression", "--data", path)
    assert set(result["metrics"]) == {"pearson", "spearman"}


def test_perplexity_joins_lines(cli, folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in range(5 + j, 25 + j)) for j in range(4)))
    options = ("--model", folder / "llama-tied", "--task", "text-generation", "--data", path, "--window", 16)
    result = cli(*options, "--max-tokens", 50, "--reference", folder / "llama-tied", "--threads", torch.get_num_threads())
    tokens = ev.encode_text(make_tokenizer(special=False), path.read_text(), 50)
    model = ev.load_model(folder / "llama-tied", "text-generation")
    assert result["metrics"]["perplexity"] == pytest.approx(ev.perplexity(model, tokens, 16), rel=1e-6)
    assert (result["samples"], result["tokens"], result["comparison"]["kl"]) == (4, 46, 0.0)


def test_text2text(cli, folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": t, "target": "w5 w6"}) + "\n" for t in TEXTS))
    options = ("--model", folder / "t5-tied", "--task", "text2text-generation", "--data", path)
    assert set(cli(*options)["metrics"]) == {"exact_match", "loss"}
    assert set(cli(*options, "--generate")["metrics"]) == {"exact_match", "loss", "error_rate"}


def test_table_for_people(monkeypatch, capsys, folder, tsv):
    arguments = [*sentences(folder, "low-bit", tsv), "--reference", folder / "bert-cls"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "zsaq", "evaluate", *map(str, arguments)])
    main()
    printed = capsys.readouterr().out
    assert "low-bit: 4 samples" in printed
    assert all(text in printed for text in ("accuracy", "f1_macro", "KL(reference || model), nats", "equal predictions"))


CONTENTS = {
    "empty.tsv": "",
    "header.csv": "text,label\n",
    "cola.tsv": "gj04\t1\t\tThe sailors rode.\ngj04\t1\t\tThe weights made it.\n",
    "unlabelled.tsv": "index\tsentence\n0\tw5\n",
    "names.csv": "text,label\nw5,good\n",
    "range.csv": "text,label\nw5,0\nw6,3\n",
    "hole.csv": "text,label\nw5,0\n,1\n",
    "broken.jsonl": '{"text": "w5", "label"\n',
    "kind.doc": "text",
}
ERRORS = [
    ("missing.tsv", {}, "there is no file .*missing.tsv"),
    ("empty.tsv", {}, "empty.tsv is empty; give a file with data"),
    ("header.csv", {}, "header.csv has no rows; give a file with data"),
    ("cola.tsv", {}, r"has no text column \(text or sentence\); its columns are \['gj04', '1', 'Unnamed: 2', 'The sailors"),
    ("unlabelled.tsv", {}, r"no label column \(label or labels or score\); its columns are \['index', 'sentence'\]"),
    ("names.csv", {}, "'good' in row 1 of column 'label' is no class of the model; use 0 to 2 or one of .'LABEL_0'"),
    ("range.csv", {}, "3 in row 2 of column 'label' is no class"),
    ("hole.csv", {}, "row 2 has None in column 'text', which is no text"),
    ("broken.jsonl", {}, "broken.jsonl cannot be read as .jsonl"),
    ("kind.doc", {}, "kind.doc is of no kind we read"),
    (
        "dev.tsv",
        {"--text-column": "words"},
        r"has no column 'words'; its columns are \['sentence', 'label'\]: name one with",
    ),
    ("dev.tsv", {"--model": "empty"}, "(?i)model"),
    ("dev.tsv", {"--model": "no-such-folder"}, "there is no model at"),
    ("dev.tsv", {"--model": "bare"}, "no tokenizer was found at"),
    ("dev.tsv", {"--task": "text-regression"}, "so it does not do text-regression; use task text-classification"),
    ("dev.tsv", {"--task": "text-generation"}, "has no weights for text-generation"),
    ("dev.tsv", {"--window": "16"}, "--window means nothing for text-classification, only for text-generation; leave it"),
    ("dev.tsv", {"--batch-size": "0"}, "--batch-size 0 is no count; use 1 or more"),
    ("dev.tsv", {"--metric": "no-such-metric"}, "metric='no-such-metric' was not found"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS, ids=[f"{e[0]} {' '.join(e[1].values())}" for e in ERRORS])
def test_errors(cli, folder, tsv, name, options, message):
    path = tsv.parent / name
    if name in CONTENTS:
        path.write_text(CONTENTS[name])
    chosen = {"--model": "bert-cls", "--task": "text-classification", **options, "--data": path}
    chosen["--model"] = folder / chosen["--model"]
    code, said = cli(*(part for option in chosen.items() for part in option))
    assert code == 1
    assert re.search(message, said.splitlines()[-1]), said


def test_metric_of_text2text_needs_generate(cli, folder, tsv):
    code, said = cli("--model", folder / "t5-tied", "--task", "text2text-generation", "--data", tsv, "--metric", "bleu")
    assert code == 1
    assert "--metric bleu needs what the model writes; add --generate" in said


@pytest.mark.parametrize(("value", "number"), [(1, 1), (2.0, 2), ("2", 2), ("bad", 0), (True, 1)])
def test_class_of(value, number):
    assert class_of(value, "row 1", {"bad": 0, "fair": 1, "good": 2}) == number


def test_heavy_imports_wait_until_the_command_runs():
    tree = ast.parse(Path(evaluate.__file__).read_text(encoding="utf-8"))
    names = {
        n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in tree.body if "Import" in type(n).__name__
    }
    assert names == {"argparse", "collections.abc", "pathlib", "time", "typing", "common"}
