"""Training recipes: what snnkern's command line does, as functions."""

__all__ = ["State", "fit"]


def __getattr__(name: str):
    if name in __all__:  # late: a command that does not train needs nothing of what training does
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
