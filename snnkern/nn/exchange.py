"""Networks to and from NIR, the Neuromorphic Intermediate Representation that other tools and chips read.

NIR's neurons are differential equations; a network of time steps is their forward Euler steps of length dt::

    tau dv/dt = v_leak - v + r I       h = v + dt/tau (v_leak - v + r x)       nir.LIF
        dv/dt = r I                    h = v + dt r x                          nir.IF
    a spike where h > v_threshold, then v = v_reset

    lif                              nir.LIF: tau, r, v_leak
    tau, decay_input=True            dt tau, 1, reset
    tau, decay_input=False           dt tau, tau, reset
    decay                            dt / (1 - decay), 1 / (1 - decay), 0
    decay=1, or tau infinite         nir.IF with r = 1/dt

Source: Pedersen et al., "Neuromorphic intermediate representation", Nature Communications 2024.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..spec.arguments import number
from ..surrogate import Surrogate, Triangle
from .layers import IAF, LIF, TTM, Linear, SmoothLIF
from .node import BaseNode
from .norm import fold

__all__ = ["from_nir", "to_nir"]

# What NIR does not say of a neuron, in its metadata: that it is computed in the decay form, and fires at the threshold.
DECAY, AT_THRESHOLD = "snnkern_decay", "snnkern_fire_at_threshold"
_NEURONS = LIF, BaseNode, IAF, SmoothLIF
_LEAVES = (*_NEURONS, TTM, nn.Linear, nn.modules.conv._ConvNd, _NormBase, nn.AvgPool2d, _DropoutNd)
# Functions that leave samples as they are, or change their shape.
_PASS = {"unflatten", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "detach", "__getitem__"}
_RESHAPE = {"flatten", "reshape", "view"}


def to_nir(model: nn.Module, x: torch.Tensor, dt: float = 1e-4):
    """The NIR graph of a network for inference: ``nir.write(path, to_nir(model, x))``.

    The layers are those that run when the model gets x, in evaluation mode: Linear, Conv1d, Conv2d, AvgPool2d, Flatten,
    the mean over height and width, sums, and the neurons; the names of the nodes are those of the modules. Batch norms
    are folded away, see ``fold``. The model itself is left as it is.

    Spikes of the graph in forward Euler steps of dt are those of the model but for rounding, and ``from_nir`` gives the
    same bits, but where neurons add the bias of the layer before them (``SpikingMLP``): in the graph ``Affine`` does.
    What NIR does not say: it fires above the threshold, so that ``fire_at_threshold``, which LIFNode has, stands in the
    neuron's metadata, as does the decay form; surrogates and where gradients flow are left out.

    Args:
        model: of layers of [T, N, ...]; a ``LIFNode`` in multi-step mode.
        x: an example of its input, [T, N, ...], for the shapes; T and N at least 2, or merging them would go unseen.
        dt: time step in seconds. 1e-4 is what SpikingJelly and snnTorch assume.

    Raises:
        ModuleNotFoundError: ``nir`` is not installed.
        ValueError: NIR cannot say it, such as a soft reset, ternary or integer spikes, grouped convolutions, a maximum;
            or a module runs twice. The message names the module.
    """
    nir = _nir()
    if not number("dt", dt) > 0:
        raise ValueError(f"dt must be > 0, got {dt!r}")
    if x.dim() < 3 or min(x.shape[:2]) < 2:
        raise ValueError(f"x must be [T, N, ...] with T and N at least 2, got shape {tuple(x.shape)}")
    try:
        model = fold(model)
    except ValueError:  # nothing to fold
        model = copy.deepcopy(model).eval()
    trace = _Trace(nir, dt, tuple(x.shape[:2]))
    for path, module in model.named_modules():
        if isinstance(module, BaseNode):
            module.reset()
        if isinstance(module, _LEAVES) or (not [*module.children()] and "pool" in type(module).__name__.lower()):
            module.register_forward_pre_hook(trace.enter)
            module.register_forward_hook(trace.leaf(path or "layer"), with_kwargs=True)
    trace.name(x, ("input",), tuple(x.shape[2:]))
    trace.nodes["input"] = nir.Input(np.array(x.shape[2:]))
    with torch.no_grad(), trace:
        out = model(x)
    sources, features = trace.sources(out, "the output")
    trace.add("output", nir.Output(np.array(features)), sources)
    return nir.NIRGraph(trace.nodes, trace.edges)


class _Trace(TorchFunctionMode):
    """Follows tensors from layer to layer. Of each it knows which nodes' outputs it sums, and the shape of a sample."""

    def __init__(self, nir, dt: float, steps_and_samples: tuple[int, int]) -> None:
        super().__init__()
        self.nir, self.dt, self.nodes, self.edges = nir, dt, {}, []
        self.leading = steps_and_samples, (math.prod(steps_and_samples),)  # what stands before the shape of a sample
        self.known: dict[int, tuple] = {}  # with the tensor itself: an id belongs to what lives
        self.inside = False
        self.left_out: torch.Tensor | None = None

    def name(self, tensor: torch.Tensor, sources: tuple[str, ...], features: tuple[int, ...]) -> None:
        self.known[id(tensor)] = tensor, sources, features

    def sources(self, tensor: object, what: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        if id(tensor) not in self.known:
            raise ValueError(f"{what} must come from layers that NIR has, got {_brief(tensor)} from elsewhere")
        return self.known[id(tensor)][1:]

    def add(self, name: str, node, sources: tuple[str, ...]) -> None:
        if name in self.nodes:
            raise ValueError(f"{name} must run once, got a second call: NIR has no weights or neurons in two places")
        if len(set(sources)) < len(sources):
            raise ValueError(f"{name} must not get the same spikes twice, got the sum of {', '.join(sources)}")
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.inside = True

    def leaf(self, path: str) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
            self.inside = False
            bias = kwargs.get("bias")
            if bias is not None and bias is not self.left_out:
                raise ValueError(f"{path}: NIR has no bias, got one that is not of the Linear before it")
            if kwargs.get("add_bias") is False:
                self.left_out = module.bias  # for the neurons, but its node has it
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each is not bias]
            found = [self.sources(each, f"the input of {path}") for each in given]
            features = found[0][1]
            if isinstance(module, _DropoutNd):  # in evaluation mode
                return self.name(out, *found[0])
            if isinstance(module, _NEURONS) and out.shape != given[0].shape:
                raise ValueError(f"{path} must put out as many steps as it gets: NIR has one clock")
            try:
                node = self.layer(module, features)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            self.add(path, node, tuple(source for sources, _ in found for source in sources))
            self.name(out, (path,), _features(module, features, out))

        return leave

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        what = func.__name__
        given = [] if self.inside else [each for each in args if id(each) in self.known]
        changed = what == "__setitem__" or what.startswith("__i") or (what.endswith("_") and not what.endswith("__"))
        if not given or (not changed and (not isinstance(out, torch.Tensor) or id(out) in self.known)):
            return out
        sources, features = self.sources(given[0], "")
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else ()
        same = shape in [(*leading, *features) for leading in self.leading]
        if what in _PASS | _RESHAPE and same:
            self.name(out, sources, features)
        elif what in _RESHAPE and shape in [(*leading, math.prod(features)) for leading in self.leading]:
            self.flatten(out, sources, features)
        elif what in ("add", "__add__", "__radd__", "__iadd__", "add_") and len(given) == 2 and not kwargs and same:
            self.name(out, sources + self.sources(given[1], "")[0], features)
        elif what == "mean" and len(features) == 3 and shape == given[0].shape[:-2]:
            pool = self.nir.AvgPool2d(*(np.array(size) for size in (features[1:], features[1:], (0, 0))))
            name = f"{'+'.join(sources)}.mean"
            self.add(name, pool, sources)
            self.flatten(out, (name,), (features[0], 1, 1))
        else:
            raise ValueError(f"NIR has no node for {what} of {_brief(given[0])}, which follows {' + '.join(sources)}")
        return out

    def flatten(self, out: torch.Tensor, sources: tuple[str, ...], features: tuple[int, ...]) -> None:
        name = f"{'+'.join(sources)}.flatten"
        self.add(name, self.nir.Flatten(np.array(features), 0, -1), sources)
        self.name(out, (name,), (math.prod(features),))

    def layer(self, module: nn.Module, features: tuple[int, ...]):
        nir, kind = self.nir, type(module)
        if isinstance(module, _NormBase):
            raise ValueError("NIR has no batch norm, and nn.fold found no layer right in front of this one")
        if isinstance(module, (LIF, BaseNode)):
            if getattr(module, "step_mode", "m") != "m":
                raise ValueError("step_mode must be 'm', got 's'")
            if isinstance(module, BaseNode):
                return self.neuron(module._neuron(), features)
            return self.neuron(
                {**module.settings, **{name: getattr(module, name) for name in module.tensors}}, features
            )
        if isinstance(module, IAF):
            raise ValueError("NIR's neurons have a hard reset, IAF the soft one")
        if kind is not Linear and kind.__module__.split(".")[0] not in ("torch", "spikingjelly"):
            raise ValueError(f"NIR has no node for {kind.__name__}")
        if isinstance(module, nn.Linear):
            if len(features) != 1:
                raise ValueError(f"a linear layer must get [T, N, C], got samples of shape {features}: flatten them")
            weight = _array(module.weight)
            return nir.Linear(weight) if module.bias is None else nir.Affine(weight, _array(module.bias))
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            if module.groups != 1 or module.padding_mode != "zeros":
                raise ValueError(f"NIR's types have no groups, and its padding is of zeros, got {module}")
            bias = np.zeros(module.out_channels, np.float32) if module.bias is None else _array(module.bias)
            options = module.stride, module.padding, module.dilation
            if isinstance(module, nn.Conv1d):
                options = [each if isinstance(each, str) else each[0] for each in options]
                return nir.Conv1d(features[1], _array(module.weight), *options, 1, bias)
            return nir.Conv2d(features[1:], _array(module.weight), *options, 1, bias)
        if isinstance(module, nn.AvgPool2d):
            sizes = [_pair(each) for each in (module.kernel_size, module.stride, module.padding)]
            left = (np.array(features[1:]) + 2 * sizes[2] - sizes[0]) % sizes[1]
            plain = (module.count_include_pad or not sizes[2].any()) and not (module.ceil_mode and left.any())
            if plain and module.divisor_override in (None, 1):
                return (nir.SumPool2d if module.divisor_override else nir.AvgPool2d)(*sizes)
        raise ValueError(f"NIR has no node for {module}")

    def neuron(self, settings: dict, features: tuple[int, ...]):
        """Of keywords of ``lif``."""
        for name in ("ternary", "v_min", *LIF.more, "weight"):
            value = settings.get(name)
            if value is not None and value is not False:
                shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(f"to_nir has no node for neurons with {name}, got {name}={shown}")
        if settings["reset"] is None:
            raise ValueError("NIR's neurons have a hard reset, got reset=None, the soft one")
        if type(settings["surrogate"]).__name__ == "Integer":
            raise ValueError("NIR's spikes are 0 or 1, got surrogate.Integer")

        def full(value) -> np.ndarray:
            return np.broadcast_to(_array(value).astype(np.float64), features).copy()

        threshold, reset = full(settings["threshold"]), full(settings["reset"])
        by_tau = settings.get("tau") is not None or settings.get("inverse_tau") is not None
        with np.errstate(divide="ignore"):
            if settings.get("inverse_tau") is not None:
                tau = 1 / full(settings["inverse_tau"])
            else:
                tau = full(settings["tau"]) if by_tau else 1 / (1 - full(_default(settings.get("decay"), 0.5)))
        said = {DECAY: not by_tau, AT_THRESHOLD: bool(settings["fire_at_threshold"])}
        if np.isinf(tau).all():
            node = self.nir.IF(full(1 / self.dt), threshold, reset)
        elif np.isinf(tau).any():
            raise ValueError("NIR has neurons with a leak or without, got both in one layer")
        else:
            r = full(1.0) if by_tau and settings["decay_input"] else tau
            node = self.nir.LIF(tau * self.dt, r, reset if by_tau else full(0.0), threshold, reset)
        node.metadata = said
        return node


