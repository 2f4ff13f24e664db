"""What a workload consists of: its inputs, the reference, and the calls to time for one contender.

Another op is another class here and its contenders; another model is a line in ``MODELS``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import snnkern
from snnkern.backend import load
from snnkern.models import VGGSNN, ResNet19, SpikingMLP
from snnkern.ops import lif as lif_op

from .check import Refused, compare
from .contenders import NEURON, Contender
from .measure import Call, available, buffers, kept, seconds_of
from .workloads import Workload

TIES = 1e-5  # share of a model's spikes that may differ: a potential at the threshold, and what follows from it
SLOWEST = {"cpu": 4.0, "cuda": 1.5}  # seconds of one forward + backward
INFERENCE = {"inference": (0, 1)}
TRAINING = {"forward": (0, 1), "backward": (1, 2), "both": (0, 3)}  # both: until what it needed is freed


def train(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward; returns the spikes and the gradient of x."""
    y = module(x)
    y.backward(grad.to(y.dtype))
    gradient, x.grad = x.grad, None
    return y.detach(), gradient


class Lif:
    """The layer alone."""

    # Streams of x's size that cannot be avoided: x in, spikes out; x and their gradient in, that of x out.
    streams = {"inference": 2, "forward": 2, "backward": 3, "both": 5, "kernel forward": 2, "kernel backward": 3}  # noqa: RUF012

    def __init__(self, workload: Workload, device: str):
        self.workload, self.device = workload, device
        dtype = getattr(torch, workload.dtype)
        self.bytes = workload.steps * workload.neurons * dtype.itemsize
        self.buffers = 1 if workload.hot else buffers(self.bytes, device)
        generator = torch.Generator(device).manual_seed(0)

        def random():
            shape = workload.steps, *workload.shape
            x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            if workload.layout == "channels last":
                x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
            return x

        self.xs = [random().requires_grad_() for _ in range(self.buffers)]
        self.grads = [random() for _ in range(self.buffers)]
        self.truths = {}

    def copy(self) -> Call:
        targets = [torch.empty_like(x, requires_grad=False) for x in self.xs]

        def run(i, mark):
            x = self.xs[i % self.buffers].detach()
            mark()
            targets[i % self.buffers].copy_(x)
            mark()

        return Call("Tensor.copy_", run, {"copy": (0, 1)})

    def module(self, contender: Contender) -> nn.Module:
        return contender.make().to(self.device)

    def once(self, module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
        train(module, x, grad)

    def foresee(self, module: nn.Module) -> None:
        """Raises Refused if shorter pieces say that the whole would take too long or too much memory."""
        steps, seconds = self.workload.steps, []
        if steps < 64:
            return
        for part in (16, 4):
            x = self.xs[0].detach()[: steps // part].requires_grad_(self.xs[0].requires_grad)
            grad = self.grads[0][: steps // part]
            if part == 16:
                self.once(module, x, grad)  # warm-up
            seconds.append(seconds_of(lambda x=x, grad=grad: self.once(module, x, grad), self.device))
            growth = math.log(seconds[-1] / seconds[0]) / math.log(4) if part == 4 else 1
            predicted = seconds[-1] * part ** max(1, growth)
            if predicted > SLOWEST[self.device]:
                raise Refused(f"would take {predicted:.0f} s a call, more than {SLOWEST[self.device]:g}")
        need = 1.5 * part * kept(lambda: module(x))
        if need > available(self.device):
            raise Refused(f"would take {need / 1e9:.0f} GB, {available(self.device) / 1e9:.0f} GB are free")

    def check(self, module: nn.Module, contender: Contender) -> dict[str, float]:
        return self.gate(module, contender, self.xs[0])

    def gate(self, layer: nn.Module, contender: Contender, x: torch.Tensor) -> dict[str, float]:
        """``compare`` with the reference, which runs once for all contenders of the same options."""
        got = train(layer, x, self.grads[0])
        if contender.equals is None:
            return {"spike_rate": got[0].float().mean().item()}
        key = tuple(sorted(contender.options.items()))
        if key not in self.truths:
            reference = snnkern.nn.LIF(**contender.options, backend="reference")
            self.truths[key] = train(reference, x, self.grads[0])
        return compare(got, self.truths[key], x, contender.options, self.workload.dtype, contender.half_state)

    def keeps(self, module: nn.Module) -> int:
        return kept(lambda: module(self.xs[0]))

    def calls(self, module: nn.Module, contender: Contender) -> list[Call]:
        with torch.no_grad():
            dtype = module(self.xs[0]).dtype  # some return float32 whatever they get
        grads = [grad.to(dtype) for grad in self.grads]

        def infer(i, mark):
            x = self.xs[i % self.buffers]
            with torch.no_grad():
                mark()
                y = module(x)
                mark()
            del y

        def train(i, mark):
            x, grad = self.xs[i % self.buffers], grads[i % self.buffers]
            mark()
            y = module(x)
            mark()
            y.backward(grad)
            mark()
            del y
            x.grad = None
            mark()

        return [Call(contender.name, infer, INFERENCE), Call(contender.name, train, TRAINING), *self.kernels(contender)]

    def kernels(self, contender: Contender) -> list[Call]:
        """Of ours, the launches alone, repeated into the memory that they were given once."""
        if not contender.name.startswith("snnkern"):
            return []
        real, seen = load(contender.backend), {"lif_forward": [], "lif_backward": []}

        def record(name):
            def launch(*call):
                seen[name].append(call)
                getattr(real, name)(*call)

            return launch

        recorder = SimpleNamespace(differentiable=False, **{name: record(name) for name in seen})
        with patch.object(lif_op, "choose", lambda *_: recorder):
            for x, grad in zip(self.xs, self.grads, strict=True):
                snnkern.lif(x, **NEURON)[0].backward(grad)
                x.grad = None

        def repeat(name):
            def run(i, mark):
                call = seen[name][i % self.buffers]
                mark()
                getattr(real, name)(*call)
                mark()

            return run

        return [
            Call(contender.name, repeat(f"lif_{way}"), {f"kernel {way}": (0, 1)}) for way in ("forward", "backward")
        ]


class LinearLif(Lif):
    """The open benchmark: ``Linear(n, n)``, then the layer; ``sum().backward()``; the gradient goes to the weights.

    As there: batch 16, T = 500, normal inputs. Unlike there: a time ends when the work does, a backward has a fresh
    graph, every linear layer sees all steps at once, and the neurons agree.
    """

    streams = {}  # noqa: RUF012

    def __init__(self, workload: Workload, device: str):
        super().__init__(workload, device)
        torch.manual_seed(0)
        self.linear = nn.Linear(workload.shape[-1], workload.shape[-1], device=device, dtype=self.xs[0].dtype)
        for x in self.xs:
            x.requires_grad_(False)

    def module(self, contender: Contender) -> nn.Module:
        return nn.Sequential(self.linear, super().module(contender))

    def kernels(self, contender: Contender) -> list[Call]:
        return []

    def once(self, module, x, grad):
        module(x).sum().backward()
        self.linear.zero_grad()

    def check(self, module: nn.Module, contender: Contender) -> dict[str, float]:
        linear, layer = module
        with torch.no_grad():
            current = linear(self.xs[0])
        return self.gate(layer, contender, current.requires_grad_())

    def calls(self, module: nn.Module, contender: Contender) -> list[Call]:
        infer = super().calls(module, contender)[0]

        def train(i, mark):
            x = self.xs[i % self.buffers]
            mark()
            y = module(x)
            mark()
            y.sum().backward()
            mark()
            del y
            self.linear.zero_grad()
            mark()

        return [infer, Call(contender.name, train, TRAINING)]


class Model:
    """One training step: forward, cross entropy of the mean over T, backward, SGD. The same weights for all."""

    streams = {}  # noqa: RUF012
    buffers, bytes = 1, None

    def __init__(self, workload: Workload, device: str):
        self.workload, self.device = workload, device
        generator = torch.Generator(device).manual_seed(0)
        frames = () if workload.op == "ResNet19" else (workload.steps,)  # it takes still images
        self.x = torch.randn(*frames, *workload.shape, device=device, generator=generator)
        self.target = torch.randint(10, workload.shape[:1], device=device, generator=generator)

    def copy(self) -> None:
        return None

    def module(self, contender: Contender) -> nn.Module:
        return self.with_neuron(contender.make)

    def with_neuron(self, neuron) -> nn.Module:
        made = []

        def make():
            made.append(neuron())
            return made[-1]

        torch.manual_seed(0)
        model = MODELS[self.workload.op](self.workload, make).to(self.device)
        model.neurons = made
        return model

    def forward(self, model: nn.Module) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.workload.dtype == "bfloat16"):
            return model(self.x)

    def foresee(self, model: nn.Module) -> None:
        seconds = seconds_of(lambda: self.forward(model), self.device)
        if seconds > SLOWEST[self.device]:
            raise Refused(f"took {seconds:.0f} s for the first forward alone, more than {SLOWEST[self.device]:g}")

    def check(self, model: nn.Module, contender: Contender) -> dict[str, float]:
        """Holds the spikes of all layers to those of our neuron, while training: there batch norm makes them fire."""
        if contender.equals is None:
            return {}
        spikes = self.spikes(model)
        differ = spikes != self.spikes(self.with_neuron(lambda: snnkern.nn.LIF(**contender.options)))
        share = differ.float().mean().item()
        rounded = contender.half_state and self.workload.dtype != "float32"
        if share > TIES and not rounded:
            raise Refused(f"{differ.sum()} of {differ.numel()} spikes differ from those of our neuron")
        return {"spikes_differ": share, "spike_rate": spikes.float().mean().item()}

    @torch.no_grad()
    def spikes(self, model: nn.Module) -> torch.Tensor:
        seen = []
        hooks = [neuron.register_forward_hook(lambda *call: seen.append(call[2] != 0)) for neuron in model.neurons]
        self.forward(model)
        for hook in hooks:
            hook.remove()
        return torch.cat([spikes.flatten() for spikes in seen])

    def keeps(self, model: nn.Module) -> int:
        return kept(lambda: self.forward(model))

    def calls(self, model: nn.Module, contender: Contender) -> list[Call]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step(i, mark):
            mark()
            optimizer.zero_grad()
            F.cross_entropy(self.forward(model).float().mean(0), self.target).backward()
            optimizer.step()
            mark()

        return [Call(contender.name, step, {"step": (0, 1)})]


def lively_mlp(workload: Workload, neuron) -> nn.Module:
    """With larger weights: its own are for a long time constant; with tau = 2 it would be silent from layer two on."""
    model = SpikingMLP(neuron=neuron)
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
    return model


MODELS = {
    "ResNet19": lambda workload, neuron: ResNet19(steps=workload.steps, neuron=neuron),
    "VGGSNN": lambda workload, neuron: VGGSNN(neuron=neuron),
    "SpikingMLP": lively_mlp,
}
CASES = {"lif": Lif, "linear+lif": LinearLif, **dict.fromkeys(MODELS, Model)}
