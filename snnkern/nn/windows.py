"""Backpropagation through a long time in windows: memory for the steps of one window, not for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from ..spec.arguments import check_alive, flag, positive, whole
from ..spec.layout import state_dtype
from .layers import Carried, carrying, mapped


class Windows(nn.Module):
    """A model that is trained through all of a long time in windows of ``steps`` steps each.

    ::

        net = Windows(model, steps=100)
        loss = criterion(net(x).mean(0), target)      # x [T, N, ...], T = 100,000
        loss.backward()                               # or torch.autograd.grad(loss, parameters)

    Forward runs window by window without a graph and keeps the outputs, and the neurons' states where windows meet.
    Backward goes through the windows from the last to the first, runs each once more from its state, with a graph, and
    feeds in the gradients of its outputs and of its last states: nothing is cut off, and the gradients are those of
    ``model(x)`` but for the order of a sum over windows. In memory are the activations of one window, T/steps states
    and the outputs [T, N, ...]; it costs one more forward. ``steps`` near the square root of T needs least.

    Args:
        model: a stack of layers [T, N, ...] to [T, N, ...] whose neurons ``nn.carried`` knows: LIF, RecurrentLIF and
            its like, BNLIF, SmoothLIF, IAF, nodes with SpikingJelly's state in multi-step mode. What else is in it
            works step by step: linear layers, convolutions, pools, dropout, layer norm, batch norm in eval mode. No
            ``torch.utils.checkpoint`` in or around it.
        steps: of a window; the last one may have fewer.
        truncate: truncated backpropagation through time: states pass from window to window, gradients do not.
        time_dim: the dimension that is time, of x and of the outputs; from 0 up.

    ``forward(x) -> outputs``, those of all windows, concatenated. x is a tensor, which may require a gradient, or
    whatever gives a window as ``x[a:b]`` (with ``time_dim`` 1: ``x[:, a:b]``) and knows its length: an array, a
    ``numpy.memmap``, a data set of h5py, a reader of one's own. It is read window by window, in forward and again in
    backward, and never whole in memory. Windows of a tensor keep their dtype, others take that of the model's
    parameters; all go to the device of these. A ``DataLoader`` streams if its data set, or its ``collate_fn``, returns
    such an object in place of a tensor, as in ``examples/long_recording.py``.

    State: a call begins and ends as one of the model does. LIF, BNLIF and the like start at rest; LIFNode and its
    like go on from their ``v``, and keep that of the last step, with its graph, until ``reset()`` or ``detach()``;
    with ``truncate`` it has none. After an error all is as before the call.

    Random numbers, such as dropout's, are drawn anew window by window and are the same in backward; so is autocast.
    Without gradient (``torch.no_grad``, eval) nothing is kept but the outputs. ``snnkern.packed_spikes`` belongs around
    ``backward``, where activations are kept. Goes inside of DistributedDataParallel, and around what ``torch.compile``
    returns. Parameters are the model's; in the ``state_dict`` their names begin with ``model.``, and
    ``net.model.state_dict()`` has the model's own. Once differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; or the model mixes time steps: TTM, recurrent
            layers of PyTorch, batch norm with the batch's statistics, ``steps_out``, outputs without as many steps as
            the window; or its nodes have ``store_v_seq``, which keeps all steps.
        RuntimeError: of ``nn.carried``; or, in backward, the model's layers were switched between training and eval.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016: the same over layers.
    """

    def __init__(self, model: nn.Module, steps: int, truncate: bool = False, time_dim: int = 0):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        flag("truncate", truncate)
        if whole("time_dim", time_dim) < 0:
            raise ValueError(f"time_dim must be at least 0, got {time_dim}")
        self.model, self.steps, self.truncate, self.time_dim = model, positive("steps", steps), truncate, time_dim

    def check(self) -> None:
        """Raises what ``forward`` raises of a model that has no windows, as far as its layers tell."""
        for module in self.model.modules():
            _check(module)
        with carrying(self.model):
            pass

    def forward(self, x) -> torch.Tensor:
        self.check()
        call = _Call(self, x)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with carrying(self.model) as neurons:
            before = [] if self.truncate else _tensors(neurons.get()[1])
            inputs = x, *before, *named.values()
            if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
                for v in before:
                    if getattr(v.grad_fn, "ran", False):
                        check_alive(v)
                y, *ends = _Recomputed.apply(call, neurons, [*named], *inputs)
            else:
                with torch.no_grad():
                    y, ends = call.forward(x, lambda *_: None), []
            after = neurons.get()[1]
        if ends:  # the same, with their graph
            after = mapped(lambda _, given=iter(ends): next(given), after)
        Carried([], neurons.stateful).set(((), after))
        return y

    def extra_repr(self) -> str:
        return f"steps={self.steps}, truncate={self.truncate}, time_dim={self.time_dim}"


class _Call:
    """What is the same for all windows of a call."""

    def __init__(self, net: Windows, x):
        self.model, self.time_dim, self.truncate = net.model, net.time_dim, net.truncate
        length = _length(x, net.time_dim)
        self.spans = [(a, min(a + net.steps, length)) for a in range(0, length, net.steps)]
        tensors = (*net.model.parameters(), *net.model.buffers())
        first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype

    def read(self, x, a: int, b: int) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x.narrow(self.time_dim, a, b - a).to(self.device)
        window = x[(slice(None),) * self.time_dim + (slice(a, b),)] if self.time_dim else x[a:b]
        if isinstance(window, torch.Tensor):
            window = window.detach().to(self.device, self.dtype)
        else:  # copied: what a file is mapped to may be read-only
            window = torch.tensor(window, dtype=self.dtype, device=self.device)
        if window.dim() <= self.time_dim or window.shape[self.time_dim] != b - a:
            raise ValueError(f"x must give {b - a} steps for {a}:{b}, got shape {tuple(window.shape)}")
        return window

    def forward(self, x, begin: Callable) -> torch.Tensor:
        """The outputs of all windows; ``begin`` is told the number and the input of each before it runs."""
        y = None
        for number, (a, b) in enumerate(self.spans):
            window = self.read(x, a, b)
            begin(number, window)
            part = self.run(self.model, window)
            if y is None:
                shape = *part.shape[: self.time_dim], self.spans[-1][1], *part.shape[self.time_dim + 1 :]
                y = part.new_empty(shape)
            y.narrow(self.time_dim, a, b - a).copy_(part)
        return y

    def run(self, model: Callable, window: torch.Tensor) -> torch.Tensor:
        y, steps = model(window), window.shape[self.time_dim]
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"model must return a tensor, got {type(y).__name__}")
        if y.dim() <= self.time_dim or y.shape[self.time_dim] != steps:
            wanted = f"{steps} steps in dimension {self.time_dim}"
            raise ValueError(f"model must give as many steps as it gets, {wanted}, got shape {tuple(y.shape)}")
        return y


class _Starts:
    """How windows start: the neurons' states and the random generators.

    What is kept of all windows is one tensor: thousands of small ones, between the large ones that layers take and give
    back, leave holes in memory that make it grow with T after all.
    """

    def __init__(self, count: int):
        self.count, self.states, self.devices, self.drawn = count, [], [], []
        self.first, self.later = [], []  # tensors of the first state; those of all others, [count - 1, ...]
        self.generators = torch.empty(count, len(torch.get_rng_state()), dtype=torch.uint8)

    def note(self, number: int, state, window: torch.Tensor) -> None:
        tensors, generator = _tensors(state), torch.get_rng_state()
        self.states.append(mapped(lambda _: _KEPT, state))
        if number == 0:
            self.first = tensors
        elif number == 1:
            self.later = [v.new_empty(self.count - 1, *v.shape) for v in tensors]
        for kept, v in zip(self.later, tensors if number else (), strict=True):
            kept[number - 1] = v
        self.devices.append(get_device_states(window))
        last = self.drawn[-1] if number else None
        self.drawn.append(last if number and torch.equal(generator, self.generators[last]) else number)
        if self.drawn[-1] == number:
            self.generators[number] = generator

    def state(self, number: int, tensors: list[torch.Tensor]):
        """Of the window; ``tensors``: ``first`` and ``later``, as autograd gives them back."""
        count = len(_tensors(self.states[0]))
        found = iter([kept[number - 1] for kept in tensors[count:]] if number else tensors[:count])
        return mapped(lambda _: next(found), self.states[number])

    def restore_generators(self, number: int) -> None:
        torch.set_rng_state(self.generators[self.drawn[number]].clone())  # PyTorch crashes on a view
        set_device_states(*self.devices[number])


class _Recomputed(torch.autograd.Function):
    """x, the states of stateful nodes, parameters -> outputs and those states after the last step."""

    @staticmethod
    def forward(ctx, call, neurons, names, x, *tensors):
        kinds, starts = {"cpu", call.device.type}, _Starts(len(call.spans))
        ctx.call, ctx.names, ctx.starts, ctx.x = call, names, starts, None
        ctx.modes = [module.training for module in call.model.modules()]
        ctx.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        y = call.forward(x, lambda number, window: starts.note(number, neurons.get(), window))
        torch.clear_autocast_cache()  # of casts without a graph
        kept = [*tensors[len(tensors) - len(names) :], *starts.first, *starts.later]
        starts.first, starts.later = [], []
        if isinstance(x, torch.Tensor):
            kept.append(x)
        else:
            ctx.x = x
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return y, *([] if call.truncate else _tensors(neurons.get()[1]))

    @staticmethod
    def backward(ctx, grad_y, *flow):
        if torch.is_grad_enabled():
            raise RuntimeError("Windows is once differentiable, got create_graph=True")
        ctx.ran = True
        call, starts, kept = ctx.call, ctx.starts, [*ctx.saved_tensors]
        exact, model, time_dim = not call.truncate, call.model, call.time_dim
        if [module.training for module in model.modules()] != ctx.modes:
            raise RuntimeError("model must be in the same mode, training or eval, in backward as in forward")
        x = kept.pop() if ctx.x is None else ctx.x
        # Leaves of their own, as hooks on parameters are for whole gradients.
        named = {name: p.detach().requires_grad_() for name, p in zip(ctx.names, kept, strict=False)}
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[3] else None
        sums = dict.fromkeys(named)
        with ExitStack() as stack:
            neurons = stack.enter_context(carrying(model))
            devices = starts.devices[0][0]
            stack.enter_context(torch.random.fork_rng(devices, device_type=call.device.type if devices else "cuda"))
            for number, (a, b) in reversed([*enumerate(call.spans)]):
                state = starts.state(number, kept[len(named) :])
                state = mapped(lambda v: v.detach().clone().requires_grad_(exact and v.is_floating_point()), state)
                window = call.read(x, a, b).detach().requires_grad_(grad_x is not None)
                neurons.set(state)
                starts.restore_generators(number)
                with ExitStack() as inside:
                    for options in ctx.autocast:
                        inside.enter_context(torch.autocast(*options))
                    inside.enter_context(torch.enable_grad())
                    y = call.run(lambda window: functional_call(model, named, (window,)), window)
                ends = _tensors(neurons.get())
                part = None if grad_y is None else grad_y.narrow(time_dim, a, b - a)
                flow = [part, *[None] * (len(ends) - len(flow)), *flow]  # into the last window: the nodes' alone
                pairs = [(t, g) for t, g in zip((y, *ends), flow, strict=True) if g is not None and t.requires_grad]
                found = _gradients(pairs, [window, *_tensors(state), *named.values()])
                if grad_x is not None and found[0] is not None:
                    grad_x.narrow(time_dim, a, b - a).copy_(found[0])
                flow = found[1 : len(found) - len(named)]
                for name, g in zip(named, found[len(found) - len(named) :], strict=True):
                    if g is not None:
                        total = sums[name]
                        sums[name] = g.to(state_dtype(g.dtype), copy=True) if total is None else total.add_(g)
        gradients = [g if g is None else g.to(named[name].dtype) for name, g in sums.items()]
        return None, None, None, grad_x, *(flow if exact else ()), *gradients


_KEPT = torch.empty(0)  # in a state: a tensor that autograd keeps


def _tensors(state) -> list[torch.Tensor]:
    found = []
    mapped(found.append, state)
    return found


def _gradients(pairs: list[tuple], inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of the outputs in ``pairs`` with the gradients beside them; None for what none of them depends on."""
    wanted = [t for t in inputs if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _length(x, time_dim: int) -> int:
    """The steps of x."""
    if isinstance(x, torch.Tensor) or time_dim:
        shape = getattr(x, "shape", ())
        if len(shape) <= time_dim:
            raise ValueError(f"x must have dimension {time_dim}, time, got {type(x).__name__} of shape {tuple(shape)}")
        length = shape[time_dim]
    elif hasattr(x, "__len__") and hasattr(x, "__getitem__"):
        length = len(x)
    else:
        raise TypeError(f"x must be a tensor, or have a length and give windows as x[a:b], got {type(x).__name__}")
    if length < 1:
        raise ValueError(f"x must have one time step at least, got {length}")
    return length


def _check(module: nn.Module) -> None:
    """Refuses a layer whose windows are not those of one call with all steps."""
    if isinstance(module, _NormBase):
        instance = isinstance(module, _InstanceNorm)
        if module.training if module.running_mean is not None else not instance:
            wanted = "batch norm in eval mode with running statistics: those of a batch go over all its steps"
            raise ValueError(f"model must have {wanted}; got {module!r} in training mode or without them")
    if getattr(module, "store_v_seq", False):
        raise ValueError(f"store_v_seq must be False in Windows, which keeps no step's potential, got {module!r}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ValueError("model must not be a DistributedDataParallel, which goes around Windows(model)")
