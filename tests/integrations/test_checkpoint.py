"""Damaged files, and files that do not belong together: a clear error, or the right numbers; never wrong ones silently."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import logits, make, quantized

from optimum_zsaq.integrations.checkpoint import CheckpointError, header, read_header, tensor_crc, verify_files


CLS = tf.BertForSequenceClassification
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good packed checkpoint of a BERT: (folder, outputs, table)."""
    root = tmp_path_factory.mktemp("good")
    model = quantized("bert-cls", root)
    model.save_pretrained(root / "saved")
    return root / "saved", logits(model), model.config.quantization_config.stored_table()


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(good[0], tmp_path / "saved"))


def _flip(file: Path, position: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def _header_length(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[:8], "little")


# Truncated ------------------------------------------------------------------------------------------------------------


def _cuts(size: int, start: int) -> dict[str, int]:
    """Where a file of `size` bytes, whose data begins at `start`, is cut."""
    return {
        "empty": 0,
        "first byte": 1,
        "length": 7,
        "header begins": 8,
        "header": start // 2,
        "header ends": start - 1,
        "no data": start,
        "first tensor": start + 1,
        "middle": (start + size) // 2,
        "last byte": size - 1,
    }


@pytest.mark.parametrize("cut", _cuts(2, 1))
def test_truncated(good, folder, cut):
    file = folder / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: _cuts(len(data), 8 + _header_length(file))[cut]])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it has \d+ bytes.*save the checkpoint again"):
        verify_files([str(file)], good[2])
    with pytest.raises(CheckpointError, match="is damaged"):
        CLS.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", device_map="cpu")


def test_longer_than_it_was(good, folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="is damaged: it has .* bytes instead of"):
        verify_files([str(folder / WEIGHTS)], good[2])
    with pytest.raises((CheckpointError, SafetensorError), match="damaged|deserializing header"):
        CLS.from_pretrained(folder)


# One bit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_one_bit_of_the_data(folder, seed):
    file, generator = folder / WEIGHTS, random.Random(seed)
    start = 8 + _header_length(file)
    _flip(file, generator.randrange(start, file.stat().st_size), generator.randrange(8))
    with pytest.raises(CheckpointError, match="is damaged: the bytes of .* are not those that were saved.*again"):
        CLS.from_pretrained(folder)


@pytest.mark.parametrize("name", ["weight_codes", "weight_scale", "weight", "bias"])
def test_one_bit_of_each_kind_of_tensor(good, folder, name):
    start, tensors = read_header(folder / WEIGHTS)
    entry = tensors[f"bert.pooler.dense.{name}"]
    _flip(folder / WEIGHTS, start + entry["data_offsets"][0], 7)
    with pytest.raises(CheckpointError, match=f"the bytes of bert.pooler.dense.{name} are not"):
        verify_files([str(folder / WEIGHTS)], good[2])


@pytest.mark.parametrize("seed", range(40))
def test_one_bit_of_the_header(good, folder, seed):
    """Either an error, or the numbers are right: a flipped bit of a checksum's name, for one, changes no number."""
    file, generator = folder / WEIGHTS, random.Random(seed)
    _flip(file, generator.randrange(8 + _header_length(file)), generator.randrange(8))
    try:
        model = CLS.from_pretrained(folder)
    except (CheckpointError, SafetensorError, OSError, RuntimeError):
        return
    assert torch.equal(logits(model), good[1])


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.position_embeddings.weight",
        "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert.encoder.layer.0.attention.self.query.bias",
        "bert.encoder.layer.0.attention.self.query.weight_codes",
        "bert.encoder.layer.0.attention.self.query.weight_scale",
        "bert.embeddings.word_embeddings.weight_codes",
        "classifier.weight",
    ],
)
def test_one_bit_of_a_tensors_name(folder, name):
    """The tensor is then unknown and another one missing: transformers would make a random one."""
    file = folder / WEIGHTS
    start = file.read_bytes().index(f'"{name}":{{"dtype"'.encode())
    _flip(file, start + len(name), 1)
    with pytest.raises(CheckpointError, match="damaged|lacks some tensors|incomplete"):
        CLS.from_pretrained(folder)


