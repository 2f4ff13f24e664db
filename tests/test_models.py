"""The models: their sizes, what they take, and that each is the network it says, written out once more below."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import GRADIENT_BOUND, brief
from torch import nn

import snnkern
from snnkern.models import (
    CNN6,
    MODELS,
    SNN5,
    VGG14,
    VGGSNN,
    BResNet50,
    BResNet72,
    DspikeResNet18,
    DspikeVGG16,
    ResNet18,
    ResNet19,
    ResNet34,
    SEWResNet34,
    SpikingMLP,
    SpikingResNet34,
    SpikingRNN,
    ToyCNN,
    VanillaRNN,
)
from snnkern.models.chain import parse
from snnkern.nn import BNLIF, LIF, AdaptiveLIF, LIFNode, RecurrentLIF, TdBatchNorm, fold
from snnkern.surrogate import Dspike, Rectangle, Sigmoid, Triangle

T, N = 2, 2


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepare(model, x):
    """Gives batch norm something to do, and statistics of x from which neurons fire in eval mode too."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (BNLIF, TdBatchNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.6)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model


class Plain:
    """The parameters and buffers of a model, and the operations its network needs, time-folded."""

    def __init__(self, model, neuron, steps=T):
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.training = model.training
        self.fused = any(isinstance(module, BNLIF) for module in model.modules())
        self.neuron, self.steps = neuron, steps
        self.rates = []

    def lif(self, x):
        spikes = snnkern.lif(x, **self.neuron, backend="reference")[0]
        self.rates.append(spikes.mean().item())
        return spikes

    def stage(self, x, name, stride=1, shortcut=None, alpha=1.0):
        if not self.fused:
            y = self.norm(self.conv(x, name, stride), name, alpha)
            return self.lif(y if shortcut is None else y + shortcut)
        y = self.conv(x, name, stride)
        options = {"training": self.training, "momentum": 1.0, "residual": shortcut, "scale": self.scale(alpha)}
        spikes = snnkern.bn_lif(y, *self.of_norm(name), **options, **self.neuron, backend="reference")[0]
        self.rates.append(spikes.mean().item())
        return spikes

    def conv(self, x, name, stride=1):
        weight = self.parameters[f"{name}.conv.weight"]
        bias = self.parameters.get(f"{name}.conv.bias")
        y = F.conv2d(x.flatten(0, 1), weight, bias, stride, weight.shape[-1] // 2).unflatten(0, x.shape[:2])
        return y.expand(self.steps, *y.shape[1:])

    def of_norm(self, name):
        parameters = (self.parameters[f"{name}.norm.{key}"] for key in ("weight", "bias"))
        return *parameters, *(self.buffers[f"{name}.norm.running_{key}"] for key in ("mean", "var"))

    def scale(self, alpha):
        return alpha * self.neuron.get("threshold", 1.0)

    def norm(self, y, name, alpha=1.0):
        weight, bias, mean, var = self.of_norm(name)
        weight = self.scale(alpha) * weight
        return F.batch_norm(y.flatten(0, 1), mean, var, weight, bias, self.training, 1.0).unflatten(0, y.shape[:2])

    def linear(self, x, name):
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))


class PlainANN(Plain):
    def lif(self, x):
        return x.relu()


def pool(x, function=F.avg_pool2d, size=2, **options):
    return function(x.flatten(0, 1), size, **options).unflatten(0, x.shape[:2])


def plain_chain(net, x, pooled, strides=None, hidden=0):
    for i, stride in enumerate(strides or [1] * (pooled[-1] + 1)):
        x = net.stage(x, f"stages.{i}", stride)
        x = pool(x) if i in pooled else x
    x = x.flatten(2)
    for i in range(hidden):
        x = net.lif(net.linear(x, f"hidden.{2 * i}"))
    return net.linear(x, "head")


def plain_resnet(net, x, strides, projecting, stem=(1,), hidden=False, alpha=1.0, pooled=False):
    for i, stride in enumerate(stem):
        x = net.stage(x, f"stem.{i}", stride)
    for i, stride in enumerate(strides):
        name = f"blocks.{i}"
        y = net.stage(x, f"{name}.first", stride)
        if i in projecting and pooled and stride > 1:
            x = net.norm(net.conv(pool(x), f"{name}.shortcut"), f"{name}.shortcut", alpha)
        elif i in projecting:
            x = net.norm(net.conv(x, f"{name}.shortcut", stride), f"{name}.shortcut", alpha)
        x = net.stage(y, f"{name}.second", shortcut=x, alpha=alpha)
    x = x.mean((3, 4))
    if hidden:
        x = net.lif(net.linear(x, "hidden.0"))
    return net.linear(x, "head")


