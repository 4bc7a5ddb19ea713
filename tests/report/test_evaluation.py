"""Measurements against scikit-learn, formulas and slow loops, on tiny random models."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from tiny_models import LABELS, VOCABULARY, make, make_tokenizer
from torch import nn

from optimum_zsaq import PreQuantConfig
from optimum_zsaq.report import evaluation as ev


LENGTHS = (3, 9, 5, 9, 1, 7, 4)


def samples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of different lengths; the last token is the end token, which some heads look for."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": [*torch.randint(5, VOCABULARY, (n,), generator=generator).tolist(), 2]} for n in LENGTHS]


@torch.no_grad()
def one_by_one(model, found) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([s["input_ids"]])).logits for s in found])


# Classification and regression


@pytest.mark.parametrize("name", ["bert-cls", "distilbert-cls", "llama-cls", "bart-cls"])
def test_batches_give_what_samples_alone_give(name):
    model, found = make(name), samples()
    expected = one_by_one(model, found).argmax(dim=1).tolist()
    assert ev.measure_classification(model, found, [0] * len(found), batch_size=3).predictions == expected


def test_model_without_padding_token_is_measured():
    model, found = make("gpt2-cls"), samples()
    model.config.pad_token_id = None
    expected = one_by_one(model, found).argmax(dim=1).tolist()
    assert ev.measure_classification(model, found, [0] * len(found)).predictions == expected


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (LABELS, "macro")])
def test_classification_equals_sklearn(classes, average):
    model, found = make("bert-cls", num_labels=classes), samples()
    labels = [0, 1, classes - 1, 0, 1, 0, 1]
    predictions = one_by_one(model, found).argmax(dim=1).tolist()
    result = ev.measure_classification(model, found, labels)
    assert result.metrics == {
        "accuracy": metrics.accuracy_score(labels, predictions),
        f"f1_{average}": metrics.f1_score(labels, predictions, average=average, zero_division=0.0),
        "mcc": metrics.matthews_corrcoef(labels, predictions),
    }
    assert result.scores.tolist() == [float(a == b) for a, b in zip(labels, predictions, strict=True)]
    assert result.comparison == {}


def test_classification_by_hand():
    """2 of 4 right: accuracy 1/2; one true positive of 2 found and 2 wanted: F1 1/2; (1*1 - 1*1) / ... = 0: MCC 0."""
    model = make("bert-cls", num_labels=2)
    values = iter([1.0, -1.0, 1.0, -1.0])
    model.forward = lambda input_ids, attention_mask: type(
        "Output", (), {"logits": torch.tensor([[0.0, next(values)] for _ in input_ids])}
    )
    found = ev.measure_classification(model, [{"input_ids": [5]}] * 4, [1, 0, 0, 1])
    assert found.metrics == {"accuracy": 0.5, "f1_binary": 0.5, "mcc": 0.0}


def test_kl_and_agreement_match_the_formula():
    reference, found = make("bert-cls"), samples()
    model = make("bert-cls", seed=1)
    p, q = (one_by_one(m, found).double().softmax(dim=1) for m in (reference, model))
    result = ev.measure_classification(model, found, None, reference)
    assert result.comparison["kl"] == pytest.approx((p * (p / q).log()).sum(dim=1).mean().item(), rel=1e-4)
    assert result.comparison["agreement"] == (p.argmax(dim=1) == q.argmax(dim=1)).double().mean().item()
    assert result.metrics == {}
    assert len(result.scores) == 0


def test_a_model_is_its_own_reference():
    model, found = make("bert-cls"), samples()
    result = ev.measure_classification(model, found, [0] * len(found), model)
    assert result.comparison == {"kl": 0.0, "agreement": 1.0}
    assert result.reference_metrics == result.metrics


def test_regression_equals_scipy():
    model, reference, found = make("bert-cls", num_labels=1), make("bert-cls", seed=1, num_labels=1), samples()
    labels = [0.5, 3.0, 1.0, 2.5, 5.0, 4.0, 0.0]
    values, others = (one_by_one(m, found)[:, 0].double().numpy() for m in (model, reference))
    result = ev.measure_regression(model, found, labels, reference)
    assert result.metrics["pearson"] == pytest.approx(stats.pearsonr(labels, values).statistic, abs=1e-5)
    assert result.metrics["spearman"] == pytest.approx(stats.spearmanr(labels, values).statistic, abs=1e-5)
    assert result.comparison["mean_difference"] == pytest.approx(np.abs(values - others).mean(), rel=1e-4)
    assert result.scores == pytest.approx((values - labels) ** 2, rel=1e-4)


def test_dropout_is_off_and_the_mode_comes_back():
    model, found = make("bert-cls", hidden_dropout_prob=0.5), samples()
    expected = ev.measure_classification(model, found, [0] * len(found)).predictions
    assert ev.measure_classification(model.train(), found, [0] * len(found)).predictions == expected
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0]), "0 samples have 1 labels"),
        (([], []), "nothing to measure on"),
        ((samples(), None), "give labels or a reference model"),
        ((samples(), [0, 1]), "7 samples have 2 labels"),
        ((samples(), [0, 1, 2, 0, 9, 0, -1]), r"labels \[-1, 9\] are no classes of the model; use 0 to 2"),
    ],
)
def test_classification_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ev.measure_classification(make("bert-cls"), *arguments)


def test_reference_with_other_classes():
    with pytest.raises(ValueError, match="the model has 3 outputs and the reference 2"):
        ev.measure_classification(make("bert-cls"), samples(), None, make("bert-cls", num_labels=2))


# Perplexity


@pytest.mark.parametrize("name", ["llama-tied", "opt-untied", "gpt2-tied"])
def test_perplexity_equals_a_slow_loop(name):
    model = make(name)
    tokens = torch.randint(5, VOCABULARY, (44,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = [tokens[:16], tokens[16:32], tokens[32:]]
    losses = []
    with torch.no_grad():
        for window in windows:
            predicted = model(input_ids=torch.tensor([window])).logits[0].log_softmax(dim=-1)
            losses.append([-predicted[i, window[i + 1]].item() for i in range(len(window) - 1)])
    result = ev.measure_perplexity(model, tokens, window=16)
    mean = sum(map(sum, losses)) / 41
    assert result.tokens == 41
    assert result.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.scores == pytest.approx([sum(loss) / len(loss) for loss in losses], rel=1e-5)
    assert ev.perplexity(model, tokens, window=16) == result.metrics["perplexity"]


def test_a_window_of_one_token_predicts_nothing():
    model, tokens = make("llama-tied"), list(range(5, 22))
    assert ev.measure_perplexity(model, tokens, window=8).tokens == 14
    assert ev.perplexity(model, tokens, window=8) == ev.perplexity(model, tokens[:16], window=8)


def test_token_kl_matches_the_formula():
    model, reference, tokens = make("llama-tied"), make("llama-tied", seed=1), list(range(5, 35))
    with torch.no_grad():
        p, q = (m(input_ids=torch.tensor([tokens])).logits[0, :-1].softmax(dim=-1) for m in (reference, model))
    result = ev.measure_perplexity(model, tokens, 64, reference)
    assert result.comparison["kl"] == pytest.approx((p * (p / q).log()).sum(dim=-1).mean().item(), rel=1e-3)
    assert result.comparison["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.reference_metrics["perplexity"] == pytest.approx(ev.perplexity(reference, tokens, 64))


@pytest.mark.parametrize("window", [1, 81])
def test_window_that_the_model_does_not_read(window):
    with pytest.raises(ValueError, match=f"window={window} is no length that this model reads; use 2 to 80"):
        ev.measure_perplexity(make("opt-tied"), list(range(90)), window)


def test_text_of_one_token():
    with pytest.raises(ValueError, match="the text has 1 token"):
        ev.measure_perplexity(make("llama-tied"), [5], 16)


# Text to text


def write(model, sample: dict[str, list[int]], length: int) -> list[int]:
    """What a model writes greedily after one sample, without the decoder's first token."""
    return model.generate(torch.tensor([sample["input_ids"]]), max_new_tokens=length)[0].tolist()[1:]


