"""The analyses, on networks whose spikes, operations and losses can be written out."""

import json
from functools import partial
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from snnkern import analysis, losses
from snnkern.models import CNN6, VGGSNN, ResNet19, SpikingMLP, SpikingRNN, VanillaRNN
from snnkern.nn import LIF, SmoothLIF
from snnkern.surrogate import Dspike

pytest.importorskip("matplotlib")
from snnkern.analysis import pictures
from snnkern.analysis.landscape import _directions


@pytest.fixture(scope="module")
def cnn():
    """CNN6 with statistics of its own, in training mode, and images [20, 1, 8, 8]."""
    torch.manual_seed(0)
    model, x = CNN6(3), torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        for _ in range(80):
            model(x)
    model.stages[2].eval()
    return model, x, torch.arange(20) % 10


@pytest.fixture(autouse=True)
def nothing_changes(cnn):
    model = cnn[0]
    before = [value.clone() for value in model.state_dict().values()]
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert model.training and not model.stages[2].conv.training and model.stages[3].conv.training


class Alternating(nn.Module):
    """Fires wherever its input is positive, at even steps."""

    def forward(self, x):
        return (x > 0).to(x.dtype) * (torch.arange(len(x)) % 2 == 0).view(-1, *[1] * (x.dim() - 1))


class Small(nn.Module):
    """Conv 2 to 4 of 3x3 (stride 2, with padding), neurons, a 2x2 average, a linear layer; static images or frames."""

    steps = 4

    def __init__(self, neuron=Alternating):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.neuron, self.pool, self.head = neuron(), nn.AvgPool2d(2), nn.Linear(4, 3)

    def forward(self, x, steps=None):
        if x.dim() == 4:
            y = self.conv(x)
            y = y.expand(steps or self.steps, *y.shape)
        else:
            y = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        s = self.neuron(y)
        return self.head(self.pool(s.flatten(0, 1)).flatten(1).unflatten(0, s.shape[:2]))


# Energy


def test_operations_are_rates_times_steps_times_macs():
    torch.manual_seed(0)
    model, x = Small(), torch.randn(10, 2, 4, 4)
    found = analysis.energy(model, x, 3, batch=4, neurons=(Alternating,))
    macs = 4 * 2 * 2 * (2 * 9), 4 * 3
    rate = (model.conv(x) > 0).double().mean().item() * 2 / 3  # two of three steps are even
    assert 0.2 < rate < 0.5
    conv, head = found.layers
    assert (conv.name, conv.steps, conv.macs) == ("conv", 3, macs[0]) and (head.name, head.steps) == ("head", 3)
    assert conv.multiplications == conv.additions == 3 * macs[0]
    assert head.macs == macs[1] and head.multiplications == 0
    assert head.rate == pytest.approx(rate) and head.additions == pytest.approx(3 * rate * macs[1])
    assert found.rates == {"neuron": pytest.approx(rate)}
    assert found.macs == sum(macs) and found.ann_joules == pytest.approx(sum(macs) * 5.5e-12)
    assert found.joules == pytest.approx(3 * macs[0] * 5.5e-12 + 3 * rate * macs[1] * 0.9e-12)
    assert analysis.sparsity(model, x, 3, neurons=(Alternating,)) == found.rates


@pytest.mark.parametrize(
    ("make", "shape", "macs"),
    [
        (lambda: ResNet19(steps=1), (1, 3, 32, 32), 2285.4),  # as the Dspike paper's table has it: 2285
        (lambda: ResNet19(steps=1, stem=64), (1, 3, 32, 32), 2216.5),
        (VGGSNN, (1, 1, 2, 48, 48), 1361.7),
    ],
)
def test_macs_of_the_published_networks(make, shape, macs):
    assert analysis.energy(make(), torch.zeros(shape)).macs / 1e6 == pytest.approx(macs, abs=0.06)


def test_event_frames_may_count_as_spikes_in_the_first_layer_too():
    model, x = Small(), (torch.rand(5, 6, 2, 4, 4) < 0.3).float()
    counted = analysis.energy(model, x, analog=False, add=2.0).layers[0]
    assert counted.multiplications == 0 and counted.steps == 5
    assert counted.additions == pytest.approx(5 * x.mean().item() * counted.macs)
    assert analysis.energy(model, x, 2).layers[0].multiplications == 2 * counted.macs


def test_all_layers_of_an_ann_multiply():
    found = analysis.energy(Small(nn.ReLU), torch.randn(10, 2, 4, 4), 1, neurons=())
    assert found.additions == found.multiplications == found.macs and found.joules == found.ann_joules


