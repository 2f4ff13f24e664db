"""The models: their sizes, what they take, and that each is the network it says, written out once more below."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import GRADIENT_BOUND
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import snnkern
from snnkern.models import CNN6, VGGSNN, ResNet19, SpikingMLP
from snnkern.nn import BNLIF, LIF, LIFNode, TdBatchNorm

T, N = 2, 2
MODELS = (CNN6, ResNet19, VGGSNN, SpikingMLP)


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

    def __init__(self, model):
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.training = model.training
        self.fused = any(isinstance(module, BNLIF) for module in model.modules())
        self.rates = []

    def lif(self, x, decay=0.5):
        spikes = snnkern.lif(x, decay=decay, backend="reference")[0]
        self.rates.append(spikes.mean().item())
        return spikes

    def stage(self, x, name, stride=1, shortcut=None):
        if not self.fused:
            y = self.norm(self.conv(x, name, stride), name)
            return self.lif(y if shortcut is None else y + shortcut)
        y = self.conv(x, name, stride)
        options = {"training": self.training, "momentum": 1.0, "residual": shortcut, "backend": "reference"}
        spikes = snnkern.bn_lif(y, *self.of_norm(name), **options)[0]
        self.rates.append(spikes.mean().item())
        return spikes

    def conv(self, x, name, stride=1):
        weight = self.parameters[f"{name}.conv.weight"]
        bias = self.parameters.get(f"{name}.conv.bias")
        y = F.conv2d(x.flatten(0, 1), weight, bias, stride, weight.shape[-1] // 2).unflatten(0, x.shape[:2])
        return y.expand(T, *y.shape[1:])

    def of_norm(self, name):
        parameters = (self.parameters[f"{name}.norm.{key}"] for key in ("weight", "bias"))
        return *parameters, *(self.buffers[f"{name}.norm.running_{key}"] for key in ("mean", "var"))

    def norm(self, y, name):
        weight, bias, mean, var = self.of_norm(name)
        return F.batch_norm(y.flatten(0, 1), mean, var, weight, bias, self.training, 1.0).unflatten(0, y.shape[:2])

    def linear(self, x, name):
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])


def pool(x):
    return F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])


def plain_cnn6(net, x):
    for i in range(6):
        x = net.stage(x, f"stages.{i}")
        x = pool(x) if i in (1, 3) else x
    return net.linear(x.flatten(2), "head")


def plain_vgg(net, x):
    for i in range(8):
        x = net.stage(x, f"stages.{i}")
        x = pool(x) if i % 2 else x
    return net.linear(x.flatten(2), "head")


def plain_vgg_without_pools(net, x):
    for i, stride in enumerate((1, 2) * 4):
        x = net.stage(x, f"stages.{i}", stride)
    return net.linear(x.flatten(2), "head")


def plain_resnet(net, x, projecting=(3, 6), hidden=True):
    x = net.stage(x, "stem")
    for i, stride in enumerate((1, 1, 1, 2, 1, 1, 2, 1)):
        y = net.stage(x, f"blocks.{i}.first", stride)
        if i in projecting:
            x = net.norm(net.conv(x, f"blocks.{i}.shortcut", stride), f"blocks.{i}.shortcut")
        x = net.stage(y, f"blocks.{i}.second", shortcut=x)
    x = x.mean((3, 4))
    if hidden:
        x = net.lif(net.linear(x, "hidden.0"))
    return net.linear(x, "head")


def plain_narrow_resnet(net, x):
    return plain_resnet(net, x, projecting=(0, 3, 6), hidden=False)


def plain_mlp(net, x):
    for i in (0, 2, 4):
        x = net.lif(net.linear(x, f"layers.{i}"), decay=0.9753)
    return net.linear(x, "head")


convolutional = {
    "CNN6": (CNN6, plain_cnn6, (T, N, 1, 8, 8)),
    "ResNet19": (ResNet19, plain_resnet, (T, N, 3, 8, 8)),
    "ResNet19-64": (partial(ResNet19, stem=64, hidden=None), plain_narrow_resnet, (T, N, 3, 8, 8)),
    "VGGSNN": (partial(VGGSNN, size=16), plain_vgg, (T, N, 2, 16, 16)),
    "VGGSNN-strided": (partial(VGGSNN, size=16, pooling=False), plain_vgg_without_pools, (T, N, 2, 16, 16)),
}
networks = convolutional | {"SpikingMLP": (SpikingMLP, plain_mlp, (20, N, 70))}


@pytest.mark.parametrize(
    ("name", "inputs", "norm"),
    [(name, "frames", "separate") for name in networks]
    + [(name, inputs, "fused") for name in convolutional for inputs in ("frames", "static")]
    + [("CNN6", "static", "separate")],
)
def test_is_the_network_written_out(name, inputs, norm, backend, device):
    make, plain, shape = networks[name]
    static = inputs == "static"
    if name in convolutional:
        make = partial(make, fused=norm == "fused")
    torch.manual_seed(0)
    x = data(*shape).to(device)
    model = prepare(make(backend=backend).to(device), x)
    given, seen, steps = (x[0], x[:1], {"steps": T}) if static else (x, x, {})

    outputs = model.eval()(given, **steps)
    net = Plain(model)
    assert torch.equal(outputs, plain(net, seen))
    assert net.fused == (norm == "fused")
    assert len(net.rates) == sum(isinstance(module, LIF) for module in model.modules())
    assert all(0.001 < rate < 0.999 for rate in net.rates)

    model.train()
    net = Plain(model)
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
    ("make", "count"),
    [
        (partial(ResNet19, stem=64), 12_630_858),
        (partial(ResNet19, stem=64, classes=100), 12_653_988),
        (ResNet19, 12_697_994),
        (partial(ResNet19, hidden=None), 12_569_226),
        (partial(ResNet19, hidden=None, classes=100), 12_615_396),
        (VGGSNN, 9_271_498),
        (partial(VGGSNN, pooling=False), 9_271_498),
        (SpikingMLP, 44_288 + 404),  # weights and biases
        (partial(SpikingMLP, classes=35), 46_208 + 419),
        (CNN6, 46_874),
    ],
)
def test_number_of_parameters(make, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


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
        (partial(VGGSNN, size=16, steps=3), (1, 2, 16, 16), None, (3, 1, 10)),
        (partial(VGGSNN, size=32, pooling=False, classes=3), (1, 2, 32, 32), 2, (2, 1, 3)),
    ],
)
def test_shapes(make, shape, steps, expected):
    with torch.no_grad():
        assert make().eval()(data(*shape), steps).shape == expected


def test_mlp_takes_any_sizes():
    assert SpikingMLP(hidden=[8, 3], inputs=5, classes=2)(data(7, 4, 5)).shape == (7, 4, 2)


def test_vgg_starts_from_kaimings_normal_distribution():
    for stage in VGGSNN(size=16).stages:
        wanted = (2 / (9 * stage.conv.out_channels)) ** 0.5
        assert stage.conv.weight.std().item() == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", convolutional)
def test_static_image_is_convolved_once(name):
    make, _, (_, _, *shape) = convolutional[name]
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

    make, plain, shape = networks[name]
    made, used = [], []
    model = make(neuron=neuron)
    assert not any(isinstance(module, LIF) for module in model.modules())
    net, x = Plain(model.train()), data(*shape)
    model(x)
    assert used == made
    plain(net, x)
    assert len(made) == len(net.rates)


@pytest.mark.parametrize("name", convolutional)
def test_channels_last_changes_nothing(name):
    make, _, shape = convolutional[name]
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


class Copies(TorchDispatchMode):
    """Counts the copies made of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", convolutional)
