"""The neuron once more, in NumPy: a judge of the reference, and of every backend's gradients.

Forward is in the floats of the state, each operation of the docstring of ``snnkern.lif`` rounded once. The adjoint is
in float64, from the potentials that forward had, and says of each number how far rounding may take it: ``Rounded``.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

import snnkern
from snnkern.spec.layout import state_dtype
from snnkern.surrogate import Dspike, Integer


class Step(NamedTuple):
    """[neurons]: what the membrane received, the potential before and behind, not reset, the step's threshold, the
    spike, and whether the lower bound held."""

    x: np.ndarray
    v: np.ndarray
    h: np.ndarray
    threshold: np.ndarray
    s: np.ndarray
    held: np.ndarray


class Judged(NamedTuple):
    spikes: np.ndarray  # [T, neurons]
    potentials: np.ndarray  # after every step
    states: list  # after the last: [neurons] each
    steps: list[Step]
    form: str
    leak: np.ndarray


def without_time(x, time_dim):
    return [*x.shape[:time_dim], *x.shape[time_dim + 1 :]]


def time_first(t, time_dim):
    """[T, neurons]"""
    t = t.detach().cpu().movedim(time_dim, 0)
    return t.reshape(len(t), math.prod(t.shape[1:]))


def _of_neurons(t, shape, dtype):
    """A number, or a tensor that broadcasts to ``shape``: [neurons]."""
    return torch.as_tensor(t, dtype=dtype, device="cpu").detach().expand(shape).reshape(-1).numpy()


def _form(neuron):
    for name in ("decay", "tau", "inverse_tau"):
        leak = neuron.get(name)
        if type(leak) is float and leak == math.inf:
            return "decay", 1.0
        if leak is not None:
            return name, leak
    return "decay", 0.5


def _states(v, i, a, neuron):
    return [v, *([i] if "synapse_decay" in neuron else []), *([a] if "threshold_decay" in neuron else [])]


@np.errstate(all="ignore")
def judge(x, v, neuron) -> Judged:
    """``snnkern.lif(x, v, **neuron)``, spikes as many as x has steps."""
    shape, state = without_time(x, neuron["time_dim"]), state_dtype(x.dtype)
    x, number = time_first(x, neuron["time_dim"]).to(state).numpy(), np.dtype(str(state)[6:]).type
    form, leak = _form(neuron)
    leak, threshold = _of_neurons(leak, shape, state), _of_neurons(neuron["threshold"], shape, state)
    bias = None if neuron["bias"] is None else _of_neurons(neuron["bias"], shape, state)
    reset, v_min, surrogate = neuron["reset"], neuron["v_min"], neuron["surrogate"]
    rest, given = number(reset or 0), [] if v is None else list(v) if isinstance(v, tuple) else [v]
    given = [_of_neurons(each, shape, state) for each in given]
    at_rest = neuron.get("tau") is not None or neuron.get("inverse_tau") is not None
    v = given[0] if given else np.full(x.shape[1:], rest if at_rest else 0, number)
    i, a = (given[1], given[-1]) if len(given) > 1 else (np.zeros_like(v), np.zeros_like(v))
    fires = np.greater_equal if neuron["fire_at_threshold"] else np.greater
    steps, potentials = [], []
    for r in x:
        if bias is not None:
            r = r + bias
        if "synapse_decay" in neuron:
            r = i = number(neuron["synapse_decay"]) * i + r
        at = threshold
        if "threshold_decay" in neuron:
            at = threshold + number(neuron["threshold_jump"]) * a
        if form == "decay":
            h = leak * v + r
        else:
            change = r - (v - rest) if neuron.get("decay_input", True) else v - rest
            change = change / leak if form == "tau" else change * leak
            h = v + change if neuron.get("decay_input", True) else v - change + r
        held = h <= number(v_min) if v_min is not None else np.zeros_like(h, bool)
        h = np.where(held, number(v_min or 0), h)
        if isinstance(surrogate, Integer):
            u = h / at
            s = np.rint(np.minimum(np.where(u > 0, u, number(0)), number(surrogate.levels)))
        else:
            s = fires(h, at).astype(number)
            if neuron["ternary"]:
                s = s - fires(-h, at).astype(number)
        steps.append(Step(r, v, h, at, s, held))
        v = h - at * s if reset is None else np.where(s != 0, rest, h)
        if "threshold_decay" in neuron:
            a = number(neuron["threshold_decay"]) * a + s
        potentials.append(v)
    spikes = np.stack([step.s for step in steps]) if steps else x
    return Judged(spikes, np.stack(potentials) if steps else x, _states(v, i, a, neuron), steps, form, leak)


class Rounded(NamedTuple):
    """A number, float64, and by how many of its units in the last place another order of rounding may change it, times
    their size: to first order the sum, over all operations, of what each result is times how much of it arrives."""

    value: torch.Tensor
    error: torch.Tensor

    def __add__(self, other):
        value = self.value + other.value
        return Rounded(value, self.error + other.error + value.abs())

    def by(self, factor, error=None):
        """Times ``factor``, which is ``error`` units off, one of its own if None. Nothing times infinity is nothing."""
        value = self.value * factor
        error = self.error * factor.abs() + self.value.abs() * (factor.abs() if error is None else error)
        nothing = (factor == 0) & ~self.value.isnan() | (self.value == 0) & ~factor.isnan()
        error = torch.where(error.isnan(), torch.where(nothing & self.error.isfinite(), 0.0, math.inf), error)
        return Rounded(torch.where(nothing, 0.0, value), error)

    def where(self, condition):
        """Else nothing, or, of what is infinite or not a number, something or other."""
        lost = torch.where(self.value.isfinite() & self.error.isfinite(), 0.0, math.inf)
        return Rounded(torch.where(condition, self.value, 0.0), torch.where(condition, self.error, lost))


def _exact(t):
    return Rounded(t, torch.zeros_like(t))


def _slope(surrogate, u):
    """The derivative, and how far off it is if its argument is."""
    g = surrogate.grad(u)
    off = (surrogate.grad(u + (u.abs() + 1) * 2**-10) - g).abs() * 2**10
    if isinstance(surrogate, Dspike):  # 1 - tanh^2, in the reference
        off = off + surrogate.grad(torch.zeros_like(u))
    least = 2**-120 * surrogate.grad(torch.zeros_like(u)).clamp(min=1.0)  # of what is then multiplied by a large peak
    lost = torch.where(g.abs() < least, g.abs() * 2**50, 0.0)  # what underflows, or whose inverse overflows
    return g, g.abs() + off + lost


class Gradients(NamedTuple):
    x: Rounded  # [T, neurons]
    states: list[Rounded]  # [neurons], as all others
    leak: Rounded
    threshold: Rounded
    bias: Rounded


@np.errstate(all="ignore")
def adjoint(found: Judged, x, neuron, grads) -> Gradients:
    """For ``grads`` of what ``lif`` returns. Of one step or more."""
    double = lambda t: torch.from_numpy(np.asarray(t)).double()  # noqa: E731
    front, surrogate, hard = neuron["time_dim"], neuron["surrogate"], neuron["reset"] is not None
    number = found.leak.dtype.type
    rest, leak = float(number(neuron["reset"] or 0)), double(found.leak)
    of_input = neuron.get("decay_input", True) and found.form != "decay"
    inverse = 1 / leak if found.form == "tau" else leak
    gain_of_x, gain_of_v = (inverse if of_input else torch.ones_like(leak)), 1 - inverse
    if found.form == "decay":
        gain_of_v = leak
    grad_s = time_first(snnkern.ttm(grads[0], x.shape[front], front, backend="reference"), front).double()
    sequence = neuron["return_v"] == "sequence"
    zero = _exact(torch.zeros_like(leak))
    states = [_exact(g.reshape(-1).cpu().double()) for g in grads[1:] if not sequence] or [zero] * 3
    v, i, a = states[0], states[1] if len(states) > 1 else zero, states[-1]
    of_leak = of_threshold = of_bias = zero
    of_x = []
    for t in reversed(range(len(found.steps))):
        step = found.steps[t]
        h, at, s = double(step.h), double(step.threshold), double(step.s)
        g = _exact(grad_s[t])
        if "threshold_decay" in neuron:
            g = g + a
        if sequence:
            v = v + _exact(time_first(grads[1], front)[t].double())
        if isinstance(surrogate, Integer):
            u = double(step.h / step.threshold)
            rise, off = (each / at for each in _slope(surrogate, u))
            by_h = of_event = rise, off
            by_at = of_event_at = -rise * u, off * u.abs()
        else:
            (up, off_up), (down, off_down) = _slope(surrogate, double(step.h - step.threshold)), (0 * h, 0 * h)
            if neuron["ternary"]:
                down, off_down = _slope(surrogate, double(-step.h - step.threshold))
            off = off_up + off_down
            by_h, by_at = (up + down, off), (down - up, off)
            of_event, of_event_at = ((up - down, off), (-up - down, off)) if hard else (by_h, by_at)
        of_h, of_at = g.by(*by_h), g.by(*by_at)
        of_h = of_h + (v.where(s == 0) if hard else v)
        if not hard:
            of_at = of_at + v.by(-s)
        if not neuron["detach_reset"]:
            change = v.by(rest - h if hard else -at)
            of_h, of_at = of_h + change.by(*of_event), of_at + change.by(*of_event_at)
        of_h = Rounded(*(t.masked_fill(torch.from_numpy(step.held), 0.0) for t in of_h))  # whatever came back
        far = of_h.value.abs() > float(np.finfo(number).max)  # whatever it is multiplied by
        of_h = of_h._replace(error=of_h.error.masked_fill(far, math.inf))
        above = double(step.v) - (0 if found.form == "decay" else rest)
        drive = above if found.form == "decay" else double(step.x) - above if of_input else -above
        of_leak = of_leak + of_h.by(drive, drive.abs() + double(step.x).abs())
        of_threshold = of_threshold + of_at
        if "threshold_decay" in neuron:
            decay, jump = (double(number(neuron[name])) for name in ("threshold_decay", "threshold_jump"))
            a = a.by(decay) + of_at.by(jump)
        received = of_h.by(gain_of_x)
        if "synapse_decay" in neuron:
            received = received + i
            i = received.by(double(number(neuron["synapse_decay"])))
        of_bias = of_bias + received
        of_x.append(received)
        v = of_h.by(gain_of_v, None if found.form == "decay" else 1 + inverse)  # autograd adds the two terms up
    if found.form == "tau":
        of_leak = of_leak.by(-inverse * inverse)
    of_x = Rounded(*(torch.stack(parts[::-1]) for parts in zip(*of_x, strict=True)))
    return Gradients(of_x, _states(v, i, a, neuron), of_leak, of_threshold, of_bias)
