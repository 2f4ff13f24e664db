"""What is measured, as data: groups of workloads, in two sizes (a CPU with a few cores, a GPU) and a quick choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """One op, or one training step of a model, on inputs of one size.

    ``op`` names an entry of ``cases.CASES``; ``shape`` is that of x without time. ``compiled``: torch.compile takes its
    time for every size, so only these workloads try it. ``only``: the contenders whose names begin so; empty: all.
    ``hot``: a single input, which stays in the cache. ``steps_out``: groups of steps over which spikes are summed.
    """

    group: str
    op: str
    steps: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False
    only: tuple[str, ...] = ()
    hot: bool = False
    steps_out: int | None = None

    @property
    def neurons(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        steps = f"T={self.steps}" + (f" to {self.steps_out}" if self.steps_out else "")
        return f"{self.group}: {self.op} {steps} {shape} {self.dtype} {self.layout}"


FEW = ("snnkern", "plain loop", "SpikingJelly")


def image(
    steps: int, log2: int, dtype: str = "float32", layout: str = "contiguous", compiled: bool = False
) -> Workload:
    """2**log2 neurons as a batch of 128 feature maps of 16 x 16."""
    return Workload("image", "lif", steps, (2**log2 >> 15, 128, 16, 16), dtype, layout, compiled)


def layer(steps: int, neurons: int, dtype: str = "float32") -> Workload:
    """One layer at a long T."""
    return Workload("layer", "lif", steps, (16, neurons // 16), dtype)


def long(op: str, steps: int) -> Workload:
    """One training step of a network for long sequences, 16 of them, of as many channels as spoken digits have."""
    return Workload("long", op, steps, (16, SAMPLES["SpikingMLP"][0]))


def longest(op: str, steps: int) -> Workload:
    """The same where other libraries would take minutes a step: time and memory over T."""
    return replace(long(op, steps), group="longest", only=("snnkern", "plain loop"))


def scaling(steps: int) -> Workload:
    """Is time linear in T?"""
    return Workload("scaling", "lif", steps, (16, 256), only=FEW)


def split(neurons: int) -> Workload:
    """Few neurons for long: what it brings to split time. x is in the cache, as a layer before would leave it."""
    return Workload("split", "lif", 4000, (neurons,), hot=True)


def protocol(neurons: int) -> Workload:
    """A linear layer and a LIF layer: the open benchmark, open-neuromorphic/snn-library-benchmarks."""
    return Workload("protocol", "linear+lif", 500, (16, neurons))


def overhead(compiled: bool = False) -> Workload:
    """Tensors too small to matter: what remains is the call."""
    return Workload("overhead", "lif", 4, (16,), compiled=compiled)


def model(name: str, steps: int, batch: int, dtype: str = "float32") -> Workload:
    """One training step; bfloat16 means autocast."""
    return Workload("models", name, steps, (batch, *SAMPLES[name]), dtype)


def norm(
    steps: int,
    batch: int,
    channels: int,
    dtype: str = "float32",
    layout: str = "contiguous",
    compiled: bool = False,
) -> Workload:
    """Batch norm and LIF behind a convolution of ResNet-19, for images of 32 x 32."""
    side = 32 * 128 // channels
    return Workload("norm", "bn+lif", steps, (batch, channels, side, side), dtype, layout, compiled)


def chain(batch: int, layout: str = "contiguous") -> Workload:
    """Two convolutions of ResNet-19 and what is between: its memory."""
    return Workload("chain", "conv+bn+lif+conv", 6, (batch, 128, 32, 32), "bfloat16", layout)


def sums(steps: int, steps_out: int, log2: int, dtype: str = "float32") -> Workload:
    """Spikes summed over groups of steps: 2**log2 neurons."""
    shape = 2**log2 >> 15, 128, 16, 16
    return Workload("sums", "lif+ttm", steps, shape, dtype, steps_out=steps_out)


def neurons(op: str, steps: int, log2: int) -> Workload:
    """Neurons that few libraries fuse: a leak that is learnt (plif), a surrogate without a formula here (table)."""
    shape = (2**log2 >> 15, 128, 16, 16) if log2 > 15 else (16, 2**log2 >> 4)
    return Workload(op, "lif", steps, shape)


def norm_sums(steps: int, steps_out: int, dtype: str = "float32") -> Workload:
    """The same behind batch norm: 2**18 neurons."""
    return replace(norm(steps, 2, 128, dtype), group="norm-sums", op="bn+lif+ttm", steps_out=steps_out)


def mixed(name: str, batch: int) -> Workload:
    """An update of mixed time-step training, T from 1 to 6."""
    return replace(model(name, 6, batch), group="mixed")


def twin(batch: int, dtype: str = "float32", layout: str = "contiguous") -> Workload:
    """A training step of ResNet-19 and of the same network with ReLU in place of neurons."""
    return replace(model("ResNet19", 6, batch, dtype), group="twin", only=TWIN, layout=layout)


TWIN = ("snnkern", "SpikingJelly", "ReLU twin")
SAMPLES = {
    **{"ResNet19": (3, 32, 32), "VGGSNN": (2, 48, 48), "SpikingMLP": (70,)},
    **{"ResNet18": (3, 32, 32), "CNN6": (1, 8, 8)},
}
SUMS = ((6, 3), (16, 4), (16, 1))
BOTH = ("float32", "bfloat16")
LONG = [  # of cases.MODELS
    (op, steps)
    for op in ("recurrent", "feedforward", "recurrent CUBA", "recurrent adaptive", "CUBA")
    for steps in (100, 1000)
]
LONGEST = [(op, steps) for op in ("recurrent", "feedforward") for steps in (100, 1000, 10000)]
LAYOUTS = ("contiguous", "channels last")

CPU = [
    *(image(4, log2, compiled=True) for log2 in (16, 18, 20)),
    *(image(steps, log2, compiled=log2 == 18) for steps in (6, 10) for log2 in (16, 18, 20)),
    *(image(steps, log2, "bfloat16") for steps in (4, 6, 10) for log2 in (16, 18, 20)),
    *(image(4, 20, dtype, "channels last") for dtype in BOTH),
    *(layer(128, neurons) for neurons in (256, 4096, 2**17)),
    *(layer(500, neurons) for neurons in (256, 4096, 2**15)),
    *(layer(1000, neurons) for neurons in (256, 4096, 2**14)),
    *(layer(4000, neurons) for neurons in (256, 4096)),
    layer(1000, 4096, "bfloat16"),
    *(scaling(steps) for steps in (500, 1000, 2000, 5000, 10000)),
    *(split(neurons) for neurons in (64, 256, 512)),
    *(protocol(neurons) for neurons in (512, 1024, 2048)),
    model("ResNet19", 2, 2),
    model("VGGSNN", 4, 1),
    *(model("SpikingMLP", steps, 16) for steps in (100, 1000)),
    overhead(compiled=True),
    *(norm(4, 2, 128, dtype, compiled=True) for dtype in BOTH),
    *(norm(6, batch, channels, dtype) for batch, channels in ((2, 256), (2, 512), (8, 128)) for dtype in BOTH),
    *(norm(6, 8, 128, dtype, "channels last") for dtype in BOTH),
    *(sums(steps, steps_out, 18, dtype) for steps, steps_out in SUMS for dtype in BOTH),
    *(norm_sums(steps, steps_out, dtype) for steps, steps_out in SUMS for dtype in BOTH),
    *(neurons(op, steps, log2) for op in ("plif", "table") for steps, log2 in ((4, 18), (4, 20), (128, 12))),
    *(long(op, steps) for op, steps in LONG),
    *(longest(op, steps) for op, steps in LONGEST),
    chain(4),
    *(twin(4, dtype) for dtype in BOTH),
    mixed("CNN6", 60),
    mixed("ResNet18", 4),
]

# The most important first: what the time does not reach is left out and named.
GPU = [
    *(image(4, log2, dtype) for log2 in (16, 20, 24) for dtype in BOTH),
    *(norm(4, 64, 128, dtype) for dtype in BOTH),
    *(twin(64, "bfloat16", layout) for layout in LAYOUTS),
    chain(64),
    overhead(),
    *(layer(1000, neurons, dtype) for neurons in (4096, 2**18) for dtype in BOTH),
    *(
        model(name, steps, batch, dtype)
        for name, steps, batch in (("ResNet19", 4, 64), ("VGGSNN", 10, 32))
        for dtype in BOTH
    ),
    *(norm(4, 64, 128, dtype, "channels last") for dtype in BOTH),
    *(norm(6, 64, channels, dtype) for channels in (128, 256, 512) for dtype in BOTH),
    *(sums(steps, steps_out, 24, dtype) for steps, steps_out in ((6, 3), (16, 4)) for dtype in BOTH),
    *(neurons(op, steps, log2) for op in ("plif", "table") for steps, log2 in ((4, 22), (128, 18))),
    twin(64),
    *(scaling(steps) for steps in (500, 1000, 2000, 5000, 10000)),
    *(long(op, steps) for op, steps in LONG),
    *(longest(op, steps) for op, steps in LONGEST),
    *(model("SpikingMLP", steps, 256) for steps in (100, 1000)),
    *(protocol(neurons) for neurons in (512, 4096, 16384)),
    *(image(4, log2, dtype) for log2 in (18, 26) for dtype in BOTH),
    *(image(4, 22, dtype, "channels last") for dtype in BOTH),
    *(image(4, 22, dtype, compiled=True) for dtype in BOTH),
    *(norm(4, 64, 256, dtype, compiled=True) for dtype in BOTH),
    chain(64, "channels last"),
    *(image(10, log2, dtype) for log2 in (16, 20, 24) for dtype in BOTH),
    *(layer(steps, neurons) for steps in (128, 500) for neurons in (256, 4096, 2**18)),
    *(layer(4000, neurons) for neurons in (256, 4096, 2**18)),
    *(protocol(neurons) for neurons in (2048, 8192)),
    *(image(6, log2, dtype) for log2 in (16, 20, 24, 26) for dtype in BOTH),
    image(10, 26),
]

QUICK = [
    replace(workload, only=FEW)
    for workload in (
        *(image(4, 16), image(16, 18), image(4, 18, "bfloat16")),
        *(layer(128, 4096), layer(1000, 4096)),
        norm(4, 1, 512),
        model("SpikingMLP", 100, 16),
        overhead(),
    )
]


def workloads(device: str, quick: bool = False, groups: tuple[str, ...] = ()) -> list[Workload]:
    chosen = QUICK if quick else GPU if device == "cuda" else CPU
    return [workload for workload in chosen if not groups or workload.group in groups]
