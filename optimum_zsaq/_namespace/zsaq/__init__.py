"""`optimum.zsaq`: the same module objects as `optimum_zsaq`, under Optimum's name space."""

import importlib
import importlib.abc
import importlib.util
import sys


_ALIAS, _REAL = "optimum.zsaq", "optimum_zsaq"


class _Loader(importlib.abc.Loader):
    """Hands out the real module, and leaves it the spec it has."""

    def __init__(self, real: str):
        self.real = real

    def create_module(self, spec):
        module = importlib.import_module(self.real)
        self._spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self._spec


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not name.startswith(f"{_ALIAS}."):
            return None
        real = _REAL + name.removeprefix(_ALIAS)
        return importlib.util.spec_from_loader(name, _Loader(real)) if importlib.util.find_spec(real) else None


if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
sys.modules[__name__] = importlib.import_module(_REAL)
