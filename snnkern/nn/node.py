"""Drop-ins for SpikingJelly's nodes: state that lives from call to call, around the op."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from ..backend import ORDER
from ..ops.lif import lif
from ..spec.arguments import check_alive, flag, number, positive
from ..spec.layout import state_dtype
from ..spec.neuron import GIVEN, new_spec
from ..surrogate import Integer, Sigmoid, Surrogate, from_spikingjelly
from .imports import after_import
from .recompute import given, repeatable

# What LIFNode.backend may be, and the wish it stands for: SpikingJelly's own names leave the choice to us.
_BACKENDS = {None: None, "torch": None, "cupy": None, "inductor": None, **{name: name for name in ORDER}}

# A class here, and the base instead of it for subclasses that charge by themselves; snnkern.hook fills it.
INSTEAD: dict[type, type] = {}


class BaseNode(nn.Module):
    """What the nodes here share: SpikingJelly's attributes, state rules and tools, around ``snnkern.lif``.

    Multi-step mode ("m") takes x [T, N, ...] and single-step mode ("s") x [N, ...]; the spikes have the shape and dtype
    of x (float32, float64, float16, bfloat16; any strides). A process that trains on the CPU with tensors of many MiB
    is faster after ``snnkern.keep_freed_memory()``.

    Args:
        v_threshold: potential from which on a neuron fires. It and ``tau`` of the classes may be tensors, as
            ``snnkern.lif`` takes them: a ``Parameter`` is learnt and saved, another follows ``.to(device)`` alone.
        v_reset: potential after a spike, or None to subtract the threshold.
        surrogate_function: stands for ds/dh in backward; from ``snnkern.surrogate`` or SpikingJelly.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        step_mode: "s" or "m".
        backend: a backend of ``snnkern.lif``, or None for the fastest that can run. SpikingJelly's "torch", "cupy" and
            "inductor" mean None. A bool in this place is ``store_v_seq``, SpikingJelly 2.0's order of arguments.
        store_v_seq: keep the potential after every step in ``v_seq``.

    All are attributes, and a change holds from the next forward on.

    State: ``v`` is a float (``v_reset`` or 0) at first and after ``reset()``, then the tensor [N, ...] after the last
    step, in float32 for 16-bit inputs, else in x.dtype. It may be assigned: a float, or a tensor [N, ...] of any
    floating dtype, anywhere. It keeps its graph until ``reset()`` or ``detach()`` (copies and pickles leave it out), is
    no buffer and in no ``state_dict``, follows ``.to(device)`` but keeps its dtype, and starts anew, with a warning,
    when the shape of x changes. ``v_seq`` is None or [T, N, ...] in the dtype of ``v``, differentiable: the steps of
    the last forward ("m") or all steps since ``reset()`` ("s").

    Where SpikingJelly is imported, before or after, each class here is a subclass of its class of the same name, of its
    ``BaseNode`` at least, so that its tools find the node; none of its arithmetic runs in the node. What counts
    PyTorch's operations, as some of its energy counters do, sees none inside the node but with backend="reference".

    ``torch.utils.checkpoint`` runs a forward twice and the state advances once; gradients and state are those without
    it, bit for bit. Where that cannot be, it raises: a gradient through the state from one checkpointed part to another
    needs ``use_reentrant=False``, and a checkpoint within another is not known.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
        RuntimeError: the state belongs to a graph that backward has freed, or the backend cannot run here.
    """

    _printed = ()  # attributes that say how a class charges
    _given_in = -1  # see recompute.py
    _fire_at_threshold = True
    lava_s_cale = 1 << 6  # for SpikingJelly's lava_exchange

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        charge = ("neuronal_charge", "neuronal_fire", "neuronal_reset")  # what subclasses of SpikingJelly's node define
        for name in (*charge, "single_step_functional_forward", "multi_step_functional_forward"):
            if name in vars(cls):
                if INSTEAD.keys() & {*cls.__bases__}:
                    cls.__bases__ = tuple(INSTEAD.get(base, base) for base in cls.__bases__)
                    return
                raise TypeError(f"{cls.__name__} defines {name}, which the fused neuron would never call")

    def __init__(
        self,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | None = None,
        store_v_seq: bool = False,
    ):
        if isinstance(backend, bool):
            backend, store_v_seq = None, backend
        nn.Module.__init__(self)
        self._memories = {}
        self._memories_rv = {}
        self.register_memory("v", 0.0 if v_reset is None else number("v_reset", v_reset))
        self.v_threshold = _parameter("v_threshold", v_threshold)
        self.v_reset = v_reset
        self.surrogate_function = surrogate_function
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        _check(BaseNode._neuron(self))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multi_step_forward(x) if self._step_mode == "m" else self.single_step_forward(x)

    @repeatable
    def multi_step_forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """x [T, N, ...] -> spikes [T, N, ...], whatever ``step_mode`` says."""
        if not self._store_v_seq:
            return self._advance(x_seq)
        spikes, self.v_seq = lif(x_seq, self._fit(self.v, x_seq), **self._neuron(), return_v="sequence")
        if len(x_seq):
            self.v = self.v_seq[-1].clone()  # users write into v
        else:
            (self.v,) = self.materialize_states((x_seq,), (self.v,), "m")
        return spikes

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
        spikes, memories["v"] = lif(x, self._fit(memories["v"], x), **self._neuron())
        return spikes

    def _fit(self, v: object, x: torch.Tensor) -> torch.Tensor | None:
        """The state ``v`` as ``lif`` takes it with an input x [T, N, ...]; None to start at rest."""
        if not isinstance(v, torch.Tensor):
            rest = self.v_reset or 0.0  # where lif starts by itself
            return None if v == rest else torch.full(x.shape[1:], v, dtype=state_dtype(x.dtype), device=x.device)
        if v.shape == x.shape[1:] and v.dtype == state_dtype(x.dtype) and v.device == x.device:
            return v
        return _converted(v, x)

    def materialize_states(self, inputs: tuple, states: tuple, step_mode: str) -> tuple:
        """The states as tensors that suit the inputs."""
        x = inputs[0] if step_mode == "m" else inputs[0].unsqueeze(0)
        v = self._fit(states[0], x)
        if v is None:
            v = torch.full(x.shape[1:], self.v_reset or 0.0, dtype=state_dtype(x.dtype), device=x.device)
        return v, *states[1:]

    def functional_forward(self, inputs: tuple, states: tuple, **kwargs) -> tuple[tuple, tuple]:
        """((x,), (v,)) -> ((spikes,), (v after the last step,)) in the node's step mode; its own state stays."""
        if self._step_mode == "m":
            return self.multi_step_functional_forward(inputs, states, **kwargs)
        return self.single_step_functional_forward(inputs, states, **kwargs)

    def single_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs) -> tuple[tuple, tuple]:
        (spikes,), states = self.multi_step_functional_forward((inputs[0].unsqueeze(0),), states)
        return (spikes.squeeze(0),), states

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs) -> tuple[tuple, tuple]:
        spikes, v = lif(inputs[0], self._fit(states[0], inputs[0]), **self._neuron())
        return (spikes,), (v, *states[1:])

    def _neuron(self) -> dict:
        """The node's attributes as keywords of ``lif``."""
        return {
            "threshold": self.v_threshold,
            "reset": self.v_reset,
            "surrogate": self.surrogate_function,
            "detach_reset": self.detach_reset,
            "fire_at_threshold": self._fire_at_threshold,
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
        self._store_v_seq = flag("store_v_seq", value)
        self.v_seq = None

    def supported_step_mode(self) -> tuple[str, ...]:
        return "s", "m"

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if not isinstance(value, str) or value not in self.supported_step_mode():
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
        if not (value is None or isinstance(value, str)) or value not in _BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(self.supported_backends)}, got {value!r}")
        self._backend = value

    def extra_repr(self) -> str:
        names = ["v_threshold", "v_reset", "surrogate_function", "detach_reset", "step_mode", "backend"]
        shown = [*self._printed, *(name for name in names if name not in self._modules)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def __getattr__(self, name: str):
        memories = self.__dict__.get("_memories", ())
        if name == "v_seq":  # monitors of SpikingJelly 0.0.0.0.14 ask here
            return BaseNode.v_seq.fget(self)
        return memories[name] if name in memories else nn.Module.__getattr__(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__.get("_memories", ()):
            self._memories[name] = value
            given(self)
            return
        if isinstance(value, (nn.Module, nn.Parameter)) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # which refuses it; nn.Module would register it instead
            return
        if name == "surrogate_function":  # nn.Module lets nothing but a module take the place of a module
            self._modules.pop(name, None)
        nn.Module.__setattr__(self, name, value)

    def _apply(self, fn, recurse: bool = True):
        for state in (self._memories, self._memories_rv, self.__dict__):  # the last: of a tensor for a threshold
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(fn(value.new_empty(0)).device)
        return nn.Module._apply(self, fn, recurse)

    def _replicate_for_data_parallel(self):
        replica = nn.Module._replicate_for_data_parallel(self)
        replica.__dict__.update(_memories=self._memories.copy(), _v_pieces=self._v_pieces.copy())
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, **self._detached_state(), "_given_in": -1}

    def _detached_state(self) -> dict:
        memories = {name: _detached(value) for name, value in self._memories.items()}
        return {"_memories": memories, "_v_pieces": [v.detach() for v in self._v_pieces]}


class _Leaky(BaseNode):
    """What LIFNode and TernaryLIFNode share: their leak."""

    _printed = ("tau", "decay_input")

    def __init__(
        self,
        tau: float | torch.Tensor = 2.0,
        decay_input: bool = True,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | None = None,
        store_v_seq: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        self.tau, self.decay_input = _parameter("tau", tau), decay_input
        _check(self._neuron())

    def _neuron(self) -> dict:
        return {"tau": self.tau, "decay_input": self.decay_input, **super()._neuron()}


class LIFNode(_Leaky):
    """SpikingJelly's LIFNode with the same spikes, fused, on any backend and in any precision.

    ::

        h = v + (x - (v - rest)) / tau          decay_input
          = v - (v - rest) / tau + x            otherwise
        s = h >= v_threshold
        v = v_reset if s else h                 hard reset
          = h - v_threshold*s                   soft reset, v_reset=None

    ``rest`` is ``v_reset``, 0 if None. ``tau``: membrane time constant in steps, > 0. ``decay_input``: whether the
    input is divided by tau too. Other arguments, state and errors: ``BaseNode``.

    Training with ``detach_reset=True``, ATan and a power of 2 for ``tau`` gives SpikingJelly's weights to the last bit
    on the CPU; otherwise gradients differ in rounding, Sigmoid's in any case. x edited in place before backward, and
    second derivatives, raise; see ``snnkern.lif``.

    Source: Fang et al., SpikingJelly, Science Advances 2023, version 2.0.0. On the CPU 0.0.0.0.12 and 0.0.0.0.14 give
    the same bits, but with decay_input=False and v_reset 0 or None they compute ``v*(1 - 1/tau) + x`` (0.0.0.0.14 in
    eval mode for None alone), which is rounded otherwise unless tau is a power of 2; ``snnkern.convert`` keeps that.
    """


class IFNode(BaseNode):
    """SpikingJelly's IFNode: a neuron without leak, ``h = v + x``. Arguments, state and errors: ``BaseNode``.

    SEW-ResNet's ``MultiStepIFNode`` is ``MultiStepIFNode(surrogate_function=surrogate.ATan())``.
    """

    def _neuron(self) -> dict:
        return {"tau": math.inf, "decay_input": False, **super()._neuron()}


class ParametricLIFNode(BaseNode):
    """SpikingJelly's ParametricLIFNode: a LIFNode that learns ``1 / tau = sigmoid(w)``, one for all its neurons.

    ::

        h = v + (x - (v - rest)) * sigmoid(w)   decay_input
          = v - (v - rest) * sigmoid(w) + x     otherwise

    ``init_tau``, > 1, gives ``w`` its first value; ``w`` is a parameter of shape [] and in the ``state_dict``.

    Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", ICCV 2021.
    """

    _printed = ("decay_input",)

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | None = None,
        store_v_seq: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq)
        if number("init_tau", init_tau) <= 1:
            raise ValueError(f"init_tau must be > 1, got {init_tau!r}")
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1)))
        _check(self._neuron())

    def _neuron(self) -> dict:
        return {"inverse_tau": self.w.sigmoid(), "decay_input": self.decay_input, **super()._neuron()}

    def extra_repr(self) -> str:
        return f"tau={1 / self.w.detach().sigmoid()}, {super().extra_repr()}"


