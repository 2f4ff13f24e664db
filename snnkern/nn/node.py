"""A drop-in for SpikingJelly's node: state that lives from call to call, around the op."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..backend import ORDER
from ..ops.lif import lif
from ..spec.arguments import check_alive, number
from ..spec.layout import state_dtype
from ..spec.neuron import new_spec
from ..surrogate import Sigmoid, Surrogate, from_spikingjelly
from .recompute import repeatable

# What LIFNode.backend may be, and the wish it stands for: SpikingJelly's own names leave the choice to us.
_BACKENDS = {None: None, "torch": None, "cupy": None, "inductor": None, **{name: name for name in ORDER}}


class LIFNode(nn.Module):
    """SpikingJelly's LIFNode with the same spikes, fused, on any backend and in any precision.

    ::

        h = v + (x - (v - rest)) / tau          decay_input
          = v - (v - rest) / tau + x            otherwise
        s = h >= v_threshold
        v = v_reset if s else h                 hard reset
          = h - v_threshold*s                   soft reset, v_reset=None

    ``rest`` is ``v_reset``, 0 if None. Multi-step mode ("m") takes x [T, N, ...] and single-step mode ("s") x [N, ...];
    the spikes have the shape and dtype of x (float32, float64, float16, bfloat16; any strides). A process that trains
    on the CPU with tensors of many MiB is faster after ``snnkern.keep_freed_memory()``.

    Args:
        tau: membrane time constant in steps, > 0.
        decay_input: whether the input is divided by tau too.
        v_threshold: potential from which on a neuron fires.
        v_reset: potential after a spike, or None to subtract the threshold.
        surrogate_function: stands for ds/dh in backward; from ``snnkern.surrogate`` or SpikingJelly.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        step_mode: "s" or "m".
        backend: a backend of ``snnkern.lif``, or None for the fastest that can run. SpikingJelly's "torch", "cupy" and
            "inductor" mean None.
        store_v_seq: keep the potential after every step in ``v_seq``. For monitoring: the steps then run one by one.

    All are attributes, and a change holds from the next forward on.

    State: ``v`` is a float (``v_reset`` or 0) at first and after ``reset()``, then the tensor [N, ...] after the last
    step, in float32 for 16-bit inputs, else in x.dtype. It may be assigned: a float, or a tensor [N, ...] of any
    floating dtype, anywhere. It keeps its graph until ``reset()`` or ``detach()`` (copies and pickles leave it out), is
    no buffer and in no ``state_dict``, follows ``.to(device)`` but keeps its dtype, and starts anew, with a warning,
    when the shape of x changes. ``v_seq`` is None or [T, N, ...] in the dtype of ``v``, differentiable: the steps of
    the last forward ("m") or all steps since ``reset()`` ("s").

    Training with ``detach_reset=True``, ATan and a power of 2 for ``tau`` gives SpikingJelly's weights to the last bit
    on the CPU; otherwise gradients differ in rounding, Sigmoid's in any case. x edited in place before backward, and
    second derivatives, raise; see ``snnkern.lif``.

    ``torch.utils.checkpoint`` runs a forward twice and the state advances once; gradients and state are those without
    it, bit for bit. Where that cannot be, it raises: a gradient through the state from one checkpointed part to another
    needs ``use_reentrant=False``, and a checkpoint within another is not known.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
        RuntimeError: the state belongs to a graph that backward has freed, or the backend cannot run here.

    Source: Fang et al., SpikingJelly, Science Advances 2023; versions 0.0.0.0.14 to 2.0.0 behave alike.
    """

    def __new__(cls, *args, **kwargs):
        # SpikingJelly's tools know stateful modules by their class, so become one of them, but only where it is in use.
        base = sys.modules.get("spikingjelly.activation_based.base")
        if base is not None and not issubclass(LIFNode, base.MemoryModule):
            LIFNode.__bases__ = (base.MemoryModule,)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        charge = ("neuronal_charge", "neuronal_fire", "neuronal_reset")  # what subclasses of SpikingJelly's node define
        for name in (*charge, "single_step_functional_forward", "multi_step_functional_forward"):
            if name in vars(cls):
                raise TypeError(f"{cls.__name__} defines {name}, which the fused neuron would never call")

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | None = None,
        store_v_seq: bool = False,
    ):
        number("tau", tau)
        number("v_threshold", v_threshold)
        rest = 0.0 if v_reset is None else number("v_reset", v_reset)
        surrogate = from_spikingjelly(surrogate_function)
        new_spec(None, tau, decay_input, v_threshold, v_reset, surrogate, detach_reset, True)
        super().__init__()
        self._memories = {}
        self._memories_rv = {}
        self.register_memory("v", rest)
        self.tau = tau
        self.decay_input = decay_input
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate_function = surrogate_function
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multi_step_forward(x) if self._step_mode == "m" else self.single_step_forward(x)

    @repeatable
    def multi_step_forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x [T, N, ...] -> spikes [T, N, ...], whatever ``step_mode`` says."""
        if not self._store_v_seq:
            return self._advance(x_seq)
        spikes, potentials = [], []
        for x in x_seq.split(1):  # no steps at all come as one piece [0, N, ...]
            spikes.append(self._advance(x))
            potentials.append(self.v.expand(x.shape))
        self.v_seq = torch.cat(potentials)
        return torch.cat(spikes)

    @repeatable
    def single_step_forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ...] -> spikes [N, ...], whatever ``step_mode`` says."""
        spikes = self._advance(x.unsqueeze(0)).squeeze(0)
        if self._store_v_seq:
            v, seen = self.v.unsqueeze(0), self._v_pieces
            if seen and (seen[-1].shape[1:], seen[-1].dtype, seen[-1].device) != (v.shape[1:], v.dtype, v.device):
                seen.clear()
            seen.append(v.clone())  # users write into v
        return spikes

    def _advance(self, x: torch.Tensor) -> torch.Tensor:
        memories = self._memories
        v = memories["v"]
        if not isinstance(v, torch.Tensor):
            rest = self.v_reset or 0.0  # where lif starts by itself
            v = None if v == rest else torch.full(x.shape[1:], v, dtype=state_dtype(x.dtype), device=x.device)
        elif v.shape != x.shape[1:] or v.dtype != state_dtype(x.dtype) or v.device != x.device:
            v = _fit(v, x)
        spikes, memories["v"] = lif(x, v, **self._neuron())
        return spikes

    def _neuron(self) -> dict:
        """The node's attributes as keywords of ``lif``."""
        return {
            "tau": self.tau,
            "decay_input": self.decay_input,
            "threshold": self.v_threshold,
            "reset": self.v_reset,
            "surrogate": self.surrogate_function,
            "detach_reset": self.detach_reset,
            "fire_at_threshold": True,
            "backend": _BACKENDS[self._backend],
        }

    def reset(self) -> None:
        """Back to the state before the first step; ``v_seq`` is forgotten."""
        for name, value in self._memories_rv.items():
            self._memories[name] = copy.deepcopy(value)
        self.v_seq = None

    def detach(self) -> None:
        """Cuts the state and ``v_seq`` from their graphs, their values kept: truncated backpropagation through time."""
        self.__dict__.update(self._detached_state())

    def register_memory(self, name: str, value: object) -> None:
        """Adds a state attribute that ``reset()`` sets to ``value`` again. KeyError if the name is taken."""
        if hasattr(self, name):
            raise KeyError(f"{name!r} is already an attribute")
        self._memories[name] = value
        self.set_reset_value(name, value)

    def set_reset_value(self, name: str, value: object) -> None:
        self._memories_rv[name] = copy.deepcopy(_detached(value))

    def get_reset_value(self, name: str) -> object:
        return self._memories_rv[name]

    def memories(self) -> Iterator[object]:
        yield from self._memories.values()

    def named_memories(self) -> Iterator[tuple[str, object]]:
        yield from self._memories.items()

    @property
    def v_seq(self) -> torch.Tensor | None:
        pieces = self._v_pieces
        if len(pieces) > 1:  # joined when asked for, not at every step
            pieces[:] = [torch.cat(pieces)]
        return pieces[0] if pieces else None

    @v_seq.setter
    def v_seq(self, value: torch.Tensor | None) -> None:
        self._v_pieces = [] if value is None else [value]

    @property
    def store_v_seq(self) -> bool:
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = value
        self.v_seq = None

    def supported_step_mode(self) -> tuple[str, ...]:
        return "s", "m"

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in self.supported_step_mode():
            raise ValueError(f"step_mode must be one of {self.supported_step_mode()}, got {value!r}")
        self._step_mode = value

    @property
    def supported_backends(self) -> tuple[str, ...]:
        return tuple(name for name in _BACKENDS if name)

    @property
    def backend(self) -> str | None:
        return self._backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        if value not in _BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(self.supported_backends)}, got {value!r}")
        self._backend = value

    def extra_repr(self) -> str:
        names = ["tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "backend"]
        if "surrogate_function" not in self._modules:
            names.insert(4, "surrogate_function")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __getattr__(self, name: str):
        memories = self.__dict__.get("_memories", ())
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__.get("_memories", ()):
            self._memories[name] = value
            return
        if name == "surrogate_function":  # nn.Module lets nothing but a module take the place of a module
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def _apply(self, fn, recurse: bool = True):
        for state in (self._memories, self._memories_rv):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(fn(value.new_empty(0)).device)
        return nn.Module._apply(self, fn, recurse)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.update(_memories=self._memories.copy(), _v_pieces=self._v_pieces.copy())
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._detached_state()}

    def _detached_state(self) -> dict:
        memories = {name: _detached(value) for name, value in self._memories.items()}
        return {"_memories": memories, "_v_pieces": [v.detach() for v in self._v_pieces]}


def _fit(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The state ``v`` for an input x [T, N, ...] that it does not suit as it is; None to start anew."""
    if v.shape != x.shape[1:]:
        warnings.warn(
            f"the state of a LIFNode has shape {tuple(v.shape)} and its input asks for {tuple(x.shape[1:])}: it starts "
            "anew; call reset() between unrelated inputs",
            stacklevel=2,
        )
        return None
    if getattr(v.grad_fn, "ran", False):  # the cast would hide the freed graph from lif
        check_alive(v)
    return v.to(x.device, state_dtype(x.dtype))


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value
