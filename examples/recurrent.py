"""A recurrent network of adaptive neurons learns to tell nine speakers by two vowels.

``python examples/recurrent.py`` trains on the 270 utterances of JapaneseVowels, 12 coefficients of speech over 7 to 29
steps, which come with aeon (``pip install --no-deps aeon``), and tests on 370 others: about 96 % are right after half a
minute or less. ``RecurrentLIF`` takes all steps in one call, forward and backward.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from snnkern.data.series import time_series
from snnkern.nn import RecurrentLIF

EPOCHS = 30

torch.manual_seed(0)
data = time_series("JapaneseVowels")
net = nn.Sequential(
    nn.Linear(12, 128),
    RecurrentLIF(128, decay=0.9, threshold_decay=0.95, threshold_jump=0.05),  # every spike raises the threshold
    nn.Linear(128, data.classes),
)
print(net)
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def accuracy() -> float:
    with torch.no_grad():
        right = [net(x.transpose(0, 1)).mean(0).argmax(1) == y for x, y in DataLoader(data.test, 500)]
    return torch.cat(right).float().mean().item()


for epoch in range(1, EPOCHS + 1):
    for x, y in DataLoader(data.train, batch_size=30, shuffle=True):
        loss = F.cross_entropy(net(x.transpose(0, 1)).mean(0), y)  # [N, T, 12] to [T, N, 12]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    if epoch % 5 == 0:
        print(f"epoch {epoch:2}: loss {loss:.3f}, accuracy {accuracy():.1%}")
