"""Event-driven inference, as an asynchronous chip does it: spikes one by one in the order of time, no frames, no clock.

A network is a row of synapses (convolutions, linear layers, average pools) and ``nn.IAF`` neurons without biases, which
cannot exist without a clock. An event adds the weights of its synapses to the neurons that they reach, whose potential
has a lower bound; then every neuron of the layer at or above the threshold fires once and keeps the rest of its charge,
which may let it fire at the layer's next event. These spikes have run through all layers before the next event of the
input is taken. Simultaneous events are taken as they stand, spikes that one event causes in a layer in the order of
their neurons: channel by channel, row by row.

Two exact relations to the clocked network, in the dtype of the weights:

- every layer by itself: given its input with one spike a step, T = the number of spikes, the clocked layer fires the
  same spikes;
- the whole network with ``serial=False``, where all that one event of the input causes in a layer arrives at the next
  together, and an event of the input is one step of every layer: given one event a step, T = the number of events, the
  clocked network fires the same spikes, up to the rounding of sums of several weights.

Source: Du et al., "Temporal Flexibility in Spiking Neural Networks", ICLR 2025, section 5.2 and table 7: on a Speck2e,
whose neuron this is, without the chip's coarse weights, limited rates and delays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import BNLIF, IAF, TdBatchNorm, fold
from ..nn.modes import evaluating

__all__ = ["EventDriven", "Layer", "Response", "event_driven", "place", "respond", "row", "without_biases"]

Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
SYNAPSES = nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
NOTHING = nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.Sequential  # an empty one
NORMS = _BatchNorm, TdBatchNorm, BNLIF
CHUNK = 128  # neurons whose synapses are found at once


@dataclass(frozen=True, eq=False)
class Layer:
    """Synapses and the neurons behind them; input i adds ``weights[a:b]`` to the neurons ``targets[a:b]``, none twice,
    with ``a, b = offsets[i : i + 2]``. Weights of 0 are no synapses."""

    name: str  # of the neurons; of the last synapses where none follow
    offsets: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    neurons: int
    threshold: float | None  # None: a readout, which adds up
    v_min: float | None


class Response(NamedTuple):
    """Of a network to the events of one sample."""

    output: np.ndarray  # [classes]: what the readout receives in all, or the spikes of the last neurons
    spikes: dict[str, np.ndarray]  # by layer [S, 2] in order: number of the event that caused it, neuron
    operations: dict[str, int]  # by layer: synapses that a spike or an event has crossed


class EventDriven(NamedTuple):
    """Of a network on a test set; numbers by layer are means over the samples."""

    accuracy: float  # a fraction, of the argmax of ``outputs``
    outputs: np.ndarray  # [N, classes]
    events: float  # of the input
    spikes: dict[str, float]  # by layer
    operations: dict[str, float]  # by layer: synapses that a spike or an event has crossed
    samples: int


def row(model: nn.Module, shape: Sequence[int]) -> list[Layer]:
    """The layers of a network whose frames have this shape, [C, H, W] or [inputs].

    The model takes [T, N, *shape], as those of ``snnkern.models`` do. One pass, in which layers put out random numbers,
    shows that each takes what the one before puts out, and that nothing is added or changed in between.

    Raises: ValueError, which names the layer: a bias, a batch norm, neurons other than ``IAF``, another layer, or
        layers that are not in a row.
    """
    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            raise ValueError(f"{name} is a batch norm, which is to be folded first: see analysis.without_biases")
        if getattr(module, "bias", None) is not None and module.bias.count_nonzero():
            raise ValueError(f"{name} has a bias, which cannot exist without a clock: see analysis.without_biases")
    layers, path, inputs = [], [], prod(shape)
    like = next(model.parameters())
    for name, module, given in _trace(model, shape, like):
        if isinstance(module, IAF):
            layers.append(_layer(name, path, module, inputs, like))
            path, inputs = [], layers[-1].neurons
        else:
            path.append((module, _sample(name, module, given)))
    if path:
        layers.append(_layer(name, path, None, inputs, like))
    return layers


def place(events: Events, shape: Sequence[int]) -> np.ndarray:
    """The neuron of the input for each of the events: ``(p H + y) W + x``, int64.

    Args:
        events: arrays (t, x, y, p) of equal length in order of time: time in any unit, column, row, and channel.
        shape: [C, H, W] of the input.

    Raises: ValueError for events that are out of order or out of place.
    """
    if len(events) != 4 or len({len(column) for column in events}) != 1:
        raise ValueError(f"events must be four arrays (t, x, y, p) of equal length, got {[*map(np.shape, events)]}")
    t, *rest = map(np.asarray, events)
    if (t[1:] < t[:-1]).any():
        raise ValueError(f"events must be in order of time, number {int((t[1:] < t[:-1]).argmax()) + 1} is not")
    for name, column, size in zip("xyp", rest, reversed(shape), strict=True):
        if len(column) and not 0 <= column.min() <= column.max() < size:
            raise ValueError(f"events must have {name} from 0 to {size - 1}, got {column.min()} to {column.max()}")
    x, y, p = (column.astype(np.int64) for column in rest)
    return (p * shape[1] + y) * shape[2] + x


def respond(layers: Sequence[Layer], inputs: np.ndarray, serial: bool = True) -> Response:
    """What a network does with events at these neurons of its input, one after the other; see the module.

    Args:
        layers: as ``row`` gives them.
        inputs: [E], whole numbers.
        serial: False: the spikes that one event of the input causes in a layer arrive at the next layer together.
    """
    inputs, size = np.asarray(inputs), len(layers[0].offsets) - 1
    if len(inputs) and not (inputs.dtype.kind in "iu" and 0 <= inputs.min() <= inputs.max() < size):
        raise ValueError(f"inputs must be whole numbers from 0 to {size - 1}, got {inputs.min()} to {inputs.max()}")
    spikes, operations = {}, {}
    arriving = np.stack([np.arange(len(inputs)), inputs.astype(np.int64)], 1)
    for layer in layers:
        operations[layer.name] = int(np.diff(layer.offsets)[arriving[:, 1]].sum())
        if layer.threshold is None:
            return Response(_sum(layer, arriving[:, 1]), spikes, operations)
        steps = arriving[:, 0] if serial else np.arange(len(inputs))
        first = np.arange(len(arriving) + 1) if serial else np.searchsorted(arriving[:, 0], np.arange(len(inputs) + 1))
        arriving = spikes[layer.name] = _fire(layer, arriving[:, 1], steps, first)
    return Response(np.bincount(arriving[:, 1], minlength=layer.neurons), spikes, operations)


def event_driven(
    model: nn.Module,
    recordings: Iterable[tuple[Events, int]],
    shape: Sequence[int],
    serial: bool = True,
    check: Callable[[], None] = lambda: None,
) -> EventDriven:
    """Tests a network event by event, as an asynchronous chip computes it; see the module.

    Args:
        model: layers in a row without biases: convolutions, linear layers, sums over space, ``IAF`` neurons.
        recordings: (events, class) of every sample; events are arrays (t, x, y, p) of equal length in order of time:
            time in any unit, column, row, and channel.
        shape: [C, H, W] of a frame.
        serial: False: the spikes that one event of the input causes in a layer arrive at the next layer together.
        check: called after every recording.

    Raises: ValueError, which names the layer that no such chip has; or for events out of order or out of place.
    """
    layers, answers, correct, events = row(model, shape), [], 0, 0
    spikes = {layer.name: 0 for layer in layers if layer.threshold is not None}
    operations = {layer.name: 0 for layer in layers}
    for recording, target in recordings:
        inputs = place(recording, shape)
        answer = respond(layers, inputs, serial)
        answers.append(answer.output)
        correct += int(answer.output.argmax()) == int(target)
        events += len(inputs)
        for name, found in answer.spikes.items():
            spikes[name] += len(found)
        for name, count in answer.operations.items():
            operations[name] += count
        check()
    if not answers:
        raise ValueError("recordings must be one or more, got none")
    count = len(answers)
    means = ({name: value / count for name, value in total.items()} for total in (spikes, operations))
    return EventDriven(correct / count, np.stack(answers), events / count, *means, count)


def without_biases(model: nn.Module) -> nn.Module:
    """A copy for a chip: the means of batch norms and all biases are 0, and the norms are folded into the layers before
    them. It is another network than before, to be trained further.

    Source: the published code of Du et al., ICLR 2025.
    """
    made = copy.deepcopy(model)
    for module in made.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.zero_()
    if any(isinstance(module, NORMS) for module in made.modules()):
        made = fold(made)
    for module in made.modules():
        if isinstance(module, SYNAPSES) and getattr(module, "bias", None) is not None:
            module.bias = None
    return made


def _trace(model: nn.Module, shape: Sequence[int], like: torch.Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, module and the input's shape of what runs, in order, without what does nothing."""
    drawn = torch.Generator(like.device).manual_seed(0)

    def random(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, dtype=like.dtype, device=like.device)

    seen, last = [], random(shape)
    before = "the input"

    def look(name: str, module: nn.Module):
        def hook(module, given, output):
            nonlocal last, before
            if not isinstance(module, (*SYNAPSES, IAF, *NOTHING)):
                raise ValueError(f"{name} is a {type(module).__name__}, which cannot run event by event; what can: "
                                 f"{', '.join(kind.__name__ for kind in (*SYNAPSES, IAF))}")  # fmt: skip
            (x, *others) = given
            if any(other is not None for other in others) or not torch.equal(x.flatten(), last.flatten()):
                raise ValueError(f"{name} must take what {before} puts out, and nothing else: layers are not in a row")
            if isinstance(module, NOTHING):
                return None
            seen.append((name, module, tuple(x.shape)))
            before, last = name, random(output.shape)
            return last

        return module.register_forward_hook(hook)

    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    handles = [look(name, module) for name, module in leaves]
    try:
        with torch.no_grad(), evaluating(model):
            output = model(last[None, None])
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not torch.equal(output.flatten(), last.flatten()):
        raise ValueError(f"the model must put out what {before} does, got something else")
    return seen


