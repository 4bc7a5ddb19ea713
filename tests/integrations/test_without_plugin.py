"""A process without the plugin: a low-bit checkpoint stops it, and never gives random or garbage weights."""

import json
import os
import subprocess
import sys

import pytest
from tiny_models import quantized


NAMES = {
    "bert-cls": ("AutoModelForSequenceClassification", "BertForSequenceClassification"),
    "llama-tied": ("AutoModelForCausalLM", "LlamaForCausalLM"),
    "gpt2-tied": ("AutoModelForCausalLM", "GPT2LMHeadModel"),
    "t5-tied": ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration"),
}

BITS = {"bert-cls": (2, 4, 8), "llama-tied": (4, 8), "gpt2-tied": (4,), "t5-tied": (8,)}

LOAD = """
import json, sys
import transformers

found = {}
for folder, classes in json.load(open(sys.argv[1])).items():
    for name in classes:
        try:
            getattr(transformers, name).from_pretrained(folder)
            found[f"{folder} {name}"] = "loaded"
        except Exception as error:
            found[f"{folder} {name}"] = f"{type(error).__name__}: {error}"
found["plugin"] = "optimum_zsaq" in sys.modules and "optimum_zsaq.integrations" in sys.modules
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    """What a process with the autoload off gets for each checkpoint and class."""
    root = tmp_path_factory.mktemp("without")
    jobs = {}
    for name, classes in NAMES.items():
        for bits in BITS[name]:
            folder = root / f"{name}-{bits}"
            quantized(name, root / name, weight_bits=bits, embedding_bits=bits).save_pretrained(folder)
            jobs[str(folder)] = classes
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OPTIMUM_ZSAQ_AUTOLOAD": "0"}
    command = [sys.executable, "-P", "-c", LOAD, str(root / "jobs.json"), str(root / "found.json")]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    results = json.loads((root / "found.json").read_text())
    assert results.pop("plugin") is False
    return {key.removeprefix(f"{root}/"): value for key, value in results.items()}


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name in NAMES for bits in BITS[name]])
def test_loading_stops(found, name, bits):
    for cls in NAMES[name]:
        assert found[f"{name}-{bits} {cls}"].startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`")
