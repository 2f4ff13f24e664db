"""Tensors that are not plain memory, and whoever looks on: fake and wrapped tensors, modes, tracing, torch.func."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import INTERPRETED, TORCH, assert_gradients_close
from test_lif import draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import snnkern
from snnkern.nn import BNLIF, LIF, TTM, LIFNode

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.skipif(INTERPRETED, reason="nothing here depends on the kernels"),
]


def bn_lif(y, **options):
    """Without affine parameters, and so without anything but y that could be batched or faked."""
    return snnkern.bn_lif(y, None, None, None, None, **{"training": True, **options})


def same(got, wanted) -> bool:
    one = isinstance(got, torch.Tensor)
    return torch.equal(got, wanted) if one else all(map(torch.equal, got, wanted))


def weighted(x, **options):
    """A loss through both outputs, with another gradient for every neuron."""
    spikes, v_last = snnkern.lif(x, **options)
    return (spikes * torch.arange(x.shape[-1], device=x.device)).sum() + v_last.square().sum()


def gradient(x, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(weighted(x, **options), x)[0]


OPS = {
    "lif": snnkern.lif,
    "lif of a transposed x": lambda x: snnkern.lif(x.transpose(1, 2)),
    "lif summed": lambda x: snnkern.lif(x, steps_out=5),
    "lif repeated": lambda x: snnkern.lif(x, steps_out=47),
    "bn_lif": bn_lif,
    "bn_lif summed": lambda x: bn_lif(x, steps_out=5),
    "ttm": lambda x: snnkern.ttm(x, 5),
    "LIF": LIF(),
    "LIFNode": lambda x: LIFNode(step_mode="m")(x),
    "BNLIF": BNLIF(4).eval(),
}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


class Wrapped(torch.Tensor):
    """A tensor around another, which alone has memory."""

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        result = function(*tree_map_only(cls, lambda t: t.inner, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, cls, result)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@ops
def test_fake_tensors_stay_fake(op):
    x = draw((20, 3, 4))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = op(mode.from_tensor(x).requires_grad_())
        loss = sum(t.sum() for t in (got if isinstance(got, tuple) else (got,)))
        loss.backward()
    wanted = op(x)
    for fake, real in zip(*(((t,) if isinstance(t, torch.Tensor) else t) for t in (got, wanted)), strict=True):
        assert type(fake).__name__ == "FakeTensor"
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_fake_gradient_of_a_real_forward_stays_fake():
    x = draw((20, 3, 4)).requires_grad_()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        grad = mode.from_tensor(draw((20, 3, 4), seed=2))
    (got,) = torch.autograd.grad(snnkern.lif(x)[0], x, grad)
    assert type(got).__name__ == "FakeTensor" and got.shape == x.shape


@ops
def test_wrapped_tensors_are_unwrapped_by_their_class(op):
    x = draw((20, 3, 4))
    got = op(Wrapped(x))
    got = got.inner if isinstance(got, Wrapped) else [t.inner for t in got]
    assert same(got, op(x))


def test_gradients_of_wrapped_tensors():
    x = draw((20, 3, 4))
    wrapped = Wrapped(x).requires_grad_()
    spikes, v_last = snnkern.lif(wrapped)
    ((spikes * Wrapped(torch.arange(4))).sum() + v_last.square().sum()).backward()
    assert torch.equal(wrapped.grad.inner, gradient(x))


def test_a_subclass_sees_the_call_and_keeps_its_class():
    names = []

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    spikes, _ = snnkern.lif(draw((20, 4)).as_subclass(Sub))
    assert type(spikes) is Sub and any("snnkern.lif" in name for name in names)


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_that_cannot_be_are_refused(mesh):
    """Those that can are computed by two processes in ``test_ddp.py``."""
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    x = draw((20, 3, 4))
    sharded = distribute_tensor(x, mesh, [Shard(1)])
    for of in (distribute_tensor(x, mesh, [Shard(0)]), DTensor.from_local(x, mesh, [Partial()])):
        for op in (snnkern.lif, lambda x: snnkern.ttm(x, 5)):
            with pytest.raises(ValueError, match="x must be sharded along other dimensions than time, 0"):
                op(of)
    with pytest.raises(TypeError, match="v must be no tensor, or a DTensor, for x in a DTensor, got Tensor"):
        snnkern.lif(sharded, torch.zeros(3, 4))
    with pytest.raises(TypeError, match="threshold must be no tensor, or a DTensor"):
        snnkern.lif(sharded, threshold=torch.ones(4))
    with pytest.raises(NotImplementedError, match="bn_lif takes no DTensor"):
        bn_lif(sharded)


@ops
def test_a_mode_sees_the_op_and_the_results_are_the_same(op):
    x = draw((20, 3, 4))
    with Seen() as seen:
        got = op(x)
    assert any(name.startswith("snnkern.") for name in seen.names)
    with FlopCounterMode(display=False):
        counted = op(x)
    assert same(got, op(x)) and same(counted, op(x))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("time_dim", [0, 1])
def test_a_mode_around_backward_alone(time_dim, order):
    def gradients(mode=None):
        x = draw((6, 20, 4)).permute(order).requires_grad_()
        v = draw([n for i, n in enumerate(x.shape) if i != time_dim], seed=1).requires_grad_()
        residual = draw(x.shape, seed=3).requires_grad_()
        loss = weighted(x, v=v, time_dim=time_dim)
        spikes, v_last = bn_lif(x, v=v, residual=residual, time_dim=time_dim)
        loss = loss + (spikes * residual).sum() + v_last.square().sum() + snnkern.ttm(x, 3, time_dim).square().sum()
        if mode is None:
            return torch.autograd.grad(loss, (x, v, residual))
        with mode:
            return torch.autograd.grad(loss, (x, v, residual))

    seen = Seen()
    assert same(gradients(seen), gradients())
    assert {"snnkern.lif_backward.default", "snnkern.bn_lif_backward.default", "snnkern.ttm.default"} <= {*seen.names}


@ops
def test_a_trace_computes_what_its_function_does(op):
    x, other = draw((20, 3, 4)), draw((20, 3, 4), seed=5)
    stateless = not isinstance(op, torch.nn.Module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(op, x, check_trace=stateless)
    assert same(traced(other), op(other))
    longer = draw((33, 5, 4), seed=6)
    assert same(traced(longer), op(longer))


def test_a_trace_of_a_node_is_its_first_call_and_differentiable():
    traced = torch.jit.trace(LIFNode(step_mode="m"), draw((20, 3, 4)), check_trace=False)
    x = draw((20, 3, 4), seed=5).requires_grad_()
    node = LIFNode(step_mode="m")
    assert torch.equal(traced(x), node(x))
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (traced, LIFNode(step_mode="m"))]
    assert torch.equal(*grads) and grads[0].norm() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_for_more_steps_than_there_are_refuses():
    traced = torch.jit.trace(lambda x: snnkern.lif(x, steps_out=5)[0], draw((20, 4)))
    with pytest.raises(RuntimeError, match="recorded for 5 steps or more, got shape"):
        traced(draw((3, 4)))


@ops
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(op, mode):
    x, other = draw((20, 3, 4)), draw((20, 3, 4), seed=5)
    traced = make_fx(lambda x: op(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert same(traced(other), op(other))


def test_make_fx_leaves_sizes_open():
    graph = make_fx(lambda x: snnkern.lif(x), tracing_mode="symbolic")(draw((20, 3, 4)))
    other = draw((31, 5, 4))
    assert same(graph(other), snnkern.lif(other))


@pytest.mark.filterwarnings("ignore:The tensor attribute", "ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("neuron", [LIF(), LIFNode(step_mode="m")], ids=["LIF", "LIFNode"])
def test_export(neuron, strict):
    """A program of any number of steps, with gradients; a node's starts from the state that the node had."""
    neuron = copy.deepcopy(neuron)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), neuron)
    model[0].weight.data.mul_(5)
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("N", min=2)}
    program = torch.export.export(model, (draw((20, 3, 4)),), dynamic_shapes=(sizes,), strict=strict)
    for shape in ((33, 7, 4), (3, 2, 4)):
        found = []
        for f in (program.module(), model):
            if isinstance(neuron, LIFNode):
                neuron.reset()
            x = draw(shape, seed=5).requires_grad_()
            spikes = f(x)
            found.append((spikes, *torch.autograd.grad(spikes.cumsum(0).square().sum(), x)))
        assert same(*found) and found[0][1].norm() > 0


