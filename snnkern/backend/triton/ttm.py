"""The temporal transformation in Triton, and its launch: a program makes BLOCK numbers of one step of y."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import on

BLOCK = 1024
_sizes = ["steps_in", "steps_out", "inner", "x_outer", "x_step", "per_row"]


@triton.jit(do_not_specialize=_sizes)
def ttm_kernel(x, y, steps_in, steps_out, inner, x_outer, x_step, per_row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    inner, x_outer, x_step = inner.to(tl.int64) * UNIT, x_outer.to(tl.int64) * UNIT, x_step.to(tl.int64) * UNIT
    row = tl.program_id(0) // per_row  # of y, [outer, steps_out]
    j = row % steps_out
    if steps_out <= steps_in:
        first = (2 * j.to(tl.int64) * steps_in + steps_out - 1) // (2 * steps_out)
        last = (2 * (j + 1).to(tl.int64) * steps_in + steps_out - 1) // (2 * steps_out)
    else:
        first = (2 * j + 1).to(tl.int64) * steps_in // (2 * steps_out)
        last = first + 1
    at = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < inner
    x += (row // steps_out).to(tl.int64) * x_outer + at
    total = tl.load(x + first * x_step, exists, other=0.0).to(tl.float32)
    for t in range(first + 1, last):
        total += tl.load(x + t * x_step, exists, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * inner + at, total.to(y.dtype.element_ty), exists)


def ttm(layout, x, y):
    _, outer, steps_in, inner, x_outer, x_step, steps = layout
    if outer * inner == 0:
        return
    sizes = (inner, x_outer, x_step)
    unit = 16 if all(size % 16 == 0 for size in sizes) else 1  # from which Triton knows that rows are aligned
    block = min(BLOCK, max(32, triton.next_power_of_2(inner)))
    per_row = triton.cdiv(inner, block)
    with on(x.device):
        ttm_kernel[(outer * steps * per_row,)](
            x, y, steps_in, steps, *(size // unit for size in sizes), per_row, UNIT=unit, BLOCK=block
        )
