import json
import os
import platform
import random
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import snnkern
from snnkern import losses
from snnkern.cli import app
from snnkern.data import Data, digits
from snnkern.methods import dspike
from snnkern.models import MODELS
from snnkern.train import fit
from snnkern.train import folder as runs
from snnkern.train.batches import Epoch, to_device
from snnkern.train.compare import compare, named, table
from snnkern.train.evaluation import evaluate, restore
from snnkern.train.folder import Interrupted, RunError, load_weights, read_metrics
from snnkern.train.processes import working
from snnkern.train.progress import Watch
from snnkern.train.recipe import RecipeError, load, override

# Two stages of two epochs of four steps, with a switch of the loss, and Dspike's search in the second stage.
TINY = [
    "data.train=200",
    "batch=50",
    "model.name=ToyCNN",
    "neuron.threshold=0.5",
    'neuron.surrogate={name = "Dspike"}',
    "stage.epochs=2",
    "stage.0.steps=2",
    "stage.1.steps=3",
    'stage.0.loss=[{name = "sdt"}, {name = "tet", from_epoch = 2}]',
    "stage.1.temperature={step = 0.5, batch = 20}",
]


def tiny(*overrides, name="digits-tit"):
    return load(name, [*TINY, "seed=3", *overrides])


def one_stage(*overrides):
    return load("digits-tet", ["data.train=120", "batch=50", "stage.steps=2", "stage.epochs=2", "seed=0", *overrides])


class At(Watch):
    """``action`` at the n-th call of ``step``."""

    interval = -1.0

    def __init__(self, call, action):
        self.call, self.action = call, action

    def step(self, recipe, state, cost, numbers):
        self.call -= 1
        if self.call == 0:
            self.action()


class InterruptAt(At):
    """Ctrl-C, as the terminal sends it, at the n-th call of ``step``."""

    def __init__(self, call):
        super().__init__(call, lambda: os.kill(os.getpid(), signal.SIGINT))


