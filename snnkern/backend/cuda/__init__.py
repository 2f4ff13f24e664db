"""CUDA C++ (``csrc/cuda``), compiled when a kernel is first needed; compute capability 8.0 and up."""

import torch

from .._extension import missing
from . import program
from .bn_lif import bn_gradients, bn_moments, bn_prepare, bn_sums, lif_backward, lif_forward  # noqa: F401
from .bn_once import bn_backward, bn_forward  # noqa: F401
from .pack import pack, unpack  # noqa: F401
from .recurrent import recurrent_backward, recurrent_forward  # noqa: F401
from .ttm import ttm  # noqa: F401

differentiable = False


def unavailable() -> str | None:
    if missing():
        return missing()
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if without := program.missing():
        return without
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return None


def refuses(device_type, dtype) -> str | None:
    if device_type != "cuda":
        return f"the tensor is on {device_type}, this backend needs it on a CUDA device"
    if dtype == torch.float64:
        return "its state is float32, x is float64"
    return None
