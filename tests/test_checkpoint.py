"""``torch.utils.checkpoint`` around nodes with state: everything is as without it, bit for bit, or it raises."""

import pytest
import torch
from conftest import EMULATED, INTERPRETED, TORCH
from test_lif import draw
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import snnkern
from snnkern.nn import BNLIF, LIF, LIFNode

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(INTERPRETED or EMULATED, reason="nothing here depends on the kernels"),
]

since_2_8 = pytest.mark.skipif(TORCH < (2, 8), reason="use_reentrant=False needs PyTorch 2.8 and is refused before")
REENTRANT = [pytest.param(False, marks=since_2_8), True]


def without(part, *inputs, **_):
    return part(*inputs)


def network(**node):
    """First layer, the part that a checkpoint is put around, last layer."""
    torch.manual_seed(0)
    first = nn.Linear(4, 8)
    middle = nn.Sequential(LIFNode(**node), nn.Dropout(0.3), nn.Linear(8, 8), LIFNode(v_reset=None, **node))
    with torch.no_grad():
        first.weight.mul_(6)
        middle[2].weight.mul_(8)
    return first, middle, nn.Linear(8, 3)


def nodes(net):
    return [module for part in net for module in part.modules() if isinstance(module, LIFNode)]


def loss_of(net, around, x, **options):
    first, middle, last = net
    return last(around(middle, first(x), **options)).square().sum()


def whole(net, around, **options):
    """Two batches, the state carried from one to the next, one backward."""
    first = loss_of(net, around, draw((6, 5, 4)), **options)
    (first + loss_of(net, around, draw((3, 5, 4), seed=1), **options)).backward()


def once(net, around, **options):
    loss_of(net, around, draw((6, 5, 4)), **options).backward()


def truncated(net, around, **options):
    for seed in range(3):
        loss_of(net, around, draw((6, 5, 4), seed=seed), **options).backward()
        for node in nodes(net):
            node.detach()


def one_backward_for_batches_apart(net, around, **options):
    losses = []
    for seed in range(3):
        losses.append(loss_of(net, around, draw((6, 5, 4), seed=seed), **options))
        before = [node.v for node in nodes(net)]
        for node in nodes(net):
            node.reset()
    sum(losses).backward()
    for node, v in zip(nodes(net), before, strict=True):
        assert node.v == 0.0
        node.v = v


def backward_twice(net, around, **options):
    loss = loss_of(net, around, draw((6, 5, 4)), **options)
    loss.backward(retain_graph=True)
    loss.backward()


def steps_inside(net, around, **options):
    first, middle, last = net
    for node in nodes(net):
        node.step_mode = "s"
    y = around(lambda x: torch.stack([middle(x_t) for x_t in x]), first(draw((6, 5, 4))), **options)
    last(y).square().sum().backward()


def parts_one_by_one(net, around, **options):
    first, middle, last = net
    for node in nodes(net):
        node.step_mode = "s"
    last(torch.stack([around(middle, x, **options) for x in first(draw((6, 5, 4)))])).square().sum().backward()


def plain_beside(net, around, **options):
    losses = [loss_of(net, f, draw((3, 5, 4), seed=i), **options) for i, f in enumerate((without, around, without))]
    sum(losses).backward()


def everything(train, around, node=None, **options):
    net = network(**{"step_mode": "m", **(node or {})})
    torch.manual_seed(1)
    train(net, around, **options)
    gradients = [p.grad for part in net for p in part.parameters()]
    assert all(g.norm() > 0 for g in gradients)
    return *gradients, *(state for node in nodes(net) for state in (node.v, node.v_seq) if state is not None)


def assert_as_without(train, node=None, **options):
    for got, wanted in zip(
        everything(train, checkpoint, node, **options), everything(train, without, node), strict=True
    ):
        assert torch.equal(got, wanted)


ONE_PART = once, truncated, one_backward_for_batches_apart, backward_twice, steps_inside


@since_2_8
@pytest.mark.parametrize("train", [*ONE_PART, whole, parts_one_by_one, plain_beside])
def test_state_and_gradients_are_those_without(train):
    assert_as_without(train, use_reentrant=False)


