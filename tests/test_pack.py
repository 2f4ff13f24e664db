"""Spikes kept as bits: the kernels on every backend that can run, and ``packed_spikes`` among the rest of autograd."""

import contextlib
import gc
import math
import threading

import pytest
import torch
from conftest import INTERPRETED
from test_lif import draw
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import snnkern
from snnkern.backend import choose
from snnkern.nn import BNLIF, LIF
from snnkern.ops import pack as ops
from snnkern.ops.pack import pack, unpack
from snnkern.train.processes import leave

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def binary(shape, dtype=torch.float32, device="cpu", seed=0):
    return (draw(shape, device=device, seed=seed) > 0.5).to(dtype)


def refuses(backend, dtype):
    return dtype == torch.float64 and backend != "cpu"


def both(backend, x):
    return [choose(x.device.type, x.dtype, name) for name in (backend, "reference")]


@pytest.fixture
def packs(monkeypatch):
    """The results of the calls of ``pack`` that the context makes."""
    made = []

    def spy(*args):
        made.append(pack(*args))
        assert made[-1] is None or made[-1].nbytes == math.ceil(args[0].numel() / 8)
        return made[-1]

    monkeypatch.setattr(ops, "pack", spy)
    return made


# The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16, 1000, 16384, 16389, 70003])
def test_bits_and_back(backend, device, dtype, n):
    x = binary(n + 1, dtype, device)
    if refuses(backend, dtype):
        return
    wanted = [0] * math.ceil(n / 8)
    for i, spike in enumerate(x[:n].tolist()):
        wanted[i // 8] |= int(spike) << i % 8
    for kernels in both(backend, x):
        bits = pack(x[:n], kernels)
        assert bits.tolist() == wanted
        assert torch.equal(unpack(bits, (n,), dtype, kernels), x[:n])
        assert torch.equal(pack(x[1:], kernels), pack(x[1:].clone(), kernels))  # not at 16 bytes
        assert torch.equal(unpack(bits[1:], (max(n - 8, 0),), dtype, kernels), x[8:n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-0.0, 2.0, 0.5, -1.0, math.nan, math.inf, 6e-8])
def test_what_is_not_binary_is_refused(backend, device, dtype, value):
    if refuses(backend, dtype):
        return
    for n, at in ((1, 0), (16, 3), (20, 19), (70000, 0), (70000, 40001), (70000, 69999)):
        x = torch.ones(n, dtype=dtype, device=device)
        x[at] = value
        for kernels in both(backend, x):
            assert pack(x, kernels) is None
            bits = pack(x, kernels, check=False)
            if kernels.__name__.endswith("cpu"):  # which looks all the same
                assert bits is None
                continue
            unchecked = unpack(bits, (n,), dtype, kernels)
            assert unchecked[at] == 0 and unchecked.sum(dtype=torch.float64) == n - 1


# What is kept


def net(device="cpu", dtype=torch.float32, backend=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), LIF(backend=backend), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers, LIF(backend=backend), nn.Conv2d(4, 3, 7)).to(device, dtype)


def gradients(model, x, context, forward=None):
    with context:
        loss = (forward or model)(x).square().sum()
    return [loss, *backward(model, x, loss)]


