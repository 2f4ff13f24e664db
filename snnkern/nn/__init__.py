"""Modules around the ops: they hold parameters and state, and no mathematics of their own."""

from .layers import LIF, TTM, SmoothLIF, carried
from .node import LIFNode
from .norm import BNLIF, TdBatchNorm, fold

__all__ = ["BNLIF", "LIF", "TTM", "LIFNode", "SmoothLIF", "TdBatchNorm", "carried", "fold"]