ONNX = {
    "LIF": LIF(tau=2.5, decay_input=False, reset=-0.2, fire_at_threshold=True, backend="cpu"),
    "LIF summed": LIF(reset=None, steps_out=3),
    "LIFNode": LIFNode(step_mode="m"),
    "BNLIF": BNLIF(4),
    "TTM": TTM(3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize(
    ("model", "dynamo"),
    [*((model, False) for model in ONNX.values()), (ONNX["LIFNode"], True)],
    ids=[*ONNX, "LIFNode, dynamo"],
)
def test_onnx_exporters_unroll_the_reference(model, dynamo):
    runtime, model = pytest.importorskip("onnxruntime"), copy.deepcopy(model).eval()
    file, x, other = io.BytesIO(), draw((6, 3, 4)), draw((6, 7, 4), seed=5)
    if dynamo:
        pytest.importorskip("onnxscript")
        sizes = ({1: torch.export.Dim("N")},)
        torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=sizes, verbose=False).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {1: "N"}})
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    if isinstance(model, LIFNode):
        model.reset()
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    wanted = model(other)
    assert torch.equal(torch.from_numpy(got), wanted) and wanted.abs().sum() > 0


# torch.func and its relatives


@pytest.mark.parametrize("op", list(OPS.values())[:7], ids=list(OPS)[:7])
@pytest.mark.parametrize("dim", [1, 2])
def test_vmap_is_a_stack(op, dim):
    x = draw((20, 3, 4, 2)[: 3 if dim == 1 else 4])
    got = torch.vmap(lambda t: op(t.unsqueeze(1)), in_dims=dim)(x)
    wanted = [op(t.unsqueeze(1)) for t in x.unbind(dim)]
    assert same(
        got, torch.stack(wanted) if isinstance(got, torch.Tensor) else list(map(torch.stack, zip(*wanted, strict=True)))
    )


