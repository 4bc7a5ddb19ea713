"""What is kept comes back as it was, wherever it lay, and its place is free afterwards."""

from pathlib import Path

import pytest
import torch

from optimum_zsaq.algorithms.activations import Activations


def value(size: int = 10) -> dict:
    return {"a": (torch.randn(size), None, 3), "b": torch.arange(size)}  # 4 + 8 bytes an element


def same(one: dict, other: dict) -> bool:
    return torch.equal(one["a"][0], other["a"][0]) and one["a"][1:] == other["a"][1:] and torch.equal(one["b"], other["b"])


@pytest.mark.parametrize(("limit", "held"), [(None, 5), (300, 2), (119, 0), (0, 0)])
def test_comes_back_as_it_was(limit, held):
    store, values = Activations(limit), [value() for _ in range(5)]
    kept = [store.keep(v) for v in values]
    assert all(same(k.get(), v) for k, v in zip(kept, values, strict=True))
    assert (store.used, store.spilled) == (120 * held, 120 * (5 - held))


def test_place_is_freed():
    store = Activations(120)
    first, second = store.keep(value()), store.keep(value())
    folder = Path(store._folder.name)
    assert len(list(folder.iterdir())) == 1
    del second
    assert (store.spilled, list(folder.iterdir())) == (0, [])
    del first
    third = store.keep(value())
    assert (store.used, store.spilled) == (120, 0)
    assert third.get() is third.get()


def test_the_folder_goes_with_it():
    store = Activations(0)
    kept = store.keep(value())
    folder = Path(store._folder.name)
    assert folder.exists()
    del kept, store
    assert not folder.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_costs_memory_and_loses_nothing(monkeypatch, caplog, error):
    def full(*_):
        raise error

    store = Activations(limit=0)
    first = store.keep({"a": torch.ones(3)})
    monkeypatch.setattr(torch, "save", full)
    second, third = store.keep({"a": torch.zeros(3)}), store.keep({"a": torch.full((3,), 2.0)})
    assert [kept.get()["a"][0].item() for kept in (first, second, third)] == [1.0, 0.0, 2.0]
    assert (store.used, store.spilled) == (24, 12)
    assert caplog.text.count("activations are kept in memory from here on") == 1
