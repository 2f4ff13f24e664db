"""Who is measured. A contender makes a module, x [T, N, ...] to spikes, through its library's public interface; every
call starts from a fresh state. For ``bn+lif`` it is given the number of channels, for ``lif+ttm`` that of steps left,
for ``bn+lif+ttm`` both. For networks of long sequences it makes the layer of synapses too, from the numbers of inputs
and neurons.

The neuron: tau = 2, input not decayed, threshold 1 (fires at it), hard reset to 0, surrogate ATan(2), the gradient
through the reset too. Where a library cannot, ``equals`` holds the options of ``snnkern.lif`` that it must agree with
instead, and ``differs`` says the same in words.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from statistics import fmean

import torch
from torch import nn

import snnkern
from snnkern.backend import why_not
from snnkern.spec import split as splitting
from snnkern.spec.layout import state_dtype
from snnkern.surrogate import ATan, SuperSpike, Table

SURROGATE = ATan(2.0)
NEURON = {"tau": 2.0, "decay_input": False, "surrogate": SURROGATE, "fire_at_threshold": True}
LONGEST_COMPILED = 16
NORM = ("norm", "chain")
OWN = (
    "split",
    *NORM,
    "sums",
    "norm-sums",
    "mixed",
    "plif",
    "table",
    *("recurrent", "recurrent CUBA", "recurrent adaptive", "CUBA", "feedforward"),
)  # groups of workloads, or ops in them, with contenders of their own


def mixed(ts: list[tuple[int, ...]], greatest: int) -> list[dict]:
    """The calls of a model in one update of mixed time-step training, for the configurations drawn."""
    return [{"t": t} for t in ts]


def at_greatest(ts: list[tuple[int, ...]], greatest: int) -> list[dict]:
    """As many ordinary calls."""
    return [{"steps": greatest}] * len(ts)


def at_mean(ts: list[tuple[int, ...]], greatest: int) -> list[dict]:
    return [{"steps": round(fmean(map(fmean, ts)))}] * len(ts)


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[..., nn.Module]
    equals: dict | None = field(default_factory=dict)  # beyond NEURON; None: another neuron, not checked
    differs: str = ""
    backend: str | None = None
    needs: str = "torch"  # the module that must be importable
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # where it is one
    compiled: bool = False
    half_state: bool = False  # a 16-bit input gets a 16-bit state
    rounded: bool = False  # its batch norm is PyTorch's
    groups: tuple[str, ...] = ()  # of workloads that it is for; empty: all but OWN
    model: dict = field(default_factory=dict)  # keywords for ResNet19 and VGGSNN
    context: Callable[[], AbstractContextManager] = nullcontext  # of its forward passes
    passes: Callable[[list[tuple[int, ...]], int], list[dict]] = mixed  # of one update, in the group "mixed"
    apart: tuple[str, ...] = ()  # the transformations that it has outside of its stages: "sums", "repeats"

    def takes(self, workload) -> bool:
        """Whether it is meant to be measured there; only then is it missed, and a reason given."""
        if workload.dtype not in self.dtypes or not self.name.startswith(workload.only or ""):
            return False
        of = workload.op if workload.op in OWN else workload.group
        return of in self.groups if self.groups else of not in OWN

    def refuses(self, workload) -> str | None:
        """Why it is not measured there."""
        if not self.compiled:
            return None
        if workload.steps > LONGEST_COMPILED:
            return f"unrolled over T: left out above T = {LONGEST_COMPILED}"
        return None if workload.compiled else "compiled anew for every size: left out here"

    @property
    def options(self) -> dict:
        return NEURON | (self.equals or {})


class Shared(nn.Module):
    """Ours, with work shared among threads in one way, which holds for the backward that follows too."""

    real, threads = staticmethod(splitting.split), torch.get_num_threads()

    def __init__(self, threads: int | None = None, over_time: bool = True):
        super().__init__()
        self.layer = snnkern.nn.LIF(**NEURON, backend="cpu")
        self.way = threads, self.real if over_time else lambda steps, *_: splitting.Split(1, steps, 0)

    def forward(self, x):
        threads, splitting.split = self.way
        torch.set_num_threads(threads or self.threads)
        return self.layer(x)


class Alone(snnkern.nn.LIF):
    """Ours, whose linear layer adds its own bias."""

    def forward(self, x, residual=None, steps_out=None):
        return super().forward(x, residual, steps_out)


class Layer(nn.Module):
    """``call(module, *inputs)`` as a module."""

    def __init__(self, module: nn.Module, call: Callable):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs):
        return self.call(self.module, *inputs)


class Steps(nn.Module):
    """A cell, (x_t, state) to (spikes, state), in the loop over time that people write. ``start(x_0)`` is its state."""

    def __init__(self, cell: nn.Module, start: Callable = lambda x: None):
        super().__init__()
        self.cell, self.start = cell, start

    def forward(self, x):
        state, spikes = self.start(x[0]), []
        for x_t in x.unbind(0):
            s, state = self.cell(x_t, state)
            spikes.append(s)
        return torch.stack(spikes)


class Plain(nn.Module):
    """About six elementwise operations a step."""

    def forward(self, x, v):
        h = v - v / 2.0 + x
        s = SURROGATE(h - 1.0, h >= 1.0)
        return s.to(x.dtype), h * (1 - s)


class Normed(nn.Module):
    """PyTorch's batch norm, time folded into the batch, and neurons behind it."""

    def __init__(self, neuron: nn.Module, channels: int):
        super().__init__()
        self.norm, self.neuron = nn.BatchNorm2d(channels), neuron

    def forward(self, y):
        return self.neuron(self.norm(y.flatten(0, 1)).unflatten(0, y.shape[:2]))


