import math

import pytest
import torch

from snnkern.losses import sdt, tet

T, N, C = 5, 7, 4


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(T, N, C, generator=generator, dtype=torch.float64)
    return outputs, torch.randint(C, (N,), generator=generator)


def cross_entropy(scores, label):
    return math.log(sum(math.exp(s) for s in scores)) - scores[label]


def test_values_follow_the_formulas(case):
    outputs, target = case
    o, y = outputs.tolist(), target.tolist()
    mean = [[sum(o[t][n][c] for t in range(T)) / T for c in range(C)] for n in range(N)]
    wanted_sdt = sum(cross_entropy(mean[n], y[n]) for n in range(N)) / N
    wanted_ce = sum(cross_entropy(o[t][n], y[n]) for t in range(T) for n in range(N)) / (N * T)
    wanted_mse = sum((s - 0.7) ** 2 for step in o for sample in step for s in sample) / (T * N * C)
    assert sdt(outputs, target).item() == pytest.approx(wanted_sdt, rel=1e-12)
    assert tet(outputs, target).item() == pytest.approx(wanted_ce, rel=1e-12)
    mixed = tet(outputs, target, lamb=0.3, phi=0.7).item()
    assert mixed == pytest.approx(0.7 * wanted_ce + 0.3 * wanted_mse, rel=1e-12)


def test_published_example():
    outputs = torch.tensor([[[0.0, 0.0]], [[-10.0, 0.0]]])
    target = torch.tensor([0])
    assert sdt(outputs, target).item() == pytest.approx(5.0067, abs=1e-4)
    assert tet(outputs, target).item() == pytest.approx(5.3466, abs=1e-4)


def test_gradients_follow_the_formulas(case):
    outputs, target = case
    onehot = torch.nn.functional.one_hot(target, C)
    wanted_sdt = ((outputs.mean(0).softmax(-1) - onehot) / (N * T)).expand(T, N, C)
    wanted_tet = (outputs.softmax(-1) - onehot) / (N * T)
    wanted_mse = 2 * (outputs - 1) / (N * T * C)
    for loss, wanted in (
        (sdt, wanted_sdt),
        (tet, wanted_tet),
        (lambda o, y: tet(o, y, lamb=0.25), 0.75 * wanted_tet + 0.25 * wanted_mse),
        (lambda o, y: tet(o, y, lamb=1.0), wanted_mse),
    ):
        leaf = outputs.clone().requires_grad_()
        loss(leaf, target).backward()
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-6, atol=1e-12)


def test_tet_bounds_sdt_by_a_gap_that_no_label_changes(case):
    outputs, target = case
    gap = (outputs.logsumexp(-1).mean(0) - outputs.mean(0).logsumexp(-1)).mean()
    assert gap > 0.1
    for labels in (target, (target + 1) % C):
        torch.testing.assert_close(tet(outputs, labels) - sdt(outputs, labels), gap)
    shifted = outputs[:1] + torch.randn(T, N, 1, dtype=torch.float64)  # differ by constants along the classes only
    torch.testing.assert_close(tet(shifted, target), sdt(shifted, target))


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1, -3])
def test_time_dim(case, time_dim):
    outputs, target = case
    moved = outputs.movedim(0, time_dim)
    for loss in (sdt, tet):
        torch.testing.assert_close(loss(moved, target, time_dim=time_dim), loss(outputs, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_outputs_are_computed_in_float32(case, dtype):
    outputs, target = case
    outputs = outputs.to(dtype)
    for loss in (sdt, tet):
        value = loss(outputs, target)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(outputs.float(), target))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outputs": [[[0.0]]]}, TypeError, "outputs must be a floating-point tensor, got list"),
        ({"outputs": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "outputs must be .* torch.int64"),
        ({"outputs": torch.zeros(3, 4)}, ValueError, r"outputs must have three dimensions.*\(3, 4\)"),
        ({"outputs": torch.zeros(0, 3, 4)}, ValueError, "outputs must have three dimensions, none of them 0 long"),
        ({"target": torch.zeros(3)}, TypeError, "target must be an int64 tensor .* torch.float32"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target must have shape \(3,\)"),
        ({"time_dim": 3}, ValueError, "time_dim must name"),
        ({"time_dim": 0.0}, TypeError, "time_dim must be an int"),
        ({"lamb": 1.5}, ValueError, r"lamb must be in \[0, 1\], got 1.5"),
        ({"lamb": "0"}, TypeError, "lamb must be a float"),
        ({"phi": math.nan}, ValueError, "phi must be finite"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"outputs": torch.zeros(2, 3, 4), "target": torch.zeros(3, dtype=torch.int64)} | change
    for loss in (tet,) if {"lamb", "phi"} & change.keys() else (sdt, tet):
        with pytest.raises(error, match=message):
            loss(**arguments)
