"""How tests reach the modules of `examples/study`, which is a folder of scripts and no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


STUDY = Path(__file__).parents[1] / "examples" / "study"


def load_study(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A study's module, read anew with all the modules beside it."""
    for path in STUDY.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module(name)
