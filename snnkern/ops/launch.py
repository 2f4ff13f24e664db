"""What kernels write is allocated, and they are launched; arguments have been checked. With a backend whose kernels do
nothing this only allocates, which is what tracing needs (``library.py``)."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch

from ..backend.reference.bn_lif import gather
from ..spec.layout import Layout, arrange, state_dtype
from ..spec.neuron import Backward, Forward, LIFSpec, More, Parameter, Recurrence
from ..spec.norm import ROWS, Batch, Norm, Parameters, Plan
from ..spec.split import CHUNK
from ..surrogate import Integer, Surrogate, Table
from .pack import note

LEAST = 2  # elements of what a registered op keeps: torch.compile compiles anew where a size becomes 0 or 1


class Op(NamedTuple):
    """What a call of ``lif`` or ``bn_lif`` is besides its tensors."""

    spec: LIFSpec
    time_dim: int
    steps_out: int
    kernels: ModuleType
    return_v: bool | str = True


def go_back_by(surrogate: Surrogate, node) -> int:
    """Makes backward from ``node``, a tensor's ``grad_fn``, take this surrogate in every neuron behind it: forward does
    not know the surrogate, so one forward pass serves many. Returns how many nodes there are."""
    seen, left, found = set(), [node], 0
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += (behind for behind, _ in node.next_functions)
        if isinstance(getattr(node, "op", None), Op):
            spec = node.op.spec
            if isinstance(spec.surrogate, Integer) or isinstance(surrogate, Integer):
                raise ValueError(f"surrogate must not be or replace one of integer spikes, got {surrogate!r}")
            node.op = node.op._replace(spec=replace(spec, surrogate=surrogate))
            found += 1
        elif isinstance(getattr(node, "surrogate", None), Surrogate):  # of the reference
            node.surrogate = surrogate
            found += 1
    return found


class Tensors(NamedTuple):
    """The parameters of a neuron that are tensors, as given but in the dtype of the state; None: it has none."""

    leak: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def given(self) -> bool:
        return self.leak is not None or self.threshold is not None or self.bias is not None


NO_TENSORS = Tensors()


class Kept(NamedTuple):
    """What backward needs of forward's tensors, in the kernels' order."""

    x: torch.Tensor
    v: torch.Tensor | None
    saved: torch.Tensor | None
    table: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    leak: torch.Tensor | None = None  # Tensors
    threshold: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        return Tensors(*self[-3:])


def lif_forward(op: Op, x, v, keep: bool, tensors: Tensors = NO_TENSORS):
    """Returns spikes, v_last (or the sequence), what is kept, and the layout of x."""
    x, layout = arrange(x, op.time_dim, op.steps_out)
    call = _forward(op, layout, x, v, keep, tensors)
    op.kernels.lif_forward(op.spec, layout, call)
    v_last = call.more.v_seq if op.return_v == "sequence" else call.v_last
    return call.spikes, v_last, Kept(x, call.v, call.saved, None, None, *tensors), layout


def _forward(op: Op, layout: Layout, x, v, keep: bool, tensors: Tensors) -> Forward:
    """x, arranged, and v as kernels can take them, and new tensors for what they write."""
    if v is not None:
        v = layout.arrange(v, op.time_dim, op.spec.states)
    outputs, more = _outputs(op, x, layout, keep), None
    if tensors.given() or op.return_v == "sequence":
        more = _parameters(op, layout, x, tensors)
        if op.return_v == "sequence":
            more = more._replace(v_seq=layout.empty(x.shape, state_dtype(x.dtype), x.device))
    return Forward(x, v, *outputs, more=more)


def lif_backward(op: Op, layout: Layout, kept: Kept, grad_spikes, grad_v, want_v: bool, *want_tensors: bool):
    """The adjoint, from the gradients of spikes and of v_last (or the sequence): gradients of x and, if wanted, of v
    and of the tensors among the parameters.

    Of neuron n, kernels write the sums over time

        grad_leak       dL/dh[t] * drive[t],    drive = v[t-1]   decay
                                                      = x[t] - (v[t-1] - rest)   tau_input, and its inverse
                                                      = -(v[t-1] - rest)         tau, and its inverse
        grad_threshold  dL/dthreshold through h[t] > threshold and the reset of step t
        grad_bias       dL/dx[t]
    """
    call = _adjoint(op, layout, kept, grad_spikes, grad_v, want_v, want_tensors or (False,) * 3)
    op.kernels.lif_backward(op.spec, layout, call)
    return call.grad_x, call.grad_v, *_of_tensors(op, call, kept.tensors)


def _adjoint(op: Op, layout: Layout, kept: Kept, grad_spikes, grad_v, want_v: bool, want_tensors) -> Backward:
    sequence = grad_v if op.return_v == "sequence" else None
    call = _backward(op, layout, kept, grad_spikes, None if op.return_v == "sequence" else grad_v, want_v)
    if kept.tensors.given() or sequence is not None:
        more = _parameters(op, layout, kept.x, kept.tensors)
        sums = [
            layout.empty(_without_time(op, kept.x), state_dtype(kept.x.dtype), kept.x.device, without=op.time_dim)
            if wanted
            else None
            for wanted in want_tensors
        ]
        grad_v_seq = None if sequence is None else layout.arrange(sequence)
        table = None if call.more is None else call.more.table
        rest = dict(zip(("grad_leak", "grad_threshold", "grad_bias"), sums, strict=True))
        call = call._replace(more=more._replace(table=table, grad_v_seq=grad_v_seq, **rest))
    return call


def _of_tensors(op: Op, call: Backward, tensors: Tensors):
    """The gradients of the tensors among the parameters, from what kernels wrote."""
    sums = (None,) * 3 if call.more is None else call.more[-3:]
    leak, *rest = (None if g is None else g.sum_to_size(p.shape) for g, p in zip(sums, tensors, strict=True))
    if leak is not None and op.spec.form in ("tau_input", "tau"):
        leak = -leak / (tensors.leak * tensors.leak)
    return leak, *rest


class Feedback(NamedTuple):
    """What the neurons of ``recurrent_lif`` have besides those of ``lif``."""

    weight: torch.Tensor  # [H, H] in the dtype of the state
    s: torch.Tensor | None  # spikes before the first step, in the kernels' order


def recurrent_forward(op: Op, x, weight, v, s, keep: bool, tensors: Tensors = NO_TENSORS):
    """As ``lif_forward``, of layers of neurons that receive their own spikes; what feeds back comes last."""
    x, layout = arrange_layers(x, op.time_dim)
    feedback = Feedback(weight.contiguous(), None if s is None else layout.arrange(s, op.time_dim))
    call = _forward(op, layout, x, v, keep, tensors)
    given = feedback.weight, weight.t().contiguous(), feedback.s
    op.kernels.recurrent_forward(op.spec, layout, call, Recurrence(*given))
    return call.spikes, call.v_last, Kept(x, call.v, call.saved, None, None, *tensors), layout, feedback


def recurrent_backward(op: Op, layout: Layout, kept: Kept, feedback: Feedback, spikes, grad_spikes, grad_v, want_v,
                       want_weight: bool, want_s: bool, *want_tensors: bool):  # fmt: skip
    """As ``lif_backward``, from forward's spikes too: gradients of x, v, the weight, s and the tensors."""
    call = _adjoint(op, layout, kept, grad_spikes, grad_v, want_v, want_tensors)
    (weight, s), spikes, grad_s = feedback, layout.arrange(spikes), None
    if want_s:
        shape, state = _without_time(op, kept.x), state_dtype(kept.x.dtype)
        grad_s = layout.empty(shape, state, kept.x.device, without=op.time_dim)
    feedback = Recurrence(weight, weight.t().contiguous(), s, spikes, grad_s)
    op.kernels.recurrent_backward(op.spec, layout, call, feedback)
    grad_weight = None
    if want_weight and hasattr(op.kernels, "recurrent_weight"):
        grad_weight = op.kernels.recurrent_weight(op.spec, layout, call.grad_x, feedback)
    elif want_weight:
        grad_weight = _of_weight(op, layout, call.grad_x, spikes, s)
    grad_s = None if grad_s is None else grad_s.to(kept.x.dtype)
    return call.grad_x, call.grad_v, grad_weight, grad_s, *_of_tensors(op, call, kept.tensors)


