"""What is to happen to modules of other packages, as soon as they are imported."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["after_import"]


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls ``action(module)`` once the module ``name`` has been imported: now, if it has been already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
    if _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    _WATCH.actions.setdefault(name, []).append(action)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find, and stands around their loader."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.actions:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.actions[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, actions) -> None:
        self.loader, self.actions = loader, actions

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for action in self.actions:
            action(module)


_WATCH = _Watch()
