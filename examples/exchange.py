"""A trained network as a file for others, and back: safetensors for its weights, NIR for the network itself.

``python examples/exchange.py`` trains on handwritten digits, saves, loads and compares: the same spikes, bit for bit.
NIR (``pip install 'snnkern[nir]'``) is read by other libraries and by the tools of neuromorphic chips. Batch norms
would be folded away on the way there.
"""

import tempfile
from pathlib import Path

import nir
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from snnkern.data.scikit import digits
from snnkern.nn import LIF, from_nir, to_nir

(x, y), (new, labels) = ((images.flatten(1), classes) for images, classes in digits(noise=0.0, train=1200))
shown = new.expand(8, -1, -1)  # [T, N, 64]


def build() -> nn.Sequential:
    neurons = [LIF(tau=2.0, decay_input=False) for _ in range(2)]
    return nn.Sequential(nn.Linear(64, 64), neurons[0], nn.Linear(64, 64), neurons[1], nn.Linear(64, 10))


torch.manual_seed(0)
net = build()
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(6):
    for batch in torch.randperm(len(x)).split(64):
        loss = F.cross_entropy(net(x[batch].expand(8, -1, -1)).mean(0), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
net.eval()
with torch.no_grad():
    wanted = net(shown)
print(f"trained: {(wanted.mean(0).argmax(1) == labels).float().mean():.1%} of new digits are right")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    weights = Path(folder) / "net.safetensors"
    save_file(net.state_dict(), weights)
    other = build().eval()
    other.load_state_dict(load_file(weights))
    same = "equal" if torch.equal(other(shown), wanted) else "DIFFERENT"
    print(f"{weights.name}, {weights.stat().st_size / 1e3:.0f} kB: outputs {same}")

    graph = Path(folder) / "net.nir"
    nir.write(graph, to_nir(net, shown[:2, :2]))
    other = from_nir(nir.read(graph)).eval()
    same = "equal" if torch.equal(other(shown), wanted) else "DIFFERENT"
    print(f"{graph.name}, {graph.stat().st_size / 1e3:.0f} kB: outputs {same}")
    print(f"nodes of the graph: {', '.join(f'{k} ({type(v).__name__})' for k, v in nir.read(graph).nodes.items())}")