def arrange_layers(x, time_dim: int):
    """``arrange``, with the neurons of a layer, the last dimension but for time, innermost."""
    last = x.dim() - 1 - (time_dim == x.dim() - 1)
    x, layout = arrange(x, time_dim)
    if (layout.order or range(x.dim()))[-1] != last or layout.inner % max(x.shape[last], 1):
        x, layout = arrange(x.movedim(time_dim, 0).contiguous().movedim(0, time_dim), time_dim)
        if layout.order is None:  # of one step or none, which may stand anywhere
            layout = layout._replace(outer=1, inner=layout.outer * layout.inner, x_outer_stride=0)
    return x, layout


def _of_weight(op: Op, layout: Layout, grad_x, spikes, s) -> torch.Tensor:
    """The sum over steps and layers of what a neuron's input wants, times the spikes of the step before."""
    grad_x, spikes = (t.movedim(op.time_dim, 0) for t in (grad_x, layout.restore(spikes)))
    size = grad_x.shape[-1]
    grad = grad_x[1:].reshape(-1, size).t() @ spikes[:-1].reshape(-1, size)
    if s is not None and len(grad_x):
        grad = grad + grad_x[0].reshape(-1, size).t() @ layout.restore(s, op.time_dim).reshape(-1, size)
    return grad.to(state_dtype(grad.dtype))


