"""Loading a low-bit checkpoint, or an adapter, in a process that never imports this package.

`install` is the `torch.backends` entry point, called at the end of `import torch`. It only arms import hooks: when
transformers has imported its base class of models, and when PEFT has imported the last of its modules, the package
registers itself with them. Nothing here may ever raise: a fault would break `import torch`. `OPTIMUM_ZSAQ_AUTOLOAD=0` turns
it off.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable


TARGET = "transformers.modeling_utils"
ADAPTERS = "peft.mixed_model"  # the last one that `peft/__init__.py` imports
SWITCH = "OPTIMUM_ZSAQ_AUTOLOAD"


def install() -> None:
    """Arm registration, or do it now if transformers' models are imported already."""
    try:
        if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "off", "no"):
            return
        for target, register in ((TARGET, _register), (ADAPTERS, _register_adapters)):
            module = sys.modules.get(target)
            if module is not None and not module.__spec__._initializing:
                register()
            elif not any(isinstance(finder, _Finder) and finder.target == target for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder(target, register, being_imported=module is not None))
    except Exception as error:
        warnings.warn(f"optimum-zsaq could not arm its autoload: {error!r}", stacklevel=2)


def _register() -> None:
    try:
        importlib.import_module("optimum_zsaq.integrations.registration").register()
    except Exception as error:
        warnings.warn(f"optimum-zsaq could not register with transformers: {error!r}", stacklevel=2)


def _register_adapters() -> None:
    try:
        importlib.import_module("optimum_zsaq.integrations.peft")
    except Exception as error:
        warnings.warn(f"optimum-zsaq could not register with PEFT: {error!r}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the target through the other finders, once, and has registration follow its execution.

    Where transformers' target itself is importing torch just now, the first file of a model family, which comes after it,
    serves.
    """

    def __init__(self, target: str, register: Callable[[], None], being_imported: bool):
        self.target, self.register, self.being_imported = target, register, being_imported

    def _wanted(self, name: str) -> bool:
        if self.being_imported and self.target == TARGET:
            return name.startswith("transformers.models.") and ".modeling_" in name
        return name == self.target

    def find_spec(self, name, path=None, target=None):
        if not self._wanted(name):
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.register)
        except Exception as error:
            warnings.warn(f"optimum-zsaq could not follow the import of {name}: {error!r}", stacklevel=2)
            return None
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner, register: Callable[[], None]):
        self._inner, self._register = inner, register

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module):
        self._inner.exec_module(module)
        self._register()

    def __getattr__(self, name):
        return getattr(self._inner, name)
