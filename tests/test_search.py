"""Estimated accuracy of temporal configurations, the search of the best, and ``snnkern search`` on a small network."""

import math
import random
from fractions import Fraction
from itertools import pairwise, product

import pytest

from snnkern.methods.mtt_search import Estimate, agreement, energy, fit, search

CIFAR100 = Estimate((0.93, 0.53, 0.59, 0.67, 1.22, 0.48, 1.36, 0.18), 67.11)
CIFAR10 = Estimate((0.49, 0.28, 0.17, 0.37, 0.37, 0.04, 0.05, 0.17), 92.13)


def test_the_published_estimates():
    uniform = [round(CIFAR100.predict([steps] * 8), 2) for steps in range(1, 7)]
    assert uniform == [67.11, 73.07, 74.61, 75.54, 76.19, 76.69]
    assert round(CIFAR100.predict((3, 2, 2, 3, 5, 3, 6, 2)), 2) == 75.07
    assert round(CIFAR10.predict([3] * 8), 2) == 94.57
    assert round(CIFAR10.predict((4, 2, 2, 3, 5, 2, 2, 4)), 2) == 94.63


def test_a_fit_finds_what_made_the_accuracies():
    rng = random.Random(0)
    t = [tuple(rng.randint(1, 6) for _ in range(8)) for _ in range(18)]
    found = fit(t, [CIFAR100.predict(each) for each in t])
    assert found.K == pytest.approx(CIFAR100.K, abs=1e-9) and found.c == pytest.approx(67.11)
    assert agreement(found, t, [CIFAR100.predict(each) for each in t]) == pytest.approx((1, 0), abs=1e-9)
    off = [found.predict(each) + (0.5 if i % 2 else -0.5) for i, each in enumerate(t)]
    assert agreement(found, t, off).rmse == pytest.approx(0.5) and agreement(found, t, off).correlation < 1
    assert agreement(found, t[:1], off[:1]).correlation is None
    worse = fit(t, off)  # least squares: no other estimate is closer
    least = agreement(worse, t, off).rmse
    for i in range(8):
        moved = Estimate(tuple(k + 0.01 * (i == j) for j, k in enumerate(worse.K)), worse.c)
        assert agreement(moved, t, off).rmse > least


@pytest.mark.parametrize(
    ("configurations", "text"),
    [
        ([(1, 2), (2, 1)], "must be at least 3, one more than stages, got 2"),
        ([(1, 2, 5), (2, 1, 5), (2, 2, 5), (1, 1, 5)], "those of stage 3 (counted from 1) never change"),
        (
            [(1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 3, 2)],
            "the steps of stage 2 (counted from 1) follow from those before",
        ),
        ([(1, 2), (2, 1), (3,)], "t must be a number of time steps for each of 2 stages, got (3,)"),
        ([(1, 2), (2, 1), (0, 2)], "t must be at least 1, got 0"),
        ([], "configurations must be at least one, got none"),
    ],
)
def test_configurations_that_settle_no_estimate(configurations, text):
    with pytest.raises(ValueError) as error:
        fit(configurations, [0.5] * len(configurations))
    assert text in str(error.value)


def brute_force(estimate, rates, budget, low, high, monotone):
    """(-accuracy, energy, t), least of all, without rounding."""
    limit = Fraction(budget) * sum(map(Fraction, rates))
    found = []
    for t in product(range(low, high + 1), repeat=len(rates)):
        spent = sum(Fraction(rate) * steps for rate, steps in zip(rates, t, strict=True))
        if spent <= limit and not (monotone and any(a < b for a, b in pairwise(t))):
            worth = sum(Fraction(k * math.sqrt(math.log2(steps))) for k, steps in zip(estimate.K, t, strict=True))
            found.append((-worth, spent, t))
    return min(found)[2]


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_search_equals_brute_force(ties, monotone):
    rng = random.Random(1)
    for _ in range(60):
        stages, high = rng.randint(1, 4), rng.randint(1, 5)
        low = rng.randint(1, high)
        weights = [rng.choice((-0.5, 0.0, 0.5, 1.0)) if ties else rng.gauss(0.5, 1) for _ in range(stages)]
        rates = [rng.choice((0.0, 0.1, 0.2)) if ties else 0.3 * rng.random() for _ in range(stages)]
        budget = rng.choice((low, high, (low + high) / 2, rng.uniform(low, high)))
        asked = Estimate(tuple(weights), 50.0), rates, budget, low, high, monotone
        found = search(*asked)
        assert found.t == brute_force(*asked), asked
        assert found.accuracy == asked[0].predict(found.t) and found.energy == energy(found.t, rates)


def test_search_of_deep_networks():
    """More stages than can be tried: no worse than the uniform configuration, better with more to spend."""
    rng = random.Random(2)
    for stages, high in ((8, 6), (16, 6), (35, 4)):
        for alike in (False, True):
            weights = [0.7 if alike else rng.uniform(0.1, 1.4) for _ in range(stages)]
            rates = [0.1 if alike else rng.uniform(0.03, 0.3) for _ in range(stages)]
            estimate, before = Estimate(tuple(weights), 67.0), 0.0
            for budget in (1, 1.7, 3, high):
                found = search(estimate, rates, budget, 1, high)
                assert found.energy <= budget * math.fsum(rates) * (1 + 1e-12)
                assert found.accuracy >= max(before, estimate.predict([int(budget)] * stages))
                assert found.nodes < 100_000
                before = found.accuracy
            assert found.t == (high,) * stages


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"budget": 1.5}, "budget must be at least low, 2, as no configuration costs less, got 1.5"),
        ({"rates": [0.1]}, "rates must be one for each of 2 stages, got 1"),
        ({"rates": [0.1, -0.1]}, "rates must not be negative, got -0.1"),
        ({"rates": [0.1, math.nan]}, "rates must be finite, got nan"),
        ({"high": 1}, "high must be at least low, 2, got 1"),
        ({"low": 0}, "low must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_searched(changed, text):
    with pytest.raises(ValueError) as error:
        search(Estimate((1.0, 1.0), 0.0), **({"rates": [0.1, 0.2], "budget": 3, "low": 2, "high": 6} | changed))
    assert text in str(error.value)