class ILIFNode(LIFNode):
    """SpikingJelly's ILIFNode: integer spikes, as many as thresholds fit into the potential, ``levels`` at most.

    ::

        h = (1 - 1/tau) * v + x
        s = round(clamp(h / v_threshold, 0, levels))        ties to even
        v = h - v_threshold*s

    This is SpikingJelly's multi-step mode bit for bit; its single steps compute ``v - v/tau + x``, which is rounded
    otherwise. ``tau``: at least 1. ``surrogate_function``: ``surrogate.Integer(levels)`` or SpikingJelly's
    MultiLevelSpikeCount.

    Source: Luo et al., "Integer-Valued Training and Spike-Driven Inference Spiking Neural Network for High-performance
    and Energy-efficient Object Detection", ECCV 2024.
    """

    _fire_at_threshold = False

    def __init__(
        self,
        tau: float | torch.Tensor = 4 / 3,
        v_threshold: float | torch.Tensor = 1.0,
        surrogate_function: Integer | nn.Module = Integer(4),
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str | None = None,
        store_v_seq: bool = False,
    ):
        if not isinstance(tau, torch.Tensor) and number("tau", tau) < 1:
            raise ValueError(f"tau must be at least 1, got {tau!r}")
        if not isinstance(from_spikingjelly(surrogate_function), Integer):
            raise TypeError(f"surrogate_function must count spikes, as surrogate.Integer, got {surrogate_function!r}")
        super().__init__(
            tau, False, v_threshold, None, surrogate_function, detach_reset, step_mode, backend, store_v_seq
        )

    def _neuron(self) -> dict:
        return {"decay": 1 - 1 / self.tau, **BaseNode._neuron(self)}