def test_recurrent_layers_count():
    counted = analysis.energy(VanillaRNN(2, 8, 1, 3), torch.rand(6, 4, 2), neurons=())
    assert [(layer.steps, layer.macs) for layer in counted.layers] == [(6, 8 * 2 + 8 * 8), (6, 8 * 3)]
    assert counted.additions == counted.multiplications == 6 * (80 + 24)


def test_spikes_that_feed_back_count():
    torch.manual_seed(0)
    model, spikes = SpikingRNN(2, (8,), 3), []
    model.layers[1].register_forward_hook(lambda module, x, y: spikes.append(y))
    counted = analysis.energy(model, 3 * torch.randn(6, 4, 2))
    assert [(layer.steps, layer.macs) for layer in counted.layers] == [(6, 8 * 2), (6, 8 * 8), (6, 8 * 3)]
    received = spikes[0][:-1].sum().item() / 4  # per sample; each arrives at 8 neurons
    assert received > 0 and counted.layers[1].additions == pytest.approx(8 * received)


def test_sums_of_spikes_count_as_their_value():
    class Twice(Alternating):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    once, twice = Small(), Small(Twice)
    twice.load_state_dict(once.state_dict())
    x = torch.randn(10, 2, 4, 4)
    counts = [analysis.energy(model, x).layers[1].additions for model in (once, twice)]
    assert counts[1] == pytest.approx(2 * counts[0]) and counts[0] > 0


@pytest.mark.parametrize("fused", [True, False])
def test_every_neuron_layer_of_a_model_is_seen(cnn, fused):
    x = cnn[1]
    model = CNN6(3, fused=fused)
    model.load_state_dict(cnn[0].state_dict())
    names = [f"stages.{i}.{'norm' if fused else 'neuron'}" for i in range(6)]
    found = analysis.energy(model, x)
    assert list(found.rates) == names and all(0 < rate < 1 for rate in found.rates.values())
    # the averages between stages leave the rate of the spikes what it was
    assert [layer.rate for layer in found.layers[1:]] == pytest.approx(list(found.rates.values()), rel=1e-6)
    assert found.macs == 491_008
    assert list(found.rates.values()) == pytest.approx(list(analysis.energy(cnn[0], x).rates.values()))


def test_steps_summed_by_the_neurons_keep_their_rate():
    torch.manual_seed(0)
    before, after, x = nn.Linear(3, 3), nn.Linear(3, 2), torch.randn(6, 5, 3)
    full, summed = (analysis.energy(nn.Sequential(before, LIF(steps_out=t), after), x) for t in (None, 2))
    assert full.rates["1"] > 0 and summed.rates == pytest.approx(full.rates)
    assert (full.layers[1].steps, summed.layers[1].steps) == (6, 2)
    assert summed.layers[1].additions == pytest.approx(full.layers[1].additions)


def test_energy_is_printed_and_goes_into_json(cnn):
    found = analysis.energy(cnn[0], cnn[1])
    console = Console(width=120, file=None, record=True, quiet=False)
    with console.capture() as captured:
        console.print(found)
    assert "stages.5.conv" in captured.get() and "as an ANN" in captured.get() and "491,008" in captured.get()
    assert json.loads(json.dumps(found.as_dict()))["joules"] == pytest.approx(found.joules)
    with pytest.raises(ValueError, match="model must have a convolution"):
        analysis.energy(Nothing(), cnn[1])


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x, steps=None):
        return self.factor * x.flatten(1).unsqueeze(0)


# Accuracy