def test_header_that_is_no_json_object(good, folder):
    for text in (b"[]", b"3", b'{"a":3}', b'{"a":{"data_offsets":[0]}}', b'{"__metadata__":[]}', b"\xff\xfe"):
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match="again|no optimum-zsaq header"):
            verify_files([str(folder / WEIGHTS)], good[2])


# Files that are missing or foreign --------------------------------------------------------------------------------------


def test_header_stripped_by_another_program(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match="no optimum-zsaq header.*save the model with save_pretrained again"):
        CLS.from_pretrained(folder)


def test_weights_of_a_float_model(folder):
    make("bert-cls").save_pretrained(folder.parent / "float")
    shutil.copy(folder.parent / "float" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="no optimum-zsaq header"):
        CLS.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [{"weight_bits": 8}, {"weight_bits": 3}, {"symmetric": False}, {"granularity": "tensor"}, {"outliers": 0.01}],
    ids=str,
)
def test_weights_of_another_scheme(folder, tmp_path, settings):
    quantized("bert-cls", tmp_path / "other", **settings).save_pretrained(tmp_path / "foreign")
    shutil.copy(tmp_path / "foreign" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="config and the weights disagree.*linear=.*from the same checkpoint"):
        CLS.from_pretrained(folder)


def test_weights_in_another_format(folder):
    """A pytorch_model.bin has no checksums."""
    tensors = load_file(folder / WEIGHTS)
    tensors["bert.pooler.dense.weight_codes"] ^= 1
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pytorch_model.bin is no safetensors file.*save_pretrained again"):
        CLS.from_pretrained(folder)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        CLS.from_pretrained(folder)


@pytest.fixture
def shards(good, tmp_path):
    """The good checkpoint in several files."""
    CLS.from_pretrained(good[0]).save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    return tmp_path / "shards"


def test_missing_shard(shards):
    sorted(shards.glob("*.safetensors"))[1].unlink()
    with pytest.raises((OSError, CheckpointError), match="00002-of-"):
        CLS.from_pretrained(shards)


def test_shard_left_out_of_the_index(shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != lost}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="damaged|lacks some tensors|incomplete"):
        CLS.from_pretrained(shards)


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_one_bit_of_one_shard(shards, position):
    file = sorted(shards.glob("*.safetensors"))[2]
    start = 8 + _header_length(file)
    _flip(file, start + int(position * (file.stat().st_size - start)), 3)
    with pytest.raises(CheckpointError, match="00003-of-.*is damaged: the bytes of"):
        CLS.from_pretrained(shards)


@pytest.mark.parametrize("seed", range(5))
def test_one_bit_of_a_fake_quantized_checkpoint(tmp_path, seed):
    quantized("bert-cls", tmp_path, packed=False).save_pretrained(tmp_path / "saved")
    file, generator = tmp_path / "saved" / WEIGHTS, random.Random(seed)
    _flip(file, generator.randrange(8 + _header_length(file), file.stat().st_size), generator.randrange(8))
    with pytest.raises(CheckpointError, match="is damaged: the bytes of"):
        CLS.from_pretrained(tmp_path / "saved")


def test_a_fake_quantized_checkpoint_is_not_packed_by_its_config(tmp_path):
    quantized("bert-cls", tmp_path, packed=False).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(path.read_text().replace('"packed": false', '"packed": true'))
    with pytest.raises(CheckpointError, match="config and the weights disagree.*packed"):
        CLS.from_pretrained(tmp_path / "saved")


# config.json edited -----------------------------------------------------------------------------------------------------


def _change(**fields) -> Callable[[dict], None]:
    return lambda config: config.update(fields)


def _row(kind: str, **fields) -> Callable[[dict], None]:
    return lambda config: config["modules"][kind]["weight"].update(fields)