def plain_sew(net, x, connect):
    x = net.stage(x, "stem.0", 2)
    x = pool(x, F.max_pool2d, 3, stride=2, padding=1)
    for i in range(16):
        stride = 2 if i in (3, 7, 13) else 1
        y = net.stage(net.stage(x, f"blocks.{i}.first", stride), f"blocks.{i}.second")
        x = net.stage(x, f"blocks.{i}.shortcut", 2) if stride == 2 else x
        x = {"ADD": x + y, "AND": x * y, "IAND": x * (1 - y)}[connect]
    return net.linear(x.mean((3, 4)), "head")


def plain_toy(net, x):
    y = F.conv2d(x.flatten(0, 1), net.parameters["conv.weight"], padding=1).unflatten(0, x.shape[:2])
    return net.linear(pool(net.lif(y.expand(net.steps, *y.shape[1:]))).flatten(2), "head")


def plain_mlp(net, x):
    for i in (0, 2, 4):
        x = net.lif(net.linear(x, f"layers.{i}"))
    return net.linear(x, "head")


TET = {}  # decay 0.5, threshold 1, triangle: the defaults of lif
DSPIKE = {"decay": 0.25, "threshold": 0.5, "surrogate": Dspike(1.0)}
IF = {"decay": 1.0, "surrogate": Sigmoid(4.0), "detach_reset": True, "fire_at_threshold": True}
RES18 = (1, 1, 2, 1, 2, 1, 2, 1)  # strides of the blocks
RES19 = (1, 1, 1, 2, 1, 1, 2, 1)
RES34 = (2, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1)
ROOT = 0.5**0.5

# A model, the same network written out, its input, its neurons
convolutional = {
    "CNN6": (CNN6, partial(plain_chain, pooled=(1, 3), strides=(1,) * 6), (T, N, 1, 8, 8), TET),
    "SNN5": (partial(SNN5, size=16), partial(plain_chain, pooled=(1, 2, 3, 4)), (T, N, 3, 16, 16), TET),
    "VGGSNN": (partial(VGGSNN, size=16), partial(plain_chain, pooled=(1, 3, 5, 7)), (T, N, 2, 16, 16), TET),
    "VGGSNN-strided": (
        partial(VGGSNN, size=16, pooling=False),
        partial(plain_chain, pooled=(), strides=(1, 2) * 4),
        (T, N, 2, 16, 16),
        TET,
    ),
    "DspikeVGG16": (
        partial(DspikeVGG16, size=32, hidden=(96, 64), classes=10),
        partial(plain_chain, pooled=(1, 3, 6, 9, 12), hidden=2),
        (T, N, 3, 32, 32),
        DSPIKE,
    ),
    "ResNet18": (ResNet18, partial(plain_resnet, strides=RES18, projecting=(2, 4, 6)), (T, N, 3, 8, 8), TET),
    "ResNet19": (ResNet19, partial(plain_resnet, strides=RES19, projecting=(3, 6), hidden=True), (T, N, 3, 8, 8), TET),
    "ResNet19-64": (
        partial(ResNet19, stem=64, hidden=None, alpha=ROOT, pooled_shortcuts=True),
        partial(plain_resnet, strides=RES19, projecting=(0, 3, 6), alpha=ROOT, pooled=True),
        (T, N, 3, 8, 8),
        TET,
    ),
    "DspikeResNet18": (
        DspikeResNet18,
        partial(plain_resnet, strides=RES18, projecting=(2, 4, 6), stem=(1, 1, 2), alpha=ROOT, pooled=True),
        (T, N, 3, 16, 16),
        DSPIKE,
    ),
    "SpikingResNet34": (
        partial(SpikingResNet34, classes=10),
        partial(plain_resnet, strides=RES34, projecting=(0, 3, 7, 13), stem=(2,), alpha=ROOT),
        (T, N, 3, 32, 32),
        TET,
    ),
    "SEWResNet34": (partial(SEWResNet34, classes=10), partial(plain_sew, connect="ADD"), (T, N, 3, 32, 32), IF),
}
networks = convolutional | {
    "ToyCNN": (ToyCNN, plain_toy, (T, N, 1, 28, 28), {"decay": 0.25, "threshold": 0.5, "surrogate": Rectangle(1.0)}),
    "SpikingMLP": (SpikingMLP, plain_mlp, (20, N, 70), {"decay": 0.9753}),
}


