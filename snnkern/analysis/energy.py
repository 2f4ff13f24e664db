"""Operations, energy and sparsity of a network, counted from the spikes of a forward pass.

A spike that arrives costs an addition per synapse behind it, an analog input a multiplication and an addition per step:

::

    additions       = sum over layers of  rate of the layer's input * T * MACs
    multiplications = T * MACs of the first layer
    energy          = 0.9 pJ * additions + 4.6 pJ * multiplications      (45 nm)

MACs are the multiply-accumulates of one frame in the same network without spikes (ANN), whose energy is that of as many
additions and multiplications. Batch norm counts nothing, as it can be folded into the weights; neither do neurons,
pools and the sums of shortcuts.

Source: Deng et al., ICLR 2022, section 5.1 (figure 4B); Li et al., "Differentiable Spike", NeurIPS 2021, section 5.4
(table 3, whose numbers these formulas give, in units 1000 times smaller than it prints: the ANN's MAC costs
0.9 + 4.6 pJ there, not the 4.6 pJ of the text). Costs per operation: Horowitz, ISSCC 2014.

Dspike's table 3 takes s * T * A for the additions: one mean rate s of all neurons, and the additions A of the whole
ANN, the first layer's among them. The sum over layers differs wherever rates do: it is more than s * T * A where layers
with many MACs receive many spikes, and always by the first layer, whose analog input adds at every step and not at s.

What they leave open is chosen here. The rate is the mean *value* of the input: spikes averaged by a pool or added by a
shortcut (SEW) or over time (TTM) count as the spikes that they consist of, not as one operation per nonzero. The first
layer's additions are counted beside its multiplications, as in the ANN. The first layer is counted at every step,
though a static image is convolved only once here: hardware that computes step by step cannot know it is static.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..nn import BNLIF, IAF, LIF, LIFNode, LinearLIF, RecurrentLIF, SmoothLIF
from .accuracy import accuracy_over_steps, outputs

__all__ = ["NEURONS", "Energy", "Layer", "accuracy_over_energy", "energy", "joules", "sparsity"]

NEURONS = (LIF, BNLIF, LIFNode, SmoothLIF, IAF)


def joules(additions: float, multiplications: float, add: float = 0.9, multiply: float = 4.6) -> float:
    """Energy of so many operations, in joules.

    Args:
        additions, multiplications: how many.
        add, multiply: cost of one, in picojoules. The defaults are those of 32-bit floats at 45 nm: 0.9 pJ an addition,
            4.6 pJ a multiplication as the papers bill it.
    """
    return (additions * add + multiplications * multiply) * 1e-12


@dataclass(frozen=True)
class Layer:
    """A convolution, linear or recurrent layer, per sample. Of a RecurrentLIF: its weights, which its spikes pass."""

    name: str
    steps: float
    macs: int  # of one frame
    rate: float  # mean of the input
    additions: float
    multiplications: float


@dataclass(frozen=True)
class Energy:
    """Of a network, per sample."""

    layers: list[Layer]  # operations of each
    rates: dict[str, float]  # spikes per neuron and step, by neuron layer
    add: float  # cost of an addition, pJ
    multiply: float  # of a multiplication, pJ

    @property
    def additions(self) -> float:
        return sum(layer.additions for layer in self.layers)

    @property
    def multiplications(self) -> float:
        return sum(layer.multiplications for layer in self.layers)

    @property
    def joules(self) -> float:
        return joules(self.additions, self.multiplications, self.add, self.multiply)

    @property
    def macs(self) -> int:
        """Of the ANN."""
        return sum(layer.macs for layer in self.layers)

    @property
    def ann_joules(self) -> float:
        return joules(self.macs, self.macs, self.add, self.multiply)

    def as_dict(self) -> dict:
        """For JSON."""
        names = "additions", "multiplications", "joules", "macs", "ann_joules"
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    HEADER = ("layer", "steps", "MACs", "input rate", "adds", "mults", "energy, nJ")

    def rows(self) -> list[tuple[str, ...]]:
        """Under ``HEADER``: the layers, the whole, and the ANN, as text."""
        rows = []
        for layer in self.layers:
            spent = joules(layer.additions, layer.multiplications, self.add, self.multiply)
            rows.append(
                (
                    layer.name,
                    f"{layer.steps:g}",
                    f"{layer.macs:,}",
                    "analog" if layer.multiplications else f"{layer.rate:.3f}",
                    f"{layer.additions:,.0f}",
                    f"{layer.multiplications:,.0f}",
                    f"{1e9 * spent:,.1f}",
                )
            )
        whole = f"{self.additions:,.0f}", f"{self.multiplications:,.0f}", f"{1e9 * self.joules:,.1f}"
        ann = f"{self.macs:,}", f"{self.macs:,}", f"{1e9 * self.ann_joules:,.1f}"
        return [*rows, ("all", "", f"{self.macs:,}", "", *whole), ("as an ANN", "1", f"{self.macs:,}", "", *ann)]

    def __rich__(self):
        from rich.table import Table

        table = Table(
            title=f"Operations per sample ({self.add:g} pJ an addition, {self.multiply:g} pJ a multiplication)"
        )
        for i, column in enumerate(self.HEADER):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i)
        *layers, whole, ann = self.rows()
        for i, row in enumerate([*layers, whole, ann]):
            table.add_row(*row, end_section=i == len(layers) - 1)
        return table


def energy(
    model: nn.Module,
    x: torch.Tensor,
    steps: int | None = None,
    batch: int = 256,
    *,
    add: float = 0.9,
    multiply: float = 4.6,
    analog: bool = True,
    neurons: tuple[type[nn.Module], ...] = NEURONS,
) -> Energy:
    """Operations and energy per sample, the mean over x; see the module.

    Args:
        add, multiply: cost of an operation, in picojoules.
        analog: the first layer's input is not spikes, so it multiplies. False: count it like the others (event frames
            of zeros and ones; the papers multiply there, too).
        neurons: the classes of the layers that fire, for networks with others than snnkern's; none for an ANN, whose
            layers all multiply.
    """
    count = _count(model, x, steps, batch, neurons)
    layers = []
    for name, seen in count.layers.items():
        frames = seen.frames / count.samples
        if not layers:  # computed once for a static image
            frames = max(frames, count.first_steps)
        rate = seen.total / seen.elements
        multiplies = (analog and not layers) or not neurons
        operations = frames * seen.macs
        layers.append(
            Layer(
                name,
                frames,
                seen.macs,
                rate,
                operations if multiplies else rate * operations,
                operations if multiplies else 0.0,
            )
        )
    if not layers:
        raise ValueError(f"model must have a convolution or linear layer that runs, {type(model).__name__} has none")
    return Energy(layers, count.rates(), add, multiply)


def sparsity(
    model: nn.Module,
    x: torch.Tensor,
    steps: int | None = None,
    batch: int = 256,
    neurons: tuple[type[nn.Module], ...] = NEURONS,
) -> dict[str, float]:
    """Spikes per neuron and step of every neuron layer, by its name, in the order in which they run.

    ``neurons``: as in ``energy``.

    Source: Li et al., NeurIPS 2021, section 5.4 and figure 4.
    """
    return _count(model, x, steps, batch, neurons).rates()


def accuracy_over_energy(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: Sequence[int], batch: int = 256, **options
) -> list[dict[str, float]]:
    """``steps``, ``accuracy`` (a fraction) and ``joules`` (per sample) for each number of steps.

    ``options`` are those of ``energy``. Source: Deng et al., ICLR 2022, figure 4B.
    """
    rows = []
    for t in steps:
        accuracy = accuracy_over_steps(model, x, y, t, batch)[-1]
        rows.append({"steps": t, "accuracy": accuracy, "joules": energy(model, x, t, batch, **options).joules})
    return rows


@dataclass
class _Seen:
    macs: int = 0
    frames: int = 0
    total: float = 0.0
    elements: int = 0


class _Count:
    def __init__(self) -> None:
        self.layers: dict[str, _Seen] = defaultdict(_Seen)
        self.fired: dict[str, _Seen] = defaultdict(_Seen)
        self.first_steps = 1
        self.samples = 0

    def rates(self) -> dict[str, float]:
        return {name: seen.total / seen.elements for name, seen in self.fired.items()}

    def layer(self, name: str):
        def hook(module, inputs, output):
            (x, *_), seen = inputs, self.layers[name]
            if isinstance(module, (nn.Linear, LinearLIF)):
                frames, seen.macs = x.numel() // module.in_features, module.weight.numel()
            elif isinstance(module, nn.RNNBase):
                frames = x.numel() // module.input_size
                seen.macs = sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
            else:
                frames, seen.macs = len(x), output[0].numel() * module.weight[0].numel()
            seen.frames += frames
            seen.total += x.sum(dtype=torch.float64).item()
            seen.elements += x.numel()

        return hook

    def neuron(self, name: str):
        def hook(module, inputs, output):
            if not self.fired:
                self.first_steps = len(inputs[0])
            seen = self.fired[name]
            seen.total += output.sum(dtype=torch.float64).item()
            received = inputs[0].numel()  # not the output's: it may hold sums over steps
            if isinstance(module, LinearLIF):
                received = received // module.in_features * module.out_features
            seen.elements += received

        return hook

    def feedback(self, name: str):
        def hook(module, inputs, output):
            seen, time_dim = self.layers[name], module.settings["time_dim"]
            received = output.narrow(time_dim, 0, output.shape[time_dim] - 1)  # of the steps before
            seen.macs = module.weight.numel()
            seen.frames += output.numel() // module.features
            seen.total += received.sum(dtype=torch.float64).item()
            seen.elements += output.numel()

        return hook


def _count(model, x, steps, batch, neurons) -> _Count:
    count, handles = _Count(), []
    try:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.RNNBase, LinearLIF)):
                handles.append(module.register_forward_hook(count.layer(name)))
            if isinstance(module, neurons):
                handles.append(module.register_forward_hook(count.neuron(name)))
                if isinstance(module, RecurrentLIF):
                    handles.append(module.register_forward_hook(count.feedback(name)))
        count.samples = outputs(model, x, steps, batch).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return count
