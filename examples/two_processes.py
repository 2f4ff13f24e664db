"""Data parallel training: DistributedDataParallel, and statistics of batch norm that go over all processes.

``torchrun --nproc-per-node 2 examples/two_processes.py`` trains on handwritten digits with half of every batch in each
of two processes on the CPU (on GPUs: "nccl", and tensors on the process's GPU). Started by ``python`` alone it is one
process with the whole batch: the same losses but for rounding. Neurons need nothing for it; their state belongs to the
samples.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from snnkern.data.scikit import digits
from snnkern.nn import BNLIF, LIF

STEPS, BATCH, EPOCHS = 6, 60, 5

several = "RANK" in os.environ  # torchrun sets it
if several:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

torch.manual_seed(0)  # the same weights, and the same order of samples, everywhere
(x, y), (new, labels) = ((images.flatten(1), classes) for images, classes in digits(noise=0.0, train=1200))
norm = BNLIF(128, LIF(decay=0.5), process_group=dist.group.WORLD if several else None)
net = nn.Sequential(nn.Linear(64, 128, bias=False), norm, nn.Linear(128, 10))
model = DistributedDataParallel(net) if several else net
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for epoch in range(1, EPOCHS + 1):
    for batch in torch.randperm(len(x)).split(BATCH):
        mine = batch[rank::world]
        loss = F.cross_entropy(model(x[mine].expand(STEPS, -1, -1)).mean(0), y[mine])
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged over the processes
        optimizer.step()
    if several:
        dist.all_reduce(loss.detach_())
    if rank == 0:
        print(f"epoch {epoch}: loss of the last batch {loss.item() / world:.4f}")

net.eval()
with torch.no_grad():
    right = (net(new.expand(STEPS, -1, -1)).mean(0).argmax(1) == labels).float().mean()
if several:
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    everywhere = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everywhere, weights)
    if rank == 0:
        same = "equal" if all(torch.equal(weights, other) for other in everywhere) else "DIFFERENT"
        print(f"weights of {world} processes: {same}")
    dist.destroy_process_group()
if rank == 0:
    print(f"accuracy {right:.1%}")
