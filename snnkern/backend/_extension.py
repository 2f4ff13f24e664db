"""The compiled extension, if there is one."""

from __future__ import annotations

import math
from pathlib import Path

from ..spec.layout import DTYPES
from ..spec.neuron import FORMS


def _why(error: ImportError, package: Path) -> str:
    """What to do about the extension that ``package`` cannot import."""
    if found := sorted(path.name for path in package.glob("_C.*")):
        what = f"the compiled extension, {', '.join(found)}, cannot be loaded ({error})"
    else:
        what = "the compiled extension is missing"
    if (package.parent / "CMakeLists.txt").exists():
        build = f"`python -m pip install -e {package.parent}` builds it there"
        return f"{what} in the source folder: {build}; an installed one is imported from any other folder"
    return f"{what}: install a C++ compiler, then snnkern again (pip install --force-reinstall --no-deps)"


try:
    from .. import _C

    _missing = None
except ImportError as error:
    _C = None
    _missing = _why(error, Path(__file__).parents[1])


_no_norm, _no_more = _C and _C.Norm(1, 1, 0, 0), _C and _C.More(*(0, 1, 1) * 3, *(0,) * 7)


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    return _missing


# The structures of csrc/lif.h and csrc/norm.h. Of a tensor they hold the address: who launches holds the tensors, by
# names, until the launch is over.


def neuron_of(spec):
    """LIFSpec, made once."""
    made = spec.__dict__.get("_made")
    if made is None:
        made = spec.__dict__["_made"] = _C.LIFSpec(
            FORMS.index(spec.form),
            math.nan if spec.leak is None else spec.leak,  # not a power of two, whose form is another
            math.nan if spec.threshold is None else spec.threshold,
            spec.fire_at_threshold,
            spec.reset is not None,
            spec.rest,
            spec.v_start,
            spec.detach_reset,
            spec.ternary,
            spec.v_min is not None,
            spec.v_min or 0.0,
            _C.surrogates[spec.surrogate.twin().__name__],
            *spec.surrogate.constants(),
            spec.synapse_decay is not None,
            spec.synapse_decay or 0.0,
            spec.threshold_decay is not None,
            spec.threshold_decay or 0.0,
            spec.threshold_jump,
        )
    return made


def shape_of(layout, split, x):
    return _C.LIFShape(DTYPES.index(x.dtype), *layout[1:], *split)


def forward_of(call, scratch=None):
    """LIFForward, for a ``spec.neuron.Forward``."""
    *tensors, norm, more = call
    return _C.LIFForward(*addresses(*tensors, scratch), norm_of(norm), more_of(more))


def backward_of(call, scratch=None):
    """LIFBackward, for a ``spec.neuron.Backward``."""
    *tensors, norm, pull_push, grad_residual, more = call
    of_norm = *addresses(pull_push, grad_residual), more_of(more)
    return _C.LIFBackward(*addresses(*tensors, scratch), norm_of(norm), *of_norm)


def norm_of(norm):
    """Norm; None: no norm."""
    if norm is None:
        return _no_norm
    return _C.Norm(norm.channels, norm.period, *addresses(norm.table, norm.residual))


def more_of(more):
    """More; None: nothing of it."""
    return _no_more if more is None else _C.More(*words_of(more))


def words_of(more) -> list[int]:
    """What csrc/lif.h's More is made of."""
    words = []
    for p in more[:3]:
        words += (0, 1, 1) if p is None else (*addresses(p.data), p.channels, p.period)
    return words + addresses(*more[3:])


def recurrence_of(recurrence):
    """Recurrence, for a ``spec.neuron.Recurrence``."""
    return _C.Recurrence(recurrence.weight.shape[0], *addresses(*recurrence))


def parameters_of(parameters):
    return _C.NormParameters(*addresses(*parameters))


def plan_of(plan, table, sums):
    """NormPlan, for sums (or moments) of any number of parts; None: there are none."""
    parts = 0 if sums is None else (sums.numel() // sums.shape[-1]) // 2
    return _C.NormPlan(DTYPES.index(table.dtype), table.shape[1], parts, *plan)


def addresses(*tensors) -> list[int]:
    return [0 if t is None else t.data_ptr() or _of_nothing(t) for t in tensors]


def _of_nothing(t) -> int:
    if t.numel():
        raise RuntimeError(f"a tensor of shape {tuple(t.shape)} has no memory: it was freed, or stands for zeros")
    return 0
