"""The backends, and the one rule by which a call gets one.

A backend is a folder here with one file per op. Its ``__init__`` offers

- ``unavailable() -> str | None``: why it cannot run on this machine;
- ``refuses(device_type, dtype) -> str | None``: why it cannot serve such a tensor;
- ``differentiable``: True if its ops are made of PyTorch's own, so that autograd needs no help;
- the ops themselves; ``bn_forward`` and ``bn_backward``, each three of them in one, only where that is faster.

Without a wish, the first of ``ORDER`` that can serve the tensor is taken and the reasons against the others are logged
at debug level; that the reference is taken for want of the extension is told by one warning a process. A wish
(``backend=`` or ``SNNKERN_BACKEND``) is obeyed or raises its reason; nothing falls back from a failure.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch

from ._extension import missing

ORDER = ("cuda", "cpu", "triton", "reference")  # fastest first, and the CPU before Triton's interpreter
_log = logging.getLogger("snnkern")


def why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot serve a tensor on such a device and of such a dtype; None if it can."""
    module = load(name)
    return module.unavailable() or module.refuses(device_type, dtype)


def backends() -> dict[str, str | None]:
    """Every backend, fastest first, with None if it can run on this machine, else the reason why not."""
    return {name: load(name).unavailable() for name in ORDER}


def choose(device_type: str, dtype: torch.dtype, backend: str | None = None) -> ModuleType:
    """The backend for a tensor.

    Raises:
        ValueError: ``backend`` (or ``SNNKERN_BACKEND``) is not the name of one.
        RuntimeError: it is, but cannot serve this tensor.
    """
    if backend is None:
        backend = os.environ.get("SNNKERN_BACKEND") or None
    elif not isinstance(backend, str):
        raise _unknown(backend)
    return _choose(device_type, dtype, backend)


@cache
def _choose(device_type: str, dtype: torch.dtype, wish: str | None) -> ModuleType:
    for name in ORDER if wish is None else (wish,):
        reason = why_not(name, device_type, dtype)
        if reason is None:
            if name == "reference" and wish is None and device_type in ("cpu", "cuda") and missing():
                _warn_of_the_reference()
            return load(name)
        if wish is not None:
            raise RuntimeError(f"backend {wish!r} cannot run: {reason}")
        _log.debug("%s tensor of %s: not backend %r: %s", device_type, dtype, name, reason)
    raise AssertionError("the reference backend serves every tensor")


@cache
def _warn_of_the_reference() -> None:
    message = f"snnkern runs on its reference, which is many times slower than the kernels: {missing()}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def load(name: str) -> ModuleType:
    """The module of a backend; ValueError if there is none of that name."""
    if not isinstance(name, str) or name not in ORDER:
        raise _unknown(name)
    return importlib.import_module(f"{__name__}.{name}")


def _unknown(name: object) -> ValueError:
    return ValueError(f"backend must be one of {', '.join(ORDER)}, got {name!r}")


def on(device: torch.device):
    """Kernels are launched on the current device: a context in which that is ``device``."""
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    module = getattr(torch, device.type)
    return nullcontext() if device.index == module.current_device() else module.device(device)