class TernaryIFNode(BaseNode):
    """SpikingJelly's TernaryIFNode: an ``IFNode`` of spikes -1, 0 and 1.

    ::

        s = (h >= v_threshold) - (-h >= v_threshold)
        v = v_reset if s else h                 hard reset
          = h - v_threshold*s                   soft reset, v_reset=None
    """

    def _neuron(self) -> dict:
        return {"tau": math.inf, "decay_input": False, "ternary": True, **super()._neuron()}


class TernaryLIFNode(_Leaky):
    """SpikingJelly's TernaryLIFNode: charges as ``LIFNode``, fires and resets as ``TernaryIFNode``."""

    def _neuron(self) -> dict:
        return {"ternary": True, **super()._neuron()}


class _MultiStep:
    """Nodes of SpikingJelly's ``clock_driven``: multi-step always."""

    def supported_step_mode(self) -> tuple[str, ...]:
        return ("m",)


class MultiStepLIFNode(_MultiStep, LIFNode):
    """``LIFNode`` in multi-step mode alone, with the constructor of SpikingJelly 0.0.0.0.12.

    Other than there, ``v_seq`` is None unless ``store_v_seq`` is set. ``lava_s_cale`` is kept for SpikingJelly's
    ``lava_exchange`` and used by nothing here.
    """

    def __init__(
        self,
        tau: float | torch.Tensor = 2.0,
        decay_input: bool = True,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        backend: str | None = None,
        lava_s_cale: int = 1 << 6,
    ):
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, "m", backend)
        self.lava_s_cale = positive("lava_s_cale", lava_s_cale)


