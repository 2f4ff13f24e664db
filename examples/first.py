"""A first spiking network from scratch: plain PyTorch, and ``LIF`` where others have a ReLU.

``python examples/first.py`` trains it for some seconds on handwritten digits, each shown for 8 time steps, and prints
its accuracy on digits that it has not seen, 96 to 97 %, and how often its neurons fire.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from snnkern.nn import LIF

STEPS = 8

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
training, test = torch.randperm(len(labels)).split([1297, 500])

net = nn.Sequential(nn.Linear(64, 128), LIF(decay=0.9), nn.Linear(128, 10))  # [T, N, 64] to [T, N, 10]
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)


def shown(chosen: torch.Tensor) -> torch.Tensor:
    """The same pixels at every step, [T, N, 64]."""
    return pixels[chosen].expand(STEPS, -1, -1)


for epoch in range(1, 11):
    for batch in training[torch.randperm(len(training))].split(64):
        loss = F.cross_entropy(net(shown(batch)).mean(0), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = net(shown(test)).mean(0).argmax(1) == labels[test]
    print(f"epoch {epoch:2}: loss {loss:.3f}, accuracy {right.float().mean():.1%}")

with torch.no_grad():
    spikes = net[:2](shown(test))
print(f"a neuron fires at {spikes.mean():.1%} of all time steps")