@pytest.mark.parametrize(
    ("name", "inputs", "norm"),
    [(name, "frames", "separate") for name in networks]
    + [(name, inputs, "fused") for name in convolutional for inputs in ("frames", "static")]
    + [("CNN6", "static", "separate"), ("ToyCNN", "static", "separate")],
)
def test_is_the_network_written_out(name, inputs, norm, backend, device):
    make, plain, shape, neuron = networks[name]
    static = inputs == "static"
    if name in convolutional:
        make = partial(make, fused=norm == "fused")
    torch.manual_seed(0)
    x = data(*shape).to(device)
    model = prepare(make(backend=backend).to(device), x)
    given, seen, steps = (x[0], x[:1], {"steps": T}) if static else (x, x, {})

    outputs = model.eval()(given, **steps)
    net = Plain(model, neuron)
    assert torch.equal(outputs, plain(net, seen))
    assert net.fused == (norm == "fused")
    assert len(net.rates) == sum(isinstance(module, LIF) for module in model.modules())
    assert all(0.001 < rate < 0.999 for rate in net.rates)

    model.train()
    net = Plain(model, neuron)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        outputs, expected = model(given, **steps), plain(net, seen)
        weight = data(*outputs.shape, seed=1).to(device)
        (outputs * weight).sum().backward()
        (expected * weight).sum().backward()
    assert torch.equal(outputs, expected)
    bound = GRADIENT_BOUND[torch.float32] * len(net.rates)  # that of one LIF layer, over again
    for key, parameter in model.named_parameters():
        got, wanted = parameter.grad, net.parameters[key].grad
        assert got.isfinite().all()
        if key.endswith("conv.bias"):  # batch norm takes a constant away: all that is left is rounding
            assert got.abs().max() < 1e-3 * net.parameters[key[:-4] + "weight"].grad.abs().max()
        else:
            assert got.any() and (got - wanted).norm() <= bound * wanted.norm(), key
    for key, buffer in model.named_buffers():
        assert key.endswith("num_batches_tracked") or torch.equal(buffer, net.buffers[key]), key


@pytest.mark.parametrize(
    ("make", "count", "macs", "shape"),
    [
        (partial(ResNet19, stem=64), 12_630_858, "2216.5", (3, 32, 32)),
        (partial(ResNet19, stem=64, classes=100), 12_653_988, None, None),
        (ResNet19, 12_697_994, "2285.4", (3, 32, 32)),
        (partial(ResNet19, hidden=None), 12_569_226, "2285.2", (3, 32, 32)),
        (partial(ResNet19, hidden=None, classes=100), 12_615_396, None, None),
        (partial(ResNet19, hidden=None, pooled_shortcuts=True), 12_569_226, "2285.2", (3, 32, 32)),
        (ResNet18, 11_173_962, "555.4", (3, 32, 32)),
        (partial(ResNet18, classes=100), 11_220_132, None, None),
        (partial(ResNet18, in_channels=2), 11_173_386, "1248.4", (2, 48, 48)),
        (partial(ResNet18, in_channels=2, classes=101), 11_220_069, None, None),
        (ResNet34, 21_282_122, "1159.4", (3, 32, 32)),
        (BResNet50, 39_576_906, "1763.4", (3, 32, 32)),
        (BResNet72, 57_873_738, "2593.9", (3, 32, 32)),
        (VGG14, 14_724_042, "313.2", (3, 32, 32)),
        (partial(VGG14, classes=100), 14_770_212, None, None),
        (SpikingResNet34, 21_801_896, "3676.6", (3, 224, 224)),
        (SEWResNet34, 21_797_672, "3663.8", (3, 224, 224)),
        (DspikeResNet18, 11_247_946, "187.4", (3, 32, 32)),
        (DspikeVGG16, 138_352_576, "15470.3", (3, 224, 224)),
        (SNN5, 2_253_098, "150.4", (3, 32, 32)),
        (VGGSNN, 9_271_498, "1361.7", (2, 48, 48)),
        (partial(VGGSNN, pooling=False), 9_271_498, "660.9", (2, 48, 48)),
        (ToyCNN, 11_824, "0.1", (1, 28, 28)),
        (SpikingMLP, 44_288 + 404, None, None),  # weights and biases
        (partial(SpikingMLP, classes=35), 46_208 + 419, None, None),
        (partial(SpikingMLP, inputs=1, hidden=(64, 64), classes=10), 4_938, None, None),
        (partial(SpikingMLP, inputs=1, hidden=(64, 64), classes=10, norm=True), 4_938 + 128, None, None),
        (lambda neuron: VanillaRNN(), 13_258, None, None),
        (lambda neuron: SpikingRNN(), 28_052, None, None),  # 70-128-20 with biases, and 128 x 128
        (partial(SpikingRNN, recurrent=False), 28_052 - 128 * 128, None, None),
        (CNN6, 46_874, "0.5", (1, 8, 8)),
    ],
)
def test_number_of_parameters_and_of_multiplications(make, count, macs, shape):
    """MACs, in millions, of convolutions and linear layers for one frame."""

    def add(layer, x, y):
        counted.append(y.numel() * layer.weight[0].numel())

    counted = []
    with torch.device("meta"):
        model = make(neuron=nn.ReLU).eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(add)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        if macs:
            model(torch.empty(1, *shape), steps=1)
            assert f"{sum(counted) / 1e6:.1f}" == macs