class MultiStepIFNode(_MultiStep, IFNode):
    """``IFNode`` in multi-step mode alone; the rest as for ``MultiStepLIFNode``."""

    def __init__(
        self,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        backend: str | None = None,
        lava_s_cale: int = 1 << 6,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, "m", backend)
        self.lava_s_cale = positive("lava_s_cale", lava_s_cale)


class MultiStepParametricLIFNode(_MultiStep, ParametricLIFNode):
    """``ParametricLIFNode`` in multi-step mode alone, with the constructor of SpikingJelly 0.0.0.0.12."""

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Surrogate | nn.Module = Sigmoid(),
        detach_reset: bool = False,
        backend: str | None = None,
    ):
        super().__init__(init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, "m", backend)


def _join(theirs: ModuleType) -> None:
    """Makes each class here a subclass of its namesake in SpikingJelly's module ``neuron``, but for the namesake's own
    methods, which would charge, fire and reset without ``lif``: they stay missing."""
    for cls in (BaseNode, *_NODES):
        namesake = getattr(theirs, cls.__name__, None)
        if not isinstance(namesake, type) or issubclass(cls, namesake):
            continue
        cls.__bases__ = (*(base for base in cls.__bases__ if base is not nn.Module), namesake)
        for base in cls.__mro__:
            if base.__module__.startswith(theirs.__name__):
                for name in vars(base):
                    if not name.startswith("__") and not hasattr(nn.Module, name) and name not in vars(BaseNode):
                        setattr(BaseNode, name, _Missing())


