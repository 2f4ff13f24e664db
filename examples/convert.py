"""Networks written for SpikingJelly, snnTorch and Norse, converted: the same spikes, outputs and state_dict.

``python examples/convert.py`` builds one for each library that is installed, runs it on handwritten digits, converts it
in place with ``snnkern.convert`` and runs it again. Outputs are equal to the last bit. How much faster a training step
becomes depends on who walks through time: a network that calls its neurons step by step still does.
"""

import time
from importlib.util import find_spec

import torch
from torch import nn

import snnkern
from snnkern.data.scikit import digits

STEPS = 100


def spikingjelly() -> nn.Module:
    from spikingjelly.activation_based import neuron

    return nn.Sequential(
        nn.Linear(64, 256), neuron.LIFNode(tau=2.0, step_mode="m"),
        nn.Linear(256, 256), neuron.ParametricLIFNode(init_tau=4.0, step_mode="m"), nn.Linear(256, 10),
    )  # fmt: skip


def snntorch() -> nn.Module:
    from snntorch import Leaky

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.neurons = nn.Linear(64, 256), Leaky(beta=0.9, reset_mechanism="zero")
            self.readout = nn.Linear(256, 10)

        def forward(self, x):
            potential, outputs = self.neurons.init_leaky(), []
            for step in self.hidden(x):
                spikes, potential = self.neurons(step, potential)
                outputs.append(self.readout(spikes))
            return torch.stack(outputs)

    return Net()


def norse() -> nn.Module:
    from norse.torch import IAF, Lift, SequentialState

    return SequentialState(Lift(nn.Linear(64, 256)), IAF(), Lift(nn.Linear(256, 10)))


def run(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The outputs [T, N, 10], and the seconds of forward and backward, the least of five."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        y = net(x)
        y = y[0] if isinstance(y, tuple) else y  # with the last state
        y.square().mean().backward()
        seconds.append(time.perf_counter() - begun)
        for module in net.modules():
            if hasattr(module, "v"):  # SpikingJelly's neurons would go on where they are
                module.reset()
    return y.detach(), min(seconds)


(images, _), _ = digits(noise=0.0)
x = images[:16].flatten(1).expand(STEPS, -1, -1)
for make in (spikingjelly, snntorch, norse):
    if find_spec(make.__name__) is None:
        print(f"{make.__name__} is not installed\n")
        continue
    torch.manual_seed(0)
    net = make()
    keys = [*net.state_dict()]
    before, slow = run(net, x)
    print(snnkern.convert(net))
    after, fast = run(net, x)
    same = "equal" if torch.equal(before, after) and keys == [*net.state_dict()] else "DIFFERENT"
    print(f"outputs {same}; {1e3 * slow:.0f} ms, converted {1e3 * fast:.0f} ms\n")
