"""What the CUDA backend compiles for batch norm before the LIF, and how it shares the work out: no GPU is needed."""

import re
import subprocess

import pytest
from conftest import brief
from test_cuda_lif import BF16, F32, SPEC, WIDE, cuobjdump, meta

from snnkern.backend.cuda import bn_lif, lif, program
from snnkern.spec.layout import layout_of

if program.missing():
    pytest.skip(program.missing(), allow_module_level=True)


@pytest.fixture
def made(monkeypatch):
    """What is launched for y, [T, N, C, ...], on a device of 132 multiprocessors: (variant, grid, parts)."""

    def call(make, y, time_dim=0, residual=False):
        layout = layout_of(y, time_dim)
        channels, period = y.shape[2], layout.period(y.shape, 2, time_dim)
        if make is bn_lif._moments:
            launch, parts = make.__wrapped__(layout, channels, period, y.dtype, True, 0)
        else:
            launch, parts = make(SPEC, layout, channels, period, residual, y.dtype, True, True, 0)
        return *launch, parts

    for module in (lif, bn_lif):
        monkeypatch.setattr(module, "processors", lambda device: 132)
        monkeypatch.setattr(module, "prepare", lambda header, name, variant, grid, constants, device: (variant, grid))
    monkeypatch.setattr(bn_lif, "_shared_memory", lambda device: 228 << 10)
    return call


ALL = [bn_lif._moments, bn_lif._forward, bn_lif._sums, bn_lif._backward]


def last(y):
    return y.movedim(2, -1).contiguous().movedim(-1, 2)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("make", ALL)
def test_any_dense_layout_is_wide(made, make, dtype):
    y = meta(4, 32, 128, 32, 32, dtype=dtype)
    contiguous, *_ = made(make, y)
    assert (contiguous.width, contiguous.lanes, contiguous.rows) == (WIDE[dtype], 1, False)
    channels_last, *_ = made(make, last(y))
    assert channels_last == contiguous._replace(lanes=WIDE[dtype])
    batch_first, *_ = made(make, y.movedim(0, 1).contiguous(), 1)
    assert batch_first == contiguous._replace(rows=True)
    odd_images, *_ = made(make, meta(4, 64, 512, 7, 7, dtype=dtype))
    assert odd_images == contiguous._replace(lanes=WIDE[dtype])