def test_vmap_over_the_state_alone():
    x, v = draw((20, 4)), draw((6, 4))
    got = torch.vmap(snnkern.lif, in_dims=(None, 0))(x, v)
    assert same(got, snnkern.lif(x.expand(6, 20, 4), v, time_dim=1))


def test_torch_func_grad_and_vmap_in_either_order():
    x = draw((20, 3, 4))
    wanted = gradient(x)
    assert torch.equal(torch.func.grad(weighted)(x), wanted)
    assert torch.equal(torch.vmap(torch.func.grad(weighted), in_dims=1, out_dims=1)(x), wanted)
    if TORCH == (2, 6):
        pytest.skip("PyTorch 2.6 raises where a vmap's output has no gradient")
    assert torch.equal(torch.func.grad(lambda x: torch.vmap(weighted, in_dims=1)(x).sum())(x), wanted)


def test_torch_func_grad_of_batch_norm_and_sums():
    def loss(x):
        return (bn_lif(x, steps_out=3)[0] * snnkern.ttm(x, 3)).sum()

    x = draw((20, 3, 4)).requires_grad_()
    assert torch.equal(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("neuron", [LIF, lambda: LIFNode(step_mode="m")], ids=["LIF", "LIFNode"])
def test_modules_as_functions_of_their_parameters(neuron):
    """``functional_call`` under ``grad``, for every sample by itself, and of several models at once."""

    def network(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), neuron(), torch.nn.Linear(6, 3), neuron())
        for parameter in model.parameters():
            parameter.data.mul_(4)
        return model

    def loss(parameters, x):
        return (torch.func.functional_call(stateless, parameters, (x,)) * torch.arange(3)).square().sum()

    def fresh(model):  # without the state that the last call left
        return copy.deepcopy(model).requires_grad_(True)

    models, x = [network(seed) for seed in range(3)], draw((6, 5, 4)).mul(2)
    stateless, parameters = fresh(models[0]), dict(models[0].named_parameters())
    whole = fresh(models[0])
    wanted = torch.autograd.grad((whole(x) * torch.arange(3)).square().sum(), whole.parameters())
    assert all(g.norm() > 0 for g in wanted)
    got = torch.func.grad(loss)(parameters, x)
    assert all(map(torch.equal, got.values(), wanted))
    stateless = fresh(models[0])
    samples = torch.vmap(torch.func.grad(lambda p, x: loss(p, x.unsqueeze(1))), in_dims=(None, 1))(parameters, x)
    for g, w in zip(samples.values(), wanted, strict=True):
        torch.testing.assert_close(g.sum(0), w)
    stacked, _ = torch.func.stack_module_state(models)
    stateless = fresh(models[0])
    got = torch.vmap(lambda p: torch.func.functional_call(stateless, p, (x,)))(stacked)
    torch.testing.assert_close(got, torch.stack([fresh(model)(x) for model in models]))


@pytest.mark.parametrize("op", [lambda x: snnkern.lif(x)[1], lambda x: snnkern.lif(x.transpose(1, 2))[0]])
def test_jacobians(op):
    def rows(x):
        return op(x).flatten(1)[:, :3].sum(0)

    x = draw((20, 3, 4))
    wanted = torch.autograd.functional.jacobian(rows, x)
    assert wanted.norm() > 0
    assert torch.equal(torch.autograd.functional.jacobian(rows, x, vectorize=True), wanted)
    assert torch.equal(torch.func.jacrev(rows)(x), wanted)


