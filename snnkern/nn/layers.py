"""Layers without state between calls, and how they keep it for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..backend import load
from ..backend.reference import lif as reference
from ..ops.lif import lif
from ..ops.linear import linear
from ..ops.recurrent import recurrent_lif
from ..ops.ttm import ttm
from ..spec.arguments import check_residual, check_x, flag, number, positive, whole
from ..spec.neuron import GIVEN, new_spec
from ..surrogate import Sigmoid, Surrogate, Triangle, from_spikingjelly


class _Memory:
    """The state of neurons from call to call, while ``carried`` holds: None at rest, a tensor or a tuple of such."""

    def __init__(self) -> None:
        self.v, self.taken = None, False

    def take(self, steps_out: int | None = None):
        if steps_out is not None:
            raise ValueError(
                f"steps_out must be None where neurons carry their state from call to call, got {steps_out}"
            )
        if self.taken:
            raise RuntimeError("neurons that a model calls twice in one forward cannot carry their state: make two")
        self.taken = True
        return self.v


class _Stateless(nn.Module):
    """Neurons of which every call starts at rest, but while ``carried`` gives them a memory."""

    _memory: _Memory | None = None


class LIF(_Stateless):
    """Leaky integrate-and-fire neurons in the papers' terms, without state: every call starts at rest.

    ``forward(x, residual=None, steps_out=None, bias=None) -> spikes`` of x, plus the residual if there is one; shape
    and dtype are those of x, but for ``steps_out``. That and ``bias`` a call may give in place of the layer's own.
    Arguments, equations, dtypes and errors are those of ``snnkern.lif``, which is there for whoever wants the potential
    too. A ``Parameter`` among them is learnt, and any other tensor a buffer, under the argument's name; ``settings``
    holds the other keywords.
    """

    more = "bias", "synapse_decay", "threshold_decay", "threshold_jump"  # in ``settings`` only where given

    def __init__(
        self,
        decay: float | torch.Tensor | None = None,
        tau: float | torch.Tensor | None = None,
        decay_input: bool = True,
        threshold: float | torch.Tensor = 1.0,
        reset: float | None = 0.0,
        surrogate: Surrogate = Triangle(),
        detach_reset: bool = False,
        fire_at_threshold: bool = False,
        steps_out: int | None = None,
        time_dim: int = 0,
        backend: str | None = None,
        inverse_tau: float | torch.Tensor | None = None,
        ternary: bool = False,
        v_min: float | None = None,
        bias: torch.Tensor | None = None,
        synapse_decay: float | None = None,
        threshold_decay: float | None = None,
        threshold_jump: float | None = None,
    ):
        super().__init__()
        more = zip(self.more, (bias, synapse_decay, threshold_decay, threshold_jump), strict=True)
        neuron = {
            "decay": decay,
            "tau": tau,
            "decay_input": decay_input,
            "threshold": threshold,
            "reset": reset,
            "surrogate": from_spikingjelly(surrogate),
            "detach_reset": detach_reset,
            "fire_at_threshold": fire_at_threshold,
            "inverse_tau": inverse_tau,
            "ternary": ternary,
            "v_min": v_min,
            **{name: value for name, value in more if value is not None},
        }
        tensors = {name: value for name, value in neuron.items() if isinstance(value, torch.Tensor)}
        if not isinstance(neuron.get("bias", torch.empty(0)), torch.Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
        new_spec(**{k: v for k, v in (neuron | dict.fromkeys(tensors, GIVEN)).items() if k != "bias"})
        for name, value in tensors.items():
            keep = self.register_parameter if isinstance(value, nn.Parameter) else self.register_buffer
            keep(name, value)
            del neuron[name]
        self.tensors = tuple(tensors)
        if steps_out is not None:
            positive("steps_out", steps_out)
        whole("time_dim", time_dim)
        if backend is not None:
            load(backend)
        # Not attributes: networks are reset by calling whatever is named `reset` on their modules.
        self.settings = {**neuron, "steps_out": steps_out, "time_dim": time_dim, "backend": backend}

    @property
    def alone(self) -> list[str]:
        """The arguments that neurons behind a norm in one pass, ``bn_lif``, do not have."""
        return [*self.tensors, *(name for name in self.more if name in self.settings)]

    def _now(self, steps_out: int | None) -> dict:
        """The keywords of the op, for a call with these ``steps_out``."""
        settings = self.settings if steps_out is None else {**self.settings, "steps_out": steps_out}
        return {**settings, **{name: getattr(self, name) for name in self.tensors}} if self.tensors else settings

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        steps_out: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_residual(residual)
        settings = self._now(steps_out)
        if bias is not None:
            settings = {**settings, "bias": bias}
        return self._fire(x if residual is None else x + residual, settings)

    def _fire(self, x: torch.Tensor, settings: dict) -> torch.Tensor:
        memory = self._memory
        v = memory and memory.take(settings["steps_out"])
        spikes, v = lif(x, v, return_v=memory is not None, **settings)
        if memory is not None:
            memory.v = v
        return spikes

    def extra_repr(self) -> str:
        defaults = inspect.signature(lif).parameters
        shown = [f"{name}={tuple(getattr(self, name).shape)}" for name in self.tensors if name in defaults]
        return ", ".join(shown + [f"{k}={v!r}" for k, v in self.settings.items() if v != defaults[k].default])


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``snnkern.linear``, which on the CPU is faster where its input are few spikes.

    ``forward(x, add_bias=True)``: False where the neurons behind it add the bias, ``LIF``'s forward takes one.
    """

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        return linear(x, self.weight, self.bias if add_bias else None)