@pytest.mark.parametrize("name", ["t5-tied", "bart-untied"])
def test_exact_match_is_what_greedy_decoding_writes(name):
    """Targets are what each model writes, one of them changed: all match but that one."""
    model, found = make(name), samples()
    model.generation_config.forced_eos_token_id = None
    targets = [write(model, sample, 6) for sample in found]
    targets[2] = [*targets[2][:-1], 7]
    result = ev.measure_text2text(model, found, targets, batch_size=2)
    assert result.scores.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert result.metrics["exact_match"] == 6 / 7


@pytest.mark.parametrize("name", ["t5-tied", "bart-untied"])
def test_generate_in_batches_equals_one_by_one(name):
    model, found = make(name), samples()
    expected = [[token for token in write(model, sample, 6) if token not in (0, 2)] for sample in found]
    assert ev.generate(model, found, 6, batch_size=3) == expected


def test_text2text_loss_equals_the_model_s():
    model, found = make("t5-untied"), samples()
    targets = [[9, 8, 2], [7, 2], [6, 2], [5, 2], [9, 2], [11, 12, 13, 2], [8, 2]]
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([s["input_ids"]]), labels=torch.tensor([t])).loss.item() * len(t)
            for s, t in zip(found, targets, strict=True)
        ]
    result = ev.measure_text2text(model, found, targets, make("t5-untied"), batch_size=3)
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 17, rel=1e-5)
    assert result.comparison == {"kl": 0.0, "agreement": 1.0}
    assert result.tokens == 17