def backward(model, x, loss):
    x.grad = None
    model.zero_grad()
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_equal(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == w.dtype and g.stride() == w.stride() and torch.equal(g, w)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_an_element_is_kept_and_gradients_are_the_same(backend, device, dtype, packs, channels_last):
    if refuses(backend, dtype) or (INTERPRETED and dtype == torch.bfloat16):
        return
    model, x = net(device, dtype, backend), draw((5, 2, 9, 9), dtype, device).requires_grad_()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    dense = []
    for layer in (model[1], model[3]):
        layer.register_forward_hook(lambda _, args, spikes: dense.append(StorageWeakRef(spikes.untyped_storage())))
    with snnkern.packed_spikes(backend=backend):
        loss = model(x).square().sum()
    gc.collect()
    assert [bits.nbytes for bits in packs] == [math.ceil(5 * 6 * 81 / 8), math.ceil(5 * 4 * 49 / 8)]
    assert all(storage.expired() for storage in dense)  # the bits are all that is left
    got = [loss, *backward(model, x, loss)]
    dense.clear()
    assert_equal(got, gradients(model, x, contextlib.nullcontext()))
    assert len(packs) == 2 and len(dense) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_stage_keeps_little_more_than_what_its_convolution_made(backend, device, channels_last):
    """conv, batch norm, LIF, conv: the output of the first, a bit a spike, some numbers a channel."""
    conv, norm, after = nn.Conv2d(3, 32, 3, padding=1), BNLIF(32, LIF(backend=backend)), nn.Conv2d(32, 8, 3, padding=1)
    x = draw((4, 2, 3, 16, 16), torch.bfloat16, device)
    stage = nn.ModuleList([conv.bfloat16(), norm, after.bfloat16()]).to(device)
    if channels_last:
        stage.to(memory_format=torch.channels_last)
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 2))
    exist = {t.untyped_storage().data_ptr() for t in (x, *stage.parameters(), *stage.buffers())}
    kept, real = {}, ops.saved_tensors_hooks

    def counted(pack, unpack):
        def count(t):
            packed = pack(t)
            for part in packed.args:
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in exist:
                    kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
            return packed

        return real(count, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "saved_tensors_hooks", counted)
        with snnkern.packed_spikes(backend=backend):
            y = conv(x.flatten(0, 1)).unflatten(0, (4, 2))
            z = after(norm(y).flatten(0, 1))
    assert z.requires_grad and y.numel() * 2 < sum(kept.values()) <= 2.2 * y.numel()


def test_without_the_context_dense_spikes_are_kept():
    model, x, dense = net(), draw((5, 2, 9, 9)), []
    model[1].register_forward_hook(lambda _, args, spikes: dense.append(StorageWeakRef(spikes.untyped_storage())))
    loss = model(x).square().sum()
    assert not dense[0].expired() and loss.requires_grad
    assert not hasattr(snnkern.lif(x)[0].untyped_storage(), "_snnkern_spikes")


def test_all_users_share_one_packed_copy(backend, device, packs):
    layers = [nn.Linear(40, 3, device=device) for _ in range(3)]
    with snnkern.packed_spikes(backend=backend):
        spikes, _ = snnkern.lif(draw((6, 40), device=device), backend=backend)
        loss = sum(layer(spikes).sum() for layer in layers)
    loss.backward()
    assert len(packs) == 1
    for layer in layers:
        assert torch.equal(layer.weight.grad, spikes.sum(0).expand(3, 40))


