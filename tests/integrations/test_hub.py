"""push_to_hub and save_pretrained(push_to_hub=True) against a fake Hub: what is sent, in one commit, and whose card."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from tiny_models import logits, quantized

from optimum_zsaq.integrations import saving


class Hub:
    """Stands for `HfApi`: remembers the calls, and the bytes of what is committed."""

    def __init__(self, card: str | None):
        self.card, self.calls, self.files = card, [], {}

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, **options):
        self.calls.append(("create_branch", options))

    def create_commit(self, operations, **options):
        for operation in operations:
            with open(operation.path_or_fileobj, "rb") as file:
                self.files[operation.path_in_repo] = file.read()
        self.calls.append(("create_commit", options))
        return "the commit"

    def load_card(self, repo_id, **options):
        self.calls.append(("load_card", {"repo_id": repo_id, **options}))
        if self.card is None:
            raise LocalEntryNotFoundError("no card")
        return ModelCard(self.card)

    def named(self, name: str) -> list[dict]:
        return [options for call, options in self.calls if call == name]


@pytest.fixture
def hub(monkeypatch):
    """Put a fake Hub, whose repository has a card or none, in place of the real one."""

    def install(card: str | None = None) -> Hub:
        fake = Hub(card)
        for module in ("transformers.utils.hub", "optimum_zsaq.integrations.saving"):
            monkeypatch.setattr(f"{module}.hf_api", lambda *_, **__: fake)
        monkeypatch.setattr(saving.ModelCard, "load", fake.load_card)
        return fake

    return install


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return quantized("bert-cls", tmp_path_factory.mktemp("model"))


OPTIONS = {"private": True, "token": "secret", "revision": "draft", "commit_message": "why", "commit_description": "how"}


def test_push(model, hub, tmp_path):
    fake = hub()
    assert model.push_to_hub("me/tiny", create_pr=True, tags=["mine"], **OPTIONS) == "the commit"
    assert fake.named("create_repo") == [{"repo_id": "me/tiny", "private": True, "token": "secret", "exist_ok": True}]
    assert [options["branch"] for options in fake.named("create_branch")] == ["draft"]
    (commit,) = fake.named("create_commit")
    assert commit == {
        "repo_id": "me/tiny",
        "commit_message": "why",
        "commit_description": "how",
        "token": "secret",
        "create_pr": True,
        "revision": "draft",
    }
    assert sorted(fake.files) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard(fake.files["README.md"].decode())
    assert {"zsaq", "mine"} <= set(card.data.tags)
    assert 'from_pretrained("me/tiny")' in card.text
    assert all(options["token"] == "secret" for options in fake.named("load_card"))
    for name, content in fake.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_push_in_shards(model, hub):
    fake = hub()
    model.push_to_hub("tiny", max_shard_size="6KB")
    assert "model.safetensors.index.json" in fake.files
    assert sum(name.endswith(".safetensors") for name in fake.files) > 3
    assert fake.named("create_commit")[0]["repo_id"] == "me/tiny"
    assert 'from_pretrained("me/tiny")' in fake.files["README.md"].decode()


def test_save_and_push(model, hub, tmp_path):
    fake = hub()
    options = {name: OPTIONS[name] for name in ("private", "token", "commit_message")}
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/tiny", **options)
    (commit,) = fake.named("create_commit")
    assert commit["repo_id"] == "me/tiny"
    assert (commit["commit_message"], commit["token"]) == ("why", "secret")
    assert fake.named("create_repo")[0]["private"] is True
    assert sorted(fake.files) == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out")), logits(model))
    assert 'from_pretrained("me/tiny")' in fake.files["README.md"].decode()


def test_save_and_push_takes_the_folders_name(model, hub, tmp_path):
    fake = hub()
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True)
    assert fake.named("create_commit")[0]["repo_id"] == "me/tiny"


def test_save_and_push_to_a_branch(model, hub, tmp_path):
    """transformers refuses a revision here; to drop it silently would push to main."""
    fake = hub()
    try:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/tiny", revision="draft")
    except TypeError:
        assert not fake.named("create_commit")
    else:
        assert fake.named("create_commit")[0]["revision"] == "draft"


@pytest.mark.parametrize("how", ["push", "save"])
def test_a_misspelt_option_sends_nothing(model, hub, tmp_path, how):
    """`privte=True` must not make a public repository."""
    fake = hub()
    send, target = (model.push_to_hub, "me/tiny") if how == "push" else (model.save_pretrained, tmp_path / "out")
    extra = {} if how == "push" else {"push_to_hub": True, "repo_id": "me/tiny"}
    with pytest.raises(TypeError, match="privte"):
        send(target, privte=True, **extra)
    assert not fake.calls


def test_only_what_was_saved_is_pushed(model, hub, tmp_path):
    """Whatever else lies in the folder was never offered for publication."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "token.txt").write_text("secret")
    (tmp_path / "private.txt").write_text("secret")
    fake = hub()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tiny")
    assert sorted(fake.files) == ["README.md", "config.json", "model.safetensors"]


