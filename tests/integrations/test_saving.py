"""save_pretrained: whole or not at all, over nothing that is good, and nothing of an earlier save left behind."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_models import logits, make, make_tokenizer, quantized

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.integrations.saving import attach_saving, detach_saving


CLS = tf.BertForSequenceClassification


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two packed models of one architecture."""
    root = tmp_path_factory.mktemp("models")
    return [quantized("bert-cls", root / str(seed), model_seed=seed, weight_bits=2 + seed) for seed in (0, 1)]


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _fail(monkeypatch, error: BaseException, after: int = 0) -> None:
    """Have the write of a weight file fail, after some that succeeded, with half a file written."""
    from transformers import modeling_utils

    original, calls = modeling_utils.safe_save_file, []

    def save(tensors, filename, metadata=None):
        calls.append(filename)
        if len(calls) <= after:
            return original(tensors, filename, metadata=metadata)
        Path(filename).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(modeling_utils, "safe_save_file", save)


ERRORS = {
    "interrupted": KeyboardInterrupt("Ctrl-C"),
    "no space": OSError(28, "No space left on device"),
    "killed by a library": RuntimeError("I/O error"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("shards", [0, 2], ids=["one file", "third shard"])
def test_a_good_checkpoint_survives_a_failed_save(models, tmp_path, monkeypatch, error, shards):
    models[0].save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = _listing(tmp_path)
    with monkeypatch.context() as patch:
        _fail(patch, error, after=shards)
        with pytest.raises(type(error), match=re.escape(str(error))):
            models[1].save_pretrained(tmp_path / "out", max_shard_size="6KB" if shards else "5GB")
    assert _listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "out")), logits(models[0]))
    models[1].save_pretrained(tmp_path / "out")
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "out")), logits(models[1]))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_failed_first_save_leaves_nothing(models, tmp_path, monkeypatch, error):
    _fail(monkeypatch, error)
    with pytest.raises(type(error)):
        models[0].save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_card_leaves_nothing(models, tmp_path, monkeypatch):
    from optimum_zsaq.integrations import saving

    def fail(*_):
        raise RuntimeError("no card today")

    monkeypatch.setattr(saving, "model_card", fail)
    with pytest.raises(RuntimeError, match="no card today"):
        models[0].save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_target_is_a_file(models, tmp_path):
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(NotADirectoryError, match="out is a file; give save_pretrained a folder"):
        models[0].save_pretrained(target)
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parent_is_a_file(models, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        models[0].save_pretrained(tmp_path / "file" / "out")


def test_state_dict_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="saves its own tensors; leave out state_dict=, or load it into the model"):
        models[0].save_pretrained(tmp_path / "out", state_dict=models[0].state_dict())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("kind", [str, Path])