def test_error_rate_counts_edits(monkeypatch):
    from optimum_zsaq.report import generation

    monkeypatch.setattr(generation, "generate", lambda model, s, length, batch_size: [[5, 6, 7], [8]])
    result = ev.measure_text2text(make("t5-tied"), samples()[:2], [[5, 7], [8, 9]], decode=lambda ids: ids)
    assert result.metrics["error_rate"] == 2 / 4
    assert result.scores.tolist() == [1.0, 1.0]


def test_text2text_errors():
    with pytest.raises(ValueError, match="7 samples have 1 targets; give one, not empty, a sample"):
        ev.measure_text2text(make("t5-tied"), samples(), [[5, 2]])
    model = make("t5-tied")
    model.config.pad_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="names no first token of its decoder"):
        ev.measure_text2text(model, samples(), [[5, 2]] * 7)


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("kitten", "sitting", 3), ("abc", "", 3), ([1, 2], [2], 1)])
def test_edit_distance(a, b, edits):
    assert ev.edit_distance(a, b) == ev.edit_distance(b, a) == edits


# Samples, loading


def test_encode_pairs_and_cuts():
    tokenizer = make_tokenizer()
    assert ev.encode(tokenizer, ["w5 w6"], ["w7"])[0]["input_ids"] == [1, 5, 6, 2, 7, 2]
    assert ev.encode(tokenizer, ["w5 w6 w7 w8"], max_length=4)[0]["input_ids"] == [1, 5, 6, 2]
    assert ev.encode_text(tokenizer, "w5 w6 w7", 3) == [1, 5, 6]
    assert ev.encode_targets(tokenizer, ["w5", "w6 w7"]) == [[1, 5, 2], [1, 6, 7, 2]]
    assert ev.encode(tokenizer, []) == []


def test_float16_checkpoint_is_measured_in_float32(tmp_path):
    make("bert-cls").half().save_pretrained(tmp_path)
    assert ev.load_model(tmp_path, "text-classification").dtype == torch.float32


def test_low_bit_model_is_loaded_as_it_is(tmp_path):
    make("bert-cls").save_pretrained(tmp_path / "float")
    cls = type(make("bert-cls"))
    cls.from_pretrained(tmp_path / "float", quantization_config=PreQuantConfig()).save_pretrained(tmp_path / "out")
    model = ev.load_model(tmp_path / "out", "text-classification")
    assert type(model.bert.pooler.dense) is not nn.Linear


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert-cls", "fill-mask", "task='fill-mask' cannot be measured; use one of"),
        ("bert-cls", "text2text-generation", "is a bert model, which cannot do text2text-generation"),
        ("bert-cls", "text-generation", "has no weights for text-generation: it lacks .*saved as BertForSequenceClass"),
        ("bert-cls", "text-regression", r"has 3 output\(s\), so it does not do text-regression; use task text-class"),
        ("bert", "text-classification", "it lacks .'classifier.bias', 'classifier.weight'.; use the task"),
    ],
)
def test_model_of_another_task(tmp_path, name, task, message):
    make(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ev.load_model(tmp_path, task)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"(?i)model"):
        ev.load_model(tmp_path, "text-generation")


def test_no_tokenizer(tmp_path):
    make("bart-untied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer was found at .*; save the model"):
        ev.load_tokenizer(tmp_path)


# Other metrics

SCRIPT = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_metric_script(tmp_path):
    pytest.importorskip("evaluate")
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    assert ev.extra_metric(str(script), [1, 2, 3, 4], [1, 2, 3, 3]) == {"share": 0.75}
    with pytest.raises(ValueError, match="metric='no-such-metric' was not found; without a network give the path"):
        ev.extra_metric("no-such-metric", [1], [1])


def test_metric_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install 'optimum-zsaq\[evaluate\]'"):
        ev.extra_metric("accuracy", [1], [1])
