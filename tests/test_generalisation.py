"""Noise, gradients and the landscape in one dimension, against what is written out by hand."""

import json
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from snnkern import analysis, losses
from snnkern.analysis.landscape import _directions
from snnkern.methods.dspike import cosine
from snnkern.models import CNN6
from snnkern.nn import LIF
from snnkern.surrogate import Triangle


@pytest.fixture(scope="module")
def cnn():
    """CNN6 with statistics of its own, in training mode, and images [20, 1, 8, 8]."""
    torch.manual_seed(0)
    model, x = CNN6(3, plan="4C3-AP2-6C3-6C3"), torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        for _ in range(80):
            model(x)
    return model, x, torch.arange(20) % 10


@pytest.fixture(autouse=True)
def nothing_changes(cnn):
    model = cnn[0]
    model.stages[1].norm.eval()
    before = [value.clone() for value in model.state_dict().values()]
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert model.training and not model.stages[1].norm.training and model.stages[2].norm.training
    assert all(parameter.grad is None for parameter in model.parameters())


def convolutions(model):
    return [stage.conv.weight for stage in model.stages]


# Noise


class Watching(nn.Module):
    """Outputs [1, N, 2]; keeps the images it sees and its parameters at that time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append((x, {name: p.detach().clone() for name, p in self.named_parameters()}))
        return self.head(self.norm(self.conv(x)).flatten(1)).unsqueeze(0)


def test_noise_is_what_is_added_and_to_what():
    torch.manual_seed(0)
    model, x, y, sigmas = Watching(), torch.randn(5, 1, 4, 4), torch.arange(5) % 2, (0.0, 0.1, 0.3)
    before, shown = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    analysis.weight_noise(model, x, y, sigmas, 2, seed=7, progress=lambda *at: shown.append(at))
    assert shown == [(i, 6) for i in range(1, 7)]
    generator, seen = torch.Generator().manual_seed(7), iter(model.seen)
    for _ in range(2):
        noise = {f"{n}.weight": torch.randn(before[f"{n}.weight"].shape, generator=generator) for n in ("conv", "head")}
        for sigma, (image, found) in zip(sigmas, seen, strict=False):
            assert torch.equal(image, x) and found.keys() == before.keys()
            for name, value in found.items():
                assert torch.equal(value, before[name] + sigma * noise[name] if name in noise else before[name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    model.seen.clear()
    analysis.input_noise(model, x, y, sigmas, 2, seed=7)
    generator = torch.Generator().manual_seed(7)
    wanted = [
        x + sigma * noise for noise in [torch.randn(x.shape, generator=generator) for _ in "ab"] for sigma in sigmas
    ]
    assert all(torch.equal(a, b) for (a, _), b in zip(model.seen, wanted, strict=True))
    assert all(torch.equal(found[name], before[name]) for _, found in model.seen for name in before)


@pytest.mark.parametrize("under", [analysis.weight_noise, analysis.input_noise])
def test_curves_begin_at_the_clean_accuracy_and_belong_to_the_seed(cnn, under):
    model, x, _ = cnn
    y = analysis.outputs(model, x, 2).mean(0).argmax(1)
    y[:5] = (y[:5] + 1) % 10
    found = under(model, x, y, [0.0, 3.0], 3, steps=2, batch=8)
    clean = analysis.accuracy_over_steps(model, x, y, 2)[-1]
    assert clean == 0.75 and found.mean[0] == found.least[0] == found.greatest[0] == clean
    noisy = [run[1] for run in found.runs]
    assert len({*noisy}) > 1 and (found.least[1], found.greatest[1]) == (min(noisy), max(noisy))
    assert found.mean[1] == pytest.approx(sum(noisy) / 3)
    assert under(model, x, y, [3.0, 0.0], 2, steps=2).runs == [run[::-1] for run in found.runs[:2]]
    assert under(model, x, y, [0.0, 3.0], 3, seed=1, steps=2) != found


def interrupted(*at):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "measure",
    [
        lambda cnn: analysis.weight_noise(*cnn, [0.5], progress=interrupted),
        lambda cnn: analysis.line(*cnn, {"L": losses.sdt}, points=3, progress=interrupted),
        lambda cnn: analysis.gradient_similarity(*cnn, losses.sdt, batch_statistics=True, progress=interrupted),
    ],
)
def test_the_network_returns_when_interrupted(cnn, measure):
    with pytest.raises(KeyboardInterrupt):
        measure(cnn)


# Gradients


def test_lengths_are_those_of_autograd(cnn):
    model, x, y = cnn
    shown = []
    found = analysis.gradient_lengths(model, x, y, losses.tet, 5, batch=8, progress=lambda *at: shown.append(at))
    assert shown == [(8, 20), (16, 20), (20, 20)]
    twin = CNN6(3, plan="4C3-AP2-6C3-6C3").eval()
    twin.load_state_dict(model.state_dict())
    whole = torch.autograd.grad(losses.tet(twin(x, 5), y), convolutions(twin))
    assert found.weights == pytest.approx(torch.cat([g.flatten() for g in whole]).norm().item(), rel=1e-5)
    lengths = []
    for i in range(len(x)):
        image = x[i : i + 1].clone().requires_grad_()
        losses.tet(twin(image, 5), y[i : i + 1]).backward()
        lengths.append(image.grad.norm().item())
    assert found.inputs == pytest.approx(sum(lengths) / len(x), rel=1e-5) and found.inputs > 0


class Mlp(nn.Module):
    """Frames [T, N, 1, 2, 2] to [T, N, 3], without a convolution; a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.first, self.neuron, self.head = (
            nn.Linear(4, 8),
            LIF(threshold=0.2, surrogate=Triangle(2.0)),
            nn.Linear(8, 3),
        )
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.neuron(self.first(x.flatten(2))))