class LinearLIF(LIF):
    """A linear layer and its neurons: ``torch.nn.Linear``, then ``LIF``, whose kernel adds the bias.

    ``forward(x, residual=None, steps_out=None) -> spikes`` of x [T, N, in_features], [T, N, out_features]; the residual
    is added to what the neurons receive. The product is ``snnkern.linear``.

    Args:
        in_features, out_features, bias, device, dtype: those of ``torch.nn.Linear``, as are the parameters ``weight``
            and ``bias`` and what they start from.
        neuron: the arguments of ``LIF``, by name.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, **neuron
    ) -> None:
        flag("bias", bias)
        features = positive("in_features", in_features), positive("out_features", out_features)
        plain = nn.Linear(*features, bias, device, dtype)
        super().__init__(bias=plain.bias, **neuron)
        self.in_features, self.out_features = features
        if not bias:
            self.bias = None
        self.weight = plain.weight
        self.tensors = (*self.tensors, "weight")

    def _now(self, steps_out: int | None) -> dict:
        return {name: value for name, value in super()._now(steps_out).items() if name != "weight"}

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, steps_out: int | None = None
    ) -> torch.Tensor:
        return super().forward(linear(x, self.weight), residual, steps_out)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"


class CubaLIF(LIF):
    """Current-based LIF neurons: an input is a synaptic current that decays, and this current charges the membrane.

    ::

        i[t] = synapse_decay*i[t-1] + x[t]    is what LIF receives for x[t]

    ``synapse_decay`` is exp(-dt/tau) of a synaptic time constant; all else is ``LIF``.

    Source: Cramer et al., "The Heidelberg Spiking Data Sets", IEEE TNNLS 2022, eq. 2-4.
    """

    def __init__(self, synapse_decay: float, **neuron):
        super().__init__(synapse_decay=_required("synapse_decay", synapse_decay), **neuron)


class AdaptiveLIF(LIF):
    """LIF neurons whose threshold every spike raises by ``threshold_jump``, and which forget it by ``threshold_decay``.

    ::

        threshold[t] = threshold + threshold_jump*a[t-1]    a[t] = threshold_decay*a[t-1] + s[t]

    In the terms of the source: rho = threshold_decay and beta (1 - rho) = threshold_jump. All else is ``LIF``.

    Source: Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", NeurIPS 2018.
    """

    def __init__(self, threshold_decay: float, threshold_jump: float, **neuron):
        given = {"threshold_decay": threshold_decay, "threshold_jump": threshold_jump}
        super().__init__(**{name: _required(name, value) for name, value in given.items()}, **neuron)


def _required(name: str, value) -> float:
    if value is None:
        raise TypeError(f"{name} must be a float, got None")
    return value


class RecurrentLIF(LIF):
    """A layer of neurons that receive their own spikes a step later, through ``weight``: ``snnkern.recurrent_lif``.

    ``forward(x, residual=None, steps_out=None, bias=None) -> spikes`` of x [T, N, features], as ``LIF``, of which it
    takes all arguments: with ``synapse_decay`` it is the recurrent current-based layer, with ``threshold_decay`` and
    ``threshold_jump`` that of LSNNs.

    Args:
        features: neurons of the layer, H.
        neuron: the arguments of ``LIF``, by name.

    Parameters: weight [H, H], at first uniform in +-1/sqrt(H), as that of ``torch.nn.RNN``.

    Source: see ``snnkern.recurrent_lif``.
    """

    def __init__(self, features: int, **neuron):
        super().__init__(**neuron)
        bound = positive("features", features) ** -0.5
        self.features = features
        self.weight = nn.Parameter(torch.empty(features, features).uniform_(-bound, bound))
        self.tensors = (*self.tensors, "weight")

    def _fire(self, x: torch.Tensor, settings: dict) -> torch.Tensor:
        memory, steps_out, time_dim = self._memory, settings["steps_out"], settings["time_dim"]
        v, s = (memory and memory.take(steps_out)) or (None, None)
        given = {name: value for name, value in settings.items() if name != "steps_out"}
        spikes, v = recurrent_lif(x, v=v, s=s, **given)
        if memory is not None:
            memory.v = v, spikes.select(time_dim, -1)
        return spikes if steps_out is None else ttm(spikes, steps_out, time_dim, settings["backend"])

    def extra_repr(self) -> str:
        return f"{self.features}, {super().extra_repr()}"


class SmoothLIF(_Stateless):
    """LIF neurons without a step: the output is ``surrogate.primitive(h - threshold)``, between 0 and 1.

    The gradient is then exact, which tells what the surrogate of a spike costs: Sigmoid(k) gives ``sigmoid(k x)`` and
    the experiment of its source. The reset takes this output for the spike: ``v = reset s + (1 - s) h`` (hard).

    ``forward(x, residual=None)``, as ``LIF``; a loop of PyTorch operations, as the kernels know spikes only. Arguments
    are those of ``LIF``. As the ``neuron`` of a model: ``partial(SmoothLIF, Sigmoid(10.0))``.

    Source: Deng et al., ICLR 2022, section 5.1 and table 2 (k = 1, 10, 20).
    """

    def __init__(
        self,
        surrogate: Surrogate = Sigmoid(10.0),
        decay: float | None = None,
        tau: float | None = None,
        decay_input: bool = True,
        threshold: float = 1.0,
        reset: float | None = 0.0,
        detach_reset: bool = False,
        time_dim: int = 0,
    ):
        super().__init__()
        surrogate = from_spikingjelly(surrogate)
        self.spec = new_spec(decay, tau, decay_input, threshold, reset, surrogate, detach_reset, False)
        self.time_dim = time_dim

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check_residual(residual)
        x = x if residual is None else x + residual
        time_dim = check_x(x, self.time_dim)
        memory = self._memory
        spikes, v = reference(x, memory and memory.take(), self.spec, time_dim, x.shape[time_dim], smooth=True)
        if memory is not None:
            memory.v = v
        return spikes

    def extra_repr(self) -> str:
        return f"{self.spec.surrogate!r}, {self.spec.form}={self.spec.leak}, threshold={self.spec.threshold}"


class IAF(_Stateless):
    """Integrate-and-fire neurons of asynchronous chips, clocked: no leak, soft reset, a lower bound of the potential.

    ::

        h[t] = max(v[t-1] + x[t], v_min)    s[t] = (h[t] >= threshold)    v[t] = h[t] - threshold s[t]    v[0] = 0

    At most one spike a step: charge for more stays, and fires at the next steps. ``snnkern.lif``, whose gradient is
    autograd's of this loop with the surrogate for ds/dh; none passes where h is v_min.

    ``forward(x, residual=None)``, as ``LIF``.

    Args:
        threshold: positive.
        v_min: lower bound of the potential, at most 0; None for none.
        surrogate, detach_reset, time_dim, backend: those of ``LIF``.

    Source: sinabs' ``IAF`` with ``SingleSpike``, and -1 for ``min_v_mem`` as in the published code of Du et al.,
    "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, which lets several spikes fire a step.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        v_min: float | None = -1.0,
        surrogate: Surrogate = Triangle(),
        detach_reset: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
    ):
        super().__init__()
        self.spec = new_spec(1.0, None, True, threshold, None, from_spikingjelly(surrogate), detach_reset, True)
        if self.spec.threshold <= 0:
            raise ValueError(f"threshold must be positive, got {threshold!r}")
        self.v_min = v_min if v_min is None else number("v_min", v_min)
        if v_min is not None and v_min > 0:
            raise ValueError(f"v_min must be at most 0, where the potential starts, got {v_min!r}")
        if backend is not None:
            load(backend)
        self.time_dim, self.backend = time_dim, backend

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check_residual(residual)
        x, spec, memory = x if residual is None else x + residual, self.spec, self._memory
        neuron = {"decay": 1.0, "reset": None, "threshold": spec.threshold, "fire_at_threshold": True}
        neuron |= {"v_min": self.v_min, "surrogate": spec.surrogate, "detach_reset": spec.detach_reset}
        options = {"return_v": memory is not None, "time_dim": self.time_dim, "backend": self.backend}
        spikes, v = lif(x, memory and memory.take(), **neuron, **options)
        if memory is not None:
            memory.v = v
        return spikes

    def extra_repr(self) -> str:
        return f"threshold={self.spec.threshold}, v_min={self.v_min}, {self.spec.surrogate!r}"