def interrupt_at_call(monkeypatch, owner, name, call, action=lambda *args: None):
    """Makes ``owner.name`` raise KeyboardInterrupt at its ``call``-th call, after ``action`` on its arguments."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action(*args)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of ``tiny`` that nothing interrupted: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    fit(tiny(), folder)
    return folder


TIMES = "images_per_second", "seconds", "search_seconds", "memory"


def learnt(folder):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]


def weights(folder, stage=0, which="last"):
    return load_weights(folder / f"stage{stage}-{which}.safetensors")[0]


def assert_same_end(folder, whole):
    assert learnt(folder) == learnt(whole)
    for path in whole.glob("*.safetensors"):
        ours, theirs = load_weights(folder / path.name), load_weights(path)
        assert ours[0].keys() == theirs[0].keys() and ours[1] | {"recipe": 0} == theirs[1] | {"recipe": 0}
        assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
    ours, theirs = (torch.load(place / "checkpoint.pt")["optimiser"]["state"] for place in (folder, whole))
    for step, state in ours.items():
        assert all(torch.equal(value, theirs[step][key]) for key, value in state.items())


def test_evaluate_averages_over_time_and_judges_single_moments():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, steps):
            assert not self.training
            x = x[:, 0, 0, 0]
            return torch.stack([torch.stack([x, -2 * x], -1), torch.stack([x, 5 * x], -1)])[:steps]

    # Step 1 says class 0 where x > 0, step 2 says class 1 there; the mean over both says class 1 (1.5 x against x).
    model, x, y = Fixed(), torch.tensor([1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 1])
    tested = evaluate(model, TensorDataset(x, y), steps=2, batch=3)
    assert tested.accuracy == [0.75, 0.25]
    assert tested.moments == [0.75, 0.25]
    assert tested.samples == 4
    assert model.training
    outputs = model.eval()(x, 2).double()
    for t in (1, 2):
        assert tested.sdt[t - 1] == pytest.approx(losses.sdt(outputs[:t], y).item())
        assert tested.tet[t - 1] == pytest.approx(losses.tet(outputs[:t], y).item())


def test_evaluate_feeds_the_first_frames():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, steps=None):
            assert x.shape == (2, 3, 1, 1, 1) and steps is None
            return torch.cat([x, 1.5 - x], 2).flatten(2)

    frames = torch.arange(4.0).expand(3, 4).reshape(3, 4, 1, 1, 1)
    tested = evaluate(Sums(), TensorDataset(frames, torch.tensor([1, 1, 0])), steps=2, events=True)
    assert tested.moments == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ValueError, match="steps must be at most the number of frames, 4, got 5"):
        evaluate(Sums(), TensorDataset(frames, torch.tensor([1, 1, 0])), steps=5, events=True)


@pytest.mark.parametrize("loss", ["sdt", "tet"])
def test_training_learns(tmp_path, loss):
    fit(load(f"digits-{loss}", ["stage.epochs=8", "stage.steps=2", "seed=0"]), tmp_path)
    metrics = read_metrics(tmp_path)
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["train_accuracy"] > 0.75
    assert metrics[-1]["test_accuracy"] > 0.55
    assert all(line["images_per_second"] > 0 and line["memory"] > 0 for line in metrics)


def test_folder_of_a_run(whole):
    held = json.loads((whole / "settings.json").read_text())
    assert held["settings"] == tiny().settings() and held["versions"]["torch"] == torch.__version__
    names = [f"stage{stage}-{which}.safetensors" for stage in (0, 1) for which in ("best", "last")]
    names = ["checkpoint.pt", "lock", "metrics.jsonl", "settings.json", *names]
    assert sorted(path.name for path in whole.iterdir()) == names
    metrics = read_metrics(whole)
    assert [(line["stage"], line["epoch"], line["steps"]) for line in metrics] == [
        (0, 1, 2),
        (0, 2, 2),
        (1, 1, 3),
        (1, 2, 3),
    ]
    assert [line["criterion"] for line in metrics] == ["sdt", "tet", "tet", "tet"]
    assert [line["lr"] for line in metrics] == pytest.approx([2e-3, 1e-3, 2e-4, 1e-4])  # cosine, stepped per epoch
    best = [load_weights(whole / f"stage{stage}-best.safetensors")[1] for stage in (0, 1)]
    for stage, about in enumerate(best):
        reached = [line["test_accuracy"] for line in metrics if line["stage"] == stage]
        assert about["test_accuracy"] == max(reached) and about["epoch"] == 1 + reached.index(max(reached))


def test_restored_network_has_the_accuracy_of_its_file(whole):
    model, recipe, about = restore(whole, stage=1, best=True)
    data = recipe.load_data()
    assert evaluate(model, data.test, 3).accuracy[-1] == about["test_accuracy"]
    with pytest.raises(RunError, match="stage must be one of the run's 2, counted from 0, got 2"):
        restore(whole, stage=2)


STEPS = 16 + 4 * 3 + 2 * 54  # calls of Watch.step in a run of ``tiny``: batches, test batches, weights in the searches


@pytest.mark.parametrize("call", [2, 4, 5, 14, 70, *sorted(random.Random(0).sample(range(15, STEPS), 4))])
def test_ctrl_c_at_any_step_and_resuming_is_bit_for_bit(tmp_path, whole, call):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stage\.[01], epoch [12]"):
        fit(tiny(), tmp_path, InterruptAt(call))
    torch.manual_seed(call)  # neither the caller's generator
    torch.set_num_threads(2)  # nor the caller's threads matter
    fit(tiny(), tmp_path)
    assert torch.get_num_threads() == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(torch.optim.Adam, "step", 1), (torch.optim.Adam, "step", 11), (runs, "replacing", 4), (runs, "replacing", 9)],
)
def test_being_stopped_anywhere_and_resuming_is_bit_for_bit(tmp_path, whole, monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(), tmp_path)
    fit(tiny(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_kill_9_and_resuming_is_bit_for_bit(tmp_path, whole):
    arguments = ["train", "digits-tit", *TINY, "seed=3", "checkpoint_minutes=1e-9", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "snnkern", *arguments], stdout=subprocess.DEVNULL)
    folder = tmp_path / "seed3"
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() / 5)
    process.kill()
    process.wait()
    assert (folder / "checkpoint.pt").exists()
    fit(tiny(), folder)
    assert_same_end(folder, whole)


def test_interrupt_while_writing_a_checkpoint_keeps_the_one_before(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, torch, "save", 3, lambda state, file: file.write(b"half"))
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["state"]["epoch"] == 2
    assert len(read_metrics(tmp_path)) == 3
    fit(tiny(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_fitting_again_changes_nothing(tmp_path):
    model = fit(one_stage(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fit(one_stage(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    again = fit(one_stage("workers=1", "checkpoint_minutes=1"), tmp_path)  # settings that change no number
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_damaged_checkpoint_is_named_and_left_alone(tmp_path, keep):
    fit(one_stage("stage.epochs=1", "data.train=20"), tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged .* move it away"):
        fit(one_stage("stage.epochs=1", "data.train=20"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_with_something_else_is_refused(tmp_path, whole):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(
        RunError, match=r"other settings \(stage.1.optimiser.lr 0.0002 there, 0.1 here\); choose another"
    ):
        fit(tiny("stage.1.optimiser.lr=0.1"), whole)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match="is not empty and is not a run's folder"):
        fit(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path):
    """Another process holds it, and is then killed."""
    code = """
