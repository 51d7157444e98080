"""Registers `model_type: tinyllama` with transformers' Auto classes, without importing transformers.

Importing transformers and torch takes seconds, and a command that reports a wrong path should not spend them.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


_AUTO = "transformers.models.auto.configuration_auto"


def register_model_type() -> None:
    """Makes the Auto classes know `tinyllama`: now if transformers has been imported, else when it is imported."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """Adds the model type to transformers' mapping of configurations.

    `AutoConfig.register` needs the class, and importing it takes three seconds that transformers itself defers until a
    Llama is used. Its mapping is lazy inside: a class name, looked up in a module. No public function offers that
    (transformers 5.23). tests/test_registration.py checks that this works.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._mapping["tinyllama"] = "TinyLlamaConfig"
    CONFIG_MAPPING._modules["tinyllama"] = sys.modules[__package__]


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module of the Auto classes as Python does, and registers the model type when it has been executed."""

    _loader: importlib.abc.Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is like any other: its own loader reads its source for tracebacks and inspection.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
        sys.meta_path.remove(self)
