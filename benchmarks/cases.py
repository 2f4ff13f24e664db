"""What a workload consists of: its inputs, the reference, and the calls to time for one contender.

Another op is another class here and its contenders; another model is a line in ``MODELS``.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import snnkern
from snnkern.backend import load
from snnkern.methods.mtt import Sampler
from snnkern.models import CNN6, VGGSNN, ResNet18, ResNet19, SpikingMLP
from snnkern.nn import BNLIF, Windows
from snnkern.ops import bn_lif as bn_lif_op
from snnkern.ops import lif as lif_op

from .check import EXACT, GRADIENT, HALF_STATE, ROUNDED, Refused, compare, compare_within, distance
from .contenders import LAYERS, Apart, Contender, Within
from .measure import Call, available, buffers, kept, seconds_of
from .workloads import Workload

TIES = 1e-5  # share of a model's spikes that may differ: potentials at the threshold
SLOWEST = {"cpu": 4.0, "cuda": 1.5}  # seconds of one forward + backward
INFERENCE = {"inference": (0, 1)}
TRAINING = {"forward": (0, 1), "backward": (1, 2), "both": (0, 3)}  # both: until what it needed is freed
STATIC = ("ResNet19", "ResNet18", "CNN6")  # models that take still images


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """[..., C, H, W] in a workload's layout."""
    if layout == "contiguous":
        return x
    return x.flatten(0, -4).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:-3])


def streams(forward: float, backward: float) -> dict[str, float]:
    """By mode."""
    both = {"forward": forward, "backward": backward, "both": forward + backward}
    return both | {"kernel forward": forward, "kernel backward": backward}


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
            return laid_out(torch.randn(shape, dtype=dtype, device=device, generator=generator), workload.layout)

        self.xs = [random().requires_grad_() for _ in range(self.buffers)]
        self.grads = [random()[: workload.steps_out] for _ in range(self.buffers)]
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
            self.once(module, x, grad)  # warm-up, for each T: it may be a constant of a kernel that is compiled now
            seconds.append(seconds_of(lambda x=x, grad=grad: self.once(module, x, grad), self.device))
            growth = math.log(seconds[-1] / seconds[0]) / math.log(4) if part == 4 else 1
            predicted = seconds[-1] * part ** min(2, max(1, growth))  # more than quadratic is a disturbance
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
            module.zero_grad()

        calls = [Call(contender.name, infer, INFERENCE), Call(contender.name, train, TRAINING)]
        return calls + self.kernels(module, contender)

    def kernels(self, module: nn.Module, contender: Contender) -> list[Call]:
        return self.launches(module, contender, lif_op) if contender.name.startswith("snnkern") else []

    def launches(self, module: nn.Module, contender: Contender, op) -> list[Call]:
        """The launches of ``op`` alone, repeated into the memory that they were given once."""
        real, seen = load(contender.backend), []

        class Recorder:
            differentiable = False

            def __getattr__(self, name):
                launch = getattr(real, name)

                def recorded(*call):
                    seen[-1].append((launch, call))
                    return launch(*call)

                return recorded

        with patch.object(op, "choose", lambda *_: Recorder()):
            for x, grad in zip(self.xs, self.grads, strict=True):
                seen.append([])
                y = module(x)
                seen.append([])
                y.backward(grad)
                x.grad = None
        module.zero_grad()

        def repeat(way):
            def run(i, mark):
                launches = seen[2 * (i % self.buffers) + way]
                mark()
                for launch, call in launches:
                    launch(*call)
                mark()

            return run

        ways = enumerate(("kernel forward", "kernel backward"))
        return [Call(contender.name, repeat(way), {name: (0, 1)}) for way, name in ways]


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

    def kernels(self, module: nn.Module, contender: Contender) -> list[Call]:
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