def test_targets(models, tmp_path, monkeypatch, relative, kind):
    monkeypatch.chdir(tmp_path)
    target = kind("a/b/out") if relative else kind(tmp_path / "a" / "b" / "out")
    models[0].save_pretrained(target)
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "a" / "b" / "out")), logits(models[0]))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_into_the_current_folder(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models[0].save_pretrained(".")
    assert {"config.json", "model.safetensors", "README.md"} == {path.name for path in tmp_path.iterdir()}
    assert torch.equal(logits(CLS.from_pretrained(tmp_path)), logits(models[0]))


def test_not_the_main_process_writes_nothing(models, tmp_path):
    models[0].save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_files_in_the_target_stay(models, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "folder").mkdir()
    (tmp_path / "out" / "folder" / "model.safetensors").write_text("not ours")
    before = _listing(tmp_path / "out")
    models[0].save_pretrained(tmp_path / "out")
    after = _listing(tmp_path / "out")
    assert {name: after.get(name) for name in before} == before


def test_a_persons_readme_in_the_target_stays(models, tmp_path):
    """A card is ours only if we wrote it."""
    (tmp_path / "README.md").write_text("# Weeks of notes\n")
    models[0].save_pretrained(tmp_path)
    assert "Weeks of notes" in (tmp_path / "README.md").read_text()


def test_a_readme_in_another_encoding_stays(models, tmp_path):
    (tmp_path / "README.md").write_bytes("# Größe\n".encode("latin-1"))
    models[0].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == "# Größe\n".encode("latin-1")


def test_options_that_transformers_ignores_are_ignored(models, tmp_path):
    """Much code still says `safe_serialization=True`, which is what happens anyway."""
    models[0].save_pretrained(tmp_path, safe_serialization=True)
    assert torch.equal(logits(CLS.from_pretrained(tmp_path)), logits(models[0]))


def test_our_own_readme_is_written_anew(models, tmp_path):
    for model, bits in zip(models, (2, 3), strict=True):
        model.save_pretrained(tmp_path)
        assert f"Linear layers: {bits} bits" in (tmp_path / "README.md").read_text()


def test_no_shard_of_an_earlier_save_stays(models, tmp_path):
    models[0].save_pretrained(tmp_path, max_shard_size="4KB")
    first = {path.name for path in tmp_path.glob("model*")}
    models[1].save_pretrained(tmp_path, max_shard_size="12KB")
    second = {path.name for path in tmp_path.glob("model*")}
    models[1].save_pretrained(tmp_path)
    third = {path.name for path in tmp_path.glob("model*")}
    assert len(first) > len(second) > len(third)
    assert third == {"model.safetensors"}
    assert not (first & second) - {"model.safetensors.index.json"}
    assert torch.equal(logits(CLS.from_pretrained(tmp_path)), logits(models[1]))


@pytest.mark.parametrize("order", [("low", None), (None, "low")], ids=str)
def test_a_variant_and_the_plain_files_live_side_by_side(models, tmp_path, order):
    """As transformers has it: a save replaces the files of its own variant only."""
    for variant in order:
        models[0].save_pretrained(tmp_path, variant=variant, max_shard_size="4KB")
        models[0].save_pretrained(tmp_path, variant=variant)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model.low.safetensors"}
    for variant in order:
        assert torch.equal(logits(CLS.from_pretrained(tmp_path, variant=variant)), logits(models[0]))


def test_the_float_checkpoint_it_came_from_can_be_the_target(tmp_path):
    model = quantized("bert-cls", tmp_path)
    outputs = logits(model)
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "float")), outputs)


def test_the_checkpoint_it_was_loaded_from_can_be_the_target(models, tmp_path):
    """Loaded tensors may be mapped from the very file that is replaced."""
    models[0].save_pretrained(tmp_path / "out")
    again = CLS.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "out", max_shard_size="6KB")
    again.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(models[0]))
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "out")), logits(models[0]))


def test_permissions_are_those_of_a_float_save(models, tmp_path):
    """The temporary folder is private; what is moved out of it must not be."""
    make("bert-cls").save_pretrained(tmp_path / "float")
    models[0].save_pretrained(tmp_path / "out")
    for name in ("", "config.json", "model.safetensors"):
        modes = [(tmp_path / folder / name).stat().st_mode & 0o777 for folder in ("float", "out")]
        assert modes[0] == modes[1], name


def test_a_model_that_was_packed_in_memory(tmp_path):
    """No checkpoint behind it: it saves and reloads as one that was loaded."""
    model = make("llama-tied")
    prepare(model, PreQuantConfig().scheme())
    outputs = logits(pack(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), outputs)
    assert "a model in memory" in (tmp_path / "README.md").read_text()


def test_markers_take_a_byte_a_row(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    markers = [t for n, t in tensors.items() if f"{n}_codes" in tensors]
    assert markers
    assert all(t.element_size() == 1 and t.shape[1] == 1 and not t.float().any() for t in markers)


def test_attach_and_detach(models):
    plain = make("bert-cls")
    attach_saving(plain)
    assert "save_pretrained" in vars(plain)
    detach_saving(plain)
    assert not {"save_pretrained", "push_to_hub"} & vars(plain).keys()
    detach_saving(plain)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_in_a_place_that_is_read_only(models, tmp_path):
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o555)
    try:
        models[0].save_pretrained(tmp_path / "parent" / "out")
    finally:
        (tmp_path / "parent").chmod(0o755)
    shutil.rmtree(tmp_path / "parent")