# Each at its published size; x of as many samples as batch norm needs at the least
PUBLISHED = {
    "CNN6": (4, 1, 8, 8),
    "ChipNet": (2, 2, 34, 34),
    "DspikeResNet18": (2, 3, 32, 32),
    "DspikeVGG16": (1, 3, 224, 224),
    "ResNet18": (2, 3, 32, 32),
    "ResNet19": (2, 3, 32, 32),
    "SEWResNet34": (1, 3, 224, 224),
    "SNN5": (2, 3, 32, 32),
    "SpikingMLP": (4, 70),
    "SpikingRNN": (4, 70),
    "SpikingResNet34": (1, 3, 224, 224),
    "ToyCNN": (4, 1, 28, 28),
    "VGG14": (2, 3, 32, 32),
    "VGGSNN": (2, 2, 48, 48),
    "VanillaRNN": (4, 1),
}


@pytest.mark.parametrize("name", brief(PUBLISHED, sorted(PUBLISHED.keys() - {"DspikeVGG16"})))
def test_trains_at_published_size(name):
    assert MODELS.keys() - PUBLISHED.keys() == {"ResNet34", "BResNet50", "BResNet72"}  # ResNet18, only deeper
    torch.manual_seed(0)
    model, shape = MODELS[name](), PUBLISHED[name]
    steps = 16 if name == "ChipNet" else 2 if len(shape) == 4 else 100  # T that lets spikes through
    x = data(*shape).expand(steps, *shape)
    target = torch.arange(shape[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(x)
        loss = snnkern.losses.tet(outputs, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert outputs.shape == (len(x), *target.shape, model.head.out_features)
    assert losses[2] < losses[0]
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", networks)
def test_ann_twin_starts_the_snn(name):
    make, plain, shape, neuron = networks[name]
    torch.manual_seed(0)
    ann, snn = make(neuron=nn.ReLU), make()
    x = data(*shape)
    if name in convolutional:
        prepare(ann, x)
    ann.eval()
    if name == "SpikingMLP":  # of 20 steps
        assert torch.equal(ann(x), plain(PlainANN(ann, neuron), x))
    else:
        outputs = ann(x[0], steps=1)
        assert outputs.shape == (1, N, 10)
        assert torch.equal(outputs, plain(PlainANN(ann, neuron, steps=1), x[:1]))
    snn.load_state_dict(ann.state_dict())
    assert snn.state_dict().keys() == ann.state_dict().keys()
    assert all(torch.equal(value, ann.state_dict()[key]) for key, value in snn.state_dict().items())
    if name in convolutional:
        make(fused=False).load_state_dict(snn.state_dict())
    assert {type(module) for module in snn.modules()} & {LIF, BNLIF}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", brief(convolutional, list(convolutional)[::2]))
def test_folded_model_gives_the_same_outputs(name, fused):
    make, _, shape, _ = convolutional[name]
    torch.manual_seed(0)
    # In float64: rounding hardly ever decides on a spike.
    x = data(*shape).double()
    model = prepare(make(fused=fused).double(), x).eval()
    folded = fold(model)
    assert not any(isinstance(module, (BNLIF, TdBatchNorm)) for module in folded.modules())
    with torch.no_grad():
        expected = model(x)
        assert expected.any()
        torch.testing.assert_close(folded(x), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(folded(x[0], T), model(x[0], T), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("connect", ["AND", "IAND"])
def test_sew_joins_by_and(connect):
    x = data(T, N, 3, 32, 32)
    model = prepare(SEWResNet34(classes=10, connect=connect), x).eval()
    net = Plain(model, IF)
    outputs = model(x)
    assert torch.equal(outputs, plain_sew(net, x, connect))
    assert outputs.any() and sum(net.rates) > 0


@pytest.mark.parametrize("connect", ["ADD", "AND", "IAND"])
def test_sew_blocks_start_as_the_identity(connect):
    def keep(block, inputs, y):
        seen.append((block, inputs[0], y))

    model, seen = SEWResNet34(connect=connect, zero_init=True), []
    for block in model.blocks:
        block.register_forward_hook(keep)
    with torch.no_grad():
        model(data(T, N, 3, 64, 64))
    assert len(seen) == 16 and seen[0][1].any()
    for block, x, y in seen:
        assert torch.equal(y, x if block.shortcut is None else block.shortcut(x, T))
    biases = torch.cat([block.second.norm.bias for block in model.blocks])
    assert (biases == (1 if connect == "AND" else 0)).all()


def test_zero_init_leaves_the_shortcuts():
    model = SpikingResNet34(zero_init=True)
    assert all(not block.second.norm.weight.any() and block.first.norm.weight.all() for block in model.blocks)
    assert all(block.second.norm.weight.all() for block in SpikingResNet34().blocks)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (ResNet19, {}),
        (SNN5, {}),
        (SpikingResNet34, {}),
        (DspikeResNet18, DSPIKE),
        (DspikeVGG16, DSPIKE),
        (SEWResNet34, IF),
        (ToyCNN, {"decay": 0.25, "threshold": 0.5, "surrogate": Rectangle(1.0)}),
    ],
)
def test_default_neurons_are_those_of_the_paper(make, settings):
    with torch.device("meta"):
        neurons = [module for module in make().modules() if isinstance(module, LIF)]
    wanted = LIF(**{"decay": 0.5, "threshold": 1.0, "surrogate": Triangle(1.0), **settings}).settings
    assert neurons and all(neuron.settings == wanted for neuron in neurons)


def test_threshold_and_alpha_scale_the_norms():
    model = ResNet19(threshold=0.8, alpha=0.25)
    assert model.stem[0].norm.lif.settings["threshold"] == 0.8
    scaled = {name: module.scale for name, module in model.named_modules() if hasattr(module, "scale")}
    last = [name for name in scaled if "second" in name or "shortcut" in name]
    assert len(last) == 8 + 2 and len(scaled) == 1 + 16 + 2
    assert all(scale == (0.2 if name in last else 0.8) for name, scale in scaled.items())


@pytest.mark.parametrize(
    ("make", "shape", "steps", "expected"),
    [
        (CNN6, (3, 1, 8, 8), None, (4, 3, 10)),
        (partial(CNN6, size=12, classes=3), (1, 3, 1, 12, 12), None, (1, 3, 3)),
        (ResNet19, (3, 3, 8, 8), None, (4, 3, 10)),
        (ResNet19, (3, 3, 7, 10), 1, (1, 3, 10)),
        (partial(ResNet19, in_channels=1, hidden=16), (2, 3, 1, 5, 1), 2, (2, 3, 10)),
        (ResNet19, (0, 3, 8, 8), None, (4, 0, 10)),
        (VGGSNN, (3, 1, 2, 48, 48), None, (3, 1, 10)),
        (partial(VGGSNN, size=40), (1, 1, 2, 40, 40), None, (1, 1, 10)),
        (partial(VGGSNN, size=17, pooling=False), (1, 1, 2, 17, 17), None, (1, 1, 10)),
        (partial(CNN6, size=7), (1, 1, 7, 7), None, (4, 1, 10)),
        (partial(SNN5, size=33, in_channels=1, steps=2), (2, 1, 33, 33), None, (2, 2, 10)),
        (partial(DspikeVGG16, size=33, hidden=(), classes=7), (1, 3, 33, 33), 1, (1, 1, 7)),
        (partial(ToyCNN, size=5), (2, 1, 5, 5), None, (6, 2, 10)),
        (partial(DspikeResNet18, in_channels=2), (3, 1, 2, 47, 30), None, (3, 1, 10)),
        (partial(ResNet18, pooled_shortcuts=True), (2, 3, 1, 9), 1, (1, 2, 10)),
        (SpikingResNet34, (1, 3, 33, 50), 1, (1, 1, 1000)),
        (partial(SEWResNet34, classes=5), (2, 1, 3, 33, 50), None, (2, 1, 5)),
        (partial(VGGSNN, size=16, steps=3), (1, 2, 16, 16), None, (3, 1, 10)),
        (partial(VGGSNN, size=32, pooling=False, classes=3), (1, 2, 32, 32), 2, (2, 1, 3)),
    ],
)
def test_shapes(make, shape, steps, expected):
    with torch.no_grad():
        assert make().eval()(data(*shape), steps).shape == expected


def test_mlp_takes_any_sizes():
    assert SpikingMLP(hidden=[8, 3], inputs=5, classes=2)(data(7, 4, 5)).shape == (7, 4, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_mlp_with_norm_is_written_out(fused):
    torch.manual_seed(0)
    model = SpikingMLP(5, (32, 16), 3, decay=0.9, norm=True, fused=fused)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    x = y = data(20, 4, 5)
    for i in (0, 3):
        y = F.linear(y, plain[f"layers.{i}.weight"])
        norm = [plain[f"layers.{i + 1}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]
        if fused:
            y = snnkern.bn_lif(y, *norm, training=True, decay=0.9, backend="reference")[0]
        else:
            y = F.batch_norm(y.flatten(0, 1), *norm[2:], *norm[:2], training=True).unflatten(0, (20, 4))
            y = snnkern.lif(y, decay=0.9, backend="reference")[0]
        assert 0.01 < y.mean() < 0.5
    assert torch.equal(model(x), F.linear(y, plain["head.weight"], plain["head.bias"]))
    assert torch.equal(model.layers[4].running_mean, plain["layers.4.running_mean"])
    taken = []
    model.layers[3].register_forward_hook(lambda layer, given, made: taken.append(len(given[0])))
    assert model(x, t=(12, 5)).shape == (5, 4, 3) and taken == [5]  # the neurons wrote the sums
    other = SpikingMLP(5, (32, 16), 3, decay=0.9, norm=True, fused=not fused)
    other.load_state_dict(model.state_dict())
    shut = model.eval()(x)
    assert (shut != other.eval()(x)).float().mean() < 0.1  # rounded elsewhere
    assert (shut != fold(model)(x)).float().mean() < 1
    assert (shut - fold(model)(x)).abs().mean() < 0.02


def test_rnn_is_that_of_pytorch():
    model, x = VanillaRNN(inputs=3, hidden=8, classes=4), data(6, 2, 3)
    mean = model(x, 6).cumsum(0) / torch.arange(1, 7).view(-1, 1, 1)
    torch.testing.assert_close(mean, model.head(model.rnn(x)[0]))
    with pytest.raises(ValueError, match=r"x must be \[T, N, 3\], got shape \(6, 2, 4\)"):
        model(data(6, 2, 4))
    with pytest.raises(ValueError, match="steps must be None or the number of frames, 6, got 3"):
        model(x, 3)


@pytest.mark.parametrize("recurrent", [True, False])
def test_spiking_rnn_is_written_out(recurrent):
    torch.manual_seed(0)
    model, x = SpikingRNN(5, (12, 8), 3, recurrent), data(30, 4, 5)
    plain, y = model.state_dict(), x
    neuron = {"decay": 0.9753, "synapse_decay": 0.9512, "backend": "reference"}
    for i in (0, 2):
        y, neuron["bias"] = snnkern.linear(y, plain[f"layers.{i}.weight"]), plain[f"layers.{i}.bias"]
        weight = plain.get(f"layers.{i + 1}.weight")
        y = (snnkern.recurrent_lif(y, weight, **neuron) if recurrent else snnkern.lif(y, **neuron))[0]
        assert 0.01 < y.mean() < 0.9
    potential, expected = 0, []
    for step in F.linear(y, plain["head.weight"], plain["head.bias"]):
        potential = potential + (step - potential) / (1 / (1 - 0.9753))
        expected.append(potential)
    outputs = model(x)
    assert torch.equal(outputs, torch.stack(expected))
    outputs.sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert isinstance(model.layers[1], RecurrentLIF) == recurrent
    with pytest.raises(ValueError, match=r"x must be \[T, N, 5\], got shape \(6, 2, 4\)"):
        model(data(6, 2, 4))


def test_spiking_rnn_takes_the_neurons_arguments():
    decay = nn.Parameter(torch.full((8,), 0.9))
    model = SpikingRNN(5, (8,), 3, neuron=partial(AdaptiveLIF, 0.98, 0.3, decay=decay, surrogate=Rectangle(1.0)))
    layer = model.layers[1]
    assert type(layer) is RecurrentLIF and layer.decay is decay and layer.weight.shape == (8, 8)
    assert {
        "threshold_decay": 0.98,
        "threshold_jump": 0.3,
        "surrogate": Rectangle(1.0),
    }.items() <= layer.settings.items()
    torch.testing.assert_close(SpikingRNN(5, (8,), 3, readout_decay=0.0).readout(data(4, 2, 3)), data(4, 2, 3))


def test_vgg_starts_from_kaimings_normal_distribution():
    for stage in VGGSNN(size=16).stages:
        wanted = (2 / (9 * stage.conv.out_channels)) ** 0.5
        assert stage.conv.weight.std().item() == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", [name for name in networks if name != "SpikingMLP"])
def test_static_image_is_convolved_once(name):
    make, _, (_, _, *shape), _ = networks[name]
    model, seen = make(steps=3).eval(), []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda module, x, y: seen.append(len(y)))
    with torch.no_grad():
        model(data(N, *shape))
    assert seen == [N] + [3 * N] * (len(convolutions) - 1)


@pytest.mark.parametrize("name", networks)
def test_neuron_makes_every_lif_layer(name):
    class Other(LIFNode):
        def forward(self, x):
            used.append(self)
            return super().forward(x)

    def neuron():
        made.append(Other(step_mode="m"))
        return made[-1]

    make, plain, shape, settings = networks[name]
    made, used = [], []
    model = make(neuron=neuron)
    assert not any(isinstance(module, LIF) for module in model.modules())
    net, x = Plain(model.train(), settings), data(*shape)
    model(x)
    assert used == made
    plain(net, x)
    assert len(made) == len(net.rates)


@pytest.mark.parametrize("name", networks)
def test_nodes_in_single_step_mode_are_switched(name):
    make, _, shape, _ = networks[name]
    results = []
    for neuron in (LIFNode, partial(LIFNode, step_mode="m")):
        torch.manual_seed(0)
        model = make(neuron=neuron).eval()
        assert {module.step_mode for module in model.modules() if isinstance(module, LIFNode)} == {"m"}
        results.append(model(data(*shape)))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", convolutional)
def test_channels_last_changes_nothing(name):
    make, _, shape, _ = convolutional[name]
    torch.manual_seed(0)
    # In float64, where a spike does not hang on the order of a sum.
    x = data(*shape).double()
    model = prepare(make().double(), x).eval()
    with torch.no_grad():
        frames, static = model(x), model(x[0], T)
        model.to(memory_format=torch.channels_last)
        for last in (x, x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (T, N))):
            torch.testing.assert_close(model(last), frames)
            torch.testing.assert_close(model(last[0], T), static)


def copies(call) -> int:
    """How many maps are copied. A dispatch mode would see that too, but under one calls go another way."""
    with torch.autograd.profiler.profile(record_shapes=True) as seen:
        call()
    # aten::copy_ is also how others, such as addmm, begin.
    events = [event for event in seen.function_events if event.name != "aten::copy_" or event.cpu_parent is None]
    names = ("aten::clone", "aten::_to_copy", "aten::copy_")
    return sum(event.name in names and len(event.input_shapes[0]) > 1 for event in events)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", convolutional)
def test_layout_is_kept_and_nothing_copied(name, memory_format, backend, device):
    def is_kept(module, inputs, output):
        assert output.dim() == 3 or output.flatten(0, -4).is_contiguous(memory_format=memory_format)

    make, _, shape, _ = convolutional[name]
    model = make(backend=backend).to(device, memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, BNLIF, TdBatchNorm)):
            module.register_forward_hook(is_kept)
    x = data(*shape).flatten(0, 1).to(device, memory_format=memory_format).unflatten(0, (T, N))
    # The linear layer of CNN6 takes a map of 2x2, channels first.
    wanted = int(name == "CNN6" and memory_format == torch.channels_last)
    assert copies(lambda: model(x)) == wanted and copies(lambda: model(x[0], T)) == wanted
    assert copies(lambda: x.clone()) == 1


@pytest.mark.parametrize("name", brief(networks, list(networks)[::3]))
def test_autocast_keeps_spikes_in_16_bits(name, backend, device):
    make, _, shape, _ = networks[name]
    model, x = make(backend=backend).to(device), data(*shape).to(device)
    seen = []
    for module in model.modules():
        if isinstance(module, (LIF, BNLIF)):
            module.register_forward_hook(lambda module, x, y: seen.append((x[0].dtype, y.dtype)))
    with torch.autocast(device, torch.bfloat16):
        outputs = model(x)
    outputs.float().square().mean().backward()
    assert seen and {dtype for pair in seen for dtype in pair} == {torch.bfloat16}
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key


def test_models_are_pickled_with_any_neuron():
    model = SpikingMLP(neuron=lambda: LIFNode(step_mode="m"))
    x = data(5, N, 70)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(ResNet19, classes=0), ValueError, "classes must be at least 1, got 0"),
        (partial(ResNet19, in_channels="3"), TypeError, "in_channels must be an int, got '3'"),
        (partial(ResNet19, stem=0), ValueError, "stem must be at least 1"),
        (partial(ResNet19, hidden=True), TypeError, "hidden must be an int, got True"),
        (partial(ResNet19, steps=0), ValueError, "steps must be at least 1"),
        (partial(ResNet19, alpha="1"), TypeError, "alpha must be a float, got '1'"),
        (partial(ResNet18, threshold=None), TypeError, "threshold must be a float, got None"),
        (partial(DspikeResNet18, pooled_shortcuts=2), TypeError, "pooled_shortcuts must be True or False, got 2"),
        (partial(SEWResNet34, connect="OR"), ValueError, "connect must be one of ADD, AND, IAND, got 'OR'"),
        (partial(SEWResNet34, connect=[]), ValueError, r"connect must be one of ADD, AND, IAND, got \[\]"),
        (partial(SEWResNet34, zero_init=None), TypeError, "zero_init must be True or False, got None"),
        (partial(SpikingResNet34, zero_init=1), TypeError, "zero_init must be True or False, got 1"),
        (partial(DspikeVGG16, size=31), ValueError, "size must be at least 32, got 31"),
        (partial(DspikeVGG16, hidden=4096), TypeError, "hidden must be a sequence of widths, got 4096"),
        (partial(DspikeVGG16, hidden=(0,)), ValueError, "hidden must be at least 1"),
        (partial(ToyCNN, size=1), ValueError, "size must be at least 2, got 1"),
        (partial(SNN5, size="32"), TypeError, "size must be an int, got '32'"),
        (partial(VGGSNN, size=15), ValueError, "size must be at least 16, got 15"),
        (lambda: parse("16C3-MP2"), ValueError, "plan must be of the form 16C3-64C5-AP2, got 'MP2' in '16C3-MP2'"),
        (lambda: parse("AP2-16C3"), ValueError, "plan must be .* got 'AP2'"),
        (lambda: parse("16C3-AP2-AP2"), ValueError, "plan must be .* got 'AP2'"),
        (partial(VGGSNN, pooling="max"), TypeError, "pooling must be True or False, got 'max'"),
        (partial(VGGSNN, steps=1.0), TypeError, "steps must be an int, got 1.0"),
        (partial(CNN6, size=3), ValueError, "size must be at least 4, got 3"),
        (partial(SpikingMLP, hidden=128), TypeError, "hidden must be a sequence .* got 128"),
        (partial(SpikingMLP, hidden=()), TypeError, r"hidden must be a sequence of one width or more, got \(\)"),
        (partial(SpikingMLP, hidden=(8, 0)), ValueError, "hidden must be at least 1"),
        (partial(SpikingMLP, inputs=0), ValueError, "inputs must be at least 1"),
        (partial(SpikingMLP, decay=1.5), ValueError, "decay must be in"),
        (partial(SpikingMLP, norm=1), TypeError, "norm must be True or False, got 1"),
        (partial(SpikingRNN, hidden=128), TypeError, "hidden must be a sequence .* got 128"),
        (partial(SpikingRNN, hidden=(8, 0)), ValueError, "hidden must be at least 1, got 0"),
        (partial(SpikingRNN, recurrent=1), TypeError, "recurrent must be True or False, got 1"),
        (partial(SpikingRNN, readout_decay=1.0), ValueError, r"readout_decay must be in \[0, 1\), got 1.0"),
        (partial(SpikingRNN, threshold_decay=0.9), ValueError, "threshold_jump"),
        (partial(SpikingRNN, neuron=nn.ReLU), TypeError, r"neuron must make a LIF where recurrent is True, got ReLU"),
        (partial(VanillaRNN, hidden=(64, 64)), TypeError, r"hidden must be an int, got \(64, 64\)"),
        *(
            (partial(model, **changes), error, message)
            for model in MODELS.values()
            if model is not VanillaRNN
            for changes, error, message in (
                ({"backend": "fpga"}, ValueError, "backend"),
                ({"neuron": LIF()}, TypeError, "neuron must be a function"),
                ({"neuron": lambda: 3}, TypeError, "neuron must make a module, got 3"),
                ({"neuron": LIF, "backend": "cpu"}, ValueError, "backend is that of the"),
                ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
            )
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "shape", "steps", "error", "message"),
    [
        (ResNet19, (2, 1, 8, 8), None, ValueError, r"x must be .* with C = 3, got shape \(2, 1, 8, 8\)"),
        (ResNet19, (3, 8, 8), None, ValueError, "x must be .*got shape"),
        (ResNet19, (2, 3, 8, 8), 0, ValueError, "steps must be at least 1"),
        (ResNet19, (2, 3, 8, 8), 2.0, TypeError, "steps must be an int, got 2.0"),
        (VGGSNN, (2, 2, 48, 32), None, ValueError, r"x must be .*\(C, H, W\) = \(2, 48, 48\), got shape"),
        (VGGSNN, (4, 2, 2, 48, 48), 3, ValueError, "steps must be None or the number of frames, 4, got 3"),
    ],
)
def test_wrong_inputs_are_named(make, shape, steps, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        make()(torch.zeros(shape), steps)


@pytest.mark.parametrize("shape", [(4, 70), (5, 4, 700), (5, 4, 1, 70)])
def test_mlp_names_a_wrong_input(shape):
    with pytest.raises(ValueError, match=r"x must be \[T, N, 70\], got shape"):
        SpikingMLP()(torch.zeros(shape))
