"""A network that is trained on whole recordings, then fed step by step as a sensor would: the same outputs, at once.

``python examples/streaming.py`` learns four activities from the accelerometer and gyroscope of a wrist (BasicMotions,
which comes with aeon: ``pip install --no-deps aeon``). Inside ``nn.carried`` neurons go on from call to call; the
network says after each of the 100 steps what it takes a new recording for.
"""

import torch
from torch import nn
from torch.nn import functional as F

from snnkern.data.series import time_series
from snnkern.nn import CubaLIF, carried

torch.manual_seed(0)
data = time_series("BasicMotions")
(x, y), (new, activities) = ((part.tensors[0].transpose(0, 1), part.tensors[1]) for part in (data.train, data.test))
neuron = {"synapse_decay": 0.8, "decay": 0.95}
net = nn.Sequential(nn.Linear(6, 64), CubaLIF(**neuron), nn.Linear(64, 64), CubaLIF(**neuron), nn.Linear(64, 4))
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(60):
    loss = F.cross_entropy(net(x).mean(0), y)  # x [T, N, 6]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    whole = net(new)
    with carried(net):
        steps = [net(step[None]) for step in new]  # [1, N, 6]: one reading of every sensor
outputs = torch.cat(steps)
guesses = outputs.cumsum(0).argmax(2)  # [T, N], of what has been seen so far
for t in (1, 5, 10, 20, 50, 100):
    print(f"after {t:3} steps {(guesses[t - 1] == activities).float().mean():.0%} are right")
print(
    f"step by step and at once: outputs of up to {whole.abs().max():.1f} differ by {(outputs - whole).abs().max():.0e}"
)