class LI(_Stateless):
    """Leaky integrators: neurons without a threshold, whose potential is what a readout gives.

    ::

        v[t] = decay v[t-1] + (1 - decay) x[t]    v[0] = 0

    ``forward(x) -> v``, of x's shape, in the dtype of the state: ``snnkern.lif`` with ``tau = 1 / (1 - decay)`` and a
    threshold that no potential reaches.

    Args:
        decay: factor in [0, 1) kept of the potential per step.
        time_dim, backend: those of ``LIF``.
    """

    def __init__(self, decay: float = 0.9, time_dim: int = 0, backend: str | None = None):
        super().__init__()
        if not 0 <= number("decay", decay) < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        if backend is not None:
            load(backend)
        self.decay, self.time_dim, self.backend = decay, time_dim, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self._memory
        neuron = {"tau": 1 / (1 - self.decay), "threshold": torch.finfo(torch.float32).max}
        options = {"return_v": "sequence", "time_dim": self.time_dim, "backend": self.backend}
        _, v = lif(x, memory and memory.take(), **neuron, **options)
        if memory is not None:
            memory.v = v.select(self.time_dim, -1)
        return v

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class TTM(nn.Module):
    """Temporal transformation of [T, N, ...] to ``steps`` time steps, without parameters; see ``snnkern.ttm``.

    ``steps`` is an attribute and may change between calls.
    """

    def __init__(self, steps: int, time_dim: int = 0, backend: str | None = None):
        super().__init__()
        positive("steps", steps)
        if backend is not None:
            load(backend)
        self.steps, self.time_dim, self.backend = steps, time_dim, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ttm(x, self.steps, self.time_dim, self.backend)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, time_dim={self.time_dim}"


