"""Batch norm with neurons and alone as modules, in one process and in two, and folded into what is before it."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import GRADIENT_BOUND, assert_gradients_close
from torch import nn

import snnkern
from snnkern.nn import BNLIF, LIF, LIFNode, TdBatchNorm, fold
from snnkern.surrogate import ATan, Sigmoid
from snnkern.train.processes import leave

T, N, C = 3, 4, 5
SHAPE = (T, N, C, 3, 2)
BOTH = pytest.mark.parametrize("make", [BNLIF, TdBatchNorm])


def data(*shape, seed=0, dtype=torch.float32):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * noise + 0.7).to(dtype)


def lively(norm, seed=1):
    """With parameters and statistics that are not those of a new one."""
    torch.manual_seed(seed)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def folded_time(norm, y):
    return norm(y.flatten(0, 1)).unflatten(0, y.shape[:2])


# Against PyTorch's batch norm


@BOTH
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_state_dict_is_that_of_batch_norm(make, affine, track):
    ours, theirs = (kind(C, affine=affine, track_running_stats=track) for kind in (make, nn.BatchNorm2d))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((lively(theirs), ours), (lively(ours, seed=2), theirs)):
        if track:
            source.num_batches_tracked.fill_(7)
        target.load_state_dict(source.state_dict())
        for key, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])
            assert value.dtype == source.state_dict()[key].dtype
    # Before version 2 there was no count of batches.
    old = {key: value for key, value in theirs.state_dict().items() if key != "num_batches_tracked"}
    assert make(C, affine=affine, track_running_stats=track).load_state_dict(old).missing_keys == []


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("track", "momentum"), [(True, 0.1), (True, 0.7), (True, None), (True, 0.0), (False, 0.1), (False, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_batch_norm_from_batch_to_batch(affine, track, momentum, dtype, backend, device):
    wide = dtype == torch.float64
    if wide:
        backend = device = "cpu"
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum, "eps": 1e-3}
    theirs = lively(nn.BatchNorm2d(C, **options)).to(dtype)
    alone, fused = TdBatchNorm(C, **options).to(dtype), BNLIF(C, LIF(backend=backend), **options).to(dtype)
    for module in (alone, fused):
        module.load_state_dict(theirs.state_dict())
    for module in (theirs, alone, fused):
        module.to(device)
    for i, training in enumerate((True, True, False, True, True, False, False)):
        for module in (theirs, alone, fused):
            module.train(training)
        y = data(*SHAPE, seed=i, dtype=dtype).to(device)
        expected = folded_time(theirs, y)
        assert torch.equal(alone(y), expected)
        spikes = snnkern.lif(expected, backend="reference")[0]
        assert 0.01 < spikes.mean() < 0.99
        # In float32 rounding may decide here and there.
        assert (fused(y) != spikes).double().mean() <= (0 if wide else 0.005)
        for key, value in theirs.state_dict().items():
            assert torch.equal(alone.state_dict()[key], value), key
            torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-14 if wide else 1e-6, atol=0)
    assert not track or theirs.num_batches_tracked == 4


@BOTH
def test_gradients_are_those_of_batch_norm(make):
    theirs = lively(nn.BatchNorm2d(C)).double()
    ours = make(C).double()
    ours.load_state_dict(theirs.state_dict())
    y, upstream = data(*SHAPE, dtype=torch.float64).requires_grad_(), data(*SHAPE, seed=1, dtype=torch.float64)
    expected = folded_time(theirs, y)
    if make is BNLIF:
        expected = snnkern.lif(expected, backend="reference")[0]
    wanted = torch.autograd.grad((expected * upstream).sum(), [y, *theirs.parameters()])
    got = torch.autograd.grad((ours(y) * upstream).sum(), [y, *ours.parameters()])
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 10 * GRADIENT_BOUND[torch.float64] * w.norm()


@BOTH
def test_eval_mode_changes_nothing_and_ignores_the_batch(make):
    module = lively(make(C)).eval()
    before = copy.deepcopy(module.state_dict())
    y = data(*SHAPE)
    whole = module(y)
    torch.testing.assert_close(module(y[:, :1]), whole[:, :1])  # PyTorch's rounds otherwise for other sizes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module.train()
    assert not torch.equal(module(y), whole)
    assert not torch.equal(module.running_mean, before["running_mean"])
    assert module.num_batches_tracked == before["num_batches_tracked"] + 1


# What BNLIF adds


def test_bnlif_hands_residual_and_settings_on():
    settings = {"decay": 0.8, "threshold": 0.6, "reset": None, "surrogate": ATan(), "fire_at_threshold": True}
    module = lively(BNLIF(C, LIF(**settings), eps=0.1, scale=0.7))
    y, residual = data(*SHAPE), data(*SHAPE, seed=1)
    expected = snnkern.bn_lif(
        y, module.weight, module.bias, None, None, training=True, eps=0.1, scale=0.7, residual=residual, **settings
    )[0]
    assert torch.equal(module(y, residual), expected)
    assert not torch.equal(module(y), expected)


def test_bnlif_takes_time_second():
    first, second = lively(BNLIF(C, LIF(decay=0.9))), lively(BNLIF(C, LIF(decay=0.9, time_dim=1)))
    y = data(*SHAPE)
    assert torch.equal(second(y.transpose(0, 1)).transpose(0, 1), first(y))
    assert torch.equal(second.running_mean, first.running_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_16_bit_inputs(dtype, training, backend, device):
    module = lively(BNLIF(C, LIF(backend=backend))).train(training).to(device)
    reference = BNLIF(C, LIF(backend="reference")).train(training).to(device)
    reference.load_state_dict(module.state_dict())
    y = data(*SHAPE, dtype=dtype).to(device)
    spikes = module(y)
    assert spikes.dtype == dtype and spikes.any()
    assert torch.equal(spikes, reference(y))
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-6, atol=0)
        assert module.state_dict()[key].dtype in (torch.float32, torch.int64)
    alone = TdBatchNorm(C, 0.7).train(training).to(device)
    alone.load_state_dict(module.state_dict())
    wide = copy.deepcopy(alone)
    z = alone(y)
    assert z.dtype == dtype
    torch.testing.assert_close(z.float(), wide(y.float()), rtol=8 * torch.finfo(dtype).eps, atol=0.02)


@BOTH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(make, duplicate):
    module = lively(make(C, momentum=None, eps=1e-3))
    if make is BNLIF:
        module.lif = LIF(decay=0.3, surrogate=Sigmoid(2.0))
    twin, y = duplicate(module), data(*SHAPE)
    assert repr(twin) == repr(module) and twin.state_dict().keys() == module.state_dict().keys()
    kept = module.running_mean.clone()
    outputs = twin(y)
    assert torch.equal(module.running_mean, kept)
    assert torch.equal(module(y), outputs) and torch.equal(module.running_mean, twin.running_mean)


def test_prints_what_differs_from_the_defaults():
    assert "scale" not in repr(BNLIF(C)) and "scale" not in repr(TdBatchNorm(C))
    assert "scale=0.35" in repr(TdBatchNorm(C, 0.5, 0.7)) and "decay=0.9" in repr(BNLIF(C, LIF(decay=0.9)))


@BOTH
def test_conversion_to_synchronised_batch_norm_leaves_them_alone(make):
    model = nn.Sequential(nn.BatchNorm2d(C), make(C))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm) and converted[1] is model[1]
    assert isinstance(converted[1], make)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(BNLIF, C, nn.ReLU()), TypeError, r"lif must be an snnkern.nn.LIF or None, got ReLU\(\)"),
        (partial(BNLIF, C, LIF), TypeError, "lif must be an snnkern.nn.LIF or None"),
        (partial(BNLIF, C, scale="1"), TypeError, "scale must be a float, got '1'"),
        (partial(BNLIF, C, scale=float("inf")), ValueError, "scale must be finite"),
        (partial(TdBatchNorm, C, None), TypeError, "alpha must be a float, got None"),
        (partial(TdBatchNorm, C, v_threshold=float("nan")), ValueError, "v_threshold must be finite, got nan"),
        (partial(TdBatchNorm, C, 0.5, constant=False, affine=False), ValueError, "constant=False needs affine=True"),
        (partial(BNLIF.from_modules, nn.ReLU(), LIF()), TypeError, r"norm must be a batch norm, got ReLU\(\)"),
        (partial(BNLIF.from_modules, nn.LayerNorm(3), LIF()), TypeError, "norm must be a batch norm, got LayerNorm"),
        (partial(BNLIF.from_modules, BNLIF(3), LIF()), TypeError, "norm must be a batch norm, got BNLIF"),
        (partial(BNLIF.from_modules, nn.BatchNorm2d(3), nn.ReLU()), TypeError, "lif must be an snnkern.nn.LIF"),
        (partial(BNLIF.from_modules, nn.BatchNorm2d(3), LIFNode()), ValueError, "lif must be in step_mode 'm'"),
        (
            partial(BNLIF.from_modules, nn.BatchNorm2d(3), LIFNode(step_mode="m", store_v_seq=True)),
            ValueError,
            "lif must be in step_mode 'm' and without store_v_seq",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@BOTH
@pytest.mark.parametrize("shape", [(T, N), (T, N, C + 1), (T, N, 1, C), (N, C, 4, 4)])
def test_wrong_inputs_are_named(make, shape):
    with pytest.raises(ValueError, match=rf"y must be \[T, N, {C}, ...\], got shape"):
        make(C)(torch.zeros(shape))


# From two layers to one and back


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(C, eps=1e-3),
        nn.BatchNorm2d(C, momentum=None),
        nn.BatchNorm2d(C, affine=False),
        nn.BatchNorm3d(C, track_running_stats=False),
        nn.SyncBatchNorm(C, momentum=0.3),
        TdBatchNorm(C, 0.5, 0.7),
        TdBatchNorm(C, 0.5, 0.7, constant=False),
    ],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("training", [True, False])
def test_one_from_two_shares_their_tensors(norm, training):
    norm = lively(copy.deepcopy(norm)).train(training)
    lif = LIF(decay=0.8)
    fused = BNLIF.from_modules(norm, lif)
    again, same = fused.to_modules()
    assert fused.lif is lif and same is lif and isinstance(again, TdBatchNorm)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(fused, name) is getattr(norm, name) is getattr(again, name)
    for name in ("eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(fused, name) == getattr(norm, name) == getattr(again, name)
    assert fused.scale == again.scale == getattr(norm, "scale", 1.0)
    assert fused.state_dict().keys() == norm.state_dict().keys() == again.state_dict().keys()

    y = data(*SHAPE)
    assert torch.equal(fused(y), lif(again(y)))
    if norm.affine:  # a step of one is a step of all
        with torch.no_grad():
            fused.weight.mul_(2)
        assert torch.equal(again.weight, norm.weight) and again.weight is fused.weight


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_node_becomes_the_same_neuron(decay_input, v_reset):
    node = LIFNode(
        tau=1.6,
        decay_input=decay_input,
        v_threshold=0.7,
        v_reset=v_reset,
        surrogate_function=ATan(),
        detach_reset=True,
        step_mode="m",
    )
    norm = lively(nn.BatchNorm2d(C)).double()
    y, upstream = data(*SHAPE, dtype=torch.float64).requires_grad_(), data(*SHAPE, seed=1, dtype=torch.float64)
    expected = node(folded_time(norm, y))
    wanted = torch.autograd.grad((expected * upstream).sum(), [y, norm.weight])
    fused = BNLIF.from_modules(norm, node)
    spikes = fused(y)
    assert torch.equal(spikes, expected) and torch.equal(fused(y), expected)  # every call starts at rest
    for g, w in zip(torch.autograd.grad((spikes * upstream).sum(), [y, norm.weight]), wanted, strict=True):
        assert (g - w).norm() <= 10 * GRADIENT_BOUND[torch.float64] * w.norm()


def test_node_that_fires_at_the_threshold_still_does():
    norm = nn.BatchNorm2d(C)
    nn.init.zeros_(norm.weight)
    nn.init.ones_(norm.bias)  # what every neuron receives: its threshold
    assert BNLIF.from_modules(norm, LIFNode(decay_input=False, step_mode="m"))(data(*SHAPE)).all()
    assert not BNLIF.from_modules(norm, LIF(decay=0.0))(data(*SHAPE)).any()


@pytest.mark.parametrize(
    ("of_node", "kept"), [(None, None), ("torch", None), ("cupy", None), ("reference", "reference")]
)
def test_backend_of_a_node_is_kept_if_it_is_ours(of_node, kept):
    node = LIFNode(step_mode="m", backend=of_node)
    assert BNLIF.from_modules(nn.BatchNorm2d(C), node).lif.settings["backend"] == kept


def test_spikingjelly_layers_become_one():
    layer = pytest.importorskip("spikingjelly.activation_based.layer", reason="SpikingJelly is not installed")
    norm = lively(layer.BatchNorm2d(C, step_mode="m")).double()
    node, y = LIFNode(step_mode="m"), data(*SHAPE, dtype=torch.float64)
    expected = node(norm(y))
    norm.reset_running_stats()
    assert torch.equal(BNLIF.from_modules(norm, node)(y), expected)


# Threshold-dependent batch norm


def test_tdbn_is_the_papers_equation():
    module = lively(TdBatchNorm(C, 0.5**0.5, 0.6, eps=1e-3)).double()
    y = data(*SHAPE, dtype=torch.float64)
    mean, var = y.mean((0, 1, 3, 4), keepdim=True), y.var((0, 1, 3, 4), unbiased=False, keepdim=True)
    weight, bias = (p.view(1, 1, C, 1, 1) for p in (module.weight, module.bias))
    expected = weight * (0.5**0.5 * 0.6 * (y - mean) / torch.sqrt(var + 1e-3)) + bias  # the bias is not scaled
    torch.testing.assert_close(module(y), expected, rtol=1e-13, atol=1e-13)
    module.train(False)
    mean, var = (s.view(1, 1, C, 1, 1) for s in (module.running_mean, module.running_var))
    expected = weight * (0.5**0.5 * 0.6 * (y - mean) / torch.sqrt(var + 1e-3)) + bias
    torch.testing.assert_close(module(y), expected, rtol=1e-13, atol=1e-13)


def test_tdbn_in_both_descriptions():
    """A factor beside weight, or weight that starts from it: one function, but weight learns and decays otherwise."""
    factor = 0.5**0.5 * 0.5
    beside, within = (TdBatchNorm(C, 0.5**0.5, 0.5, constant=constant).double() for constant in (True, False))
    assert (beside.weight == 1).all() and beside.scale == factor
    torch.testing.assert_close(within.weight.data, torch.full((C,), factor, dtype=torch.float64), rtol=1e-7, atol=0)
    assert within.scale == 1
    with torch.no_grad():
        within.weight.fill_(factor)
    y, upstream = data(*SHAPE, dtype=torch.float64), data(*SHAPE, seed=1, dtype=torch.float64)
    results = []
    for module in (beside, within):
        z = module(y)
        (z * upstream).sum().backward()
        results.append(z)
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(beside.weight.grad, factor * within.weight.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(beside.bias.grad, within.bias.grad, rtol=1e-12, atol=0)
    # One step of gradient descent moves the product weight * factor by the factor squared in one of the two.
    for module in (beside, within):
        torch.optim.SGD(module.parameters(), lr=1.0).step()
    moved = [factor * beside.weight - factor, within.weight - factor]
    torch.testing.assert_close(moved[0], factor**2 * moved[1], rtol=1e-12, atol=0)


def test_tdbn_without_parameters_is_scaled_all_the_same():
    y = data(*SHAPE)
    expected = 0.35 * TdBatchNorm(C, affine=False)(y)
    torch.testing.assert_close(TdBatchNorm(C, 0.5, 0.7, affine=False)(y), expected)


@pytest.mark.parametrize("training", [True, False])
def test_tdbn_and_its_fused_form_fire_alike(training, backend, device):
    norm = lively(TdBatchNorm(C, 0.5**0.5, 0.5)).train(training).to(device)
    nn.init.constant_(norm.bias, 0.2)
    lif = LIF(threshold=0.5, backend=backend)
    y = data(*SHAPE).to(device)
    expected = lif(copy.deepcopy(norm)(y))
    assert 0.05 < expected.mean() < 0.95
    assert (BNLIF.from_modules(norm, lif)(y) != expected).float().mean() <= 0.005


# Several processes

# Samples of each of the two, of N in all.
SHARES = [(2, 2), (3, 1), (4, 0)]
STEPS = 2


def synchronised(kind, backend, dtype, group):
    if kind == "TdBatchNorm":
        return lively(TdBatchNorm(C, 0.8, 0.9, process_group=group)).to(dtype)
    lif = LIF(threshold=0.9, backend=backend)
    if kind == "BNLIF":
        return lively(BNLIF(C, lif, scale=0.72, process_group=group)).to(dtype)
    norm = nn.SyncBatchNorm(C, momentum=None) if group else nn.BatchNorm2d(C, momentum=None)
    return lively(BNLIF.from_modules(norm, lif)).to(dtype)


def train_on(kind, backend, dtype, group=None, part=slice(None)):
    """Two batches: outputs, gradients of y, summed gradients of the parameters, running statistics."""
    module, found = synchronised(kind, backend, dtype, group), {}
    for i in range(STEPS):
        y = data(*SHAPE, seed=i, dtype=dtype)[:, part].requires_grad_()
        z = module(y)
        (z * data(*SHAPE, seed=10 + i, dtype=dtype)[:, part]).sum().backward()
        found |= {f"output {i}": z.detach(), f"grad {i}": y.grad}
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    module.eval()
    found["eval"] = module(data(*SHAPE, seed=99, dtype=dtype)).detach()
    return found | {name: b.clone() for name, b in module.named_buffers()}


CASES = [
    (kind, backend, dtype, share)
    for kind, backends in (("BNLIF", ("cpu", "reference")), ("SyncBatchNorm", ("cpu",)), ("TdBatchNorm", (None,)))
    for backend in backends
    for dtype in (torch.float32, torch.float64)
    for share in SHARES
]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        results = []
        for kind, backend, dtype, share in CASES:
            part = slice(share[0] * rank, share[0] + share[1] * rank)
            results.append([train_on(kind, backend, dtype, dist.group.WORLD, part) for _ in range(2)])
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{k}-{b}-{d}-{s}" for k, b, d, s in CASES])
def test_two_processes_are_one_with_the_whole_batch(case, two_processes):
    kind, backend, dtype, _ = CASES[case]
    whole = train_on(kind, backend, dtype)
    (first, again), (second, second_again) = (results[case] for results in two_processes)
    for once, twice in ((first, again), (second, second_again)):
        assert all(torch.equal(once[key], twice[key]) for key in whole), "not the same bits every time"
    for key, wanted in whole.items():
        a, b = first[key], second[key]
        if key.startswith("output") or key == "eval":
            got = torch.cat([a, b], 1) if key != "eval" else a
            if kind == "TdBatchNorm":
                torch.testing.assert_close(got, wanted)
            else:
                assert torch.equal(got, wanted), key
        elif key.startswith("grad of"):
            assert_gradients_close(a + b, wanted)
        elif key.startswith("grad"):
            assert_gradients_close(torch.cat([a, b], 1), wanted)
        else:
            assert torch.equal(a, b), key
            torch.testing.assert_close(a, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


# Folding


class Net(nn.Module):
    """A layer and its norm among others, and a branch."""

    def __init__(self, layer, norm):
        super().__init__()
        self.before = nn.Tanh()
        self.layer, self.norm = layer, norm
        self.branch = nn.Sequential(nn.Identity(), copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())

    def forward(self, x):
        x = self.before(x)
        return self.norm(self.layer(x)) + self.branch(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (partial(nn.Conv2d, 4, C, 3, stride=2, padding=1), nn.BatchNorm2d, (2, 4, 7, 6)),
        (partial(nn.Conv2d, 4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 7, 6)),
        (partial(nn.Conv1d, 4, C, 3, dilation=2), nn.BatchNorm1d, (2, 4, 9)),
        (partial(nn.Conv3d, 4, C, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
        (partial(nn.Linear, 4, C), nn.BatchNorm1d, (3, 4)),
    ],
    ids=lambda value: getattr(getattr(value, "func", None), "__name__", None),
)
def test_folded_layers_give_the_same(layer, norm, shape, bias, affine):
    torch.manual_seed(0)
    layer = layer(bias=bias)
    model = Net(layer, norm(layer.weight.shape[0], affine=affine, eps=1e-2)).double().eval()
    for module in (model.norm, model.branch[2]):
        lively(module)
    before = copy.deepcopy(model.state_dict())
    folded, x = fold(model.train()), data(*shape, dtype=torch.float64)
    assert not folded.training and model.training
    assert isinstance(folded.norm, nn.Identity) and isinstance(folded.branch[2], nn.Identity)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("make", [BNLIF, TdBatchNorm])
def test_ours_are_folded_with_their_factor(make):
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, C, 3)
            self.norm = BNLIF(C, LIF(decay=0.9), scale=0.35) if make is BNLIF else TdBatchNorm(C, 0.5, 0.7)

        def forward(self, x):
            return self.norm(self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    torch.manual_seed(0)
    model, x = Frames().double().eval(), data(T, N, 2, 6, 6, dtype=torch.float64)
    lively(model.norm)
    folded, expected = fold(model), model(x)
    if make is BNLIF:
        assert folded.norm is not model.norm.lif and folded.norm.settings == model.norm.lif.settings
        assert torch.equal(folded(x), expected) and 0.05 < expected.mean() < 0.95
    else:
        torch.testing.assert_close(folded(x), expected, rtol=1e-13, atol=1e-13)


def test_fold_needs_eps():
    """TET's eq. 6 divides by the running deviation alone, and so differs."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, C, 3).double(), lively(nn.BatchNorm2d(C)).double().eval()
    x = data(2, 2, 6, 6, dtype=torch.float64)
    expected, folded = norm(conv(x)), fold(nn.Sequential(conv, norm))
    factor = norm.weight / norm.running_var.sqrt()
    literal = F.conv2d(x, conv.weight * factor.view(-1, 1, 1, 1), norm.bias + (conv.bias - norm.running_mean) * factor)
    assert (folded(x) - expected).abs().max() < 1e-13
    assert 1e-6 < (literal - expected).abs().max() < 1e-3


def test_folded_in_float32_stays_float32_and_near():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, C, 3), lively(nn.BatchNorm2d(C))).eval()
    folded, x = fold(model), data(2, 2, 6, 6)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ConvTranspose2d(2, C, 3), nn.BatchNorm2d(C)),
        nn.Sequential(nn.Conv2d(2, C, 3), nn.ReLU(), nn.BatchNorm2d(C)),
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, C, 3)),
        nn.Sequential(nn.Conv2d(2, C, 3), nn.BatchNorm2d(C, track_running_stats=False)),
        nn.Sequential(nn.Linear(2, C), nn.BatchNorm1d(C + 1)),
        nn.Sequential(nn.Linear(2, C)),
    ],
)
def test_nothing_to_fold_is_said(model):
    with pytest.raises(ValueError, match="there is no batch norm behind a convolution or linear layer in Sequential"):
        fold(model)
