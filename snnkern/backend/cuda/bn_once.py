"""Batch norm and neurons in one launch and one visit to memory: the kernels in ``csrc/cuda/bn_once.cuh``.

In training, without other processes, where the elements of a channel fit into the shared memory of eight
multiprocessors of compute capability 9.0 and up, as those of [4, 64, 128, 32, 32] in bfloat16 do. Forward then reads y
once and writes the spikes; backward reads y and the gradient of spikes once and writes that of y: 5 times the bytes of
y together, in place of 8.
"""

from __future__ import annotations

import struct
from functools import lru_cache, reduce
from operator import or_

import torch

from ...spec.layout import DTYPES
from ...spec.split import CHUNK, Split
from .. import on
from .._extension import _C, addresses, words_of
from . import lif
from .program import Grid, prepare, stream_of

CLUSTER, THREADS = 8, 384  # kCluster, kOnceThreads


def bn_forward(plan, spec, layout, call, parameters) -> bool:
    """Moments, table, running statistics and ``lif_forward`` at once; False: this is none of these cases."""
    *tensors, norm, _ = call
    before, words = addresses(*parameters), [*addresses(*tensors, None), *norm[:2], *addresses(*norm[2:])]
    moments = (norm.channels, 2 * CLUSTER + 1)
    return _launch("bn_lif_forward_once", plan, spec, layout, call, before, words, words[:6], moments)


def bn_backward(plan, spec, layout, call, affine) -> bool:
    """Sums, the gradients of weight and bias, and ``lif_backward`` at once; False as above."""
    *tensors, norm, pull_push, grad_residual, more = call
    if pull_push is None:  # the statistics were the running ones
        return False
    words = [*addresses(*tensors, None), *norm[:2], *addresses(*norm[2:], pull_push, grad_residual)]
    packed = [*words[:8], words[13]]
    if more is not None:
        words += words_of(more)
    given, sums = call.grad_spikes is not None, (norm.channels, 2 * CLUSTER)
    return _launch("bn_lif_backward_once", plan, spec, layout, call, addresses(affine), words, packed, sums, given)


def _launch(name, plan, spec, layout, call, before, words, packed, sums, given=False) -> bool:
    """``words``: of csrc/lif.h's LIFForward or LIFBackward; those ``before`` and the sums go before them. ``packed``:
    addresses of what threads read or write more than a number of."""
    norm, device = call.norm, call.x.device
    residual = addresses(norm.residual)[0]
    aligned = not reduce(or_, packed, residual) & 15
    key = name, plan, spec, layout, *norm[:2], bool(residual), call.x.dtype, aligned, given, device.index
    with on(device):
        launch = _prepared(*key)
        if launch is not None:
            sums = torch.empty(sums, dtype=torch.float64, device=device)
            launch(stream_of(device.index), *before, sums.data_ptr(), *words)
    return launch is not None


@lru_cache(maxsize=512)
def _prepared(name, plan, spec, layout, channels, period, residual, dtype, aligned, given, device):
    backward = name == "bn_lif_backward_once"
    width = 4 if backward else 16 // dtype.itemsize
    once = layout.steps <= CHUNK and (layout.x_step_stride or layout.steps == 1)
    if not (aligned and once and period % width == 0 and lif.fits(layout, width) and layout.outer * layout.inner):
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9:
        return None
    items = layout.outer * layout.inner // (channels * width)
    share = -(-items // CLUSTER)
    kept = dtype.itemsize + (4 if backward else 0)  # of y; of the gradient of what the neurons receive
    shared = -(-share // THREADS) * THREADS * layout.steps * width * kept
    if shared > getattr(properties, "shared_memory_per_block_optin", 227 << 10) - 2048:  # what the kernels have besides
        return None
    variant, (neuron, shape) = lif.compiled_for(spec, layout, dtype, True, 1, Split(1, layout.steps, 0), device)
    variant = variant._replace(width=width, lanes=1, residual=residual)
    if backward:
        variant = lif.adjoint_of(spec, variant, neuron, given)
    constants = [neuron, shape, _C.bytes_of(_C.NormPlan(DTYPES.index(torch.float32), 1, CLUSTER, *plan))]
    constants.append(struct.pack("=3q", period // width, items, share))
    return prepare("bn_once.cuh", name, variant, Grid(channels * CLUSTER, 1, THREADS, shared), constants, device)
