"""One network for any number of time steps: temporal efficient training, mixed time steps, and early exit.

``python examples/any_time.py`` trains the same network three times with as many updates on handwritten digits whose
pixels are rates of random spikes, so that time counts: with the loss of the mean over 12 steps (SDT), with the loss of
every step (TET), and with TET and a number of steps drawn anew for each layer and batch (MTT). It prints the accuracy
over T of each: at a single step the first knows little, the last most. Then digits leave the last network at the first
step at which it is sure (SEENN).
"""

import torch

from snnkern.data.scikit import digits
from snnkern.losses import sdt, tet
from snnkern.methods.mtt import Sampler
from snnkern.methods.seenn import exit_early
from snnkern.models import SpikingMLP

STEPS = 12

(x, y), (new, labels) = digits(noise=0.0, train=1200)
low, high = x.min(), x.max()


def spikes(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[T, N, 64]: a pixel at its brightest fires at every other step."""
    rates = (images.flatten(1) - low).clamp(min=0) / (high - low) / 2
    return torch.bernoulli(rates.expand(STEPS, -1, -1), generator=generator)


def trained(loss_of, mixed: bool = False) -> SpikingMLP:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = SpikingMLP(64, hidden=(128, 128), classes=10, decay=0.9)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    sampler = Sampler(1, STEPS)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(64):
            t = sampler.draw(net.n_stages, generator) if mixed else (STEPS, STEPS)  # steps of each layer
            loss = loss_of(net(spikes(x[batch], generator), t=t), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


nets = {"SDT": trained(sdt), "TET": trained(tet), "TET, MTT": trained(tet, mixed=True)}
seen = spikes(new, torch.Generator().manual_seed(2))
print("T   " + "".join(f"{name:>10}" for name in nets))
for steps in (1, 2, 3, 4, 6, 12):
    with torch.no_grad():
        right = [(net(seen[:steps]).mean(0).argmax(1) == labels).float().mean() for net in nets.values()]
    print(f"{steps:<4}" + "".join(f"{share:10.1%}" for share in right))
for threshold in (0.9, 0.99, 0.999):
    found = exit_early(nets["TET, MTT"], seen, threshold)
    right = (found.predictions == labels).float().mean()
    print(f"left when more than {threshold:g} sure: after {found.steps.float().mean():.1f} steps, {right:.1%} right")
