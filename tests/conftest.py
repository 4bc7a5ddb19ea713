"""What all tests share: one `device` fixture, one thread, no network, and the package as it was installed."""

import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
for path in [p for p in sys.path if Path(p).resolve() == Path(__file__).parents[1]]:
    sys.path.remove(path)  # the sources there are not built

import pytest
import torch
from conformance import TransposedLinear, build_transposed
from torch import nn

from optimum_zsaq import kinds


torch.set_num_threads(1)

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_graphs():
    """Compiled graphs of other tests are forgotten."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """The CPU, then a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def plain_kinds(monkeypatch):
    """The layer kinds of plain torch alone, whatever was registered before; what a test registers is undone."""
    plain = {kind: kinds.KINDS[kind] for kind in (nn.Linear, nn.Embedding)}
    monkeypatch.setattr(kinds, "KINDS", plain)
    monkeypatch.setattr(kinds, "_READERS", [kinds.ModelReader()])


@pytest.fixture
def toy_kinds(plain_kinds):
    """Linear, Embedding and the toy `TransposedLinear`: the three kinds of `conformance.LAYERS`."""
    kinds.register_transposed(TransposedLinear, build_transposed)
