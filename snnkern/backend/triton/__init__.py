"""Triton kernels: NVIDIA, AMD and Intel GPUs; with ``TRITON_INTERPRET=1`` Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

differentiable = False


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; it reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (python -m pip install triton)"
    if interpreted():
        return None
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, to test them)"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except (ImportError, RuntimeError) as error:
        return f"Triton cannot drive the GPU: {error}"
    return None


def refuses(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its state is float32; float64 needs the cpu or the reference backend"
    if device_type == "cpu":
        return None if interpreted() else "the tensor is on the CPU, Triton needs it on a GPU (or TRITON_INTERPRET=1)"
    return None if device_type in ("cuda", "xpu") else f"the tensor is on {device_type}, which Triton does not serve"


_LAUNCHERS = {  # and their files
    **dict.fromkeys(("lif_forward", "lif_backward"), "lif"),
    **dict.fromkeys(("recurrent_forward", "recurrent_backward"), "recurrent"),
    **dict.fromkeys(("bn_moments", "bn_prepare", "bn_sums", "bn_gradients"), "bn_lif"),
    **dict.fromkeys(("pack", "unpack"), "pack"),
    "ttm": "ttm",
}


def __getattr__(name: str):
    """The launchers: Triton is imported when one is first asked for."""
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAUNCHERS[name]}", __name__)
    globals()[name] = getattr(module, name)
    return globals()[name]