THEIRS = "---\nlicense: mit\ntags:\n- old\n---\n# Weeks of work\n"


def test_a_persons_card_survives_with_tags_added(model, hub):
    fake = hub(THEIRS)
    model.push_to_hub("me/tiny", tags="mine")
    card = ModelCard(fake.files["README.md"].decode())
    assert "Weeks of work" in card.text
    assert "quantized by optimum-zsaq" not in card.text
    assert card.data.license == "mit"
    assert {"old", "mine", "zsaq"} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags))


def test_a_persons_card_without_metadata_survives(model, hub):
    fake = hub("# Weeks of work\n")
    model.push_to_hub("me/tiny")
    card = ModelCard(fake.files["README.md"].decode())
    assert "Weeks of work" in card.text
    assert "zsaq" in card.data.tags


def test_our_card_is_replaced(model, hub):
    fake = hub(f"---\ntags:\n- zsaq\n---\n{saving.MARK}\n# An older text\n")
    model.push_to_hub("me/tiny")
    assert "An older text" not in fake.files["README.md"].decode()


def test_an_automatic_card_of_transformers_is_replaced_or_kept_but_tagged(model, hub):
    fake = hub("---\nlibrary_name: transformers\ntags: []\n---\n# Model Card for Model ID\n")
    model.push_to_hub("me/tiny")
    assert "zsaq" in ModelCard(fake.files["README.md"].decode()).data.tags


def test_model_tags_are_pushed_once(model, hub):
    fake = hub()
    model.add_model_tags(["zsaq", "study"])
    try:
        model.push_to_hub("me/tiny", tags=["study"])
    finally:
        model.model_tags = []
    tags = ModelCard(fake.files["README.md"].decode()).data.tags
    assert sorted(tag for tag in tags if tag in ("zsaq", "study")) == ["study", "zsaq"]


def test_nothing_is_left_on_disk_after_a_push(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    hub()
    model.push_to_hub("me/tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_failed_upload_raises_and_the_folder_is_whole(model, hub, tmp_path):
    fake = hub()

    def fail(*_, **__):
        raise ConnectionError("the cable")

    fake.create_commit = fail
    with pytest.raises(ConnectionError, match="the cable"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/tiny")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out")), logits(model))


def test_an_adapter_is_pushed_as_an_adapter(hub, tmp_path):
    base = quantized("bert-cls", tmp_path)
    base.add_adapter(LoraConfig(target_modules=["query"]))
    fake = hub()
    base.push_to_hub("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= fake.files.keys()
    assert "model.safetensors" not in fake.files
    if "README.md" in fake.files:  # a card of the whole model would tell people to load what is not there
        assert "## What is in it" not in fake.files["README.md"].decode()
