"""Time split into segments: the same as the serial loop for every input, on every backend that can run."""

import pytest
import torch
from conftest import assert_gradients_close, few
from test_lif import check, draw, run, state_of

import snnkern
from snnkern.spec import split as splitting
from snnkern.spec.split import CHUNK, Split, for_cpu, for_gpu, split, warmup
from snnkern.surrogate import ATan, Dspike, Triangle

pytestmark = pytest.mark.usefixtures("poison")


def serial(x, v, backend, *upstream, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "split", lambda steps, *_: Split(1, steps, 0))
        return run(x, v, backend, *upstream, **options)


# No firing, slow leaks and none, potentials at the threshold, soft resets: where a state is long remembered.
def remembered(shape):
    """What the first step leaves decides at the last: a repair makes the next necessary."""
    x = torch.zeros(shape)
    x[0], x[-1] = 0.3, 0.8
    return x


ADVERSARIES = {
    "noise": (lambda shape: draw(shape), {}),
    "silent": (lambda shape: draw(shape) * 0.01, {"decay": 0.99}),
    "never forgets": (lambda shape: draw(shape) * 0.1, {"decay": 1.0}),
    "at the threshold": (lambda shape: (draw(shape) * 4).round() / 8 + 0.25, {"decay": 0.5}),
    "always at it": (lambda shape: torch.full(shape, 0.5), {"decay": 0.5, "fire_at_threshold": True}),
    "soft": (lambda shape: draw(shape) + 0.5, {"decay": 0.9, "reset": None}),
    "slow, fires": (lambda shape: draw(shape) + 0.2, {"decay": 0.99, "reset": -0.3}),
    "tau": (lambda shape: draw(shape) * 2, {"tau": 20.0, "reset": 0.2}),
    "remembered": (remembered, {"decay": 1.0, "surrogate": Triangle(0.5)}),
    "unstable": (lambda shape: draw(shape), {"tau": 0.5, "decay_input": False}),
}


@pytest.mark.parametrize("warm", few([0, 16, 64], [16]))
@pytest.mark.parametrize("adversary", few([*ADVERSARIES], ["at the threshold", "slow, fires"]))
def test_segments_equal_the_serial_loop(backend, device, force, adversary, warm):
    make, options = ADVERSARIES[adversary]
    x = make((150, 37)).to(device)
    v, upstream = state_of(x), (draw(x.shape, device=device, seed=2), state_of(x, seed=3))
    options = {"surrogate": ATan(), **options}
    launches = force(48, warm)
    got = check(x, v, backend, *upstream, **options)
    assert [time.segments for time in launches] == [4, 4]
    wanted = serial(x, v, backend, *upstream, **options)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w) if backend == "cpu" else assert_gradients_close(g, w) is None


@pytest.mark.parametrize(
    "dtype",
    few([torch.float32, torch.float64, torch.float16, torch.bfloat16], [torch.float32, torch.bfloat16]),
)
@pytest.mark.parametrize(
    "shape, time_dim",
    few([((97, 40), 0), ((3, 97, 40), 1), ((5, 97), 1), ((33, 97, 2), 1), ((97,), 0)], [((3, 97, 40), 1)]),
)
@pytest.mark.parametrize("length, warm", few([(16, 0), (32, 32)], [(32, 32)]))
def test_any_layout_and_dtype(backend, device, force, shape, time_dim, dtype, length, warm):
    if dtype == torch.float64 and backend != "cpu":
        pytest.skip("float64 is for the CPU")
    force(length, warm)
    x = draw(shape, dtype, device)
    v, grad = state_of(x, time_dim), draw(shape, dtype, device, 2)
    check(x, v, backend, grad, state_of(x, time_dim, 3), time_dim=time_dim, reset=-0.1)
    check(x, None, backend, grad, time_dim=time_dim, surrogate=Triangle(), detach_reset=True)
    check(x, None, backend, None, state_of(x, time_dim, 3), time_dim=time_dim, surrogate=Dspike(3.0))