class Scripted(nn.Module):
    """Outputs its input, [T, N, classes]."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x


def test_accuracy_of_the_mean_and_of_single_moments():
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 5.0]], [[0.0, 4.0], [1.0, 0.0]]])
    y = torch.tensor([1, 1])
    assert analysis.accuracy_over_steps(Scripted(), x, y, batch=1) == [0.5, 0.5, 1.0]
    assert analysis.moments(Scripted(), x, y) == [0.5, 1.0, 0.5]
    assert analysis.moments(Scripted(), x, y, 2) == [0.5, 1.0]


def test_accuracy_up_to_t_is_that_of_running_t_steps(cnn):
    model, x, y = cnn
    many = analysis.accuracy_over_steps(model, x, y, 6)
    assert [analysis.accuracy_over_steps(model, x, y, t)[-1] for t in range(1, 7)] == many
    assert len(analysis.accuracy_over_steps(model, x, y)) == 3
    rows = analysis.accuracy_over_energy(model, x, y, [2, 4])
    assert [row["accuracy"] for row in rows] == [many[1], many[3]]
    assert [row["joules"] for row in rows] == [analysis.energy(model, x, t).joules for t in (2, 4)]


def test_wrong_arguments_are_named(cnn):
    model, x, y = cnn
    with pytest.raises(ValueError, match="steps must be at most the number of frames, 3, got 4"):
        analysis.moments(Scripted(), torch.zeros(3, 2, 2), y[:2], 4)
    with pytest.raises(ValueError, match="y must hold a class for each of the 20 samples"):
        analysis.moments(model, x, y[:3])
    with pytest.raises(ValueError, match="points must be odd"):
        analysis.landscape(model, x, y, {"L": losses.sdt}, points=4)


# Landscape


class Bowl(nn.Module):
    """Outputs [1, N, 1], the sum of squares of its weights; a bias that must not move."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, x):
        assert (self.bias == 1).all()
        return self.weight.square().sum().expand(1, x.shape[1], 1)


def first(outputs, y):
    return outputs[0, 0, 0]


def test_directions_have_the_norm_of_each_filter():
    found = _directions(Bowl(), 2, 0)
    for direction in found:
        torch.testing.assert_close(direction[0].norm(dim=1), torch.tensor([5.0, 2.0]))
    assert not torch.equal(found[0][0], found[1][0])


def test_landscape_of_a_bowl():
    model, x, y = Bowl(), torch.zeros(1, 1, 1), torch.zeros(1)
    seen = []
    criteria = {"L": first, "2L": lambda outputs, y: 2 * first(outputs, y)}
    found = analysis.landscape(model, x, y, criteria, radius=0.5, points=5, progress=lambda *at: seen.append(at))
    assert found.offsets == [-0.5, -0.25, 0.0, 0.25, 0.5] and seen[-1] == (25, 25)
    (d,), (e,) = _directions(model, 2, 0)
    for i, a in enumerate(found.offsets):
        for j, b in enumerate(found.offsets):
            wanted = (model.weight + a * d + b * e).square().sum().item()
            assert found.losses["L"][i][j] == pytest.approx(wanted, rel=1e-5)
            assert found.losses["2L"][i][j] == pytest.approx(2 * wanted, rel=1e-5)
    assert found.losses["L"][2][2] == 29 and model.weight.tolist() == [[3.0, 4.0], [0.0, 2.0]]


def test_rise_is_the_mean_over_directions_and_sides():
    rise = analysis.rise(Bowl(), torch.zeros(1, 1, 1), torch.zeros(1), first, (0.1, 0.5))
    assert rise == pytest.approx([0.01 * 29, 0.25 * 29], rel=1e-4)  # the linear term cancels between the sides


def test_weights_return_when_the_loss_fails(cnn):
    def fails(outputs, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.landscape(*cnn, {"L": fails}, points=3)


def test_a_network_of_smooth_neurons_runs_too(cnn):
    model = CNN6(2, neuron=SmoothLIF)
    assert len(analysis.sparsity(model, cnn[1])) == 6


# Report and pictures


class Sets(NamedTuple):
    plain: Dataset
    test: Dataset
    classes: int = 10
    shape: tuple = (1, 8, 8)
    events: bool = False


def test_report_of_static_images(tmp_path, cnn):
    model, x, y = cnn
    data = Sets(TensorDataset(x, y), TensorDataset(x, y))
    parts = []
    found = analysis.report(model, data, tmp_path / "new", samples=12, points=3, on_part=parts.append)
    assert parts == ["accuracy", "energy", "landscape"]
    assert json.loads((tmp_path / "new" / "analysis.json").read_text()) == found
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12]
    assert found["accuracy_over_steps"] == analysis.accuracy_over_steps(model, x[chosen], y[chosen], 6)
    text = (tmp_path / "new" / "analysis.md").read_text()
    drawn = sorted(path.name for path in (tmp_path / "new").glob("*.png"))
    assert len(drawn) == 7 and all(f"({name})" in text for name in drawn)


def test_report_of_events(tmp_path):
    frames = torch.rand(5, 4, 2, 4, 4).round()  # five samples of four frames
    data = Sets(TensorDataset(frames, torch.arange(5) % 3), TensorDataset(frames, torch.arange(5) % 3), events=True)
    found = analysis.report(Small(partial(LIF, threshold=0.1)), data, tmp_path, points=0)
    assert len(found["moments"]) == found["steps"] == 4 and found["samples"] == 5
    assert "landscape" not in found and not (tmp_path / "landscape.png").exists() and len(found["rise"]["L_TET"]) == 2
    assert "rise" not in analysis.measure(Small(), data, points=0, directions=0)