class NormLif(Lif):
    """Batch norm over time, batch and space, and the layer. Inference uses the running statistics."""

    # Streams of y's size: y for its statistics, y again, spikes out; y and the spikes' gradient for the sums over
    # channels, both again, the gradient of y out.
    streams = {  # noqa: RUF012
        "inference": 2,
        **{"forward": 3, "backward": 5, "both": 8, "kernel forward": 3, "kernel backward": 5},
    }

    def module(self, contender: Contender) -> nn.Module:
        return self.prepared(contender.make(self.workload.shape[1]))

    def prepared(self, layer: nn.Module) -> nn.Module:
        """On the device, its parameters and statistics those of all."""
        generator = torch.Generator().manual_seed(1)
        norm = next(module for module in layer.modules() if hasattr(module, "running_mean"))
        with torch.no_grad():
            for values, start in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0)):
                values.copy_(start + 0.1 * torch.randn(values.shape, generator=generator))
        return layer.to(self.device)

    def gate(self, layer: nn.Module, contender: Contender, x: torch.Tensor) -> dict[str, float]:
        """Spikes and gradients of a training pass, and the spikes of one with the running statistics that it left."""
        key = tuple(sorted(contender.options.items()))
        if key not in self.truths:
            options = {**contender.options, "steps_out": self.workload.steps_out, "backend": "reference"}
            reference = BNLIF(self.workload.shape[1], snnkern.nn.LIF(**options))
            self.truths[key] = self.observe(self.prepared(reference), x)
        (got, inferred), (true, truly_inferred) = self.observe(layer, x), self.truths[key]
        limits = (ROUNDED if contender.rounded else EXACT)[self.workload.dtype]
        if contender.half_state and self.workload.dtype != "float32":
            limits = HALF_STATE
        compare_within([inferred], [truly_inferred], limits)
        return compare_within(got, true, limits)

    def observe(self, layer: nn.Module, x: torch.Tensor):
        got = train(layer.train(), x, self.grads[0])
        affine = [p.grad for name, p in layer.named_parameters() if name.endswith(("weight", "bias"))]
        layer.zero_grad()
        with torch.no_grad():
            inferred = layer.eval()(x)
        return (*got, *affine), inferred

    def keeps(self, module: nn.Module) -> int:
        module.train()
        return super().keeps(module)

    def calls(self, module: nn.Module, contender: Contender) -> list[Call]:
        def in_mode(call, training):
            def run(i, mark):
                module.train(training)
                call.run(i, mark)

            return replace(call, run=run)

        module.train()
        infer, train, *kernels = super().calls(module, contender)
        return [in_mode(infer, False), in_mode(train, True), *kernels]

    def kernels(self, module: nn.Module, contender: Contender) -> list[Call]:
        return self.launches(module, contender, bn_lif_op) if isinstance(module, BNLIF) else []


class Chain(NormLif):
    """A convolution, batch norm, the layer and the next convolution, all of one width; x are spikes.

    What is kept for backward leaves out x and the weights: the rest is one stage's share of a network.
    """

    streams = {}  # noqa: RUF012

    def __init__(self, workload: Workload, device: str):
        super().__init__(workload, device)
        for x in self.xs:
            x.detach().copy_(x.detach() > 1)
        torch.manual_seed(0)
        width, options = workload.shape[1], {"device": device, "dtype": self.xs[0].dtype}
        self.convolutions = [Frames(width, width, 3, padding=1, bias=False, **options) for _ in range(2)]
        if workload.layout == "channels last":
            for convolution in self.convolutions:
                convolution.to(memory_format=torch.channels_last)

    def module(self, contender: Contender) -> nn.Module:
        first, second = self.convolutions
        return Within(contender.context, first, super().module(contender), second)

    def check(self, module: nn.Module, contender: Contender) -> dict[str, float]:
        first, layer, _ = module
        with torch.no_grad():
            y = first(self.xs[0])
        return self.gate(layer, contender, y.requires_grad_())

    def keeps(self, module: nn.Module) -> int:
        module.train()
        return kept(lambda: module(self.xs[0]), [self.xs[0], *module.parameters(), *module.buffers()])

    def kernels(self, module: nn.Module, contender: Contender) -> list[Call]:
        return []


