"""What the papers measure on a trained network, as plain data; ``pictures`` draws it and ``report`` writes it all.

Networks are taken as ``snnkern.models`` makes them: static images [N, C, H, W], shown at ``steps`` steps, or frames
[T, N, ...], of which the first ``steps`` are used, to outputs [T, N, classes]. They run in eval mode, in parts of
``batch`` samples on the device of their parameters, and are left as they were.
"""

from .accuracy import Evaluation, accuracy_over_steps, evaluate, moments, outputs
from .asynchronous import EventDriven, event_driven, without_biases
from .energy import Energy, accuracy_over_energy, energy, joules, sparsity
from .landscape import Landscape, landscape, rise
from .report import measure, report, write

__all__ = [
    "Energy",
    "Evaluation",
    "EventDriven",
    "Landscape",
    "accuracy_over_energy",
    "accuracy_over_steps",
    "energy",
    "evaluate",
    "event_driven",
    "joules",
    "landscape",
    "measure",
    "moments",
    "outputs",
    "report",
    "rise",
    "sparsity",
    "without_biases",
    "write",
]
