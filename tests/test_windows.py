"""Training in windows: outputs, states and gradients of one piece, in the memory of one window."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from conftest import EMULATED, INTERPRETED
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

import snnkern
from examples import long_recording
from snnkern.nn import (
    BNLIF,
    IAF,
    LIF,
    TTM,
    AdaptiveLIF,
    LIFNode,
    ParametricLIFNode,
    RecurrentLIF,
    SmoothLIF,
    TdBatchNorm,
    Windows,
    carried,
)

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(INTERPRETED or EMULATED, reason="nothing here depends on the kernels"),
]

T, N = 20, 3


class Conv(nn.Module):
    """Batch norms in eval mode, one of them fused, and a layer over each step."""

    def __init__(self):
        super().__init__()
        self.conv, self.bnlif = nn.Conv2d(2, 4, 3, padding=1), BNLIF(4)
        self.next, self.norm, self.lif = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), LIF(tau=torch.tensor(2.0))
        self.head = nn.Sequential(nn.Flatten(2), nn.Linear(36, 3), nn.LayerNorm(3))

    def forward(self, x):
        steps = x.shape[:2]
        x = self.bnlif(self.conv(x.flatten(0, 1)).unflatten(0, steps))
        return self.head(self.lif(self.norm(self.next(x.flatten(0, 1))).unflatten(0, steps)))


def stack(first, second, *between):
    return nn.Sequential(nn.Linear(5, 8), first, *between, nn.Linear(8, 8), second, nn.Linear(8, 3))


networks = {
    "LIF": lambda: stack(LIF(decay=0.9), LIF(threshold=nn.Parameter(torch.tensor(0.8)))),
    "SmoothLIF, IAF": lambda: stack(SmoothLIF(), IAF()),
    "LIFNode": lambda: stack(LIFNode(step_mode="m"), ParametricLIFNode(v_reset=None, step_mode="m")),
    "more states": lambda: stack(RecurrentLIF(8, decay=0.9, synapse_decay=0.5), AdaptiveLIF(0.9, 0.2, decay=0.9)),
    "convolutions": Conv,
}


def make(name, dtype=torch.float64):
    """The network, of numbers so round that sums are exact in any order, and x."""
    torch.manual_seed(0)
    model = networks[name]().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = (6 * parameter.data).bfloat16().to(dtype)
        else:
            parameter.data = parameter.data.bfloat16().to(dtype)
    x = torch.randn(T, N, *((2, 5, 5) if name == "convolutions" else (5,))).bfloat16().to(dtype)
    return model.eval() if name == "convolutions" else model, x


def reset(model):
    for module in model.modules():
        if isinstance(module, LIFNode | ParametricLIFNode):
            module.reset()


def weights(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model, net, x, weight):
    y = net(x)
    found = torch.autograd.grad(
        (y * weight).sum(), [*model.parameters(), *([x] if getattr(x, "requires_grad", False) else [])]
    )
    reset(model)
    return y.detach(), found


def assert_equal(got, wanted, bound=1e-12):
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == w.dtype and (g - w).norm() <= bound * w.norm() and w.norm() > 0


@pytest.mark.parametrize("name", networks)
def test_gradients_are_those_of_one_piece(name):
    model, x = make(name)
    x.requires_grad_()
    weight = weights(T, N, 3)
    wanted_y, wanted = gradients(model, model, x, weight)
    assert wanted_y.std(0).max() > 0
    for steps in (1, 7, 20, 64):
        y, found = gradients(model, Windows(model, steps), x, weight)
        assert torch.equal(y, wanted_y)
        assert_equal(found, wanted)


@pytest.mark.parametrize("name", networks)
def test_float32_outputs_equal_bit_for_bit(name):
    model, x = make(name, torch.float32)
    wanted_y, wanted = gradients(model, model, x, weights(T, N, 3).float())
    y, found = gradients(model, Windows(model, 7), x, weights(T, N, 3).float())
    assert torch.equal(y, wanted_y)
    assert_equal(found, wanted, 1e-5)
    with torch.no_grad():
        assert torch.equal(Windows(model, 7)(x), wanted_y)
    assert all(module._memory is None for module in model.modules() if isinstance(module, LIF))


def loop(model, x, weight, steps, detach):
    """The same by hand, with the graph of all windows."""
    with carried(model):
        outputs = []
        for window in x.split(steps):
            outputs.append(model(window))
            for module in model.modules():
                if detach and isinstance(module, LIF):
                    module._memory.v = module._memory.v.detach()
                elif detach and isinstance(module, LIFNode | ParametricLIFNode):
                    module.detach()
        y = torch.cat(outputs)
    return y.detach(), torch.autograd.grad((y * weight).sum(), [*model.parameters()])


@pytest.mark.parametrize("name", ["LIF", "LIFNode"])
def test_truncated_is_the_loop_that_detaches(name):
    model, x = make(name)
    weight, (whole_y, whole) = weights(T, N, 3), gradients(model, model, x, weights(T, N, 3))
    wanted_y, wanted = loop(model, x, weight, 6, detach=True)
    reset(model)
    y, found = gradients(model, Windows(model, 6, truncate=True), x, weight)
    assert torch.equal(y, wanted_y) and torch.equal(y, whole_y)
    assert_equal(found, wanted)
    assert (found[0] - whole[0]).norm() > 1e-3 * whole[0].norm()


class Watched(nn.Dropout):
    """Dropout that notes the autocast in which it runs."""

    def forward(self, x):
        self.__dict__.setdefault("seen", []).append(torch.is_autocast_enabled("cpu"))
        return super().forward(x)


@pytest.mark.parametrize("mode", [torch.float32, torch.bfloat16])
def test_dropout_and_autocast_are_the_same_in_backward(mode):
    torch.manual_seed(0)
    model = stack(LIF(decay=0.9), LIF(), Watched(0.4))
    net, x, weight = Windows(model, 6), 3 * torch.randn(T, N, 5), weights(T, N, 3).float()
    found = []
    for part in (partial(loop, model, x, weight, 6, False), partial(gradients, model, net, x, weight)):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == torch.bfloat16):
            found.append((*part(), torch.rand(1)))
    (wanted_y, wanted, drawn), (y, got, drawn_too) = found
    assert y.dtype == mode and torch.equal(y, wanted_y) and torch.equal(drawn, drawn_too)
    assert_equal(got, wanted, 1e-6 if mode == torch.float32 else 1e-2)
    for inside in (True, False):  # forward; backward is not
        model[2].seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss, other = net(x).float().sum(), model[0](x[0]).float().sum()  # of a parameter cast before
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            loss.backward()
        assert model[2].seen == [inside] * 8 and other.requires_grad


def test_sixteen_bit_gradients_are_summed_in_float32():
    model, x = make("LIF", torch.bfloat16)
    x = x.repeat(50, 1, 1)
    wanted = gradients(model, model, x, torch.ones(()))[1]
    found = gradients(model, Windows(model, 4), x, torch.ones(()))[1]
    assert_equal(found, wanted, 1e-2)


class Reader:
    """A recording that is read by windows only; counts the steps of the longest."""

    def __init__(self, array, short=0):
        self.array, self.short, self.longest = array, short, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, window):
        self.longest = max(self.longest, window.stop - window.start)
        return self.array[window.start : window.stop - self.short]


def test_recordings_are_streamed(tmp_path):
    model, x = make("LIF", torch.float32)
    x = (10 * x).round().clamp(-99, 99)
    wanted_y, wanted = gradients(model, model, x, weights(T, N, 3).float())
    np.save(tmp_path / "x.npy", x.numpy().astype(np.int8))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    loader = DataLoader([(Reader(array), 1), (Reader(x.double()), 0)], batch_size=None)
    readers = [reader for reader, _ in loader]
    for given in (array, *readers, x.tolist()):
        y, found = gradients(model, Windows(model, 6), given, weights(T, N, 3).float())
        assert y.dtype == torch.float32 and torch.equal(y, wanted_y)
        assert_equal(found, wanted, 1e-5)
    assert [reader.longest for reader in readers] == [6, 6]


def test_time_in_another_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), LIF(time_dim=1), nn.Linear(8, 3)).double(), 3 * weights(N, T, 5)
    wanted_y, wanted = gradients(model, model, x, weights(N, T, 3))
    for given in (x, x.numpy()):
        y, found = gradients(model, Windows(model, 6, time_dim=1), given, weights(N, T, 3))
        assert y.shape == wanted_y.shape
        assert_equal((y, *found), (wanted_y, *wanted))


def test_state_of_nodes_goes_on_with_its_graph():
    model, x = make("LIFNode")
    net, weight = Windows(model, 6), weights(T, N, 3)
    wanted = gradients(model, model, x, weight)[1]
    model(x)
    last = model[1].v.detach()
    reset(model)
    y = torch.cat([net(x[:9]), net(x[9:])])  # two calls, one gradient
    assert torch.equal(model[1].v, last) and model[1].v.requires_grad
    assert_equal(torch.autograd.grad((y * weight).sum(), [*model.parameters()]), wanted)
    with pytest.raises(RuntimeError, match="already used and freed: call reset"):
        net(x)
    assert torch.equal(model[1].v, last)
    reset(model)
    net(x)
    model[1].v.sum().backward()  # of the state alone
    in_windows = model[0].weight.grad
    reset(model)
    model(x)
    assert_equal([in_windows], torch.autograd.grad(model[1].v.sum(), [model[0].weight]))
    reset(model)
    Windows(model, 6, truncate=True)(x)
    assert torch.equal(model[1].v, last) and not model[1].v.requires_grad
    reset(model)
    with torch.no_grad():
        net(x)
    assert torch.equal(model[1].v, last) and not model[1].v.requires_grad


def test_backward_leaves_the_state_alone():
    model, x = make("LIFNode")
    net = Windows(model, 6)
    loss = net(x).sum()
    reset(model)
    first = net(2 * x).sum()
    v = model[1].v
    loss.backward(retain_graph=True)
    assert model[1].v is v
    before = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert_equal([p.grad for p in model.parameters()], [2 * g for g in before])  # accumulated
    first.backward()


def test_hooks_and_swapped_parameters_see_whole_gradients():
    model, x = make("LIF")
    calls, net = [], Windows(model, 4)
    model[0].weight.register_hook(calls.append)
    net(x).sum().backward()
    assert len(calls) == 1
    other = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    assert next(iter(other)) == "model.0.weight"
    loss = torch.func.functional_call(net, other, (x,)).sum()
    found = torch.autograd.grad(loss, [*other.values()])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert_equal(found, gradients(model, model, x, torch.ones(()))[1])


def test_frozen_parameters_and_packed_spikes():
    model, x = make("LIF")
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    wanted = torch.autograd.grad(model(x).square().sum(), [*model[2:].parameters()])
    with snnkern.packed_spikes():
        loss = Windows(model, 6)(x).square().sum()
        loss.backward()
    assert_equal([p.grad for p in model[2:].parameters()], wanted)
    assert model[0].weight.grad is None


def peak(net, x):
    """The most bytes that autograd keeps at a time, of all but parameters, in forward and backward."""
    now, most, own = 0, 0, {p.data_ptr() for p in net.parameters()}

    class Kept:
        def __init__(self, t):
            nonlocal now, most
            self.t = t
            if t.data_ptr() not in own:
                now += t.nbytes
                most = max(most, now)
                weakref.finalize(self, free, t.nbytes)

    def free(size):
        nonlocal now
        now -= size

    with saved_tensors_hooks(Kept, lambda kept: kept.t):
        net(x).mean().backward()
    gc.collect()
    assert now == 0
    return most


def test_memory_does_not_grow_with_time():
    model, _ = make("LIF", torch.float32)
    x = np.random.default_rng(0).standard_normal((4000, N, 5), np.float32)
    short, long = (peak(Windows(model, 100), x[:steps]) for steps in (1000, 4000))
    assert long < 1.2 * short < 1.2 * peak(model, torch.from_numpy(x[:1000])) / 4
    assert peak(model, torch.from_numpy(x)) > 20 * long
    kept = [len(Windows(model, 100)(x[:steps]).grad_fn.saved_tensors) for steps in (1000, 4000)]
    assert kept[0] == kept[1]  # small tensors by the thousand would leave holes in memory


def test_spikingjelly_networks_train_in_windows():
    pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    nodes = neuron.LIFNode(), neuron.ParametricLIFNode(init_tau=3.0)
    model, x = stack(*nodes, layer.Dropout(0.3)).double(), 4 * weights(T, N, 5)  # of one mask for all steps
    functional.set_step_mode(model, "m")
    with torch.no_grad():
        model[3].weight.mul_(4)
    found = []
    for net in (model, Windows(model, 6)):
        torch.manual_seed(1)
        y = net(x)
        found.append((y, *torch.autograd.grad((y * weights(T, N, 3)).sum(), [*model.parameters()])))
        functional.reset_net(model)
    assert_equal(found[1], found[0])


class Fails(nn.Module):
    """A layer that raises when it is called once more than it may be."""

    calls = 2

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("calls", [2, 6])  # in forward, in backward
def test_an_interruption_leaves_nothing_behind(calls):
    fails = Fails()
    fails.calls = calls + 4
    model = stack(LIF(), LIFNode(step_mode="m"), fails).double()
    net, x = Windows(model, 5), 3 * weights(T, N, 5)
    net(x)
    v, drawn = model[4].v, None
    with pytest.raises(KeyboardInterrupt):
        loss = net(x)
        drawn = torch.get_rng_state()
        v = model[4].v
        loss.sum().backward()
    assert model[4].v is v and model[1]._memory is None
    assert drawn is None or torch.equal(torch.get_rng_state(), drawn)
    reset(model)
    fails.calls = 100
    y = net(x)
    reset(model)
    assert torch.equal(y, model(x))


class Half(nn.Module):
    def forward(self, x):
        return x[::2]


class Twice(nn.Sequential):
    def forward(self, x):
        return self[0](self[0](x))


class Pair(nn.Sequential):
    def forward(self, x):
        return self[0](x), None


def layers(*more):
    return nn.Sequential(nn.Linear(5, 5), *more)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (layers(), ValueError, "model must have neurons"),
        (layers(LIF(), TTM(2)), ValueError, "mix time steps .* TTM"),
        (layers(LIF(), nn.GRU(5, 5)), ValueError, "mix time steps .* GRU"),
        (layers(LIF(steps_out=2)), ValueError, "steps_out must be None .* got 2"),
        (layers(nn.BatchNorm1d(N), LIF()), ValueError, "batch norm in eval mode .* BatchNorm1d"),
        (layers(TdBatchNorm(5), LIF()), ValueError, "batch norm in eval mode .* TdBatchNorm"),
        (layers(BNLIF(5)), ValueError, "batch norm in eval mode .* BNLIF"),
        (layers(BNLIF(5, track_running_stats=False)).eval(), ValueError, "batch norm in eval mode .* BNLIF"),
        (layers(nn.InstanceNorm1d(N, track_running_stats=True), LIF()), ValueError, "batch norm in eval mode"),
        (layers(LIFNode(step_mode="m", store_v_seq=True)), ValueError, "store_v_seq must be False"),
        (layers(LIF(), Half()), ValueError, r"as many steps as it gets, 6 steps in dimension 0, got shape \(3, 3, 5\)"),
        (Twice(LIF()), RuntimeError, "calls twice"),
    ],
)
def test_models_that_have_no_windows_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        Windows(model, 6)(torch.ones(T, N, 5))
    assert all(module._memory is None for module in model.modules() if isinstance(module, LIF))


def test_frozen_norms_are_no_norms_in_training():
    model, x = make("convolutions")
    with pytest.raises(ValueError, match="batch norm in eval mode"):
        Windows(model.train(), 6)(x)
    model.bnlif.eval()
    model.norm.eval()
    loss = Windows(model, 6)(x).sum()
    model.eval()
    with pytest.raises(RuntimeError, match="same mode, training or eval"):
        loss.backward()


def test_mistakes():
    model, x = make("LIF")
    for arguments, error, message in (
        ((model, 0), ValueError, "steps must be at least 1, got 0"),
        ((model, 2.0), TypeError, "steps must be an int, got 2.0"),
        ((model, 2, 1), TypeError, "truncate must be True or False, got 1"),
        ((model, 2, False, -1), ValueError, "time_dim must be at least 0, got -1"),
        ((lambda x: x, 2), TypeError, "model must be a torch.nn.Module, got function"),
    ):
        with pytest.raises(error, match=message):
            Windows(*arguments)
    net = Windows(model, 6)
    for given, error, message in (
        (3, TypeError, "x must be a tensor, or have a length and give windows .* got int"),
        (x[:0], ValueError, "x must have one time step at least, got 0"),
        (torch.tensor(1.0), ValueError, "x must have dimension 0, time, got Tensor of shape"),
        (Reader(x, short=1), ValueError, r"x must give 6 steps for 0:6, got shape \(5, 3, 5\)"),
    ):
        with pytest.raises(error, match=message):
            net(given)
    with pytest.raises(TypeError, match="model must return a tensor, got tuple"):
        Windows(Pair(LIF()), 6)(x)
    loss = net(x).sum()
    with pytest.raises(RuntimeError, match="Windows is once differentiable"):
        torch.autograd.grad(loss, model[0].weight, create_graph=True)
    loss = net(x).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_example_learns(capsys):
    losses = long_recording.main(steps=2000, epochs=4)
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.01
    assert "windows of 250, T =   2,000:" in capsys.readouterr().out