@pytest.mark.parametrize("train", ONE_PART)
def test_reentrant_ones_too_where_no_gradient_passes_between_them(train):
    assert_as_without(train, use_reentrant=True)


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, pytest.param({"use_reentrant": False, "early_stop": False}, marks=since_2_8)],
    ids=str,
)
@pytest.mark.parametrize("train", [steps_inside, truncated])
def test_stored_potentials_too(train, options):
    assert_as_without(train, {"store_v_seq": True}, **options)


@pytest.mark.parametrize("train", [whole, parts_one_by_one, plain_beside])
def test_reentrant_ones_that_would_lose_a_gradient_are_refused(train):
    with pytest.raises(RuntimeError, match="use_reentrant=True loses the gradient"):
        everything(train, checkpoint, use_reentrant=True)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_within_another_it_is_refused(reentrant):
    def twice(part, x, **options):
        return checkpoint(lambda x: checkpoint(part, x, **options).sin(), x, **options)

    with pytest.raises(RuntimeError, match="cannot tell which of its calls this repeats"):
        everything(once, twice, use_reentrant=reentrant)


def test_behind_other_hooks_it_is_refused():
    def hidden(part, x, **options):
        def inside(x):
            with saved_tensors_hooks(lambda t: t, lambda t: t):
                y = part[0](x)
            return part[1:](y)

        return checkpoint(inside, x, **options)

    with pytest.raises(RuntimeError, match="cannot tell which of its calls this repeats"):
        everything(once, hidden, use_reentrant=False)


@pytest.mark.skipif(TORCH >= (2, 8), reason="for PyTorch before 2.8")
def test_before_pytorch_2_8_it_is_refused():
    with pytest.raises(RuntimeError, match=r"nor before PyTorch 2\.8 with False"):
        everything(once, checkpoint, use_reentrant=False)


@since_2_8
def test_a_state_edited_in_place_is_refused():
    node = LIFNode(step_mode="m")
    node.v = start = torch.ones(5, 8)
    spikes = checkpoint(node, draw((6, 5, 8)).requires_grad_(), use_reentrant=False)
    start.zero_()
    with pytest.raises(RuntimeError, match="edited in place"):
        spikes.sum().backward()


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_around_it_anything_goes(reentrant):
    def surrounded(part, x, **options):
        with torch.autocast("cpu", torch.bfloat16), snnkern.packed_spikes():
            return (checkpoint(part, x, **options) if options else part(x)).float()

    got, wanted = (everything(once, surrounded, **options) for options in ({"use_reentrant": reentrant}, {}))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_nothing_is_kept_of_what_was_repeated(reentrant):
    node = LIFNode(step_mode="m")
    y = checkpoint(node, draw((6, 5, 8)).requires_grad_(), use_reentrant=reentrant)
    v = node.v
    y.sum().backward()
    assert node.v is v
    assert set(vars(node)) == set(vars(LIFNode()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_neurons_without_state_need_nothing(reentrant):
    part, x, found = nn.Sequential(LIF(), BNLIF(4).eval()), draw((6, 5, 4)).mul(4), []
    for around in (without, checkpoint):
        y = x.clone().requires_grad_()
        around(part, y, use_reentrant=reentrant).square().sum().backward()
        found.append(y.grad)
    assert torch.equal(*found) and found[0].norm() > 0


def test_compiled_ones_are_refused_by_pytorch():
    torch.compiler.reset()
    node = LIFNode(step_mode="m")
    compiled = torch.compile(lambda x: checkpoint(node, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"(?i)side.?effect"):
        compiled(draw((6, 5, 8)).requires_grad_())


class Again(torch.autograd.Function):
    """Runs a node once more in backward, from the state that it keeps itself, as SpikingJelly's memopt does."""

    @staticmethod
    def forward(ctx, x, node):
        ctx.node, ctx.v = node, node.v
        ctx.save_for_backward(x)
        with torch.no_grad():
            return node(x)

    @staticmethod
    def backward(ctx, grad):
        node, now = ctx.node, ctx.node.v
        node.v = ctx.v
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            found = torch.autograd.grad(node(x), x, grad)
        node.v = now
        return *found, None


def test_who_gives_the_state_in_backward_is_obeyed():
    node, x, results = LIFNode(step_mode="m"), draw((5, 4, 6)).requires_grad_(), []
    for call in (node, lambda x: Again.apply(x, node)):
        node.reset()
        with torch.no_grad():
            node(x[:1])
        y = call(x[1:])
        results.append((y, node.v, torch.autograd.grad(y.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
