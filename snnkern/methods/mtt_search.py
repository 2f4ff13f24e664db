"""The best temporal configuration of a network with mixed time steps: accuracy estimated, energy bounded.

::

    acc(t) = sum_i K_i sqrt(log2 t_i) + c          least squares on a few measured configurations t
    EC(t)  = sum_i t_i R_i                         energy; R_i is the mean firing rate of stage i in the uniform network
    best   = argmax acc(t)    with  EC(t) <= T_g sum_i R_i  and  low <= t_i <= high

The paper prints strict bounds, low < t_i < high, but its own optimum reaches them. Its K for CIFAR10 are those of
accuracies as fractions, beside a c in percent: in one unit they are 100 times as large.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, sections 4.3.3 and 5.3, appendices A.3
and A.9.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch

from ..spec.arguments import number, positive

__all__ = ["Agreement", "Best", "Estimate", "agreement", "energy", "fit", "search"]


@dataclass(frozen=True)
class Estimate:
    """``acc(t) = sum_i K_i sqrt(log2 t_i) + c``, in the unit of the accuracies that it was fitted to."""

    K: tuple[float, ...]  # of every stage
    c: float  # accuracy of the uniform network of one step

    def predict(self, t: Sequence[int]) -> float:
        (t,) = _checked([t], len(self.K))
        return math.fsum([self.c, *(k * _gain(steps) for k, steps in zip(self.K, t, strict=True))])


class Agreement(NamedTuple):
    """Of estimated and measured accuracies."""

    correlation: float | None  # Pearson's; None where either does not vary
    rmse: float


class Best(NamedTuple):
    """What ``search`` found."""

    t: tuple[int, ...]
    accuracy: float  # estimated
    energy: float  # EC(t)
    nodes: int  # partial configurations that were looked at


def fit(configurations: Sequence[Sequence[int]], accuracies: Sequence[float]) -> Estimate:
    """The estimate with the least sum of squared errors.

    Args:
        configurations: a number of time steps per stage each; at least one more than there are stages.
        accuracies: measured, one for each.

    Raises: ValueError where these settle no estimate; it names the stages whose K stays open.

    Source: section 5.3 (18 random configurations of 8 stages).
    """
    configurations = _checked(configurations)
    accuracies = [number("accuracies", value) for value in accuracies]
    if len(accuracies) != len(configurations):
        raise ValueError(
            f"accuracies must be one for each of {len(configurations)} configurations, got {len(accuracies)}"
        )
    stages = len(configurations[0])
    if len(configurations) <= stages:
        raise ValueError(
            f"configurations must be at least {stages + 1}, one more than stages, got {len(configurations)}"
        )
    still = [i + 1 for i, values in enumerate(zip(*configurations, strict=True)) if len(set(values)) == 1]
    if still:
        raise ValueError(f"configurations must vary the steps of every stage, those of {_named(still)} never change")
    rows = [[*map(_gain, t), 1.0] for t in configurations]
    a, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(accuracies, dtype=torch.float64)
    if torch.linalg.matrix_rank(a) <= stages:
        first = torch.cat([a[:, -1:], a[:, :-1]], dim=1)
        ranks = [int(torch.linalg.matrix_rank(first[:, : i + 1])) for i in range(stages + 1)]
        bound = [i for i in range(1, stages + 1) if ranks[i] == ranks[i - 1]]
        raise ValueError(
            f"configurations must tell the stages apart, the steps of {_named(bound)} follow from those before"
        )
    *k, c = torch.linalg.lstsq(a, b, driver="gelsd").solution.tolist()
    return Estimate(tuple(k), c)


def agreement(estimate: Estimate, configurations: Sequence[Sequence[int]], accuracies: Sequence[float]) -> Agreement:
    """How well the estimate agrees with measured accuracies, such as those of configurations it was not fitted to."""
    guesses = [estimate.predict(t) for t in configurations]
    errors = [guess - accuracy for guess, accuracy in zip(guesses, accuracies, strict=True)]
    varied = len(set(guesses)) > 1 and len(set(accuracies)) > 1
    correlation = statistics.correlation(guesses, accuracies) if varied else None
    return Agreement(correlation, math.sqrt(statistics.fmean(error**2 for error in errors)))


def energy(t: Sequence[int], rates: Sequence[float]) -> float:
    """``EC(t) = sum_i t_i R_i``, in spikes per neuron, added up over the stages.

    Args:
        t: a number of time steps per stage.
        rates: R, spikes per neuron and step of every stage; see ``snnkern.analysis.stage_rates``.

    Source: appendix A.3.
    """
    (t,) = _checked([t], len(rates))
    return math.fsum(steps * rate for steps, rate in zip(t, rates, strict=True))


def search(
    estimate: Estimate, rates: Sequence[float], budget: float, low: int, high: int, monotone: bool = False
) -> Best:
    """The configuration of the greatest estimated accuracy that costs no more than the uniform one of ``budget`` steps.

    Exact: terms and costs are added up and compared without rounding. Of several that are equally accurate it is one
    that costs least, and of these the first in lexicographic order.

    Args:
        estimate: as ``fit`` gives it.
        rates: R, one per stage; finite, not negative.
        budget: T_g, from ``low`` up; need not be whole.
        low, high: least and greatest number of steps of a stage.
        monotone: t must not increase from one stage to the next.

    Depth first, stage after stage. A partial configuration is left when another of the same stages was at least as
    accurate and cost no more, or when the bound, in which the remaining stages take any mixture of two neighbouring
    numbers of steps (the linear relaxation), is below what is known to be reached.

    Source: appendix A.3 (depth-first search with pruning; the bounds are chosen here).
    """
    stages, low, high = len(estimate.K), positive("low", low), positive("high", high)
    weights, rates = [number("K", k) for k in estimate.K], [number("rates", rate) for rate in rates]
    budget = number("budget", budget)
    if len(rates) != stages:
        raise ValueError(f"rates must be one for each of {stages} stages, got {len(rates)}")
    if min(rates) < 0:
        raise ValueError(f"rates must not be negative, got {min(rates)!r}")
    if high < low:
        raise ValueError(f"high must be at least low, {low}, got {high}")
    if budget < low:
        raise ValueError(f"budget must be at least low, {low}, as no configuration costs less, got {budget!r}")

    steps = range(low, high + 1)
    values = _whole([[Fraction(k * _gain(t)) for t in steps] for k in weights])
    (limit,), *costs = _whole(
        [[Fraction(budget) * sum(map(Fraction, rates))], *([Fraction(rate) * t for t in steps] for rate in rates)]
    )
    caps = range(len(steps)) if monotone else [len(steps) - 1]  # places in ``steps``
    bounds = {cap: _bounds(values, costs, cap) for cap in caps}
    fronts = [{cap: ([-1], [-math.inf]) for cap in caps} for _ in range(stages)]  # costs and values, both ascending
    reached = -math.inf if monotone else bounds[caps[-1]][0].whole(limit)
    best, nodes, chosen = None, 0, [0] * stages

    def enter(stage: int, cap: int, value: int, cost: int) -> None:
        nonlocal best, nodes, reached
        nodes += 1
        if stage == stages:
            found = (-value, cost, tuple(chosen))
            if best is None or found < best:
                best, reached = found, max(reached, value)
            return
        if value + bounds[cap][stage].most(limit - cost) < reached or _dominated(*fronts[stage][cap], cost, value):
            return
        for place in range(cap + 1):
            spent = cost + costs[stage][place]
            if spent + bounds[place if monotone else cap][stage + 1].cost <= limit:
                chosen[stage] = place
                enter(stage + 1, place if monotone else cap, value + values[stage][place], spent)

    enter(0, caps[-1], 0, 0)
    t = tuple(steps[place] for place in best[2])
    return Best(t, estimate.predict(t), energy(t, rates), nodes)


@dataclass(frozen=True)
class _Bound:
    """Of the stages from one on: the most value for a cost if their steps could be mixed."""

    cost: int  # with each at its cheapest
    costs: list[int]  # beyond it, after each gain
    values: list[int]
    slopes: list[tuple[int, int]]  # value and cost of each gain, the most worth the cost first

    def most(self, left: int) -> int:
        """At least the value of whatever costs no more than ``left``, which is at least ``cost``."""
        left -= self.cost
        done = bisect_right(self.costs, left) - 1
        if done == len(self.slopes):
            return self.values[done]
        value, cost = self.slopes[done]
        return self.values[done] + (left - self.costs[done]) * value // cost

    def whole(self, left: int) -> int:
        """The value of what costs no more and mixes nothing."""
        return self.values[bisect_right(self.costs, left - self.cost) - 1]


def _bounds(values: list[list[int]], costs: list[list[int]], cap: int) -> list[_Bound]:
    """For the stages from each on, and for none, with none beyond the place ``cap``."""
    base_cost, base_value, gains = 0, 0, []
    found = [_Bound(0, [0], [0], [])]
    for value, cost in zip(reversed(values), reversed(costs), strict=True):
        hull: list[tuple[int, int]] = []  # (cost, value), upper concave, from the cheapest
        for point in zip(cost[: cap + 1], value[: cap + 1], strict=True):
            if hull and point[1] <= hull[-1][1]:
                continue
            while hull and (hull[-1][0] == point[0] or (len(hull) > 1 and not _concave(hull[-2], hull[-1], point))):
                hull.pop()
            hull.append(point)
        base_cost, base_value = base_cost + hull[0][0], base_value + hull[0][1]
        gains += [(b[1] - a[1], b[0] - a[0]) for a, b in pairwise(hull)]
        gains.sort(key=lambda gain: Fraction(*gain), reverse=True)
        sums_cost, sums_value = [0], [base_value]
        for gain, price in gains:
            sums_cost.append(sums_cost[-1] + price)
            sums_value.append(sums_value[-1] + gain)
        found.append(_Bound(base_cost, sums_cost, sums_value, list(gains)))
    return found[::-1]


def _concave(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) > (c[1] - b[1]) * (b[0] - a[0])


def _dominated(costs: list, values: list, cost: int, value: int) -> bool:
    """Whether an entry costs no more and is worth no less; if not, this one joins in place of those that it beats."""
    place = bisect_right(costs, cost)
    if values[place - 1] >= value:
        return True
    end = bisect_right(values, value, place)
    start = place - (costs[place - 1] == cost)
    costs[start:end], values[start:end] = [cost], [value]
    return False


def _whole(rows: list[list[Fraction]]) -> list[list[int]]:
    """The same numbers in a common unit, in which all are whole."""
    unit = math.lcm(*(value.denominator for row in rows for value in row))
    return [[int(value * unit) for value in row] for row in rows]


def _gain(steps: int) -> float:
    return math.sqrt(math.log2(steps))


def _checked(configurations: Sequence[Sequence[int]], stages: int | None = None) -> list[tuple[int, ...]]:
    checked = [tuple(positive("t", steps) for steps in t) for t in configurations]
    if not checked:
        raise ValueError("configurations must be at least one, got none")
    stages = len(checked[0]) if stages is None else stages
    for t in checked:
        if len(t) != stages or not t:
            raise ValueError(f"t must be a number of time steps for each of {stages} stages, got {t}")
    return checked


def _named(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))} (counted from 1)"