VIEWS = {
    "itself": lambda s: s,
    "steps": lambda s: s[3:7],
    "one step": lambda s: s[4],
    "one element": lambda s: s[4, 2, 3],
    "the last": lambda s: s[-1, -1, -1:],
    "every other": lambda s: s[1::2, :, ::3],
    "flat": lambda s: s.flatten(),
    "reshaped": lambda s: s[1:].flatten(0, 1).unflatten(1, (1, 7)),
    "transposed": lambda s: s.transpose(0, 2),
    "expanded": lambda s: s[:, :1].expand(-1, 4, -1),
    "windows": lambda s: s.unfold(0, 3, 1),
    "detached": lambda s: s.detach()[2:],
    "nothing": lambda s: s[:0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend, device, packs, monkeypatch, view):
    asked = []

    def spy(bits, shape, *args):
        asked.append(math.prod(shape))
        return unpack(bits, shape, *args)

    monkeypatch.setattr(ops, "unpack", spy)
    with snnkern.packed_spikes(backend=backend):
        spikes, _ = snnkern.lif(draw((9, 5, 7), device=device), backend=backend)
        seen = VIEWS[view](spikes)
        w = torch.ones(seen.shape, device=device, requires_grad=True)
        u = torch.ones(spikes.shape, device=device, requires_grad=True)
        loss, of_all = (seen * w).sum(), (spikes * u).sum()
    wanted, all_wanted, strides = seen.clone(), spikes.clone(), seen.stride()
    del spikes, seen
    assert torch.equal(torch.autograd.grad(loss, w)[0], wanted)
    reach = sum((n - 1) * stride for n, stride in zip(wanted.shape, strides, strict=True)) + 1
    assert len(asked) == (view != "nothing") and all(n < reach + 8 for n in asked)  # no more than the view spans
    assert torch.equal(torch.autograd.grad(of_all, u)[0], all_wanted) and len(packs) == 1


def test_neurons_keep_spikes_too(backend, device, packs):
    x = draw((6, 40), device=device).requires_grad_()

    def twice():
        spikes, _ = snnkern.lif(x, backend=backend)
        return torch.autograd.grad(snnkern.lif(spikes, backend=backend, threshold=0.5)[0].sum(), x)

    with snnkern.packed_spikes(backend=backend):
        got = twice()
    assert len(packs) == 1 and torch.equal(got[0], twice()[0])


@pytest.mark.parametrize("edit", [lambda s: s.mul_(0.5), lambda s: s[2].fill_(3.0), lambda s: s.flatten().add_(1)])
def test_spikes_edited_before_they_are_kept_are_left_alone(backend, device, packs, edit):
    w = torch.ones(40, device=device, requires_grad=True)
    with snnkern.packed_spikes(backend=backend):
        spikes, _ = snnkern.lif(draw((6, 40), device=device), backend=backend)
        edit(spikes)
        (got,) = torch.autograd.grad((spikes * w).sum(), w)
    assert torch.equal(got, spikes.sum(0)) and not packs


def test_spikes_edited_after_they_are_kept_give_the_gradient_of_what_they_were(backend, device, packs):
    w = torch.ones(40, device=device, requires_grad=True)
    with snnkern.packed_spikes(backend=backend):
        spikes, _ = snnkern.lif(draw((6, 40), device=device), backend=backend)
        wanted, loss = spikes.sum(0), (spikes * w).sum()
        spikes.mul_(0.5)
        again = (spikes * w).sum()
    assert torch.equal(torch.autograd.grad(loss, w)[0], wanted)
    assert torch.equal(torch.autograd.grad(again, w)[0], wanted / 2) and len(packs) == 1


def test_spikes_edited_behind_autograd_are_noticed_on_the_cpu(packs):
    w = torch.ones(40, requires_grad=True)
    with snnkern.packed_spikes():
        spikes, _ = snnkern.lif(draw((6, 40)))
        spikes.data[3] = 0.25
        loss = (spikes * w).sum() + (spikes * w).sum()
    assert torch.equal(torch.autograd.grad(loss, w)[0], 2 * spikes.sum(0)) and packs == [None]


def test_edits_of_everything_else_still_raise():
    x = draw((5,)).requires_grad_()
    for f in (torch.exp, lambda x: x.square().sin()):
        with snnkern.packed_spikes():
            y = f(x * 1)
            z = y * y
        y.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*at version 1; expected version 0"):
            z.sum().backward()


def test_a_new_tensor_at_the_address_of_dead_spikes_is_not_taken_for_them(packs):
    w = torch.ones(64, 64, requires_grad=True)
    with snnkern.packed_spikes():
        addresses, met = set(), 0
        for i in range(20):
            spikes = snnkern.lif(draw((64, 64), seed=i))[0]
            addresses.add(spikes.data_ptr())
            del spikes
            dense = draw((64, 64), seed=i) + 0
            met += dense.data_ptr() in addresses
            (got,) = torch.autograd.grad((dense * w).sum(), w)
            assert torch.equal(got, dense)
    assert met and not packs


def test_other_views_of_the_memory_are_left_alone(packs):
    w = torch.ones(6, 40, dtype=torch.bfloat16, requires_grad=True)
    with snnkern.packed_spikes():
        spikes, _ = snnkern.lif(draw((6, 40), torch.bfloat16))
        halves, negative = spikes.view(torch.float16), torch._neg_view(spikes)
        (got,) = torch.autograd.grad((halves * w.half()).sum() + (negative * w).sum(), w)
    assert torch.equal(got, halves.bfloat16() - spikes) and not packs


# Spikes of others


def test_detection(device, packs):
    spikes, dense = binary((6, 40), device=device), draw((6, 40), device=device)
    w = torch.full((40,), 0.5, device=device, requires_grad=True)

    def loss():
        pooled = torch.cat([spikes[:2], spikes[2:]])
        return ((spikes * w).sum() + (pooled * w).sum() + (dense * w).sum() + (dense.flatten(0) * w.repeat(6)).sum(),)

    wanted = torch.autograd.grad(loss(), w)
    with snnkern.packed_spikes():
        assert torch.equal(torch.autograd.grad(loss(), w)[0], wanted[0])
    assert not packs
    with snnkern.packed_spikes(detect=True):
        got = loss()
    assert [bits is None for bits in packs] == [False, False, True]
    with snnkern.packed_spikes(detect=True):
        loss()
    assert len(packs) == 4  # only what is concatenated anew
    assert torch.equal(torch.autograd.grad(got, w)[0], wanted[0])


def test_detection_where_there_is_nothing_to_look_at(packs):
    with snnkern.packed_spikes(detect=True), torch.device("meta"):
        assert nn.Linear(3, 4)(torch.ones(5, 3)).sum().requires_grad
    assert not packs


def test_detection_looks_again_after_an_edit(packs):
    x, w = binary((40,)), torch.full((40,), 0.5, requires_grad=True)
    with snnkern.packed_spikes(detect=True):
        first = (x * w).sum()
        x[3] = 7.0
        second = (x * w).sum()
        x.zero_()
        third = (x * w).sum()
    assert torch.equal(torch.autograd.grad(first, w)[0], binary((40,)))
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(second, w)
    assert torch.equal(torch.autograd.grad(third, w)[0], x) and sum(b is None for b in packs) == 1


# Among the rest of autograd


def test_gradients_of_higher_order(backend, device, packs):
    w = draw((40,), device=device).requires_grad_()

    def second():
        spikes, _ = snnkern.lif(draw((6, 40), device=device), backend=backend)
        (first,) = torch.autograd.grad((spikes * w).pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w)[0]

    with snnkern.packed_spikes(backend=backend):
        got = second()
    assert packs and torch.equal(got, second())


def test_a_graph_kept_for_a_second_backward(packs):
    model, x = net(), draw((5, 2, 9, 9))
    with snnkern.packed_spikes():
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_equal(torch.autograd.grad(loss, list(model.parameters())), first)
    assert len(packs) == 2


@pytest.mark.parametrize("where", ["all of it", "what follows the spikes"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(packs, use_reentrant, where):
    model, x = net(), draw((5, 2, 9, 9)).requires_grad_()
    whole = where == "all of it"
    before, after = (model[:0], model) if whole else (model[:2], model[2:])

    def forward(x):
        return checkpoint(after, before(x), use_reentrant=use_reentrant)

    got = gradients(model, x, snnkern.packed_spikes(), forward)
    assert_equal(got, gradients(model, x, contextlib.nullcontext()))
    assert len(packs) == (0 if whole else 1)  # the input of what is recomputed, and nothing within


def test_backward_inside_the_context_packs_what_is_recomputed(packs):
    model, x = net(), draw((5, 2, 9, 9)).requires_grad_()
    with snnkern.packed_spikes():
        got = gradients(model, x, contextlib.nullcontext(), lambda x: checkpoint(model, x, use_reentrant=True))
    assert_equal(got, gradients(model, x, contextlib.nullcontext()))
    assert len(packs) == 2


def test_autocast(device, packs):
    model, x = net(device), draw((5, 2, 9, 9), device=device).requires_grad_()

    def forward(x):
        with torch.autocast(device, torch.bfloat16):
            return model(x).float()

    got = gradients(model, x, snnkern.packed_spikes(), forward)
    assert_equal(got, gradients(model, x, contextlib.nullcontext(), forward))
    assert len(packs) == 2


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_models(packs, compiler):
    model, x = net(), draw((5, 2, 9, 9)).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    wanted = gradients(model, x, contextlib.nullcontext())
    assert_equal(gradients(model, x, contextlib.nullcontext(), compiled), wanted)
    for _ in range(2):
        assert_equal(gradients(model, x, snnkern.packed_spikes(), compiled), wanted)
    assert len(packs) == 4


def _data_parallel(rank, path, wanted):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", world_size=2, rank=rank)
    model = nn.parallel.DistributedDataParallel(net())
    x = draw((4, 5, 2, 9, 9))[rank::2].flatten(0, 1)
    for _ in range(2):  # buckets are rebuilt after the first
        model.zero_grad()
        with snnkern.packed_spikes():
            loss = model(x).square().sum()
        loss.backward()
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, w)
    leave()


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no distributed package")
    model, halves = net(), [draw((4, 5, 2, 9, 9))[rank::2].flatten(0, 1) for rank in range(2)]
    (sum(model(x).square().sum() for x in halves) / 2).backward()
    wanted = [p.grad for p in model.parameters()]
    torch.multiprocessing.spawn(_data_parallel, (tmp_path / "store", wanted), nprocs=2)


def test_nested_contexts_and_a_decorator(packs):
    model, x = net(), draw((5, 2, 9, 9)).requires_grad_()
    wanted = gradients(model, x, contextlib.nullcontext())
    with snnkern.packed_spikes():
        assert_equal(gradients(model, x, snnkern.packed_spikes()), wanted)
        assert_equal(gradients(model, x, contextlib.nullcontext()), wanted)
    assert_equal(gradients(model, x, contextlib.nullcontext(), snnkern.packed_spikes()(model)), wanted)
    assert len(packs) == 6
    assert_equal(gradients(model, x, contextlib.nullcontext()), wanted)
    assert len(packs) == 6


def test_an_exception_ends_the_context(packs):
    with pytest.raises(ZeroDivisionError), snnkern.packed_spikes():
        raise ZeroDivisionError
    gradients(net(), draw((5, 2, 9, 9)).requires_grad_(), contextlib.nullcontext())
    assert not packs and not ops._contexts


def test_other_threads_keep_what_they_keep(packs):
    with snnkern.packed_spikes():
        args = net(), draw((5, 2, 9, 9)).requires_grad_(), contextlib.nullcontext()
        thread = threading.Thread(target=gradients, args=args)
        thread.start()
        thread.join()
    assert not packs


def test_without_gradients_nothing_is_packed(packs):
    model, x = net(), draw((5, 2, 9, 9))
    for mode in (torch.no_grad, torch.inference_mode):
        with snnkern.packed_spikes(detect=True), mode():
            assert not model(x).requires_grad
    assert not packs


def test_the_reference_makes_spikes_too(packs):
    model, x = net(backend="reference"), draw((5, 2, 9, 9)).requires_grad_()
    wanted = gradients(model, x, contextlib.nullcontext())
    assert_equal(gradients(model, x, snnkern.packed_spikes(backend="reference")), wanted)
    assert len(packs) == 2


def test_a_backend_that_cannot_pack_raises_its_reason():
    for backend, error, message in (("fpga", ValueError, "must be one of"), ("cuda", RuntimeError, "cannot run")):
        with pytest.raises(error, match=message), snnkern.packed_spikes(backend=backend):
            net()(draw((5, 2, 9, 9)))