import sys, time
from snnkern.train import folder
with folder.holding(folder.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    fit(one_stage("stage.epochs=1"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        who = rf"is being trained by process {other.pid} on {re.escape(platform.node())} since 2\d\d\d-\d\d-\d\d "
        with pytest.raises(RunError, match=who):
            fit(one_stage("stage.epochs=1"), tmp_path)
        assert {path: path.read_bytes() for path in before} == before
    finally:
        other.kill()
        other.communicate()
    fit(one_stage("stage.epochs=1"), tmp_path)
    assert (tmp_path / "lock").read_bytes() == b""


@contextmanager
def full_disk():
    """No file grows beyond 20 kB: more than the settings need, less than a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_is_named_and_nothing_is_lost(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("all of it")
    for folder in (blocked, blocked / "inside"):
        with pytest.raises(RunError, match=rf"{blocked}.* cannot be written: (File exists|Not a directory)"):
            fit(one_stage(), folder)
    assert blocked.read_text() == "all of it"
    run = tmp_path / "run"
    with full_disk(), pytest.raises(RunError, match=r"run/stage0-best.safetensors cannot be written: File too large"):
        fit(one_stage(), run)
    assert sorted(path.name for path in run.iterdir()) == ["lock", "settings.json"]
    fit(one_stage("stage.epochs=1"), tmp_path / "short")
    with full_disk(), pytest.raises(RunError, match=r"checkpoint.pt cannot be written: File too large"):
        runs.save_checkpoint(tmp_path / "short", {"weights": torch.zeros(100_000)})
    assert torch.load(tmp_path / "short" / "checkpoint.pt")["state"]["epoch"] == 1
    assert not list(tmp_path.glob("*/*.part"))
    fit(one_stage(), run)
    assert len(read_metrics(run)) == 2


def test_infinite_loss_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"the loss of epoch \d of stage.0 is (nan|inf); try a smaller lr"):
        fit(one_stage("stage.0.optimiser.lr=3e37"), tmp_path)


class Noisy(Dataset):
    """Digits sample by sample, with noise from PyTorch's global generator."""

    def __init__(self, train):
        (self.x, self.y), _ = digits(train=60)
        self.train = train

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.5 * self.train * torch.randn(1, 8, 8), int(self.y[index])


class Forgetful(nn.Module):
    """A network with dropout, for images or frames."""

    def __init__(self, classes=10, steps=2, neuron=None):
        super().__init__()
        self.layer, self.head, self.steps = nn.Linear(64, 20), nn.Linear(20, classes), steps

    def forward(self, x, steps=None):
        x = x if x.dim() == 5 else x.expand(steps or self.steps, *x.shape)
        return self.head(nn.functional.dropout(self.layer(x.flatten(2)), 0.5, self.training))


@pytest.fixture
def noisy(monkeypatch):
    """Data with random augmentation and a network with dropout."""
    data = Data(Noisy(True), Noisy(False), 10, (1, 8, 8), False, Noisy(False))
    monkeypatch.setattr(snnkern.data, "load", lambda **options: data)
    monkeypatch.setitem(MODELS, "Forgetful", Forgetful)
    return partial(one_stage, "model.name=Forgetful", "batch=16")


def test_augmentation_and_dropout_depend_on_neither_workers_nor_interruption(tmp_path, noisy):
    for name, workers in (("whole", 0), ("workers", 2), ("interrupted", 0)):
        recipe = noisy(f"workers={workers}")
        if name == "interrupted":
            with pytest.raises(Interrupted, match="epoch 2, after step 2 of 4"):
                fit(recipe, tmp_path / name, InterruptAt(4 + 1 + 1))  # a batch of the test data is between
        fit(recipe, tmp_path / name)
        assert_same_end(tmp_path / name, tmp_path / "whole")
    first, second = learnt(tmp_path / "whole")
    assert first["loss"] != second["loss"]
    fit(noisy("seed=1"), tmp_path / "other")
    assert learnt(tmp_path / "other")[0]["loss"] != first["loss"]


def test_frames_are_cut_off_after_the_steps_of_the_stage(tmp_path, monkeypatch):
    x, y = torch.rand(40, 3, 2, 8, 8), torch.arange(40) % 10
    data = Data(*[TensorDataset(x, y)] * 2, 10, (3, 2, 8, 8), True, TensorDataset(x, y))
    monkeypatch.setattr(snnkern.data, "load", lambda **options: data)
    model = fit(one_stage("stage.steps=2", "channels_last=true"), tmp_path)
    outputs = model.eval()(x[:, :2].movedim(1, 0))
    assert read_metrics(tmp_path)[-1]["test_sdt"] == pytest.approx(losses.sdt(outputs, y).item(), rel=1e-5)
    with pytest.raises(RecipeError, match=r"stage.0.steps must be at most the 3 frames, got 4"):
        fit(one_stage("stage.steps=4"), tmp_path / "other")


@pytest.mark.parametrize("override", ["packed=true", "channels_last=true", "fused=false"])
def test_settings_that_change_only_how(tmp_path, override):
    fit(one_stage("model.name=CNN6"), tmp_path / "plain")
    fit(one_stage("model.name=CNN6", override), tmp_path / "other")
    plain, other = (read_metrics(tmp_path / name) for name in ("plain", "other"))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    if override == "packed=true":
        plain, other = weights(tmp_path / "plain"), weights(tmp_path / "other")
        assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_windows_train_and_test_what_one_piece_does(tmp_path, monkeypatch):
    few = "data.train=60", "model.norm=false", "model.hidden=[16]", "stage.epochs=2", "seed=0", "test_steps=[64]"
    fit(load("digits-sequence-sdt", few), tmp_path / "plain")
    sizes, model = [], MODELS["SpikingMLP"]
    monkeypatch.setattr(model, "forward", lambda *args, was=model.forward: sizes.append(len(args[1])) or was(*args))
    fit(load("digits-sequence-sdt", [*few, "windows=24"]), tmp_path / "windows")
    assert max(sizes) == 24 and min(sizes) == 16
    for plain, windows in zip(*(read_metrics(tmp_path / name) for name in ("plain", "windows")), strict=True):
        for name in ("loss", "train_accuracy", "test_sdt", "accuracy_over_steps"):
            assert windows[name] == pytest.approx(plain[name], rel=1e-4)
    plain, windows = (weights(tmp_path / name) for name in ("plain", "windows"))
    for name, value in plain.items():
        torch.testing.assert_close(value, windows[name], rtol=1e-3, atol=1e-4)


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
    # Without batch norm, which sees one part at a time; 120 = 50 + 50 + 20 samples in parts of 17, 17, 16 and 7, 7, 6.
    recipe = partial(
        one_stage, "model.name=ToyCNN", "stage.0.loss.lamb=0.5", 'stage.0.optimiser={name = "SGD", lr = 0.1}'
    )
    fit(recipe(), tmp_path / "plain")
    fit(recipe("accumulate=3"), tmp_path / "parts")
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(value, weights(tmp_path / "parts")[name], msg=name)
    plain, parts = (read_metrics(tmp_path / name)[-1] for name in ("plain", "parts"))
    assert (
        plain["loss"] == pytest.approx(parts["loss"], rel=1e-5) and plain["train_accuracy"] == parts["train_accuracy"]
    )


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp_trains_and_resumes(tmp_path, amp):
    recipe = one_stage(f"amp={amp}")
    fit(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path / "interrupted", InterruptAt(2))
    fit(recipe, tmp_path / "interrupted")
    assert_same_end(tmp_path / "interrupted", tmp_path / "whole")
    fit(one_stage(), tmp_path / "plain")
    exact, rough = (read_metrics(tmp_path / name)[-1]["loss"] for name in ("plain", "whole"))
    assert exact != rough and rough == pytest.approx(exact, rel=0.05)
    scaler = torch.load(tmp_path / "whole" / "checkpoint.pt")["scaler"]
    assert ("scale" in scaler) == (amp == "float16")


def test_compile(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = fit(one_stage("compile=true", "stage.epochs=1"), tmp_path)
    assert compiled == [model]


def test_stages_start_from_the_weights_of_the_one_named(tmp_path):
    common = 'epochs = 1, loss = {name = "sdt"}, optimiser = {name = "Adam", lr = 0.01}'
    stages = f'stage=[{{network = "ann", {common}}}, {{steps = 2, {common}}}, {{steps = 2, inherit = 0, {common}}}]'
    fit(one_stage(stages, "stage.2.optimiser.lr=1e-30"), tmp_path)
    ann, middle, last = (weights(tmp_path, stage)["head.weight"] for stage in range(3))
    assert torch.equal(ann, last) and not torch.equal(ann, middle)


def test_temperature_moves_by_steps_and_passes_on(tmp_path, monkeypatch):
    asked = []

    def search(model, x, y, criterion, b, step, eps, width, progress):
        asked.append((b, step, eps, width, len(x), criterion.name))
        return dspike.Found(b + step, {b: 0.1, b + step: 0.2}, 108)

    monkeypatch.setattr(dspike, "search", search)
    first = "stage.0.temperature={start = 2.0, eps = 0.2, batch = 30}"
    model = fit(tiny(first), tmp_path)
    assert [call[0] for call in asked] == pytest.approx([2.0, 2.2, 2.4, 2.9])
    settings = [(0.2, 0.2, 1.0, 30, "sdt"), (0.2, 0.2, 1.0, 30, "tet"), *[(0.5, 0.1, 1.0, 20, "tet")] * 2]
    assert [call[1:] for call in asked] == settings
    assert [line["b"] for line in read_metrics(tmp_path)] == pytest.approx([2.2, 2.4, 2.9, 3.4])
    assert read_metrics(tmp_path)[0]["cosines"] == [[2.0, 0.1], [2.2, 0.2]]
    surrogates = {module.settings["surrogate"] for module in model.modules() if isinstance(module, snnkern.nn.LIF)}
    assert surrogates == {snnkern.surrogate.Dspike(3.4000000000000004)}


def test_temperature_needs_a_surrogate_that_has_one(tmp_path):
    with pytest.raises(RecipeError, match=r"stage.0.temperature needs neurons of kind LIF with surrogate Dspike"):
        fit(one_stage("stage.0.temperature.step=0.2"), tmp_path)


PROBED = [
    *("data.train=80", "data.noise=0.0", "batch=32", "model.name=ToyCNN", "stage.steps=2", "stage.epochs=2"),
    "stage.probe={eps = [0.1, 0.001], iterations = 2}",
]


def test_a_sequence_stays_as_it_is_channels_last():
    x = torch.rand(2, 5, 3)
    taken, _ = to_device(x, torch.zeros(2), torch.device("cpu"), 4, True, channels_last=True)
    assert torch.equal(taken, x[:, :4].transpose(0, 1))


@pytest.mark.parametrize("network", ["ann", "snn"])
def test_probe_is_the_cosine_before_each_of_the_first_updates(tmp_path, monkeypatch, network):
    recipe = load("digits-tet", [*PROBED, f"stage.network={network}", "seed=0"])
    compared, cosine = [], dspike.cosine
    monkeypatch.setattr(dspike, "cosine", lambda *ab: compared.append(cosine(*ab)) or compared[-1])
    fit(recipe, tmp_path)
    rows = [line["probe"] for line in read_metrics(tmp_path)]
    assert len(compared) == 2 * 2 * 2 and [[eps for eps, _ in row] for row in rows] == [[0.1, 0.001]] * 2
    for epoch, row in enumerate(rows):
        ours = compared[4 * epoch : 4 * epoch + 4]
        assert [value for _, value in row] == [(0.0 + ours[i] + ours[2 + i]) / 2 for i in (0, 1)]
    # The first update's, by hand. An ANN's differences are its gradient, an SNN's are not.
    data = recipe.load_data()
    index = Epoch.of((0, 0, 0), 80, 32).batches[0]
    torch.manual_seed(0)
    model = recipe.make_model(0, data.classes, data.shape)
    at = model, *data.train[index], recipe.stage[0].loss[0]
    with working(recipe.device, recipe.threads):
        gradient = dspike.surrogate_gradient(*at)
        assert compared[:2] == [cosine(gradient, dspike.finite_differences(*at, eps)) for eps in (0.1, 0.001)]
    assert min(compared) > 0.98 if network == "ann" else min(compared) < 0.9


def test_first_layer_follows_its_differences_and_the_others_their_gradient(tmp_path):
    one = ["batch=80", "stage.epochs=1", "seed=0", 'stage.0.optimiser={name = "SGD", lr = 1.0}']
    recipe = load("digits-tet", [*PROBED[:-1], *one])
    data = recipe.load_data()
    torch.manual_seed(0)
    model = recipe.make_model(0, data.classes, data.shape)
    x, y = data.train[Epoch.of((0, 0, 0), 80, 80).batches[0]]
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    wanted = dspike.finite_differences(model, x, y, recipe.stage[0].loss[0], 0.2)
    moved = {}
    for key in ("gradient", "differences", "parts"):
        more = ["stage.0.differences.eps=0.2"] * (key != "gradient") + ["accumulate=3"] * (key == "parts")
        fit(override(recipe, more), tmp_path / key)
        moved[key] = {name: start[name] - value for name, value in weights(tmp_path / key).items()}
    for key in ("differences", "parts"):
        torch.testing.assert_close(moved[key]["conv.weight"], wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(moved["gradient"]["conv.weight"], wanted, rtol=0.1)
        torch.testing.assert_close(moved[key]["head.weight"], moved["gradient"]["head.weight"])


@pytest.mark.parametrize("call", [3, 60, 111, 2 * 54 + 2 * 54 + 54 + 3, 500])
def test_ctrl_c_among_finite_differences_and_resuming_is_bit_for_bit(tmp_path, probed, call):
    recipe, whole = probed
    with pytest.raises(Interrupted, match=r"stage.0, epoch [12], after step \d of 3") as stopped:
        fit(recipe, tmp_path, InterruptAt(call))
    assert torch.load(tmp_path / "checkpoint.pt")["state"]["step"] == int(str(stopped.value).split()[-3])
    fit(recipe, tmp_path)
    assert_same_end(tmp_path, whole)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A recipe with a probe and differences, and the folder of a run that nothing interrupted."""
    recipe = load("digits-tet", [*PROBED, "stage.0.differences.eps=0.1", "seed=0"])
    folder = tmp_path_factory.mktemp("probed")
    fit(recipe, folder)
    return recipe, folder


def test_what_a_watch_measures_joins_the_metrics(tmp_path):
    class Norm(Watch):
        def measure(self, recipe, metrics, model):
            return {"norm": model.head.weight.norm().item() + metrics["epoch"]}

    fit(one_stage(), tmp_path, Norm())
    metrics = read_metrics(tmp_path)
    assert metrics[-1]["norm"] == weights(tmp_path)["head.weight"].norm().item() + 2 != metrics[0]["norm"] + 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fit(one_stage("tensorboard=true", "stage.epochs=1"), tmp_path)
    assert [path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_compare_pairs_by_seed(tmp_path):
    overrides = [*TINY[:2], "seeds=3", "stage.epochs=1", "stage.steps=2", "test_steps=[1, 2, 5]"]
    recipes = {name: load(name, overrides) for name in ("digits-sdt", "digits-tet")}
    results = compare(recipes, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    values = {(run["name"], run["seed"]): run["test_tet"] for run in results["runs"]}
    assert len(set(values.values())) == 6
    differences = [values["digits-tet", seed] - values["digits-sdt", seed] for seed in (0, 1, 2)]
    row = next(row for row in results["rows"] if row["measure"] == "TET loss, test")["differences"]["digits-tet"]
    assert row["mean"] == pytest.approx(sum(differences) / 3)
    assert row["positive"] == sum(difference > 0 for difference in differences)
    assert row["sd"] == pytest.approx((sum((d - row["mean"]) ** 2 for d in differences) / 2) ** 0.5)
    _, rows = table(results)
    names = ["last epoch, %", "best epoch, %", *(f"accuracy at T = {t}, %" for t in (1, 2, 5))]
    assert [row[0] for row in rows][:5] == names
    assert rows[0][1:] == rows[3][1:]  # T = 2 is that of training
    assert len((tmp_path / "results.md").read_text().splitlines()) == len(rows) + 2
    with pytest.raises(
        RecipeError, match="seeds must be the same for all recipes, got 3 for digits-sdt and 2 for digits-tet"
    ):
        compare({**recipes, "digits-tet": load("digits-tet", ["seeds=2"])}, tmp_path)


def test_results_have_a_row_for_every_stage(tmp_path):
    recipes = {
        "tit": load("digits-tit", [*TINY[:3], "stage.epochs=3", "seeds=2", "test_steps=[1, 2]"]),
        "tet": load("digits-tet", [*TINY[:3], "stage.epochs=1", "seeds=2", "test_steps=[1, 2]"]),
    }
    results = compare(recipes, tmp_path)
    rows = {row["measure"]: row for row in results["rows"]}
    names = [f"{at}, {which} epoch, %" for at in ("T = 2", "T = 6", "last stage") for which in ("last", "best")]
    assert list(rows)[:8] == [*names, "last stage, run at T = 1, %", "last stage, run at T = 2, %"]
    metrics = [read_metrics(tmp_path / "tit" / f"seed{seed}") for seed in (0, 1)]
    for stage, label in enumerate(("T = 2", "T = 6")):
        reached = [[100 * line["test_accuracy"] for line in lines if line["stage"] == stage] for lines in metrics]
        for which, values in (("last", [line[-1] for line in reached]), ("best", [max(line) for line in reached])):
            row = rows[f"{label}, {which} epoch, %"]["tit"]
            assert row["mean"] == pytest.approx(sum(values) / 2)
            assert row["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "tet" not in rows["T = 2, last epoch, %"] and rows["T = 2, last epoch, %"]["differences"] == {}
    row = rows["T = 6, best epoch, %"]
    assert row["differences"]["tet"]["mean"] == pytest.approx(row["tet"]["mean"] - row["tit"]["mean"])
    assert rows["last stage, best epoch, %"]["tet"] == row["tet"]
    header, lines = table(results)
    assert all(len(line) == len(header) for line in lines) and lines[0][2:] == ["", "", ""]


def test_stages_of_equal_steps_have_rows_of_their_own(tmp_path):
    recipe = load("digits-tit", [*TINY[:3], "stage.epochs=1", "stage.steps=2", "seeds=1", "test_steps=[2]"])
    measures = [row["measure"] for row in compare({"tit": recipe}, tmp_path)["rows"]]
    names = [f"stage.{i}, T = 2, {which} epoch, %" for i in (0, 1) for which in ("last", "best")]
    assert measures[:4] == names


@pytest.mark.parametrize(
    ("words", "names", "read"),
    [
        (["digits-tet", "digits-tet:stage.loss.lamb=0.05"], ["digits-tet", "digits-tet,lamb=0.05"],
         lambda r: [0.0, 0.05] == [each.stage[0].loss[0].lamb for each in r]),
        (["digits-tit:stage.0.steps=2", "digits-tit:stage.1.steps=4:seeds=2", "seeds=2"],
         ["digits-tit,stage.0.steps=2", "digits-tit,stage.1.steps=4,seeds=2"],
         lambda r: [(2, 6), (2, 4)] == [tuple(s.steps for s in each.stage) for each in r]),
        (["digits-smooth:neuron.surrogate.alpha=1", "digits-smooth:neuron.surrogate.alpha=20"],
         ["digits-smooth,alpha=1", "digits-smooth,alpha=20"],
         lambda r: [1.0, 20.0] == [each.neuron["surrogate"]["alpha"] for each in r]),
        (["digits-dspike", "digits-dspike:stage.temperature.eps=0.01", "stage.steps=3"],
         ["digits-dspike", "digits-dspike,eps=0.01"],
         lambda r: [(3, 0.1), (3, 0.01)] == [(each.stage[0].steps, each.stage[0].temperature.eps) for each in r]),
        (['digits-tet:neuron.surrogate={name = "ATan"}', "digits-sdt:neuron.decay=0.25"],
         ["digits-tet,surrogate=_name_=_ATan", "digits-sdt,decay=0.25"],
         lambda r: ["ATan", "Triangle"] == [each.neuron["surrogate"]["name"] for each in r]),
    ],
)  # fmt: skip
def test_overrides_of_one_recipe_alone_name_it(words, names, read):
    recipes = named(words)
    assert list(recipes) == names and read(list(recipes.values()))


def test_recipes_of_one_file_name_keep_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, steps in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        text = (Path(snnkern.__file__).parent / "recipes" / "digits-tet.toml").read_text()
        (tmp_path / folder / "my.toml").write_text(text.replace("steps = 6", f"steps = {steps}"))
    recipes = named(["a/my.toml", "b/my.toml"])
    assert {name: recipe.stage[0].steps for name, recipe in recipes.items()} == {"a_my": 2, "b_my": 3}
    assert list(named([f"{tmp_path}/a/my.toml"])) == ["my"]
    with pytest.raises(RecipeError, match=r"recipes must differ, got a/my.toml:seeds=1 twice"):
        named(["a/my.toml:seeds=1", "a/my.toml:seeds=1"])
    with pytest.raises(RecipeError, match=r"stage.1.steps: there are 1, .* \(in digits-tet; an override of one recipe"):
        named(["digits-tit", "digits-tet", "stage.1.steps=2"])


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_only_commands_that_train_need_what_training_needs():
    code = """
import sys
import snnkern.cli
from typer.testing import CliRunner

def run(*words):
    result = CliRunner().invoke(snnkern.cli.app, words)
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    return result

assert run("doctor").exit_code == 0 and run("plot").exit_code == 2
assert "snnkern.train.recipe" not in sys.modules and "sklearn" not in sys.modules
sys.modules["snnkern.train.recipe"] = None  # as if its imports failed; typer needs pydantic, too
for words in (("train", "digits-tet"), ("train", "--list"), ("plot", "."), ("report", "."), ("export", ".", "x")):
    result = run(*words)
    assert result.exit_code == 1 and "import of snnkern.train.recipe halted" in result.stderr, (words, result.output)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_trains_keeps_freed_memory(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("snnkern.cli.keep_freed_memory", lambda: called.append(True))
    assert invoke("train", "nothing-of-this-name", "--out", tmp_path).exit_code != 0 and called


def test_doctor():
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["snnkern"] == snnkern.__version__ and report["torch"] == torch.__version__
    assert report["backends"]["reference"] == "ok" and set(report["backends"]) == set(snnkern.backends())
    text = invoke("doctor").stdout
    assert all(f"backend {name}" in text for name in report["backends"]) and "instruction set" in text


def assert_pictures(result, *paths):
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(path) for path in paths]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_train_eval_plot_and_export(tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke("train", "digits-tit", *TINY, "seed=3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "images/s" in line]
    assert len(lines) == 4 and "stage.1, snn T=3, epoch 2/2: loss" in lines[-1] and "images/s" in lines[-1]
    assert "b 2.0" in lines[-1] and "GiB, left 0:00:00" in lines[-1]
    run = tmp_path / "seed3"
    names = "loss", "accuracy", "accuracy_steps", "temperature"
    assert_pictures(invoke("plot", run), *(run / f"{name}.png" for name in names))
    names = "accuracy_epochs", "accuracy_steps", "accuracy_moments", "accuracy_growth", "temperature"
    assert_pictures(invoke("plot", tmp_path), *(tmp_path / f"{name}.png" for name in names))

    last = read_metrics(run)[-1]
    result = invoke("eval", run, "--steps", "1,3,9", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["T"] for row in found["rows"]] == [1, 3, 9] and found["trained_steps"] == 3
    assert found["rows"][1] == {
        "T": 3,
        "accuracy": last["test_accuracy"],
        "moment": last["moments"][2],
        "sdt": last["test_sdt"],
        "tet": last["test_tet"],
    }
    text = invoke("eval", run / "stage0-best.safetensors").stdout
    assert "stage.0 after epoch" in text and "at step T alone" in text
    assert invoke("eval", run, "--steps", "0,1").exit_code == 2

    again = invoke("train", "digits-tit", *TINY, "seed=3", "stage.1.steps=2", "--out", tmp_path)
    assert again.exit_code == 1 and "other settings (stage.1.steps 3 there, 2 here)" in again.stderr


def test_export_folds_batch_norm(tmp_path):
    model = fit(one_stage("stage.epochs=1"), tmp_path)
    result = invoke("export", tmp_path, tmp_path / "folded.safetensors")
    assert result.exit_code == 0, result.output
    folded = snnkern.nn.fold(model)
    folded.load_state_dict(load_weights(tmp_path / "folded.safetensors")[0])
    x = digits()[1][0][:20]
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    restored = restore(tmp_path / "folded.safetensors").model
    assert torch.equal(restored.eval()(x), folded.eval()(x))


def test_compare_on_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    overrides = "data.train=60", "stage.epochs=1", "stage.steps=2", "seeds=1", "batch=30", "test_steps=[1, 2, 4]"
    result = invoke("compare", "digits-tet", "digits-tet:stage.loss.name=sdt", *overrides, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "difference" in result.stdout and "accuracy at T = 2, %" in result.stdout
    assert (tmp_path / "digits-tet,loss=sdt" / "seed0" / "checkpoint.pt").exists()
    names = "accuracy_epochs", "accuracy_steps", "accuracy_moments", "accuracy_growth"
    assert_pictures(invoke("plot", tmp_path), *(tmp_path / f"{name}.png" for name in names))


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    arguments = "train", "digits-tit", *TINY, "seed=3", "--out", tmp_path
    with monkeypatch.context() as patch:
        patch.setattr("snnkern.train.progress.Show.interval", -1.0)
        patch.setattr("snnkern.train.progress.Show.step", lambda self, *a: os.kill(os.getpid(), signal.SIGINT))
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert "interrupted in stage.0, epoch 1, after step 2 of 4" in result.stderr
    assert "The same command goes on from there" in result.stderr
    assert torch.load(tmp_path / "seed3" / "checkpoint.pt")["state"]["step"] == 2
    assert invoke(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["train", "digits-ted"],
            "recipe must be the name of one or the path of a .toml file, got 'digits-ted'; did you",
        ),
        (["train"], "RECIPE is missing"),
        (["train", "digits-tet", "stage.0.optimiser.lr=-1"], "stage.0.optimiser.lr must be greater than 0, got -1"),
        (["train", "digits-tet", "backend=abacus"], "backend"),
        (["train", "digits-tet", "device=abacus"], "device must be one that PyTorch can use here, got 'abacus'"),
        (["train", "cifar.toml"], "got 'cifar.toml'"),
        (["compare", "digits-tet", "seed=0"], "compare needs two recipes or more, got digits-tet"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, arguments, text):
    result = invoke(*arguments, "--out", tmp_path / "never")
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert text in result.stderr.splitlines()[-1] and "Traceback" not in result.output
    assert not (tmp_path / "never").exists()


def test_missing_data_says_how_to_get_it(tmp_path):
    result = invoke("train", "tet-cifar10", f"data.root={tmp_path}", "--out", tmp_path / "never")
    assert result.exit_code == 1 and ("download=True" in result.stderr or "torchvision" in result.stderr)


def test_plot_of_something_else(tmp_path):
    result = invoke("plot", tmp_path)
    assert result.exit_code == 1 and "no run with a finished epoch" in result.stderr