def test_gradients_over_frames_of_a_network_without_convolutions():
    torch.manual_seed(0)
    model, x, y = Mlp(), torch.randn(5, 4, 1, 2, 2), torch.arange(4) % 3
    found = analysis.gradient_lengths(model, x, y, losses.sdt, 3, batch=3)
    frames = x[:3].clone().requires_grad_()
    *weights, of_x = torch.autograd.grad(losses.sdt(model(frames), y), [model.first.weight, model.head.weight, frames])
    assert found.weights == pytest.approx(torch.cat([g.flatten() for g in weights]).norm().item(), rel=1e-5)
    assert found.inputs == pytest.approx(4 * of_x.movedim(1, 0).flatten(1).norm(dim=1).mean().item(), rel=1e-5)
    layers = analysis.gradient_similarity(model, x, y, losses.sdt, (3, 5)).layers
    assert layers.keys() == {"first", "head", "idle"} and layers["idle"] == 0 < layers["head"] < 1


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_similarity_is_the_cosine_of_gradients(cnn, batch_statistics):
    model, x, y = cnn
    same = analysis.gradient_similarity(*cnn, losses.sdt, (4, 4), 8, batch_statistics)
    assert [same.whole, *same.layers.values()] == pytest.approx([1.0] * 5)
    shown = []
    progress = lambda *at: shown.append(at)  # noqa: E731
    found = analysis.gradient_similarity(*cnn, losses.sdt, (2, 5), 10, batch_statistics, progress)
    assert shown == [(10, 40), (20, 40), (30, 40), (40, 40)]
    twin = CNN6(3, plan="4C3-AP2-6C3-6C3").train(batch_statistics)
    twin.load_state_dict(model.state_dict())
    weights, parts = [*convolutions(twin), twin.head.weight], [slice(10), slice(10, 20)]

    def gradients(steps):
        loss = sum(losses.sdt(twin(x[part], steps), y[part]) for part in parts) / 2
        return torch.autograd.grad(loss, weights)

    a, b = gradients(2), gradients(5)
    wanted = [cosine(*pair) for pair in zip(a, b, strict=True)]
    assert list(found.layers) == ["stages.0.conv", "stages.1.conv", "stages.2.conv", "head"]
    assert [*found.layers.values()] == pytest.approx(wanted, abs=1e-5) and max(wanted) < 0.999
    assert found.whole == pytest.approx(cosine(*(torch.cat([g.flatten() for g in gs[:3]]) for gs in (a, b))), abs=1e-5)


# Landscape


def test_a_line_is_the_landscape_along_each_direction(cnn):
    model, x, y = cnn
    criteria = {"sdt": losses.sdt, "tet": losses.tet}
    found = analysis.line(*cnn, criteria, radius=0.5, points=3, directions=2, steps=2, batch=8)
    plane = analysis.landscape(*cnn, criteria, radius=0.5, points=3, steps=2)
    assert found.offsets == plane.offsets == [-0.5, 0.0, 0.5]
    second = _directions(model, 2, 0)[1]
    twin = CNN6(3, plan="4C3-AP2-6C3-6C3").eval()
    for name, criterion in criteria.items():
        assert found.losses[name][0] == pytest.approx([row[1] for row in plane.losses[name]], rel=1e-6)
        for a, loss in zip(found.offsets, found.losses[name][1], strict=True):
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                for weight, d in zip([p for p in twin.parameters() if p.dim() > 1], second, strict=True):
                    weight += a * d
                assert loss == pytest.approx(criterion(twin(x, 2), y).item(), rel=1e-6)


