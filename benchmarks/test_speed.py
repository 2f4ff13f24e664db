"""The few calls whose regressions are to be caught.

``python -m pytest benchmarks/test_speed.py --benchmark-autosave``, and after a change ``--benchmark-compare``.
"""

import pytest
import torch

import snnkern
from snnkern.nn import LIFNode


def training(layer, x):
    grad = torch.randn_like(x)

    def step():
        x.grad = None
        layer(x).backward(grad)

    return step


def test_lif_inference_overhead(benchmark):
    x = torch.randn(4, 16)
    benchmark(lambda: snnkern.lif(x))


@pytest.mark.parametrize(("steps", "neurons"), [(4, 16), (16, 65_536), (1000, 256)])
def test_lif_forward_and_backward(benchmark, steps, neurons):
    x = torch.randn(steps, neurons, requires_grad=True)
    benchmark(training(lambda x: snnkern.lif(x)[0], x))


def test_lifnode_step(benchmark):
    node = LIFNode(step_mode="m")

    def layer(x):
        node.reset()
        return node(x)

    benchmark(training(layer, torch.randn(16, 4096, requires_grad=True)))
