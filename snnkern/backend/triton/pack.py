"""Spikes to bits and back in Triton, and the launches: a program has BLOCK bytes, eight integers of x to each.

Where n is a multiple of 16, which Triton specialises for, all masks are whole and 16 bytes move at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec.layout import INTEGERS
from .. import on

BLOCK = 256
ONE = {torch.float32: 0x3F800000, torch.float16: 0x3C00, torch.bfloat16: 0x3F80}


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    at = byte[:, None] * 8 + lane[None, :]
    return byte, lane[None, :], at, at < n


@triton.jit
def pack_kernel(x, bits, other, n, ONE: tl.constexpr, BLOCK: tl.constexpr):
    byte, lane, at, exists = _place(n, BLOCK)
    u = tl.load(x + at, exists, other=0)
    packed = tl.sum((u == ONE).to(tl.int32) << lane, 1)
    tl.store(bits + byte, packed.to(tl.uint8), byte * 8 < n)
    if other is not None:
        if tl.max(tl.max(((u != 0) & (u != ONE)).to(tl.int32), 1), 0) > 0:
            tl.store(other, 1)  # whoever stores it stores the same


@triton.jit
def unpack_kernel(bits, x, n, ONE: tl.constexpr, BLOCK: tl.constexpr):
    byte, lane, at, exists = _place(n, BLOCK)
    packed = tl.load(bits + byte, byte * 8 < n, other=0).to(tl.int32)
    u = ((packed[:, None] >> lane) & 1) * ONE
    tl.store(x + at, u.to(x.dtype.element_ty), exists)


def pack(x, bits, check):
    other = torch.zeros(1, dtype=torch.int32, device=x.device) if check else None
    _launch(pack_kernel, x, x.view(INTEGERS[x.dtype]), bits, other)
    return not (check and other.item())


def unpack(bits, x):
    _launch(unpack_kernel, x, bits, x.view(INTEGERS[x.dtype]))


def _launch(kernel, x, *tensors):
    n = x.numel()
    if n:
        with on(x.device):
            kernel[(triton.cdiv(n, 8 * BLOCK),)](*tensors, n, ONE=ONE[x.dtype], BLOCK=BLOCK, enable_fp_fusion=False)