@pytest.mark.parametrize("gain", few([0.0, 0.5, 0.9], [0.5]))
def test_segments_guess_their_start_right(backend, device, force, monkeypatch, gain):
    """So that the repair stays idle: after the warm-up that the leak asks for, and not without one."""
    seams, scratch = [], Split.scratch

    def recorded(self, *args):
        seams.append(scratch(self, *args))
        return seams[-1]

    monkeypatch.setattr(Split, "scratch", recorded)
    x = draw((800, 200), device=device) * 0.4
    for warm in (warmup(gain, torch.float32), 0):
        force(400, warm)
        run(x, None, backend, draw(x.shape, device=device, seed=2), decay=gain)
    starts, ends = torch.stack(seams).unbind(1)
    (forward, _), (cold, _) = (starts[:, 1:] == ends[:, :-1]).float().mean((1, 2)).view(2, 2)
    assert forward > 0.999 and (cold < 0.2 or gain == 0)
    if backend == "cpu":  # where backward is checked and repaired too
        assert (starts[1, :-1] == ends[1, 1:]).float().mean() > 0.999


def test_inference_is_repaired_too(backend, device, force):
    """Nothing is kept there that would tell where two runs meet."""
    force(32, 0)
    x = draw((200, 50), device=device)
    for decay in (0.5, 0.99, 1.0):
        spikes, v = snnkern.lif(x, decay=decay, backend=backend)
        wanted, v_wanted = snnkern.lif(x, decay=decay, backend="reference")
        assert torch.equal(spikes, wanted) and torch.equal(v, v_wanted)


def test_infinite_and_missing_numbers_stay_with_their_neuron(backend, device, force):
    force(32, 16)
    x = draw((128, 20), device=device)
    x[40, 3], x[70, 5], x[31, 7] = float("inf"), float("nan"), -float("inf")
    spikes, v = snnkern.lif(x, backend=backend)
    wanted, v_wanted = snnkern.lif(x, backend="reference")
    assert torch.equal(spikes, wanted) and torch.equal(v.isnan(), v_wanted.isnan())
    assert torch.equal(v.nan_to_num(), v_wanted.nan_to_num())


@pytest.mark.parametrize("most, shortest", [(2, 16), (7, 32), (100, 64)])
@pytest.mark.parametrize("steps", [0, 1, 31, 32, 64, 100, 1000, 4001])
def test_segments_cover_time_in_whole_chunks(steps, most, shortest):
    time = split(steps, most, shortest, 64)
    assert 1 <= time.segments <= most
    if time.segments == 1:
        assert time == (1, steps, 0)
    else:
        assert time.steps % CHUNK == 0 and time.steps >= min(shortest, steps)
        assert (time.segments - 1) * time.steps < steps <= time.segments * time.steps


def test_warm_up_follows_from_the_leak():
    assert [warmup(gain, torch.float32) for gain in (0.0, 0.5, 0.9)] == [16, 64, 384]
    assert warmup(0.5, torch.float64) > warmup(0.5, torch.float32)
    for gain in (1.0, -1.0, -3.0):  # never forgets
        assert for_cpu(10**6, 64, gain, torch.float32, 8).segments == 1


def test_time_is_split_only_where_neurons_are_few():
    def segments(steps, neurons, threads=2):
        return for_cpu(steps, neurons, 0.5, torch.float32, threads).segments

    warm = warmup(0.5, torch.float32)
    assert segments(4000, 256) == 2
    assert segments(4000, 256, threads=1) == 1
    assert segments(4000, 256, threads=8) == 8
    assert segments(4000, 4096) == 1
    assert segments(4, 0) == 1
    assert segments(1000, 16) == 1  # not worth waking threads
    assert segments(256, 256) == 1  # would mostly warm up
    assert for_gpu(4000, 256, 132, 64, warm).segments > 8
    assert for_gpu(4000, 1 << 18, 132, 64, warm).segments == 1
    assert for_gpu(500, 256, 132, 64, warm).segments == 1  # a launch costs more


def test_the_rule_splits_a_real_call(device, backend):
    x = draw((5000, 64), device=device)
    spikes, v = snnkern.lif(x, backend=backend)
    wanted, v_wanted = snnkern.lif(x, backend="reference")
    assert torch.equal(spikes, wanted) and torch.equal(v, v_wanted)