class Frames(nn.Conv2d):
    """A convolution of all steps at once."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1).to(self.weight.dtype)).unflatten(0, x.shape[:2])


class Sums(Lif):
    """The layer, and its spikes summed over groups of steps: what need not be written is every spike."""

    def __init__(self, workload: Workload, device: str):
        super().__init__(workload, device)
        left = workload.steps_out / workload.steps
        self.streams = {"inference": 1 + left, **streams(1 + left, 2 + left)}

    def module(self, contender: Contender) -> nn.Module:
        return contender.make(self.workload.steps_out).to(self.device)

    def gate(self, layer: nn.Module, contender: Contender, x: torch.Tensor) -> dict[str, float]:
        if not self.truths:
            options = {**contender.options, "steps_out": self.workload.steps_out, "backend": "reference"}
            self.truths["sums"] = train(snnkern.nn.LIF(**options), x, self.grads[0])
        rounded = contender.half_state and self.workload.dtype != "float32"
        got = train(layer, x, self.grads[0])
        return compare_within(got, self.truths["sums"], HALF_STATE if rounded else EXACT[self.workload.dtype])

    def kernels(self, module: nn.Module, contender: Contender) -> list[Call]:
        return super().kernels(module, contender) if isinstance(module, snnkern.nn.LIF) else []


class NormSums(NormLif):
    """Batch norm, the layer, and its spikes summed over groups of steps."""

    def __init__(self, workload: Workload, device: str):
        super().__init__(workload, device)
        left = workload.steps_out / workload.steps
        self.streams = {"inference": 1 + left, **streams(2 + left, 3 + 2 * left)}

    def module(self, contender: Contender) -> nn.Module:
        return self.prepared(contender.make(self.workload.shape[1], self.workload.steps_out))


class Model:
    """One training step: forward, cross entropy of the mean over T, backward, SGD. The same weights for all."""

    streams = {}  # noqa: RUF012
    buffers, bytes = 1, None

    def __init__(self, workload: Workload, device: str):
        self.workload, self.device = workload, device
        generator = torch.Generator(device).manual_seed(0)
        frames = () if workload.op in STATIC else (workload.steps,)
        self.x = torch.randn(*frames, *workload.shape, device=device, generator=generator)
        self.x = laid_out(self.x, workload.layout)
        self.target = torch.randint(10, workload.shape[:1], device=device, generator=generator)

    def copy(self) -> None:
        return None

    def module(self, contender: Contender) -> nn.Module:
        made = []

        def make(*sizes):
            made.append(contender.make(*sizes))
            return made[-1]

        torch.manual_seed(0)
        model = MODELS[self.workload.op](self.workload, make, **contender.model).to(self.device)
        if self.workload.layout == "channels last":
            model.to(memory_format=torch.channels_last)
        fused = [module for module in model.modules() if isinstance(module, BNLIF)]
        inside = [module.lif for module in fused]
        model = Within(contender.context, model)
        model.passes = [{}]  # options of the calls that a step makes
        model.neurons = [*fused, *(neuron for neuron in made if not any(neuron is lif for lif in inside))]
        return model

    def forward(self, model: nn.Module, **options) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.workload.dtype == "bfloat16"):
            return model(self.x, **options)

    def backward(self, outputs: torch.Tensor) -> None:
        F.cross_entropy(outputs.float().mean(0), self.target).backward()

    def foresee(self, model: nn.Module) -> None:
        for _ in range(2):  # the first may wait for libraries to load
            seconds = seconds_of(lambda: self.forward(model), self.device)
            if seconds <= SLOWEST[self.device]:
                return
        raise Refused(f"takes {seconds:.0f} s for a forward alone, more than {SLOWEST[self.device]:g}")

    def check(self, model: nn.Module, contender: Contender) -> dict[str, float]:
        """Holds the spikes of every layer to the reference's for the same input, while training: batch norm makes them
        fire. Layer by layer, as one spike that differs changes what all layers behind it receive.
        """
        if contender.equals is None:
            return {}
        differing = fired = total = 0

        def count(layer, inputs, options, spikes):
            nonlocal differing, fired, total
            truth = reference(layer, contender.options)(*inputs, **options)
            differing += (spikes != truth).sum().item()
            fired += truth.sum().item()
            total += inputs[0].numel()

        hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in model.neurons]
        with torch.no_grad():
            for options in model.passes:
                self.forward(model, **options)
        for hook in hooks:
            hook.remove()
        rounded = contender.half_state and self.workload.dtype != "float32"
        if differing > (HALF_STATE[0] if rounded else TIES) * total:
            raise Refused(f"{differing} of {total} spikes differ from the reference")
        return {"spikes_differ": differing / total, "spike_rate": fired / total}

    def keeps(self, model: nn.Module) -> int:
        besides = [*model.parameters(), *model.buffers()]
        return max(kept(lambda options=options: self.forward(model, **options), besides) for options in model.passes)

    def calls(self, model: nn.Module, contender: Contender) -> list[Call]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step(i, mark):
            mark()
            optimizer.zero_grad()
            for options in model.passes:
                self.backward(self.forward(model, **options))
            optimizer.step()
            mark()

        return [Call(contender.name, step, {"step": (0, 1)})]


class Mixed(Model):
    """One update of mixed time-step training: forward and backward for each of three configurations, then SGD on the
    sum of the gradients; and as many passes at one T.

    A convolution behind neurons takes min(t_i, t_(i+1)) frames where it stands before the repetition, t_(i+1) behind.
    With t uniform on 1 to 6 that is 91/36 = 2.5 of 3.5 on average, for the first of a block's two.
    """

    SAMPLES = 3

    def __init__(self, workload: Workload, device: str):
        super().__init__(workload, device)
        self.truths = {}

    def module(self, contender: Contender) -> nn.Module:
        module = super().module(contender)
        (model,) = module
        generator, sampler = torch.Generator().manual_seed(0), Sampler(1, self.workload.steps)
        ts = [sampler.draw(model.n_stages, generator) for _ in range(self.SAMPLES)]
        module.passes = contender.passes(ts, self.workload.steps)
        module.t = [options.get("t") or (options["steps"],) * model.n_stages for options in module.passes]
        if contender.apart:
            stages = model.blocks if hasattr(model, "blocks") else model.stages
            for i, stage in enumerate(stages):  # a still image is convolved once by all
                stages[i] = Apart(stage, "sums" in contender.apart, "repeats" in contender.apart and i > 0)
        return module

    def check(self, model: nn.Module, contender: Contender) -> dict:
        """Holds outputs and gradients too, to those of the reference with all transformations apart."""
        facts, key = super().check(model, contender), str(model.t)
        if key not in self.truths:
            options = {**contender.options, "backend": "reference"}
            plain = replace(contender, make=lambda: snnkern.nn.LIF(**options), apart=("sums", "repeats"))
            self.truths[key] = self.observe(self.module(plain))[:2]
        *got, macs = self.observe(model)
        for name, ours, true in zip(("outputs", "gradient"), got, self.truths[key], strict=True):
            if not (differs := distance(ours, true)) <= GRADIENT[self.workload.dtype]:
                raise Refused(f"{name} differ from the reference's by {differs:.1e} of their norm")
        return facts | {"gradient_error": differs, "t": [list(t) for t in model.t], "macs": macs}

    def observe(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Outputs and the gradient of an update, and the multiplications of its convolutions, forward."""
        macs = 0

        def count(convolution, inputs, output):
            nonlocal macs
            macs += output.numel() * convolution.weight[0].numel()

        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        hooks, outputs = [module.register_forward_hook(count) for module in convolutions], []
        for options in model.passes:
            outputs.append(self.forward(model, **options))
            self.backward(outputs[-1])
        for hook in hooks:
            hook.remove()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return torch.cat(outputs).detach(), gradient, macs