def test_wrong_arguments_are_named(cnn):
    for wrong, kind, message in (
        ({"sigmas": []}, ValueError, "sigmas must hold at least one number"),
        ({"sigmas": [0.1, -1]}, ValueError, "none below 0, got"),
        ({"sigmas": ["a"]}, TypeError, "sigmas must be a float, got 'a'"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
    ):
        for under in (analysis.weight_noise, analysis.input_noise):
            with pytest.raises(kind, match=message):
                under(*cnn, **wrong)
    for steps, message in (
        ((3,), r"steps must be two numbers of time steps, got \(3,\)"),
        (3, "steps must be two numbers of time steps, got 3"),
        ((0, 3), "steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            analysis.gradient_similarity(*cnn, losses.sdt, steps)
    with pytest.raises(ValueError, match="points must be odd"):
        analysis.line(*cnn, {"L": losses.sdt}, points=2)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        analysis.line(*cnn, {"L": losses.sdt}, directions=0)
    with pytest.raises(ValueError, match="model must have a convolution or linear layer, Identity has none"):
        analysis.gradient_lengths(nn.Identity(), *cnn[1:], losses.sdt)


# Report


class Sets(NamedTuple):
    plain: Dataset
    test: Dataset
    classes: int = 10
    shape: tuple = (1, 8, 8)
    events: bool = False


def test_report_of_all_of_it(tmp_path, cnn):
    pytest.importorskip("matplotlib")
    model, x, y = cnn
    data, parts = Sets(TensorDataset(x, y), TensorDataset(x, y)), []
    options = {"samples": 12, "points": 0, "directions": 0, "generalisation": True}
    found = analysis.measure(model, data, **options, on_part=parts.append)
    assert parts == ["accuracy", "energy", "noise", "landscape in one dimension", "gradients"]
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12]
    few = x[chosen], y[chosen]
    assert found["gradient_lengths"] == analysis.gradient_lengths(model, *few, losses.sdt)._asdict()
    similarity = analysis.gradient_similarity(model, *few, losses.sdt, (1, 3), batch_statistics=True)
    assert found["gradient_similarity"]["steps"] == [1, 3]
    assert found["gradient_similarity"]["batch"] == similarity._asdict() != found["gradient_similarity"]["running"]
    assert found["noise_weights"]["runs"] == analysis.weight_noise(model, *few).runs
    assert found["noise_inputs"]["runs"] == analysis.input_noise(model, *few).runs
    assert len(found["landscape_1d"]["losses"]["L_SDT"]) == 5
    ann = analysis.measure(model, data, steps=1, longest=1, neurons=(), **options)
    assert "gradient_similarity" not in ann and "gradient_lengths" in ann

    plain = analysis.measure(model, data, samples=12, points=0, directions=0)
    assert not plain.keys() & {"noise_weights", "noise_inputs", "landscape_1d", "gradient_lengths"}
    other = analysis.measure(CNN6(3), data, **options)
    networks = {"MTT": [found, other], "ANN": [ann], "none": [plain]}
    analysis.write(tmp_path, networks)
    assert json.loads((tmp_path / "analysis.json").read_text()) == {"networks": networks}
    text = (tmp_path / "analysis.md").read_text()
    for name in ("noise_weights", "noise_inputs", "landscape_1d", "gradient_similarity"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.png").stat().st_size > 5000
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {line[0]: line[1:] for line in lines}
    values = [100 * analysis.Noise(**each["noise_weights"]).mean[3] for each in (found, other, ann)]
    middle, spread = sum(values[:2]) / 2, abs(values[0] - values[1]) / 2**0.5
    row = cells["accuracy under noise of 0.02 on the weights, %"]
    assert row == [f"{middle:.1f} ± {spread:.1f}", f"{values[2]:.1f}", "-"]
    assert cells["cosine of the gradients at T = 1 and 3, running statistics"][1:] == ["-", "-"]
    assert f"{ann['gradient_lengths']['weights']:.4g}" in cells["length of the gradient over all convolution weights"]
    assert not any(name.startswith("accuracy under noise of 0 ") for name in cells)