def test_layout_is_kept_and_nothing_copied(name, memory_format, backend, device):
    def is_kept(module, inputs, output):
        assert output.dim() == 3 or output.flatten(0, -4).is_contiguous(memory_format=memory_format)

    make, _, shape = convolutional[name]
    model = make(backend=backend).to(device, memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, BNLIF, TdBatchNorm)):
            module.register_forward_hook(is_kept)
    x = data(*shape).flatten(0, 1).to(device, memory_format=memory_format).unflatten(0, (T, N))
    with Copies() as frames:
        model(x)
    with Copies() as static:
        model(x[0], T)
    # The linear layer of CNN6 takes a map of 2x2, channels first.
    assert frames.count == (name == "CNN6" and memory_format == torch.channels_last)
    assert static.count == frames.count


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
        (partial(VGGSNN, size=40), ValueError, "size must be a multiple of 16, got 40"),
        (partial(VGGSNN, pooling="max"), TypeError, "pooling must be True or False, got 'max'"),
        (partial(VGGSNN, steps=1.0), TypeError, "steps must be an int, got 1.0"),
        (partial(CNN6, size=6), ValueError, "size must be a multiple of 4, got 6"),
        (partial(SpikingMLP, hidden=128), TypeError, "hidden must be a sequence .* got 128"),
        (partial(SpikingMLP, hidden=()), TypeError, r"hidden must be a sequence of one width or more, got \(\)"),
        (partial(SpikingMLP, hidden=(8, 0)), ValueError, "hidden must be at least 1"),
        (partial(SpikingMLP, inputs=0), ValueError, "inputs must be at least 1"),
        (partial(SpikingMLP, decay=1.5), ValueError, "decay must be in"),
        *((partial(model, backend="fpga"), ValueError, "backend") for model in MODELS),
        *((partial(model, neuron=LIF()), TypeError, "neuron must be a function") for model in MODELS),
        *((partial(model, neuron=lambda: 3), TypeError, "neuron must make a module, got 3") for model in MODELS),
        *((partial(model, neuron=LIF, backend="cpu"), ValueError, "backend is that of the") for model in MODELS),
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