@pytest.mark.parametrize("places", [792, 528, 432])
@pytest.mark.parametrize(
    ("channels", "period", "rows"), [(128, 1024, 256), (64, 3136, 256), (64, 1, 131072), (512, 49, 4096)]
)
def test_blocks_come_in_whole_waves(channels, period, rows, places):
    """What the places of a device do one after the other is hardly more than their share of the work: no second wave
    that is a third full."""
    bands = bn_lif.bands_of(channels, period, 8, rows, 64, places)
    width = min(bands.width, channels)
    packs, across = rows * width * period // 8, width * period // 8 if width > 1 else 1
    rounds = packs / (64 // across * across)
    took = -(-bands.blocks // places) * -(-rounds // bands.parts)
    assert took <= 1.15 * rounds * bands.blocks / bands.parts / places


def test_parts_are_no_more_than_there_is_work(made):
    for make in (bn_lif._moments, bn_lif._sums):
        *_, grid, parts = made(make, meta(4, 2, 3, 8, 8))
        assert parts == 1 and grid.across == 3
        *_, grid, parts = made(make, meta(4, 1 << 20, 1, 8, 8))  # one warp adds up the parts of a channel
        assert 500 < grid.across == parts <= bn_lif.MOST_PARTS
        *_, grid, parts = made(make, last(meta(4, 2, 100, 8, 8)))
        assert grid.across == 2 * parts  # bands of 64 and of 36 channels


@pytest.mark.parametrize(
    ("period", "width", "channels"), [(1, 8, 64), (4, 4, 16), (49, 8, 8), (49, 1, 1), (64, 8, 1), (5, 8, 16)]
)
def test_bands_are_whole_packs(period, width, channels):
    assert bn_lif.band_width(period, width) == channels
    assert bn_lif.bands_fit(channels, period, width, width, 64)
    assert not bn_lif.bands_fit(1024, 169, 8, 8, 64)  # 169 packs do not lie side by side in 64 threads
    assert not bn_lif.bands_fit(3, 49, 8, 8, 64)  # the last pack of a run would end in the next


def test_short_and_long_times_fit_shared_memory(made):
    for steps in (4, 8, 9, 64):
        for y in (meta(steps, 64, 128, 32, 32, dtype=BF16), meta(steps, 64, 128, 32, 32, dtype=F32)):
            variant, grid, _ = made(bn_lif._sums, y)
            a_step = variant.width * (4 + y.element_size()) * grid.threads
            assert grid.shared == max(min(steps, 16) * a_step, 16 * grid.threads)
            assert made(bn_lif._backward, y)[1].shared == min(steps, 16) * a_step


DECAY, DIVIDED, INVERSE = 0, 1, 3  # members of csrc/lif.h's Leak
KERNELS = [
    ("bn_lif_sums", 3, 8, 1, 4, INVERSE),
    ("bn_lif_sums", 3, 8, 8, 4, DECAY),
    ("bn_lif_sums", 0, 4, 4, 0, INVERSE),
    ("bn_lif_sums", 2, 8, 8, 8, DIVIDED),
    ("bn_lif_sums", 3, 1, 1, 0, DECAY),
    ("bn_lif_backward", 3, 8, 8, 4, INVERSE),
    ("bn_lif_backward", 3, 8, 8, 8, DIVIDED),
    ("bn_lif_backward", 0, 4, 1, 0, DECAY),
    ("lif_forward", 3, 8, 8, 4, INVERSE),
]


def used(header, expression, target, tmp_path):
    image, _ = program.compile(header, expression, target)
    (tmp_path / "kernel.cubin").write_bytes(image)
    run = [cuobjdump(), "-sass", "-res-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return text, *(int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))


@pytest.mark.parametrize("target", brief(["sm_80", "sm_90"], ["sm_90"]))
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("name", "dtype", "width", "lanes", "steps", "form"), KERNELS)
def test_machine_code(name, dtype, width, lanes, steps, form, residual, target, tmp_path):
    """Nothing spills, as many blocks of sums fit a multiprocessor as are launched, and wide threads move 16 bytes."""
    variant = lif.LIFVariant(
        dtype, width, steps, False, form, True, True, False, 4, True, False, False, lanes, residual
    )
    text, registers, stack = used("bn_lif.cuh", f"snnkern::{name}<{program._cpp(variant)}>", target, tmp_path)
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", text)
    if name == "bn_lif_sums":
        assert -(-registers // 8) * 8 * bn_lif._sums_blocks(variant) * lif.backward_threads(width) <= 1 << 16
    assert bool(re.search(r"LDG\.E\.NA\.128", text)) == (width > 1)


@pytest.mark.parametrize("target", brief(["sm_80", "sm_90"], ["sm_90"]))
@pytest.mark.parametrize(("dtype", "width", "lanes"), [(3, 8, 1), (3, 8, 8), (0, 4, 4), (2, 1, 1)])
def test_machine_code_of_moments(dtype, width, lanes, target, tmp_path):
    for steps in (0, 4, 8):
        variant = bn_lif.MomentsVariant(dtype, width, lanes, steps, False)
        text, registers, stack = used("norm.cuh", f"snnkern::moments<{program._cpp(variant)}>", target, tmp_path)
        assert stack == 0 and not re.search(r"\b(LDL|STL)\b", text)
        assert -(-registers // 8) * 8 * bn_lif._moment_blocks(lanes) * bn_lif.MOMENT_THREADS <= 1 << 16
