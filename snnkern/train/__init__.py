"""Training recipes: what snnkern's command line does, as functions."""

from .loop import State, fit

__all__ = ["State", "fit"]