def reference(layer: nn.Module, options: dict) -> nn.Module:
    """What a layer of neurons, or of batch norm and neurons, must equal."""
    neuron = snnkern.nn.LIF(**options, backend="reference")
    if not isinstance(layer, BNLIF):
        return neuron
    norm, _ = layer.to_modules()  # without the hooks, which a copy of the layer would have
    return BNLIF.from_modules(copy.deepcopy(norm), neuron)


class Sequence(Model):
    """A training step of a network with one layer that a contender makes, synapses included. Its own neurons are not
    those of the others, but for ours, which are held to the reference."""

    def check(self, model: nn.Module, contender: Contender) -> dict[str, float]:
        (layer,) = model.neurons
        with torch.no_grad():
            facts = {"spike_rate": layer(self.x[:1000]).mean().item()}
            if contender.name.startswith("snnkern"):
                part, settings = self.x[:100], layer.neurons.settings
                got, settings["backend"] = layer(part), "reference"
                differing = (got != layer(part)).sum().item()
                settings["backend"] = contender.backend
                if differing:
                    raise Refused(f"{differing} of {got.numel()} spikes differ from the reference")
        return facts


def sequence(workload: Workload, make, windows: int | None = None) -> nn.Module:
    inputs, neurons = workload.shape[1], 128
    torch.manual_seed(0)
    return windowed(nn.Sequential(make(inputs, neurons), nn.Linear(neurons, 20)), windows)


def windowed(model: nn.Module, windows: int | None) -> nn.Module:
    return model if windows is None else Windows(model, steps=windows)


def lively_mlp(workload: Workload, neuron, windows: int | None = None, dense: bool = False) -> nn.Module:
    """With larger weights: its own are for a long time constant; with tau = 2 it would be silent from layer two on.
    ``dense``: with PyTorch's linear layers."""
    model = SpikingMLP(neuron=neuron)
    if dense:
        for i, layer in enumerate(model.layers):
            if isinstance(layer, nn.Linear):
                model.layers[i] = nn.Linear(layer.in_features, layer.out_features)
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
    return windowed(model, windows)


MODELS = {
    "ResNet19": lambda workload, neuron, **keywords: ResNet19(steps=workload.steps, neuron=neuron, **keywords),
    "VGGSNN": lambda workload, neuron, **keywords: VGGSNN(neuron=neuron, **keywords),
    **dict.fromkeys(("SpikingMLP", "feedforward"), lively_mlp),
    **dict.fromkeys(LAYERS, sequence),
    "ResNet18": lambda workload, neuron, **keywords: ResNet18(steps=workload.steps, neuron=neuron, **keywords),
    "CNN6": lambda workload, neuron, **keywords: CNN6(steps=workload.steps, neuron=neuron, **keywords),
}
CASES = {
    "lif": Lif,
    "linear+lif": LinearLif,
    "bn+lif": NormLif,
    "conv+bn+lif+conv": Chain,
    "lif+ttm": Sums,
    "bn+lif+ttm": NormSums,
    **dict.fromkeys(MODELS, Model),
    **dict.fromkeys(("ResNet18", "CNN6"), Mixed),
    **dict.fromkeys(LAYERS, Sequence),
}
