"""Two processes with gloo on the CPU, as torchrun starts them, beside one with the whole batch."""

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
    leave()


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


if __name__ == "__main__":
    work(sys.argv[1])
