"""State and ``torch.utils.checkpoint``, which runs a part of a model once more when backward needs what was not kept.

The second run starts from the state that the first one started from, and afterwards the state is what it was before.
Which first run a second one repeats, PyTorch does not say: its hooks for saved tensors (``use_reentrant=False``; from
PyTorch 2.8 on) and its call stack (``True``) show it. Where they do not, the second run raises.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

_compiling = torch.compiler.is_dynamo_compiling
_running = torch._C._current_graph_task_id  # the number of the backward that is running, or -1
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)
_FIRST, _AGAIN = (f"_{run}_hook.__init__.<locals>.pack_hook" for run in ("checkpoint", "recomputation"))


def repeatable(step: Callable) -> Callable:
    """A method ``step(x) -> y`` of a module whose state is ``_memories`` and ``_v_pieces`` that advances it once, under
    checkpoints too.

    Raises:
        RuntimeError: ``step`` runs in a backward and cannot tell what it repeats; its state was edited in place since;
            or ``use_reentrant=True`` would lose the gradient that flows through the state.
    """

    @wraps(step)
    def run(node, x):
        if _compiling():  # PyTorch refuses what changes state inside a checkpoint
            return step(node, x)
        with_grad = torch.is_grad_enabled()
        if _running() == -1 and (_hooks(True) is None if with_grad else not node.training):
            if with_grad:
                _refuse_cut(node, None)
            return step(node, x)
        part, call = _find()
        if call is not None:
            return _repeat(step, node, x, part, call)
        if with_grad or part is not None:
            _refuse_cut(node, part)
        reentrant = isinstance(part, BackwardCFunction)
        if part is not None and node not in (starts := vars(part).setdefault("_snnkern_starts", {})):
            if reentrant and any(v.requires_grad for v in _tensors(node)):
                raise RuntimeError(_LOST)
            tensors = _tensors(node)
            versions = [v._version for v in tensors]
            starts[node] = SimpleNamespace(state=_state(node), tensors=tensors, versions=versions, call=None)
        y = step(node, x)
        if reentrant:  # runs without gradient
            for v in _tensors(node):
                v._snnkern_cut = weakref.ref(part)
        return y

    return run


def _find() -> tuple[object | None, object | None]:
    """PyTorch's object of the checkpointed part of a model that is running, None if there is none to see; and, if it
    runs again, what is the same for all of that run: the number of the backward where it is ``use_reentrant=True``."""
    hooks = _hooks(True)
    pack = hooks and inspect.unwrap(hooks[0])
    name = getattr(pack, "__qualname__", None)
    if name in (_FIRST, _AGAIN):
        seen = inspect.getclosurevars(pack).nonlocals
        if name == _AGAIN:
            return seen["target_frame_ref"](), pack
        return (seen["frame"], None) if _running() == -1 else (None, pack)  # a checkpoint within another, again
    again = None if _running() == -1 else _running()
    if again is None and torch.is_grad_enabled():  # other hooks
        return None, None
    code = (CheckpointFunction.forward if again is None else CheckpointFunction.backward).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame and frame.f_locals["ctx"], again


def given(node) -> None:
    """For whoever assigns the state: a run in the same backward starts from that, as SpikingJelly's memopt has it."""
    node.__dict__["_given_in"] = _running()


def _repeat(step, node, x, part, call):
    start = getattr(part, "_snnkern_starts", {}).get(node)
    if start is None and node._given_in == _running():
        return step(node, x)
    if start is None:
        raise RuntimeError(
            f"{type(node).__name__} runs in a backward and cannot tell which of its calls this repeats: that works for "
            "torch.utils.checkpoint, but not for one within another, nor with other hooks for saved tensors between, "
            "nor in eval mode with use_reentrant=True, nor before PyTorch 2.8 with False"
        )
    if start.call != call:
        if [v._version for v in start.tensors] != start.versions:
            raise RuntimeError("the state of a checkpointed node was edited in place before backward: assign instead")
        start.call, start.repeated = call, _leaves(*start.state)
    present = _state(node)
    node._memories, node._v_pieces = start.repeated
    try:
        return step(node, x)
    finally:
        state = _state(node)  # backward goes through what a number repeats; of the other kind values alone are wanted
        start.repeated = state if isinstance(call, int) else _leaves(*state)
        node._memories, node._v_pieces = present


def _state(node) -> tuple[dict, list]:
    return dict(node._memories), list(node._v_pieces)


def _tensors(node) -> list[torch.Tensor]:
    return [v for v in node._memories.values() if isinstance(v, torch.Tensor)]


def _leaves(memories: dict, pieces: list) -> tuple[dict, list]:
    def leaf(value):
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    return {name: leaf(value) for name, value in memories.items()}, [leaf(v) for v in pieces]


_LOST = (
    "torch.utils.checkpoint with use_reentrant=True loses the gradient that flows through a node's state into and out "
    "of the checkpointed part: use_reentrant=False keeps it; reset() or detach() says that there is to be none"
)


def _refuse_cut(node, part) -> None:
    """Refuses a state that another part than ``part`` has put out without its graph."""
    for v in _tensors(node):
        cut = getattr(v, "_snnkern_cut", None)
        if cut is not None and (part is None or cut() is not part):
            raise RuntimeError(_LOST)
