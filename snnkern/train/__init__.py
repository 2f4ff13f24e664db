"""Training recipes: what snnkern's command line does, as functions."""

from .folder import State
from .loop import fit

__all__ = ["State", "fit"]