@pytest.mark.parametrize("op", [weighted, lambda x: bn_lif(x)[1].sum(), lambda x: snnkern.ttm(x, 5).sum()])
def test_forward_mode_is_refused_not_dropped(op):
    x = draw((20, 3, 4))
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative \(jvp\): that needs backend='reference'"):
        torch.func.jvp(op, (x,), (x,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivative"),
    ):
        op(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        assert torch.equal(op(x), op(x.clone()))  # no tangent, nothing to refuse


def test_the_reference_has_every_derivative():
    def loss(x):
        return weighted(x, backend="reference")

    x = draw((5, 3, 4))
    tangent = draw(x.shape, seed=4)
    wanted = (gradient(x, backend="reference") * tangent).sum()
    assert torch.func.jvp(loss, (x,), (tangent,))[1] == pytest.approx(wanted.item(), rel=1e-5)
    assert_gradients_close(torch.func.grad(loss)(x), gradient(x))
    assert torch.func.hessian(loss)(x).norm() > 0


@pytest.mark.parametrize(
    "second",
    [
        lambda x: torch.func.grad(lambda x: torch.func.grad(weighted)(x).sum())(x),
        lambda x: torch.autograd.functional.jvp(weighted, x, x),
    ],
)
def test_second_derivatives_are_refused(second):
    with pytest.raises(RuntimeError, match="lif is once differentiable"):
        second(draw((20, 3, 4)))


# Bits that a kernel would not see


def negative(t):
    """-t, with t's memory: the bit says that the sign is still to be flipped."""
    negated = torch._neg_view(t)  # as `.conj().imag` of a complex tensor, but without gaps, which would be copied
    assert negated.is_neg() and torch.equal(negated, -t)
    return negated


def test_negative_bits_are_resolved(backend, device):
    x, v, y = draw((20, 4), device=device), draw((4,), device=device), draw((20, 3, 4), device=device)
    assert same(snnkern.lif(negative(x), negative(v), backend=backend), snnkern.lif(-x, -v, backend=backend))
    assert same(snnkern.lif(x, negative(v), backend=backend), snnkern.lif(x, -v, backend=backend))
    assert torch.equal(snnkern.ttm(negative(x), 3, backend=backend), snnkern.ttm(-x, 3, backend=backend))
    options = {"training": True, "backend": backend}
    of = [torch.rand(3, device=device) + 1 for _ in range(4)]
    stored = [negative(-t) for t in of]
    got = snnkern.bn_lif(negative(y)[..., None].transpose(1, 2)[:, :, :3], *stored, residual=None, **options)
    wanted = snnkern.bn_lif((-y)[..., None].transpose(1, 2)[:, :, :3], *of, residual=None, **options)
    assert same(got, wanted) and all(map(torch.equal, stored, of))
    residual = bn_lif(y, residual=negative(y), backend=backend)
    assert same(residual, bn_lif(y, residual=-y, backend=backend))


def test_negative_bits_of_gradients_are_resolved(backend, device):
    grad, y = draw((20, 4), device=device), draw((20, 3, 4), device=device)
    got, wanted = [], []
    for grads, sign in ((got, negative), (wanted, torch.neg)):
        x = draw((20, 4), device=device, seed=1).requires_grad_()
        spikes, v_last = snnkern.lif(x, backend=backend)
        grads += torch.autograd.grad((spikes, v_last), x, (sign(grad), sign(grad[0])))
        grads += torch.autograd.grad(snnkern.ttm(x, 3, backend=backend), x, sign(grad[:3]))
        y = y.detach().requires_grad_()
        grads += torch.autograd.grad(bn_lif(y, backend=backend)[0], y, sign(y.detach()))
    assert same(got, wanted)


def test_tensors_without_memory_are_refused():
    with pytest.raises(RuntimeError, match="has no memory"):
        snnkern.lif(torch._efficientzerotensor(3, 4), backend="cpu")
    v = torch.ones(4)
    v.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        snnkern.lif(torch.ones(3, 4), v, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_are_served_by_the_reference(dtype):
    spikes, v_last = snnkern.lif(torch.zeros(3, 4, device="meta", dtype=dtype))
    assert (spikes.shape, spikes.dtype, spikes.is_meta) == ((3, 4), dtype, True) and v_last.dtype == torch.float32


def test_an_infinite_sum_is_not_hidden_by_a_mode():
    with Seen():
        spikes, v_last = snnkern.lif(torch.full((20, 4), math.inf))
    assert spikes.all() and v_last.isfinite().all()