EDITS = {
    "weight bits": (_change(weight_bits=8), "disagrees with itself: weight_bits=8, but its table has 4 bits"),
    "embedding bits": (_change(embedding_bits=4), "disagrees with itself: embedding_bits=4, but its table has 8 bits"),
    "bits of the table": (_row("linear", bits=8), "disagrees with itself: weight_bits=4, but its table has 8 bits"),
    "granularity of the table": (_row("linear", granularity="tensor"), "config and the weights disagree"),
    "symmetry of the table": (_row("linear", symmetric=False), "config and the weights disagree"),
    "symmetry of the embedding": (_row("embedding", symmetric=False), "config and the weights disagree"),
    "inputs": (lambda c: c["modules"]["linear"].update(inputs=None), "config and the weights disagree"),
    "outliers": (lambda c: c["modules"]["linear"].update(outliers=0.5), "config and the weights disagree"),
    "float layer removed": (lambda c: c["modules"]["float"].remove("classifier"), "config and the weights disagree"),
    "float layer added": (lambda c: c["modules"]["float"].append("pooler.dense"), "config and the weights disagree"),
    "exception added": (
        lambda c: c["modules"]["exceptions"].update({"pooler.dense": c["modules"]["embedding"]}),
        "config and the weights disagree",
    ),
    "algorithm": (_change(algorithm="magic"), r"algorithm='magic' is unknown.*'none', 'prequant', .*pip install"),
    "unknown field": (_change(weight_bit=4), "no field 'weight_bit'; did you mean 'weight_bits'"),
    "newer format": (_change(format_version=99), "format_version=99.*pip install --upgrade optimum-zsaq"),
    "format of another type": (_change(format_version="one"), "format_version='one'"),
    "no table": (lambda c: c.pop("modules"), "no table of modules.*restore config.json"),
    "empty table": (_change(modules={}), "restore config.json"),
    "table of another type": (_change(modules=[]), "restore config.json"),
    "row of another type": (lambda c: c["modules"].update(linear=3), "restore config.json"),
    "unknown field of a row": (_row("linear", width=4), "restore config.json"),
    "illegal row": (_row("linear", bits=99), "restore config.json"),
    "no float list": (lambda c: c["modules"].pop("float"), "restore config.json"),
    "float list of another type": (lambda c: c["modules"].update(float="classifier"), "restore config.json"),
    "packed": (_change(packed=False), "mismatch|damaged|disagree"),
    "no method": (lambda c: c.pop("quant_method"), "no `quant_method` attribute"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_config(folder, edit):
    change, message = EDITS[edit]
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))
    with pytest.raises((ValueError, RuntimeError), match=message):
        CLS.from_pretrained(folder)


@pytest.mark.parametrize(
    "fields",
    [{"granularity": "tensor"}, {"symmetric": False}, {"ranges": "lsq"}, {"activation_bits": 4}, {"outliers": 0.1}],
    ids=str,
)
def test_settings_beside_the_table_change_no_number(good, folder, fields):
    """They say how the numbers were found; what is read is decided by the table."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"].update(fields)
    path.write_text(json.dumps(content))
    assert torch.equal(logits(CLS.from_pretrained(folder)), good[1])


def test_config_of_another_architecture(folder):
    """More layers than the checkpoint has: the config and the weights do not belong together."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "hidden_size": 64}))
    with pytest.raises((RuntimeError, ValueError), match="mismatch|disagree|shape"):
        CLS.from_pretrained(folder)


def test_wrong_folder(tmp_path):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        CLS.from_pretrained(tmp_path)


# The pieces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_crc_is_that_of_the_files_bytes(tmp_path, dtype):
    tensors = {"a": torch.arange(12).view(3, 4).to(dtype), "b": torch.zeros(0, dtype=dtype), "c": torch.ones(1).to(dtype)}
    tensors["d"] = torch.arange(12).view(3, 4).to(dtype).t().contiguous()
    table = {"linear": None}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", **header(tensors, table)})
    verify_files([str(tmp_path / "x.safetensors")], table)


def test_crc_does_not_depend_on_strides():
    tensor = torch.randn(5, 7)
    assert tensor_crc(tensor.t()) == tensor_crc(tensor.t().contiguous()) != tensor_crc(tensor)
