"""How ops and modules check their arguments. A message names the argument, what it got and what it expects."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
import torch.distributed

from .layout import DTYPES, state_dtype

MOST = torch.finfo(torch.float32).max


def whole(name: str, value) -> int:
    """``value`` if it is a whole number of Python or NumPy, or a size that torch.compile traces; else TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def positive(name: str, value) -> int:
    """As ``whole``, from 1 up; ValueError otherwise."""
    value = whole(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if type(value) is int and value >> 63:
        raise ValueError(f"{name} must be below 2**63, got {value}")
    return value


def check_x(x, time_dim, name="x") -> int:
    """Checks the input ``name`` of an op over time; returns ``time_dim`` counted from the front."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if type(time_dim) is not int:
        time_dim = whole("time_dim", time_dim)
    dims = x.dim()
    if not -dims <= time_dim < dims:
        raise ValueError(f"time_dim must name a dimension of {name}, got {time_dim} for shape {tuple(x.shape)}")
    return time_dim % dims


def check_dense(**tensors) -> None:
    """Refuses, by name, tensors whose numbers do not lie in memory side by side. What is no tensor others refuse."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            continue
        if t.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one of layout {t.layout}: call to_dense()")


def check_residual(residual, name: str = "residual") -> None:
    if residual is not None and not isinstance(residual, torch.Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(residual).__name__}")


def flag(name: str, value) -> bool:
    """``value`` if it is True or False itself, else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_group(group) -> None:
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


def number(name: str, value) -> float:
    """``value`` as a float if it is a real number of Python or NumPy, not an array or a tensor, that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        found = float(value)
    except OverflowError:  # of a whole number or a fraction
        found = math.inf
    if not -math.inf < found < math.inf:  # isfinite knows no number that torch.compile traces
        raise ValueError(f"{name} must be finite, got {value!r}")
    if not -MOST <= found <= MOST:
        raise ValueError(f"{name} must be finite in float32, got {value!r}")
    return found


def plan_steps(steps: int, steps_out: int | None) -> tuple[int, int | None]:
    """The steps that kernels are to put out, and to how many these are to be repeated, if they are."""
    if steps_out is None:
        return steps, None
    steps_out = positive("steps_out", steps_out)
    if steps < 1:
        raise ValueError(f"steps_out needs an x of one time step at least, got none for steps_out={steps_out!r}")
    return min(steps, steps_out), steps_out if steps_out > steps else None


def check_parameter(name: str, p: torch.Tensor, shape, device) -> torch.Tensor:
    """p, if it is a parameter of neurons of ``shape``."""
    if not p.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {p.dtype}")
    if p.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {p.device}")
    own = (1,) * (len(shape) - p.dim()) + tuple(p.shape)
    if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to x without time, {tuple(shape)}, got shape {tuple(p.shape)}")
    return p


def check_state(x, v, time_dim: int, name: str = "x") -> None:
    """Checks the potential ``v`` that belongs to x, which its caller knows by ``name``."""
    if v is not None:
        if not isinstance(v, torch.Tensor):
            raise TypeError(f"v must be a tensor or None, got {type(v).__name__}")
        if v.dtype != state_dtype(x.dtype):
            raise TypeError(f"v must be {state_dtype(x.dtype)} for {name} of {x.dtype}, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"v must be on the device of {name}, {x.device}, got {v.device}")
        wanted = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        if v.shape != wanted:
            raise ValueError(f"v must have the shape of {name} without time, {tuple(wanted)}, got {tuple(v.shape)}")
        # While compiling there is no looking at graphs, and none of ours: PyTorch's own message says it, at backward.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and getattr(v.grad_fn, "ran", False):
            check_alive(v)


def join_states(x, v, time_dim: int, states: int) -> torch.Tensor | None:
    """The state ``v`` of neurons that have several, each checked as ``check_state`` does, as one tensor."""
    if v is None:
        return None
    if not isinstance(v, (tuple, list)) or len(v) != states:
        got = f"{len(v)} of them" if isinstance(v, (tuple, list)) else type(v).__name__
        raise TypeError(f"v must be a tuple of the {states} states of these neurons, or None, got {got}")
    for each in v:
        if each is None:
            raise TypeError(f"v must be a tuple of {states} tensors, got None among them")
        check_state(x, each, time_dim)
    return torch.stack(tuple(v))


def check_alive(v: torch.Tensor) -> None:
    try:
        v.grad_fn.saved_tensors  # noqa: B018  # raises once backward has freed them
    except RuntimeError as error:
        raise RuntimeError(
            "the state v still belongs to a graph that backward has already used and freed: "
            "call reset() or detach() on the node (or v.detach()) before feeding it again"
        ) from error
