"""What the papers measure on a trained network, as plain data; ``pictures`` draws it and ``report`` writes it all.

A ``model`` is taken as ``snnkern.models`` makes it: ``x`` are static images [N, C, H, W], shown at ``steps`` steps, or
frames [T, N, ...], of which the first ``steps`` are used (default: the model's own, or all frames), its outputs are
[T, N, classes], ``y`` [N] int64 classes. It runs in eval mode, in parts of ``batch`` samples on the device of its
parameters, and is left as it was; ``gradient_similarity`` also has batch norms of training mode.
"""

from .accuracy import Evaluation, accuracy_over_steps, evaluate, moments, outputs
from .asynchronous import EventDriven, event_driven, without_biases
from .configurations import accuracies, stage_rates
from .energy import Energy, accuracy_over_energy, energy, joules, sparsity
from .gradients import Lengths, Similarity, gradient_lengths, gradient_similarity
from .landscape import Landscape, Line, landscape, line, rise
from .noise import Noise, input_noise, weight_noise
from .report import measure, report, write

__all__ = [
    "Energy",
    "Evaluation",
    "EventDriven",
    "Landscape",
    "Lengths",
    "Line",
    "Noise",
    "Similarity",
    "accuracies",
    "accuracy_over_energy",
    "accuracy_over_steps",
    "energy",
    "evaluate",
    "event_driven",
    "gradient_lengths",
    "gradient_similarity",
    "input_noise",
    "joules",
    "landscape",
    "line",
    "measure",
    "moments",
    "outputs",
    "report",
    "rise",
    "sparsity",
    "stage_rates",
    "weight_noise",
    "without_biases",
    "write",
]
