"""What only a GPU can show: streams, graphs, synchronisation, sizes beyond 32-bit offsets, several devices."""

import pytest
import torch
from conftest import BACKENDS, assert_gradients_close
from test_bn_lif import norm_of
from test_bn_lif import run as run_norm
from test_lif import draw, run
from test_recurrent import weight_of
from torch import nn

import snnkern
from examples import cuda_graph
from snnkern.nn import LIF, Windows, carried

GPU_BACKENDS = [name for name in BACKENDS if name in ("cuda", "triton") and torch.cuda.is_available()]
pytestmark = pytest.mark.skipif(not GPU_BACKENDS, reason="needs a GPU")

SHAPES = [(4, 1000), (20, 3, 5000), (3000, 64)]  # the last is split over time


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_waits_for_the_device(backend, shape):
    x, grad = draw(shape, device="cuda"), draw(shape, device="cuda", seed=2)
    run(x, None, backend, grad)  # compiles what there is to compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, None, backend, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_does_not_wait_either(backend, shape):
    x, w = draw(shape, device="cuda"), draw(shape, device="cuda", seed=2).requires_grad_()

    def step():
        with snnkern.packed_spikes(backend=backend):
            spikes, _ = snnkern.lif(x, backend=backend)
            loss = (spikes * w).sum()
        return spikes, torch.autograd.grad(loss, w)[0]

    step()  # compiles what there is to compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        spikes, got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, spikes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_users_on_two_streams_pack_twice(backend, shape):
    x, w = draw(shape, device="cuda"), draw(shape, device="cuda", seed=2).requires_grad_()
    side = torch.cuda.Stream()
    with snnkern.packed_spikes(backend=backend):
        spikes, _ = snnkern.lif(x, backend=backend)
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda._sleep(50_000_000)  # were its bits used there, they would not be there yet
        here = (spikes * w).sum()
        with torch.cuda.stream(side):
            there = (spikes * w).sum()
            (got,) = torch.autograd.grad(there, w)
    side.synchronize()
    assert torch.equal(got, spikes) and torch.equal(torch.autograd.grad(here, w)[0], spikes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_current_stream_is_used(backend, shape):
    x, grad = torch.zeros(shape, device="cuda"), draw(shape, device="cuda", seed=2)
    source, stream = draw(shape, device="cuda"), torch.cuda.Stream()
    wanted = run(source, None, backend, grad)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on any other stream would see zeros
        x.copy_(source)
        got = run(x, None, backend, grad)
    stream.synchronize()
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cuda_graph_replays_it(backend, shape):
    x, grad = draw(shape, device="cuda"), draw(shape, device="cuda", seed=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x, None, backend, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x, None, backend, grad)
    for seed in (5, 6):
        x.copy_(draw(shape, seed=seed))
        graph.replay()
        for g, w in zip(got, run(x, None, backend, grad), strict=True):
            assert torch.equal(g, w)


def test_a_cuda_graph_trains_as_the_steps_do():
    assert cuda_graph.train("cuda", graph=True)[0] == pytest.approx(cuda_graph.train("cuda", graph=False)[0], rel=1e-5)


def test_windows_come_from_the_cpu_and_draw_the_same_again():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Dropout(0.4), nn.Linear(8, 3)).cuda(), draw((20, 3, 5)).mul(3)

    def by_hand(x):
        with carried(model):
            return torch.cat([model(window) for window in x.cuda().split(6)])

    found = []
    for net in (Windows(model, 6), by_hand):
        torch.manual_seed(1)
        inputs = [x.clone().requires_grad_(), *model.parameters()]
        found.append((torch.autograd.grad(net(inputs[0]).square().sum(), inputs), torch.rand(1, device="cuda")))
    for got, wanted in zip(*(gradients for gradients, _ in found), strict=True):
        torch.testing.assert_close(got, wanted)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("shape", [(5, 1 << 29), (1 << 21, 1 << 10)], ids=str)
