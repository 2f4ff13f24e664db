"""Two processes with gloo on the CPU, as torchrun starts them, beside one with the whole batch: trainings, and modules
in what PyTorch has for several processes."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from conftest import TORCH
from test_lif import draw
from torch import nn

import snnkern
from snnkern.nn import LIF, LIFNode, Windows
from snnkern.train import fit
from snnkern.train.folder import Interrupted, load_weights, read_metrics
from snnkern.train.processes import leave
from snnkern.train.progress import Watch
from snnkern.train.recipe import load

# 70 samples in batches of 32: the last one has 6, and with parts of a batch 3 in a process
SIZE = ["data.train=70", "batch=32", "seed=0", "stage.epochs=2", "stage.steps=2", "workers=0"]
RUNS = {
    "plain": load("digits-tet", SIZE),
    "slow": load("digits-tet", [*SIZE, "fused=false", "stage.0.loss.lamb=0.05"]),
    "toy": load("digits-tet", [*SIZE, "model.name=ToyCNN"]),
    "parts": load("digits-tet", [*SIZE, "model.name=ToyCNN", "accumulate=3"]),
    "odd": load("digits-tet", [*SIZE, "data.train=65"]),  # a last batch of one sample is left out
    "stages": load("digits-dspike-tit", [*SIZE[:3], "stage.epochs=1", "model.name=ToyCNN"]),
    "probed": load(
        "digits-tet",
        [
            *SIZE,
            "model.name=ToyCNN",
            "stage.epochs=1",
            "stage.0.probe={eps = [0.1, 0.01], iterations = 2}",
            "stage.0.differences.eps=0.2",
        ],
    ),
    "mixed": load("digits-mtt", [*SIZE, "stage.steps=3"]),
    "interrupted": load("digits-tet", SIZE),
}


class InterruptOne(Watch):
    """SIGTERM to the second process alone, after its first step."""

    interval = -1.0
    calls = 0

    def step(self, recipe, state, cost, numbers):
        self.calls += 1
        if self.calls == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def work(folder):
    """What each of the two processes does."""
    torch.distributed.init_process_group("gloo")  # once for all runs
    for name, recipe in RUNS.items():
        if name == "interrupted":
            with pytest.raises(Interrupted, match="epoch 1, after step 2 of 3"):
                fit(recipe, f"{folder}/{name}", InterruptOne())
        fit(recipe, f"{folder}/{name}")
    rank = torch.distributed.get_rank()
    torch.save({name: make(rank) for name, make in MODULES.items()}, f"{folder}/modules{rank}.pt")
    leave()


# The modules: two batches of 4 samples, the state carried from one to the next


def network():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), LIFNode(step_mode="m"), nn.Linear(8, 8), LIF(), nn.Linear(8, 3)
    with torch.no_grad():
        layers[0].weight.mul_(6)
        layers[2].weight.mul_(8)
    return nn.Sequential(*layers)


def train_on(model, node, share=slice(None)):
    losses = [model(draw((6, 4, 4), seed=seed)[:, share]).square().mean() for seed in range(2)]
    sum(losses).backward()
    return {
        "gradients": [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()],
        "v": node.v.detach(),
        "keys": [*model.state_dict()],
    }


def half(rank):
    return slice(2 * rank, 2 * rank + 2)


def of_ddp(rank):
    model = network()
    return train_on(nn.parallel.DistributedDataParallel(model), model[1], half(rank))


def of_windows_in_ddp(rank):
    model = network()
    return train_on(nn.parallel.DistributedDataParallel(Windows(model, 4)), model[1], half(rank))


def of_fsdp(rank, **options):
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, **options)
    return train_on(model, model[1], half(rank))


def of_fsdp_in_bfloat16(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return of_fsdp(rank, mp_policy=policy)


def of_fsdp_with_checkpoints(rank):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    model = network()
    node, model = model[1], nn.Sequential(model[0], checkpoint_wrapper(model[1:4]), model[4])
    return train_on(fully_shard(model), node, half(rank))


def of_tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = network()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return train_on(model, model[1])


def on_dtensor(x, threshold, distribute=lambda t, dim=None: t):
    """Everything that ``lif`` and ``ttm`` take and give, of [N, T, C] in uneven shares of N."""
    x, threshold = distribute(x, 0).requires_grad_(), distribute(threshold).requires_grad_()
    options = {"time_dim": 1, "threshold": threshold, "reset": None}
    spikes, v = snnkern.lif(x[:, :4], **options)
    more, v = snnkern.lif(x[:, 4:], v, steps_out=3, **options)
    found = spikes, more, v, snnkern.ttm(more, 5, time_dim=1)
    weights = [distribute(draw(t.shape, seed=i)) for i, t in enumerate(found)]
    sum((t * weight).sum() for t, weight in zip(found, weights, strict=True)).backward()
    found = *found, x.grad, threshold.grad
    return [t.detach() if distribute.__name__ == "<lambda>" else t.detach().full_tensor() for t in found]


def of_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def distribute(t, dim=None):
        return distribute_tensor(t, mesh, [Replicate() if dim is None else Shard(dim)])

    return on_dtensor(draw((5, 9, 4)).mul(2), torch.tensor(0.8), distribute)


MODULES = {
    "ddp": of_ddp,
    "ddp, windows": of_windows_in_ddp,
    "fsdp": of_fsdp,
    "fsdp, checkpoints": of_fsdp_with_checkpoints,
    "fsdp, bfloat16": of_fsdp_in_bfloat16,
    "tensor parallel": of_tensor_parallel,
    "dtensor": of_dtensor,
}
if TORCH == (2, 6):  # its fully_shard works on GPUs alone
    MODULES = {name: make for name, make in MODULES.items() if not name.startswith("fsdp")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder


@pytest.mark.parametrize("name", ["plain", "slow", "parts", "stages", "probed", "mixed"])
def test_two_processes_learn_what_one_learns_with_their_batches_together(two, tmp_path, name):
    fit(RUNS["toy" if name == "parts" else name], tmp_path)
    assert_equal_but_for_rounding(two / name, tmp_path)


def test_probes_of_two_processes_are_of_the_whole_batch(two, tmp_path):
    fit(RUNS["probed"], tmp_path)
    ours, theirs = (torch.tensor(read_metrics(folder)[0]["probe"]) for folder in (two / "probed", tmp_path))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert 0.1 < theirs[:, 1].min() < 0.99


def assert_equal_but_for_rounding(ours, theirs):
    curves = [
        [
            [line[key] for key in ("loss", "train_accuracy", "test_sdt", "test_accuracy")]
            for line in read_metrics(folder)
        ]
        for folder in (ours, theirs)
    ]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)
    for path in theirs.glob("*-last.safetensors"):
        for name, value in load_weights(path)[0].items():
            torch.testing.assert_close(load_weights(ours / path.name)[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_last_batch_too_small_for_all_is_left_out(two):
    assert json.loads(json.dumps(read_metrics(two / "odd")))[-1]["train_accuracy"] * 64 % 1 == 0


def test_one_interrupted_process_stops_all_at_the_same_step(two):
    plain, resumed = (load_weights(two / name / "stage0-last.safetensors")[0] for name in ("plain", "interrupted"))
    assert all(torch.equal(plain[name], value) for name, value in resumed.items())
    keys = "loss", "train_accuracy", "test_sdt"
    plain, resumed = (
        [[line[k] for k in keys] for line in read_metrics(two / name)] for name in ("plain", "interrupted")
    )
    assert plain == resumed


def test_only_the_first_process_writes(two):
    for name in RUNS:
        metrics = read_metrics(two / name)
        assert [(line["stage"], line["epoch"]) for line in metrics] == sorted(
            {(line["stage"], line["epoch"]) for line in metrics}
        )


@pytest.mark.parametrize("name", [name for name in MODULES if name != "dtensor"])
def test_potentials_stay_in_their_process_and_gradients_are_those_of_the_whole_batch(two, name):
    model = network()
    wanted = train_on(model, model[1])
    for rank in range(2):
        got = torch.load(two / f"modules{rank}.pt")[name]
        assert len(got["keys"]) == 6 and not any("v" in key.rpartition(".")[2] for key in got["keys"])
        assert got["v"].dtype == torch.float32
        rough = {"rtol": 0.1, "atol": 0.02} if name.endswith("bfloat16") else {}
        for ours, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
            assert theirs.norm() > 0 and ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, **rough)
        share = (..., slice(4 * rank, 4 * rank + 4)) if name.startswith("tensor") else half(rank)
        torch.testing.assert_close(got["v"], wanted["v"][share], **rough)


def test_shares_of_a_dtensor_are_computed_where_they_are(two):
    wanted = on_dtensor(draw((5, 9, 4)).mul(2), torch.tensor(0.8))
    for rank in range(2):
        for got, expected in zip(torch.load(two / f"modules{rank}.pt")["dtensor"], wanted, strict=True):
            assert expected.norm() > 0
            torch.testing.assert_close(got, expected)


if __name__ == "__main__":
    work(sys.argv[1])