class BinarySteps(nn.Module):
    """Integer spikes [T, N, ...], 0 to ``levels``, as ``levels`` steps of binary ones each, [T*levels, N, ...], in eval
    mode; in training they pass.

    A neuron that fires s spikes at a step fires at the first s of its binary steps. Layers without bias, then
    ``snnkern.ttm(y, T)``, give what they give for the integers but for rounding: inference of I-LIF by additions alone.

    Source: Luo et al., ECCV 2024; see ``surrogate.Integer``.
    """

    def __init__(self, levels: int = 4):
        super().__init__()
        self.levels = positive("levels", levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x
        level = torch.arange(self.levels, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
        return (x.unsqueeze(1) > level).to(x.dtype).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Carried(NamedTuple):
    """The neurons of a model, while ``carrying`` holds."""

    plain: list[_Stateless]
    stateful: list[nn.Module]

    def get(self) -> tuple[tuple, tuple]:
        """Their states, of the plain ones and of the others: what ``mapped`` takes."""
        memories = tuple(tuple(value for _, value in module.named_memories()) for module in self.stateful)
        return tuple(module._memory.v for module in self.plain), memories

    def set(self, state: tuple[tuple, tuple]) -> None:
        for module, v in zip(self.plain, state[0], strict=True):
            module._memory.v = v
        for module, memories in zip(self.stateful, state[1], strict=True):
            for (name, _), value in zip([*module.named_memories()], memories, strict=True):
                setattr(module, name, value)


def mapped(function: Callable[[torch.Tensor], object], state):
    """A state, tensors and other values in tuples and lists of any depth, with ``function`` of every tensor for it."""
    if isinstance(state, torch.Tensor):
        return function(state)
    return type(state)(mapped(function, part) for part in state) if isinstance(state, (tuple, list)) else state


@contextmanager
def carrying(model: nn.Module) -> Iterator[Carried]:
    """Inside, neurons without state between calls have one, at rest at first. Afterwards they have none, and those with
    state are as they were. Errors: those of ``carried``."""
    plain = [module for module in model.modules() if isinstance(module, _Stateless)]
    stateful = [module for module in model.modules() if hasattr(module, "named_memories")]
    if not plain and not stateful:
        wanted = "neurons that can carry their state, such as LIF, BNLIF or LIFNode"
        raise ValueError(f"model must have {wanted}, got {type(model).__name__} without any")
    for module in model.modules():
        if isinstance(module, (TTM, nn.RNNBase)):
            raise ValueError(f"model must not mix time steps outside of its neurons, got {module!r} in it")
    if any(module._memory is not None for module in plain):
        raise RuntimeError("the state of this model is being carried already")

    def renew(*_) -> None:
        for module in plain:
            module._memory.taken = False

    before = [dict(module.named_memories()) for module in stateful]
    hook = model.register_forward_pre_hook(renew)
    try:
        for module in plain:
            module._memory = _Memory()
        yield Carried(plain, stateful)
    finally:
        hook.remove()
        for module in plain:
            module._memory = None
        for module, memories in zip(stateful, before, strict=True):
            for name, value in memories.items():
                setattr(module, name, value)


@contextmanager
def carried(model: nn.Module) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, a model's neurons go on from call to call: as one call with all the steps, by so many at a time.

    ::

        with carried(model) as keep:
            first = model(x[:1])
            keep(rows)                      # those samples go on: bool [N]
            second = model(x[1:2, rows])

    The first call starts at rest. Neurons are LIF, BNLIF, SmoothLIF, IAF and all that keeps state as LIFNode and
    SpikingJelly's modules do (multi-step mode); the latter are afterwards as they were. Outputs are those of one call,
    bit for bit as far as the layers between, PyTorch's, give a sample the same bits in a batch of any size: float32
    matrix products differ in the last ones.

    Raises:
        ValueError: the model has no such neurons, or layers that mix time steps (neurons with ``steps_out`` too); or
            its state is not by samples.
        RuntimeError: the model calls one LIF, BNLIF, SmoothLIF or IAF twice.
    """

    def keep(rows: torch.Tensor) -> None:
        if rows.dtype != torch.bool:
            raise TypeError(f"rows must be bool, got {rows.dtype}")

        def chosen(v: torch.Tensor) -> torch.Tensor:
            if v.shape[:1] != rows.shape:
                raise ValueError(f"state must be [N, ...] for rows of shape {tuple(rows.shape)}, got {tuple(v.shape)}")
            return v[rows]

        neurons.set(mapped(chosen, neurons.get()))

    with carrying(model) as neurons:
        for module in neurons.stateful:
            module.reset()
        yield keep
