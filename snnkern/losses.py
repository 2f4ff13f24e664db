"""Losses over the outputs of every time step; see ``snnkern.methods.tet``."""

from .methods.tet import sdt, tet

__all__ = ["sdt", "tet"]
