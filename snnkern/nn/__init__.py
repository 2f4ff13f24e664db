"""Modules around the ops: they hold parameters and state, and no mathematics of their own."""

from .exchange import from_nir, to_nir
from .layers import (
    IAF,
    LI,
    LIF,
    TTM,
    AdaptiveLIF,
    BinarySteps,
    CubaLIF,
    Linear,
    LinearLIF,
    RecurrentLIF,
    SmoothLIF,
    carried,
)
from .node import (
    IFNode,
    ILIFNode,
    LIFNode,
    MultiStepIFNode,
    MultiStepLIFNode,
    MultiStepParametricLIFNode,
    ParametricLIFNode,
    TernaryIFNode,
    TernaryLIFNode,
)
from .norm import BNLIF, TdBatchNorm, fold
from .windows import Windows

__all__ = [
    "BNLIF",
    "IAF",
    "LI",
    "LIF",
    "TTM",
    "AdaptiveLIF",
    "BinarySteps",
    "CubaLIF",
    "IFNode",
    "ILIFNode",
    "LIFNode",
    "Linear",
    "LinearLIF",
    "MultiStepIFNode",
    "MultiStepLIFNode",
    "MultiStepParametricLIFNode",
    "ParametricLIFNode",
    "RecurrentLIF",
    "SmoothLIF",
    "TdBatchNorm",
    "TernaryIFNode",
    "TernaryLIFNode",
    "Windows",
    "carried",
    "fold",
    "from_nir",
    "to_nir",
]
