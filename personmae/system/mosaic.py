"""Parts of mosaicml-streaming without the rest of it.

``import streaming`` imports transformers and scikit-learn, ten seconds of CPU time, for data sets that are not read here. The
writer and the cloud clients need neither, and nor does its reader.
"""

import importlib
import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import Any

_PACKAGES = ("streaming", "streaming.base")  # those whose ``__init__`` gathers everything
_lock = threading.Lock()


def load(name: str) -> Any:
    """The module ``streaming.base.X``. A later ``import streaming`` finds the same module and imports the rest.

    Raises:
        ModuleNotFoundError: mosaicml-streaming is not installed, or has no such module.
    """
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        absent = [package for package in _PACKAGES if package not in sys.modules]
        try:
            for package in absent:
                sys.modules[package] = _bare(package)
            importlib.import_module("streaming.base.format")  # first: another's import of it would lead in a circle
            return importlib.import_module(name)
        finally:
            for package in absent:
                sys.modules.pop(package, None)


def _bare(package: str) -> ModuleType:
    """A package that finds its modules and has nothing else. Its own ``__init__`` is not run."""
    parent = package.rpartition(".")[0]
    where = sys.modules[parent].__path__ if parent else None
    spec = importlib.machinery.PathFinder.find_spec(package, where)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = ModuleType(package)
    module.__path__ = [*spec.submodule_search_locations]
    return module