def _export(theirs: ModuleType) -> None:
    """SpikingJelly's export to NIR looks for the classes themselves, not for what is of them: it finds ours, too."""
    mapper = getattr(theirs, "_ModuleMapper", None)
    known = getattr(mapper, "map_dict", None)
    if isinstance(known, property):

        def with_ours(self) -> dict:
            found = known.fget(self)
            named = {cls.__name__: export for cls, export in found.items()}
            ours = {cls: named.get(cls.__name__.removeprefix("MultiStep")) for cls in _NODES}
            return found | {cls: export for cls, export in ours.items() if export}

        mapper.map_dict = property(with_ours)


class _Missing:
    def __get__(self, instance, owner):
        raise AttributeError


_NODES = (
    LIFNode,
    ILIFNode,
    IFNode,
    ParametricLIFNode,
    TernaryIFNode,
    TernaryLIFNode,
    MultiStepLIFNode,
    MultiStepIFNode,
    MultiStepParametricLIFNode,
)
for _version in ("spikingjelly.activation_based.neuron", "spikingjelly.clock_driven.neuron"):
    after_import(_version, _join)
after_import("spikingjelly.activation_based.nir_exchange.to_nir", _export)


def _parameter(name: str, value: object) -> object:
    return value if isinstance(value, torch.Tensor) else number(name, value)


def _check(neuron: dict) -> None:
    """Raises for keywords that ``lif`` would not take."""
    numbers = {name: GIVEN if isinstance(value, torch.Tensor) else value for name, value in neuron.items()}
    numbers["surrogate"] = from_spikingjelly(numbers["surrogate"])
    numbers.pop("backend")
    new_spec(**{"decay": None, "tau": None, "decay_input": True, **numbers})


def _converted(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The state ``v`` for an input x [T, N, ...] that it does not suit as it is; None to start anew."""
    if v.shape != x.shape[1:]:
        warnings.warn(
            f"the state of a node has shape {tuple(v.shape)} and its input asks for {tuple(x.shape[1:])}: it starts "
            "anew; call reset() between unrelated inputs",
            stacklevel=2,
        )
        return None
    if getattr(v.grad_fn, "ran", False):  # the cast would hide the freed graph from lif
        check_alive(v)
    return v.to(x.device, state_dtype(x.dtype))


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value