def _without_time(op: Op, x) -> torch.Size:
    return x.shape[: op.time_dim] + x.shape[op.time_dim + 1 :]


def _parameters(op: Op, layout: Layout, x, tensors: Tensors) -> More:
    fire_above, shape = None, _without_time(op, x)
    leak, threshold, bias = (None if p is None else _parameter(layout, p, shape, op.time_dim) for p in tensors)
    if threshold is not None:
        fire_above = threshold.data
        if op.spec.fire_at_threshold:
            fire_above = torch.nextafter(fire_above, torch.full_like(fire_above, -math.inf))
    return More(leak, threshold, bias, fire_above)


def _parameter(layout: Layout, p: torch.Tensor, shape: torch.Size, time_dim: int) -> Parameter:
    """p, which broadcasts to ``shape``, that of x without time: as it is where one period will do, else expanded."""
    order = layout._order(time_dim) or range(len(shape))
    p = p.detach()[(None,) * (len(shape) - p.dim())].permute(tuple(order))
    shape = [shape[i] for i in order]
    own = [i for i, size in enumerate(p.shape) if size != 1]
    first, last = (own[0], own[-1] + 1) if own else (0, 0)
    if list(p.shape[first:last]) != shape[first:last]:
        p, first, last = p.expand(shape), 0, len(shape)
    return Parameter(p.contiguous(), math.prod(shape[first:last]), max(1, math.prod(shape[last if own else 0 :])))


def bn_forward(op: Op, batch: Batch, parameters: Parameters, y, v, residual, keep: bool):
    """As ``lif_forward``, and returns the elements in a channel, of all processes, and the channels' period, too."""
    y, layout = arrange(y, op.time_dim, op.steps_out)
    if v is not None:
        v = layout.arrange(v, without=op.time_dim)
    if residual is not None:
        residual = layout.arrange(residual)
    parameters = Parameters(*(p if p is None or p.is_contiguous() else p.contiguous() for p in parameters))
    channels, count = y.shape[2], y.numel() / max(y.shape[2], 1)
    table = torch.empty((ROWS, channels), dtype=state_dtype(y.dtype), device=y.device)
    period = layout.period(y.shape, 2, op.time_dim)
    call = Forward(y, v, *_outputs(op, y, layout, keep), Norm(channels, period, table, residual))
    count = _launch_bn_forward(op, batch, layout, parameters, call, count)
    return call.spikes, call.v_last, Kept(y, v, call.saved, table, residual), layout, count, period


def _launch_bn_forward(op: Op, batch: Batch, layout: Layout, parameters: Parameters, call: Forward, count):
    """Returns the elements in a channel, of all processes."""
    kernels, norm, moments, seen = op.kernels, call.norm, None, count

    def plan():
        return Plan(seen, count / max(count - 1, 1), batch.momentum, batch.eps, batch.scale)

    if batch.training:
        at_once = getattr(kernels, "bn_forward", None) if batch.group is None else None
        if at_once and at_once(plan(), op.spec, layout, call, parameters):
            return count
        once = layout if layout.x_step_stride or layout.steps < 2 else layout._replace(steps=1)
        seen = count * once.steps / max(layout.steps, 1)
        if batch.group is None or seen:  # checked before, or its own
            moments = kernels.bn_moments(once, norm, call.x)
        else:  # a process among others may have no sample: its kernel would have no first element to shift by
            moments = norm.table.new_zeros((3, norm.channels), dtype=torch.float64)
        if batch.group is not None:
            moments, seen, count = _of_all(moments, seen, count, batch.group)
    kernels.bn_prepare(plan(), moments, parameters, norm.table)
    kernels.lif_forward(op.spec, layout, call)
    return count


class Wanted(NamedTuple):
    """Which gradients of ``bn_lif`` are, besides y's."""

    affine: bool = True
    v: bool = True
    residual: bool = True


def bn_backward(op: Op, batch: Batch, layout: Layout, count, period, kept: Kept, grad_spikes, grad_v_last, wanted):
    """The adjoint: gradients of y, of weight and bias together ([2, channels]), of v and of the residual, as ``Wanted``
    says."""
    y = kept.x
    norm = Norm(y.shape[2], period, kept.table, kept.residual)
    plan = Plan(count, 1.0, batch.momentum, batch.eps, batch.scale)
    affine = torch.empty_like(kept.table[:2]) if batch.training or wanted.affine else None
    call = _backward(op, layout, kept, grad_spikes, grad_v_last, wanted.v)._replace(
        norm=norm,
        pull_push=torch.empty_like(kept.table[:2]) if batch.training else None,
        grad_residual=layout.empty(y.shape, y.dtype, y.device) if wanted.residual else None,
    )
    _launch_bn_backward(op, batch, layout, plan, call, affine)
    return call.grad_x, affine, call.grad_v, call.grad_residual