def _sample(name: str, module: nn.Module, given: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample that a module takes."""
    kept = 1 if isinstance(module, nn.Linear) else 2 if isinstance(module, nn.Conv1d) else 3
    if prod(given[:-kept]) != 1:
        raise ValueError(f"{name} must take one frame of a sample at a time, got {tuple(given)}")
    return tuple(given[-kept:])


@torch.no_grad()
def _layer(name: str, path: list, neuron: IAF | None, inputs: int, like: torch.Tensor) -> Layer:
    """What the synapses of a path make of one spike at each of their inputs."""
    rows, columns, values = [], [], []
    for begin in range(0, inputs, CHUNK):
        x = torch.zeros(min(CHUNK, inputs - begin), inputs, dtype=like.dtype, device=like.device)
        x.diagonal(begin).fill_(1)
        for module, shape in path:
            x = module(x.reshape(-1, *shape)).flatten(1)
        source, target = x.nonzero(as_tuple=True)
        rows.append(source.cpu().numpy() + begin)
        columns.append(target.cpu().numpy())
        values.append(x[source, target].cpu().numpy())
    neurons = x.shape[1]
    offsets = np.searchsorted(np.concatenate(rows), np.arange(inputs + 1))
    threshold, v_min = (None, None) if neuron is None else (neuron.spec.threshold, neuron.v_min)
    return Layer(name, offsets, np.concatenate(columns), np.concatenate(values), neurons, threshold, v_min)


def _fire(layer: Layer, arriving: np.ndarray, steps: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[S, 2]: the spikes of a layer, and for each the number of its step: at step k, which has the number ``steps[k]``,
    arrive the spikes ``arriving[first[k] : first[k + 1]]``."""
    v = np.zeros(layer.neurons, layer.weights.dtype)
    fired = []
    for step, begin, end in zip(steps, first[:-1], first[1:], strict=True):
        for source in arriving[begin:end]:
            synapses = slice(layer.offsets[source], layer.offsets[source + 1])
            v[layer.targets[synapses]] += layer.weights[synapses]
        if layer.v_min is not None:
            np.maximum(v, layer.v_min, out=v)
        now = np.flatnonzero(v >= layer.threshold)
        if len(now):
            v[now] -= layer.threshold
            fired.append(np.stack([np.full(len(now), step), now], 1))
    return np.concatenate(fired) if fired else np.empty((0, 2), np.int64)


def _sum(layer: Layer, arriving: np.ndarray) -> np.ndarray:
    counts = np.bincount(arriving, minlength=len(layer.offsets) - 1)
    times = np.repeat(counts, np.diff(layer.offsets))
    return np.bincount(layer.targets, times * layer.weights, layer.neurons)