class Within(nn.Sequential):
    """Layers whose forward passes run in a context; all get the options of the call."""

    def __init__(self, context: Callable[[], AbstractContextManager], *layers: nn.Module):
        super().__init__(*layers)
        self.context = context

    def forward(self, x, **options):
        with self.context():
            for layer in self:
                x = layer(x, **options)
        return x


class Apart(nn.Module):
    """A stage of a network, and transformations of its own around it: ``repeats`` before it convolves, ``sums`` of
    spikes that its neurons have written."""

    def __init__(self, stage: nn.Module, sums: bool, repeats: bool):
        super().__init__()
        self.stage, self.sums, self.repeats = stage, sums, repeats

    def forward(self, x, steps, steps_out):
        if self.repeats:
            x = snnkern.ttm(x, steps)
        if self.sums:
            return snnkern.ttm(self.stage(x, steps), steps_out)
        return self.stage(x, steps, steps_out=steps_out)


def normed(neuron: Callable[[], nn.Module], channels: int) -> nn.Module:
    return Normed(neuron(), channels)


def summed(neuron: Callable[[], nn.Module], steps: int) -> nn.Module:
    """Sums of spikes over groups of steps, which ``steps`` divides."""
    return Layer(neuron(), lambda module, x: module(x).unflatten(0, (steps, -1)).sum(1))


class Fresh(nn.Module):
    """A node with state, and nodes in it, from rest at every call."""

    def __init__(self, node: nn.Module):
        super().__init__()
        self.node = node

    def forward(self, x):
        for module in self.node.modules():
            if hasattr(module, "reset"):
                module.reset()
        return self.node(x)


def plif(backend: str | None = None) -> nn.Module:
    """Ours, or SpikingJelly's."""
    if backend is None:
        from spikingjelly.activation_based import surrogate
        from spikingjelly.activation_based.neuron import ParametricLIFNode

        options = {"surrogate_function": surrogate.ATan()}
    else:
        ParametricLIFNode = snnkern.nn.ParametricLIFNode
        options = {"surrogate_function": SURROGATE, "backend": backend}
    return Fresh(ParametricLIFNode(init_tau=2.0, decay_input=False, step_mode="m", **options))


def fixed(backend: str) -> nn.Module:
    """The same node with a leak that is a number."""
    options = {"surrogate_function": SURROGATE, "backend": backend}
    return Fresh(snnkern.nn.LIFNode(tau=2.0, decay_input=False, step_mode="m", **options))


def leaky_k_relu() -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    function = surrogate.LeakyKReLU(leak=0.1, k=0.8)
    return Fresh(neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=function, step_mode="m"))