def from_nir(
    graph,
    dt: float = 1e-4,
    *,
    surrogate: Surrogate = Triangle(),
    detach_reset: bool = False,
    backend: str | None = None,
) -> fx.GraphModule:
    """The network of a NIR graph: ``from_nir(nir.read(path))`` takes [T, N, ...] and is ready for training.

    Its modules have the names of the nodes; neurons are ``LIF``, of which every call starts at rest (``v_leak``, or
    ``v_reset`` without leak: NIR does not say). Where a node has metadata of ``to_nir`` the network has the bits of the
    one exported, otherwise the equations in the order that SpikingJelly's import has. Neurons fire above the threshold
    as NIR has it; other tools fire at it.

    Args:
        graph: a ``nir.NIRGraph`` with one input, one output and no loops; of Linear, Affine, Conv1d, Conv2d, AvgPool2d,
            SumPool2d, Flatten, Scale, LIF, IF and graphs of these.
        dt: time step in seconds.
        surrogate, detach_reset, backend: of the neurons; see ``snnkern.lif``.

    Raises:
        ModuleNotFoundError: ``nir`` is not installed.
        ValueError: a node is none of these; the message names it.
    """
    nir = _nir()
    if not number("dt", dt) > 0:
        raise ValueError(f"dt must be > 0, got {dt!r}")
    options = {"surrogate": surrogate, "detach_reset": detach_reset, "backend": backend}
    return _network(nir, graph, dt, options)