def test_report_of_sequences(tmp_path):
    torch.manual_seed(0)
    held = TensorDataset(torch.rand(12, 70, 5), torch.arange(12) % 3)
    found = analysis.report(
        SpikingMLP(5, (8,), 3, norm=True), Sets(held, held, events=True), tmp_path, points=0, directions=1
    )
    assert (found["steps"], found["samples"], len(found["moments"])) == (70, 12, 70)
    assert [(layer["steps"], layer["macs"]) for layer in found["energy"]["layers"]] == [(70, 40), (70, 24)]
    rows = [line.split("|")[1].strip() for line in (tmp_path / "analysis.md").read_text().splitlines() if "|" in line]
    assert rows[2:38] == [*map(str, range(2, 70, 2)), "70", "layer"]


class Sorted(Dataset):
    """Frames [2, 4, 4] that say which sample they are, sorted by class: three of 200."""

    def __len__(self):
        return 600

    def __getitem__(self, index):
        return torch.full((2, 4, 4), float(index)), index // 200


class Watching(Small):
    """Notes which samples it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, steps=None):
        self.seen.append(tuple(x[:, 0, 0, 0].int().tolist()))
        return super().forward(x, steps)


def test_every_network_is_measured_on_the_same_samples_of_all_classes():
    data, models = Sets(Sorted(), Sorted()), (Watching(), Watching())
    for shift, model in enumerate(models):
        torch.manual_seed(shift)
        analysis.measure(model, data, samples=50, points=3, directions=1, steps=2)
    assert models[0].seen == models[1].seen and len(set(models[0].seen)) == 1
    assert {index // 200 for index in models[0].seen[0]} == {0, 1, 2} and len(set(models[0].seen[0])) == 50
    other = Watching()
    analysis.measure(other, data, samples=50, points=0, directions=0, steps=2, seed=1)
    assert set(other.seen) != set(models[0].seen)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        analysis.measure(other, data, samples=0)


def test_report_of_several_networks_beside_each_other(tmp_path, cnn):
    model, x, y = cnn
    data = Sets(TensorDataset(x, y), TensorDataset(x, y))
    found = [analysis.measure(model, data, samples=12, points=points, steps=3) for points in (3, 0)]
    networks = {"SDT": found, "TET": [analysis.measure(CNN6(4), data, samples=12, points=3, longest=5)]}
    analysis.write(tmp_path, networks)
    assert json.loads((tmp_path / "analysis.json").read_text()) == {"networks": networks}
    text = (tmp_path / "analysis.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| mean ± sd", "SDT", "TET |"] and lines[2] == ["| seeds", "2", "1 |"]
    cells = {line[0]: line[1:] for line in lines}
    accuracy = [100 * found[0]["accuracy_over_steps"][5], 100 * networks["TET"][0]["moments"][4]]
    assert cells["| accuracy at T = 6, %"] == [f"{accuracy[0]:.1f}", "- |"]
    assert cells["| accuracy at step 5 alone, %"][1] == f"{accuracy[1]:.1f} |"
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(drawn) == 7 and all(f"({name})" in text for name in drawn)


def test_pictures_compare_several(tmp_path, cnn):
    rates = analysis.sparsity(cnn[0], cnn[1])
    rows = [{"steps": t, "accuracy": 0.5, "joules": t * 1e-6} for t in (1, 2)]
    made = [
        pictures.curves(tmp_path / "a.png", {"x": ([1, 2], [[1, 2], [3, 4]]), "y": ([1, 2], [[2, 2]])}, "x", "y", "t"),
        pictures.curves(tmp_path / "b.png", {"": ([1, 2, 4], [[1, 2, 3]])}, "x", "y", "t", 2, (2, "m"), [1, 4], 0.0),
        pictures.bars(tmp_path / "c.png", {"SDT": rates, "TET": rates}, "rate", "t"),
        pictures.energy_curves(tmp_path / "d.png", {"SDT": [rows], "TET": [rows, rows]}, "t"),
        pictures.scatter(tmp_path / "e.png", {"SDT": [(1, 2), (2, 3), (3, 1)], "TET": [(1, 2)]}, "x", "y", "t"),
        pictures.surrogates(tmp_path / "f.png", {f"b = {b:g}": Dspike(b) for b in (0.5, 4)}, 0.5),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