class PlainLeaky(Plain):
    """Plain with a leak that is learnt."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x, v):
        h = v - v * self.w.sigmoid() + x
        s = SURROGATE(h - 1.0, h >= 1.0)
        return s.to(x.dtype), h * (1 - s)


def loop() -> nn.Module:
    return Steps(Plain(), lambda x: torch.zeros_like(x, dtype=state_dtype(x.dtype)))


def compiled_loop() -> nn.Module:
    return torch.compile(loop(), dynamic=False)


def compiled_normed_loop(channels: int) -> nn.Module:
    return torch.compile(Normed(loop(), channels), dynamic=False)


class SpikingJelly(nn.Module):
    """Its node, or with ``functional`` its op with a float32 state, which alone reaches its fused kernels for 16-bit x.

    It reads SJ_LIF_CUDA_IMPLEMENTATION when imported and never again: for several in one process, each call puts its
    own where that is kept.
    """

    chosen: dict[str, dict] = {}  # noqa: RUF012  # per implementation, what it found on each device

    def __init__(self, implementation: str = "auto", functional: bool = False, compiled: bool = False):
        from spikingjelly.activation_based import neuron, surrogate

        super().__init__()
        self.surrogate = surrogate.ATan()
        self.node = neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=self.surrogate, step_mode="m")
        self.implementation, self.checked = implementation, False
        self.run = self.with_float32_state if functional else self.with_node
        if compiled:
            self.run = torch.compile(self.run, dynamic=False)

    def forward(self, x):
        if x.is_cuda:
            self.force(x.device)
        return self.run(x)

    def with_node(self, x):
        self.node.reset()
        return self.node(x)

    def with_float32_state(self, x):
        from spikingjelly.activation_based import functional

        v = torch.zeros(x.shape[1:], device=x.device)
        return functional.lif_multi_step(x, v, 2.0, False, 1.0, 0.0, self.surrogate, False)[0]

    def force(self, device):
        from spikingjelly._ops.lif import _selection
        from spikingjelly.activation_based import functional

        _selection._requested = self.implementation
        _selection._selections = self.chosen.setdefault(self.implementation, {})
        if not self.checked:
            took = functional.neuron_implementation("lif", device)["implementation"]
            if self.implementation not in ("auto", took):
                raise RuntimeError(f"asked for {self.implementation!r}, it took {took!r}")
            self.checked = True


def snntorch() -> nn.Module:
    from snntorch import Leaky
    from snntorch._neurons import SpikingNeuron

    cell = Leaky(beta=0.5, reset_mechanism="zero")
    SpikingNeuron.init()  # a list that keeps every neuron ever made, with its graph
    return Steps(cell, torch.zeros_like)


def norse_box() -> nn.Module:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    return Steps(LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(0.5)), dt=1.0))


def norse() -> nn.Module:
    from norse.torch import LIF, LIFParameters

    parameters = LIFParameters(tau_mem_inv=torch.tensor(0.5), tau_syn_inv=torch.tensor(1.0))
    return Layer(LIF(parameters, dt=1.0), lambda module, x: module(x)[0])


def sinabs(package: str = "sinabs.layers") -> nn.Module:
    from sinabs.activation import MembraneReset, SingleSpike

    options = {"tau_mem": 1 / math.log(2), "spike_fn": SingleSpike, "norm_input": False}
    options["surrogate_grad_fn"] = lambda v, threshold: SURROGATE.grad(v - threshold)
    if package == "sinabs.layers":
        options["reset_fn"] = MembraneReset()
    module = importlib.import_module(package).LIF(**options).requires_grad_(False)  # tau is learnt by default

    def call(module, x):
        module.reset_states()
        return module(x.transpose(0, 1)).transpose(0, 1)  # it wants [N, T, ...]

    return Layer(module, call)


# Layers for long sequences: synapses and neurons, x [T, N, inputs] to spikes [T, N, neurons].
SLOW = {"decay": 0.95, "surrogate": SURROGATE}
CURRENT = {"synapse_decay": 0.9}
ADAPTIVE = {"threshold_decay": 0.98, "threshold_jump": 0.1}


class Recurrent(nn.Module):
    """Ours; ``loop``: the loop over time that people write, about ten operations a step and a product."""

    def __init__(self, inputs: int, neurons: int, recurrent: bool = True, loop: bool = False, **neuron):
        super().__init__()
        backend = neuron.pop("backend", None)
        self.loop, self.neuron, options = loop, neuron, {**SLOW, **neuron, "backend": backend}
        self.synapses = nn.Linear(inputs, neurons, bias=False)
        gain = 0.12 if "synapse_decay" in neuron else 0.5  # a synaptic current adds inputs up; 5 to 10 % fire
        nn.init.normal_(self.synapses.weight, std=gain * inputs**-0.5)
        self.neurons = snnkern.nn.RecurrentLIF(neurons, **options) if recurrent else snnkern.nn.LIF(**options)
        if recurrent and "synapse_decay" in neuron:
            nn.init.normal_(self.neurons.weight, std=0.1 * neurons**-0.5)

    def forward(self, x):
        x = self.synapses(x)
        if not self.loop:
            return self.neurons(x)
        rise, fall = self.neuron.get("threshold_jump", 0), self.neuron.get("threshold_decay", 0)
        weight, kept = getattr(self.neurons, "weight", None), self.neuron.get("synapse_decay")
        v, i, a, s = (torch.zeros_like(x[0]) for _ in range(4))
        spikes = []
        for z in x.unbind(0):
            if weight is not None:
                z = z + s @ weight.T
            i = z if kept is None else kept * i + z
            h = SLOW["decay"] * v + i
            threshold = 1 + rise * a if rise else 1
            s = SURROGATE(h - threshold, h > threshold)
            v = h * (1 - s)
            a = fall * a + s if rise else a
            spikes.append(s)
        return torch.stack(spikes)


def spikingjelly_recurrent(inputs: int, neurons: int) -> nn.Module:
    from spikingjelly.activation_based import layer, neuron, surrogate

    node = neuron.LIFNode(tau=20.0, decay_input=False, surrogate_function=surrogate.ATan())
    container = layer.LinearRecurrentContainer(node, neurons, neurons, step_mode="m")
    return nn.Sequential(nn.Linear(inputs, neurons), Fresh(container))


def spikingjelly_cuba(inputs: int, neurons: int) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.CUBALIFNode(0.9, 0.95, 1.0, surrogate_function=surrogate.ATan())
    node.step_mode = "m"
    return nn.Sequential(nn.Linear(inputs, neurons), Fresh(node))


def snntorch_long(name: str, inputs: int, neurons: int) -> nn.Module:
    import snntorch
    from snntorch._neurons import SpikingNeuron

    decays, feeds_back = (0.9, 0.95) if "Synaptic" in name else (0.95,), name.startswith("R")
    options = {"linear_features": neurons} if feeds_back else {}
    cell = getattr(snntorch, name)(*decays, reset_mechanism="zero", **options)
    SpikingNeuron.init()

    def call(cell, x, states):
        spikes, *states = cell(x, *states)
        return spikes, [spikes, *states] if feeds_back else states

    def start(x):
        return [torch.zeros_like(x) for _ in range(len(decays) + feeds_back)]

    return nn.Sequential(nn.Linear(inputs, neurons), Steps(Layer(cell, call), start))


def norse_long(name: str, inputs: int, neurons: int) -> nn.Module:
    import norse.torch as norse
    from norse.torch.functional.lsnn import LSNNParameters

    rates = {"tau_mem_inv": torch.tensor(0.05), "tau_syn_inv": torch.tensor(0.1)}
    p = norse.LIFParameters(**rates)
    if name.startswith("LSNN"):
        p = LSNNParameters(**rates, tau_adapt_inv=torch.tensor(0.02), beta=torch.tensor(0.1))
    if "Recurrent" in name:
        return Steps(getattr(norse, name)(inputs, neurons, p=p, dt=1.0))
    return nn.Sequential(nn.Linear(inputs, neurons), Steps(getattr(norse, name)(p=p, dt=1.0)))


ABOVE = {"fire_at_threshold": False}
LEARNT = {"tau": None, "inverse_tau": 0.5}
LEAKY = {"surrogate": Table(lambda x: torch.where(x < 0, 0.1, 0.8))}  # SpikingJelly's LeakyKReLU(0.1, 0.8)
NORSE = {**ABOVE, "decay_input": True, "surrogate": SuperSpike(1.0)}
NORSE_DIFFERS = "its input decays too, fires above the threshold, SuperSpike surrogate"
SNNTORCH_DIFFERS = "fires above the threshold, no gradient through the reset"
SJ = "spikingjelly.activation_based.neuron"
SPIKINGJELLY = {"needs": SJ}
FEEDFORWARD = "plain loop", "SpikingJelly", "snnTorch", "Norse LIF"
LAYERS = {
    "recurrent": {},
    "recurrent CUBA": CURRENT,
    "recurrent adaptive": ADAPTIVE,
    "CUBA": {**CURRENT, "recurrent": False},
}
FLOAT32_STATE = partial(SpikingJelly, functional=True)

PEERS = [
    Contender("plain loop", loop),
    Contender("compiled loop", compiled_loop, compiled=True),
    Contender("SpikingJelly", SpikingJelly, half_state=True, **SPIKINGJELLY),
    Contender("SpikingJelly, float32 state", FLOAT32_STATE, devices=("cpu",), dtypes=("bfloat16",), **SPIKINGJELLY),
    *(
        Contender(f"SpikingJelly {name}", partial(FLOAT32_STATE, name), backend=name, devices=("cuda",), **SPIKINGJELLY)
        for name in ("cuda", "triton", "torch")
    ),
    Contender("compiled SpikingJelly", partial(FLOAT32_STATE, compiled=True), compiled=True, **SPIKINGJELLY),
    Contender("snnTorch", snntorch, {**ABOVE, "detach_reset": True}, SNNTORCH_DIFFERS, needs="snntorch"),
    Contender("Norse LIFBoxCell", norse_box, NORSE, NORSE_DIFFERS, needs="norse.torch", half_state=True),
    Contender("Norse LIF", norse, NORSE, f"{NORSE_DIFFERS}, a synaptic current", needs="norse.torch"),
    Contender("sinabs", sinabs, {"detach_reset": True}, "no gradient through the reset", needs="sinabs.layers"),
    Contender(
        "EXODUS",
        partial(sinabs, "sinabs.exodus.layers"),
        None,
        "different neuron: soft reset; not checked",
        needs="sinabs.exodus.layers",
        devices=("cuda",),
    ),
]
SOME = [peer for peer in PEERS if peer.name.startswith(("plain loop", "SpikingJelly"))]
JOINED = [  # neurons with something before or behind them, and what stands in their place
    *(replace(peer, make=partial(normed, peer.make), rounded=True, groups=NORM) for peer in SOME),
    Contender("compiled loop", compiled_normed_loop, compiled=True, rounded=True, groups=NORM),
    *(replace(peer, make=partial(summed, peer.make), groups=("sums",)) for peer in SOME),
    Contender("SpikingJelly", plif, LEARNT, groups=("plif",), half_state=True, **SPIKINGJELLY),
    Contender("plain loop", lambda: Steps(PlainLeaky(), torch.zeros_like), LEARNT, groups=("plif",)),
    Contender("SpikingJelly", leaky_k_relu, LEAKY, groups=("table",), half_state=True, **SPIKINGJELLY),
    Contender("ReLU twin", nn.ReLU, None, "ReLU in place of neurons, on T x N frames", groups=("twin",)),
    *(replace(peer, groups=("feedforward",)) for peer in PEERS if peer.name in FEEDFORWARD),
]
NORSE_LONG = "input and current are scaled by 1/tau, no gradient through the reset where recurrent"
SEQUENCES = [  # for long sequences, synapses included; other neurons than ours, as far as told: not checked
    *(
        Contender(name, make, None, differs, needs=needs, groups=(op,), dtypes=("float32",))
        for op, name, make, differs, needs in (
            *((op, "plain loop", partial(Recurrent, loop=True, **more), "", "torch") for op, more in LAYERS.items()),
            ("recurrent", "SpikingJelly", spikingjelly_recurrent, "its container mixes inputs and spikes anew", SJ),
            ("CUBA", "SpikingJelly", spikingjelly_cuba, "", SJ),
            *(
                (op, "snnTorch", partial(snntorch_long, name), SNNTORCH_DIFFERS, "snntorch")
                for op, name in (("recurrent", "RLeaky"), ("recurrent CUBA", "RSynaptic"), ("CUBA", "Synaptic"))
            ),
            *(
                (op, "Norse", partial(norse_long, name), NORSE_LONG, "norse.torch")
                for op, name in (
                    ("recurrent", "LIFRecurrentCell"),
                    ("recurrent CUBA", "LIFRecurrentCell"),
                    ("recurrent adaptive", "LSNNRecurrentCell"),
                    ("CUBA", "LIFCell"),
                )
            ),
        )
    ),
]
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
WAYS = [
    Contender(f"snnkern cpu, {way}", make, groups=("split",), backend="cpu", devices=("cpu",))
    for way, make in (
        ("split over time", Shared),
        ("one thread", partial(Shared, 1)),
        ("neurons shared", partial(Shared, None, False)),
    )
]


def ours(backend: str) -> list[Contender]:
    """The fused ones before those of separate passes: the former are what others are held to."""
    name, lif = f"snnkern {backend}", partial(snnkern.nn.LIF, **NEURON, backend=backend)

    def fused(channels):
        return snnkern.nn.BNLIF(channels, lif())

    def transformed(steps):
        return nn.Sequential(lif(), snnkern.nn.TTM(steps, backend=backend))

    def norm_transformed(channels, steps):
        return nn.Sequential(fused(channels), snnkern.nn.TTM(steps, backend=backend))

    makers = [
        Contender(name, lif),
        Contender(name, fused, groups=NORM),
        Contender(name, lambda steps: lif(steps_out=steps), groups=("sums",)),
        Contender(f"{name}, separate", partial(normed, lif), rounded=True, groups=NORM),
        Contender(f"{name}, separate", transformed, groups=("sums",)),
        Contender(name, lambda channels, n: snnkern.nn.BNLIF(channels, lif(steps_out=n)), groups=("norm-sums",)),
        Contender(f"{name}, separate", norm_transformed, groups=("norm-sums",)),
        Contender(name, partial(plif, backend), LEARNT, groups=("plif",)),
        Contender(f"{name}, leak fixed", partial(fixed, backend), groups=("plif",)),
        Contender(name, partial(lif, **LEAKY), LEAKY, groups=("table",)),
        Contender(f"{name}, ATan", lif, groups=("table",)),
        Contender(name, lif, groups=("mixed",)),
        Contender(f"{name}, sums apart", lif, groups=("mixed",), apart=("sums",)),
        Contender(f"{name}, repeats apart", lif, groups=("mixed",), apart=("repeats",)),
        Contender(f"{name}, both apart", lif, groups=("mixed",), apart=("sums", "repeats")),
        Contender(f"uniform, greatest T, {name}", lif, groups=("mixed",), passes=at_greatest),
        Contender(f"uniform, mean T, {name}", lif, groups=("mixed",), passes=at_mean),
        Contender(f"{name}, separate batch norm", lif, groups=("twin",), model={"fused": False}),
        *(
            Contender(name, partial(Recurrent, backend=backend, **more), None, groups=(op,))
            for op, more in LAYERS.items()
        ),
        Contender(name, lif, groups=("feedforward",)),
        Contender(
            f"{name}, dense products",
            partial(Alone, **NEURON, backend=backend),
            groups=("feedforward",),
            model={"dense": True},
        ),
        *(
            Contender(f"{name}, windows of 500", make, None, groups=(op,), model={"windows": 500})
            for op, make in (("recurrent", partial(Recurrent, backend=backend)), ("feedforward", lif))
        ),
    ]
    if packed := getattr(snnkern, "packed_spikes", None):
        makers += [
            Contender(f"{name}, packed spikes", fused, groups=("chain",), context=packed),
            Contender(f"{name}, packed spikes", lif, groups=("twin",), context=packed),
        ]
    return [replace(contender, backend=backend) for contender in makers]


@cache
def missing(module: str) -> str | None:
    """Why ``module`` cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"cannot be imported: {error}"
    return None


def contenders(device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run on ``device``, ours first, and the reasons of those that cannot."""
    able, unable = [], {}
    for backend in OURS[device]:
        if reason := why_not(backend, device, torch.float32):
            unable[f"snnkern {backend}"] = reason
        else:
            able += ours(backend)
    for peer in (*WAYS, *PEERS, *JOINED, *SEQUENCES):
        if device in peer.devices:
            if reason := missing(peer.needs):
                unable[peer.name] = reason
            else:
                able.append(peer)
    return able, unable