def _network(nir, graph, dt: float, options: dict) -> fx.GraphModule:
    for what, found in (("input", graph.inputs), ("output", graph.outputs)):
        if len(found) != 1:
            raise ValueError(f"graph must have one {what}, got {len(found)}: {', '.join(found)}")
    before = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    try:
        order = [*TopologicalSorter(before).static_order()]
    except CycleError as error:
        raise ValueError(f"graph must have no loops, got {' -> '.join(error.args[1])}") from None
    net, values, modules = fx.Graph(), {}, {}
    x = shape = None

    def call(name: str, module: nn.Module | torch.Tensor, value: fx.Node) -> fx.Node:
        modules[name] = module
        if isinstance(module, torch.Tensor):
            return net.call_function(operator.mul, (value, net.get_attr(name)))
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.AvgPool2d)):
            return net.call_module(name, (value,))
        value = net.call_module(name, (net.call_method("flatten", (value, 0, 1)),))
        return net.call_method("unflatten", (value, 0, shape))

    for name in order:
        node = graph.nodes[name]
        if isinstance(node, nir.Input):
            values[name] = x = net.placeholder("x")
            size = net.call_function(getattr, (x, "shape"))
            shape = net.call_function(operator.getitem, (size, slice(0, 2)))
            continue
        if not before[name]:
            raise ValueError(f"{name} must have an input, got none")
        value, *others = [values[source] for source in before[name]]
        for other in others:
            value = net.call_function(operator.add, (value, other))
        if isinstance(node, nir.Output):
            values[name] = value
        elif isinstance(node, nir.NIRGraph):
            values[name] = call(name, _network(nir, node, dt, options), value)
        else:
            try:
                gain, module = _module(nir, node, dt, options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if gain is not None:
                value = call(f"{name}_gain", gain, value)
            values[name] = call(name, module, value)
    net.output(values[next(iter(graph.outputs))])
    for node in reversed(net.nodes):  # sizes that nothing asks for
        if not node.users and node.op == "call_function":
            net.erase_node(node)
    return fx.GraphModule(modules, net, "NIR")


def _module(nir, node, dt: float, options: dict) -> tuple[torch.Tensor | None, nn.Module | torch.Tensor]:
    """What stands for a node, and the factor of what it gets, if there is one."""
    if isinstance(node, (nir.LIF, nir.IF)):
        return _neuron(nir, node, dt, options)
    if isinstance(node, (nir.Linear, nir.Affine)):
        if node.weight.ndim != 2:
            raise ValueError(f"weight must have two dimensions, got {node.weight.shape}")
        return None, _filled(nn.Linear(*node.weight.shape[::-1], bias=isinstance(node, nir.Affine)), node)
    if isinstance(node, (nir.Conv1d, nir.Conv2d)):
        outputs, inputs, *kernel = node.weight.shape
        sizes = [each if isinstance(each, (str, bytes)) else _plain(each) for each in
                 (node.stride, node.padding, node.dilation)]  # fmt: skip
        sizes = [each.decode() if isinstance(each, bytes) else each for each in sizes]
        groups, made = int(node.groups), nn.Conv1d if isinstance(node, nir.Conv1d) else nn.Conv2d
        bias = bool(np.any(node.bias))  # NIR has one everywhere
        return None, _filled(made(inputs * groups, outputs, tuple(kernel), *sizes, groups, bias), node)
    if isinstance(node, (nir.AvgPool2d, nir.SumPool2d)):
        sizes = [_plain(each) for each in (node.kernel_size, node.stride, node.padding)]
        return None, nn.AvgPool2d(*sizes, divisor_override=1 if isinstance(node, nir.SumPool2d) else None)
    if isinstance(node, nir.Flatten):
        return None, nn.Flatten(*(int(each) + 2 if each >= 0 else int(each) for each in (node.start_dim, node.end_dim)))
    if isinstance(node, nir.Scale):
        return None, torch.as_tensor(node.scale)
    raise ValueError(f"there is no module for nir.{type(node).__name__}")


def _neuron(nir, node, dt: float, options: dict) -> tuple[torch.Tensor | None, LIF]:
    said = {key: bool(value) for key, value in node.metadata.items() if key in (DECAY, AT_THRESHOLD)}
    threshold, reset, r = np.asarray(node.v_threshold), _uniform("v_reset", node.v_reset), np.asarray(node.r)
    decayed = said.get(DECAY, False)
    if isinstance(node, nir.IF):
        leak, gain = {"decay": 1.0} if decayed else {"tau": math.inf, "decay_input": False}, r * dt
    else:
        rest, tau = _uniform("v_leak", node.v_leak), np.asarray(node.tau) / dt
        if not (tau > 0).all():
            raise ValueError(f"tau must be > 0, got {node.tau.min()!r}")
        if rest != reset:  # measured from the leak, it has the decay form
            decayed, threshold, reset = True, threshold - rest, reset - rest
        if decayed:
            leak, gain = {"decay": _parameter(1 - 1 / tau)}, r / tau
        elif _close(r, tau):
            leak, gain = {"tau": _parameter(tau), "decay_input": False}, np.ones(())
        else:
            leak, gain = {"tau": _parameter(tau)}, r
    options = {**leak, "threshold": _parameter(threshold), "reset": reset, **options}
    neuron = LIF(**options, fire_at_threshold=said.get(AT_THRESHOLD, False))
    return None if _close(gain, 1) else torch.tensor(gain, dtype=torch.float32), neuron


def _filled(layer: nn.Module, node) -> nn.Module:
    with torch.no_grad():
        layer.weight = nn.Parameter(torch.as_tensor(node.weight).clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.as_tensor(node.bias).clone())
    return layer


def _uniform(name: str, values) -> float:
    found = np.unique(np.asarray(values))
    if found.size != 1:
        raise ValueError(f"{name} must be the same for all neurons of a layer, got {found.size} values")
    return float(found.item())


def _parameter(values: np.ndarray) -> float | torch.Tensor:
    """One number where all neurons have it, to 15 digits: divided by dt and multiplied again, it is what it was."""
    found = np.unique(values)
    return float(f"{found.item():.15g}") if found.size == 1 else torch.as_tensor(values, dtype=torch.float32)


def _close(a: np.ndarray, b: np.ndarray | float) -> bool:
    return np.allclose(a, b, rtol=1e-6, atol=0.0)


def _features(module: nn.Module, before: tuple[int, ...], out: torch.Tensor) -> tuple[int, ...]:
    count = out.dim() - 2 if isinstance(module, _NEURONS) else len(before)
    return tuple(out.shape[out.dim() - count :])


def _pair(size) -> np.ndarray:
    return np.array(size if isinstance(size, tuple) else (size, size))


def _plain(size):
    size = np.asarray(size)
    return size.item() if size.ndim == 0 else tuple(size.tolist())


def _array(value) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float64)


def _default(value, default):
    return default if value is None else value


def _brief(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _nir():
    try:
        import nir
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("exchange with NIR needs nir: pip install 'snnkern[nir]'") from error
    return nir