def _launch_bn_backward(op: Op, batch: Batch, layout: Layout, plan: Plan, call: Backward, affine) -> None:
    spec, kernels, norm = op.spec, op.kernels, call.norm
    if affine is not None:
        at_once = getattr(kernels, "bn_backward", None) if batch.group is None else None
        if at_once and at_once(plan, spec, layout, call, affine):
            return
        sums, all_sums = kernels.bn_sums(spec, layout, call), None
        if batch.group is not None and batch.training:
            all_sums = gather(sums.view(-1, 2, norm.channels).sum(0), batch.group).sum(0)
        kernels.bn_gradients(plan, norm.table, sums, all_sums, affine, call.pull_push)
    kernels.lif_backward(spec, layout, call)


def ttm(x: torch.Tensor, steps: int, time_dim: int, kernels) -> torch.Tensor:
    x, layout = arrange(x, time_dim, steps)
    shape = [*x.shape[:time_dim], steps, *x.shape[time_dim + 1 :]]
    y = layout.empty(torch.Size(shape), x.dtype, x.device)
    kernels.ttm(layout, x, y)
    return y


def _outputs(op: Op, x, layout: Layout, keep: bool):
    """New tensors for spikes and, if wanted, v_last and, for backward, saved."""
    time_dim, v_last = op.time_dim, None
    before, after = x.shape[:time_dim], x.shape[time_dim + 1 :]
    spikes = layout.empty(torch.Size((*before, layout.steps_out, *after)), x.dtype, x.device)
    if layout.steps_out == layout.steps and op.spec.binary:  # not sums of them
        note(spikes)
    state = state_dtype(x.dtype)
    if op.return_v is True:
        v_last = layout.empty(before + after, state, x.device, time_dim, op.spec.states)
    saved = None
    if keep and has_chunks(layout.steps):
        size = (layout.steps - 1) // CHUNK * op.spec.states * layout.outer * layout.inner
        size = size if type(size) is int and size > LEAST else torch.sym_max(size, LEAST)
        saved = torch.empty((size,), dtype=state, device=x.device)
    return spikes, v_last, saved


def has_chunks(steps) -> bool:
    """Whether potentials are kept between chunks. Of a size that is traced it is not asked: there may be none then."""
    return type(steps) is not int or steps > CHUNK


def _backward(op: Op, layout: Layout, kept: Kept, grad_spikes, grad_v_last, want_v: bool) -> Backward:
    """The upstream gradients as kernels can take them, and new tensors for those of x and, if wanted, of v."""
    x, time_dim = kept.x, op.time_dim
    if grad_spikes is not None:
        grad_spikes = layout.arrange(grad_spikes)
    if grad_v_last is not None:
        grad_v_last = layout.arrange(grad_v_last, time_dim, op.spec.states)
    grad_v = None
    if want_v:
        shape = x.shape[:time_dim] + x.shape[time_dim + 1 :]
        grad_v = layout.empty(shape, state_dtype(x.dtype), x.device, time_dim, op.spec.states)
    grad_x = layout.empty(x.shape, x.dtype, x.device)
    surrogate, more = op.spec.surrogate, None
    if isinstance(surrogate, Table):
        more = More(table=surrogate.held(x.device, state_dtype(x.dtype)))
    return Backward(x, kept.v, kept.saved, grad_spikes, grad_v_last, grad_x, grad_v, more=more)


def _of_all(moments: torch.Tensor, seen: float, count: float, group):
    """The moments of all processes, as one part about their mean; and their counts."""
    total, square = moments[:-1].view(-1, 2, moments.shape[1]).sum(0)
    mean = moments[-1] + total / max(seen, 1)
    counts = torch.tensor([seen, count], dtype=torch.float64, device=moments.device).expand(moments.shape[1], 2)
    parts = gather(torch.stack([mean, square - total * total / max(seen, 1), *counts.unbind(1)]), group)
    means, squares, seens, counts = parts.unbind(1)
    mean = (means * seens).sum(0) / seens.sum(0)
    square = (squares + seens * (means - mean) ** 2).sum(0)
    seen, count = seens[:, 0].sum().item(), counts[:, 0].sum().item()
    if count < 2:
        raise ValueError("training needs more than one value per channel in the y of all processes")
    return torch.stack([torch.zeros_like(mean), square, mean]), seen, count
