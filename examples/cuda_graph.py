"""A whole training step as one CUDA graph: forward, loss, backward and optimizer, started by one call.

``python examples/cuda_graph.py`` trains a network of two layers of LIFNodes step by step and, where there is a GPU,
from a graph; it prints whether the losses are equal, and the time of a step. What a graph asks of a step:

- It ran before the capture: kernels are compiled and loaded at their first call, and refuse to be during a capture.
- Inputs lie where they lay: ``capture`` copies new ones there.
- Neurons start inside it: the step resets them. A state that outlives the step is one more input and output, of
  ``snnkern.lif(x, v)``.
- The CPU reads nothing: no ``momentum=None`` or ``process_group`` of a norm, no ``packed_spikes(detect=True)``.
- Numbers of Python are part of it, tensors on the CPU too: tau, thresholds, parameters of surrogates, learning rates.
  They keep the values that they had: after a change it is captured again. Tensors on the GPU are read anew.
- Under autocast, ``cache_enabled=False``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from snnkern.nn import LIFNode

STEPS, BATCH, PIXELS, CLASSES, WARMUP, TRAINING = 32, 16, 64, 10, 3, 20


def capture(step: Callable, *inputs: torch.Tensor) -> Callable:
    """``step`` of tensors on a GPU as one graph, after ``WARMUP`` runs: takes other inputs of the same sizes; the next
    call overwrites its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*inputs)

    def replay(*others: torch.Tensor) -> torch.Tensor:
        for kept, other in zip(inputs, others, strict=True):
            kept.copy_(other)
        graph.replay()
        return result

    return replay


def training_step(device: str) -> Callable:
    """``step(x, target) -> loss`` of a new network, always the same one."""
    torch.manual_seed(0)
    neuron = {"tau": 4.0, "decay_input": False, "detach_reset": True, "step_mode": "m"}
    layers = nn.Linear(PIXELS, 128), LIFNode(**neuron), nn.Linear(128, CLASSES), LIFNode(**neuron)
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, capturable=device == "cuda")

    def step(x, target):
        for layer in model:
            if isinstance(layer, LIFNode):
                layer.reset()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x).mean(0), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch(seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [T, N, pixels] at a rate by class and pixel, and the classes."""
    source = torch.Generator().manual_seed(seed)
    rates = torch.rand(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0)).square()
    target = torch.randint(CLASSES, (BATCH,), generator=source)
    return (torch.rand(STEPS, BATCH, PIXELS, generator=source) < rates[target]).float().to(device), target.to(device)


def train(device: str, graph: bool) -> tuple[list[float], float]:
    """The losses of ``TRAINING`` steps, and seconds a step."""
    step, first = training_step(device), batch(0, device)
    if graph:
        step = capture(step, *first)
    else:
        for _ in range(WARMUP):
            step(*first)
    batches, losses = [batch(1 + i, device) for i in range(TRAINING)], []
    begun = time.perf_counter()
    for each in batches:
        losses.append(step(*each).clone())
    losses = torch.stack(losses).tolist()
    return losses, (time.perf_counter() - begun) / TRAINING


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stepwise, seconds = train(device, graph=False)
    print(f"step by step on {device}: loss {stepwise[0]:.4f} to {stepwise[-1]:.4f}, {seconds * 1e3:.2f} ms a step")
    if device == "cpu":
        print("a CUDA graph needs a GPU")
        return
    graphed, seconds = train(device, graph=True)
    print(f"as one graph: {seconds * 1e3:.2f} ms a step, losses {'equal' if graphed == stepwise else 'NOT equal'}")


if __name__ == "__main__":
    main()