def test_offsets_beyond_32_bits(backend, shape):
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * 5 * (1 << 29):
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x[-1, -3:] = 3.0
    x.requires_grad_()
    spikes, v = snnkern.lif(x, backend=backend)
    assert spikes.sum().item() == 3 and spikes[-1, -3:].tolist() == [1, 1, 1] and v.abs().max() == 0
    (gradient,) = torch.autograd.grad(v, x, torch.ones_like(v))
    assert gradient[-1, :-3].eq(1).all() and gradient[0, :-3].eq(0.5 ** (shape[0] - 1)).all()
    assert gradient[:, -3:].eq(0).all()  # they fired, far above the threshold: nothing passes the reset


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_x_is_used(backend):
    x, grad = draw((300, 70)), draw((300, 70), seed=2)
    here, there = (run(x.to(d), None, backend, grad.to(d)) for d in ("cuda:0", "cuda:1"))
    for a, b in zip(here, there, strict=True):
        assert b.device == torch.device("cuda:1") and torch.equal(a, b.to("cuda:0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_width_gives_the_same(backend, dtype):
    """From one neuron a thread, with time split and whole, to 16 bytes a thread."""
    x, grad = draw((1100, 64), dtype, "cuda"), draw((1100, 64), dtype, "cuda", seed=2)
    few = run(x, None, backend, grad)
    many = run(x.repeat(1, 1 << 13), None, backend, grad.repeat(1, 1 << 13))
    for a, b in zip(few[:2], many[:2], strict=True):
        assert torch.equal(a, b[..., :64]) and torch.equal(a, b[..., -64:])
    assert_gradients_close(few[2], many[2][:, -64:])


# Recurrent layers


@pytest.mark.parametrize("shape", [(20, 3, 100), (300, 200, 17), (40, 2, 513)], ids=str)
def test_recurrent_layers_do_not_wait_and_use_the_current_stream(backend, shape):
    weight = weight_of(shape[-1], device="cuda").requires_grad_()
    source, grad, stream = draw(shape, device="cuda"), draw(shape, device="cuda", seed=2), torch.cuda.Stream()

    def run_layer(x):
        spikes, v = snnkern.recurrent_lif(x.requires_grad_(), weight, backend=backend)
        return spikes, v, *torch.autograd.grad(spikes, (x, weight), grad)

    wanted = run_layer(source.clone())
    late = torch.zeros_like(source)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a launch on any other stream would see zeros
            late.copy_(source)
            got = run_layer(late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


# Normalised


def norm_case(shape, dtype=torch.float32):
    y = draw(shape, dtype, "cuda")
    return y, norm_of(y), draw(shape, dtype, "cuda", seed=7), (draw(shape, dtype, "cuda", seed=2), None)


def flat(found):
    spikes, v_last, running, gradients = found
    return spikes, v_last, *running, *gradients


def test_norms_do_not_wait_and_use_the_current_stream(backend):
    y, norm, residual, grads = norm_case((20, 4, 24, 13, 13))
    wanted = flat(run_norm(y, backend, norm, residual=residual, grads=grads))
    late, stream = torch.zeros_like(y), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(y)
            got = flat(run_norm(late, backend, norm, residual=residual, grads=grads))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_every_width_give_the_same(backend, dtype, last):
    """From one neuron a thread to as many as fit, which takes a large batch; its copies have the same statistics."""
    y, norm, _, (grad, _) = norm_case((4, 2, 32, 16, 16), dtype)
    found = []
    for copies in (1, 128):
        x = y.repeat(1, copies, 1, 1, 1)
        if last:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        found.append(run_norm(x, backend, norm, grads=(grad.repeat(1, copies, 1, 1, 1), None)))
    few, many = found
    assert torch.equal(few[0], many[0][:, -2:]) and torch.equal(few[1], many[1][-2:])
    assert_gradients_close(many[3][0][:, -2:], few[3][0])
