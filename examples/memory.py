"""What a training step keeps in memory over 2,000 time steps, and three ways to keep less.

``python examples/memory.py`` shows pixels of handwritten digits as rates of spikes to two layers of neurons. The plain
loop keeps several tensors per step and neuron for backward; the fused kernels keep their input; ``packed_spikes`` a
bit per spike for the layers behind them; ``Windows`` the activations of 100 steps, whatever T is. The gradients are the
same, but for the order of sums. Memory is the peak of the process above what it had before, as Linux tells it.
"""

import ctypes
import gc
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from snnkern import packed_spikes
from snnkern.data.scikit import digits
from snnkern.nn import LIF, Windows

STEPS, BATCH, HIDDEN = 2000, 16, 256
C, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3
C.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # large tensors get pages of their own, which go when they go

(images, labels), _ = digits(noise=0.0)
rates = (images[:BATCH].flatten(1) - images.min()) / (images.max() - images.min())
x = torch.bernoulli((0.2 * rates).expand(STEPS, -1, -1), generator=torch.Generator().manual_seed(0))  # [T, N, 64]


def build(backend: str | None) -> nn.Sequential:
    torch.manual_seed(0)
    neurons = [LIF(decay=0.95, backend=backend) for _ in range(2)]
    layers = nn.Linear(64, HIDDEN), neurons[0], nn.Linear(HIDDEN, HIDDEN), neurons[1], nn.Linear(HIDDEN, 10)
    return nn.Sequential(*layers)


def step(net: nn.Module, saving) -> torch.Tensor:
    """Forward and backward; returns the gradients, one after the other."""
    with saving:
        loss = F.cross_entropy(net(x).mean(0), labels[:BATCH])
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def status(field: str) -> float:
    """Of this process, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def peak(run) -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


wanted = step(build(None), nullcontext())
for name, net, saving in (  # from little to much, so that what one leaves behind is not taken for another's
    ("fused, in windows of 100", Windows(build(None), steps=100), nullcontext()),
    ("fused, packed_spikes", build(None), packed_spikes()),
    ("fused", build(None), nullcontext()),
    ("plain loop", build("reference"), nullcontext()),
):
    found = []
    memory = peak(lambda net=net, saving=saving, found=found: found.append(step(net, saving)))
    error = (found[0] - wanted).norm() / wanted.norm()
    print(f"{name:25} {memory:6.0f} MB   gradient {'equal' if error == 0 else f'differs by {error:.0e} of its norm'}")
