"""The same LIF layer in several hands: tau = 2, input not decayed, threshold 1 (fires at it), hard reset to 0, ATan(2).

Each contender is ``make() -> layer`` with ``layer(x [T, N]) -> spikes [T, N]``, through its public interface, from a
fresh state at every call.
"""

from __future__ import annotations

import torch

import snnkern
from snnkern.surrogate import ATan

SURROGATE = ATan(2.0)


def ours(backend=None):
    def layer(x):
        return snnkern.lif(x, tau=2.0, decay_input=False, surrogate=SURROGATE, fire_at_threshold=True, backend=backend)[
            0
        ]

    return layer


def loop():
    """What people write: about six elementwise operations a step."""

    def layer(x):
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x.unbind(0):
            h = v - v / 2.0 + x_t
            s = SURROGATE(h - 1.0, h >= 1.0)
            v = h * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)

    return layer


def compiled_loop():
    return torch.compile(loop(), dynamic=False)


def spikingjelly():
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(), step_mode="m")

    def layer(x):
        node.reset()
        return node(x)

    return layer


# Name in tables and plots -> how to make it. The compiled loop is unrolled over T: it is left out above this T.
CONTENDERS = {
    "snnkern": ours,
    "SpikingJelly 2.0.0": spikingjelly,
    "plain loop": loop,
    "torch.compile of the loop": compiled_loop,
}
LONGEST_COMPILED = 16
