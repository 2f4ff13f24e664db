"""The modules: parameters, state and its lifetime. The numbers themselves are tested where the ops are."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import RUNNABLE
from torch import nn

import snnkern
from snnkern.models import CNN6
from snnkern.nn import (
    LIF,
    BinarySteps,
    ILIFNode,
    LIFNode,
    MultiStepIFNode,
    MultiStepLIFNode,
    MultiStepParametricLIFNode,
    ParametricLIFNode,
    SmoothLIF,
)
from snnkern.surrogate import ATan, Rectangle, Sigmoid, Triangle

backends = pytest.mark.parametrize("backend", [*RUNNABLE, "reference"])
pytestmark = pytest.mark.usefixtures("on_device")
step_modes = pytest.mark.parametrize("step_mode", ["s", "m"])


def current(*shape, seed=0, dtype=torch.float32):
    noise = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return noise.mul(2).add(0.5).to(torch.get_default_device(), dtype)


def lif_of_node(x, v=None, **changes):
    """What a LIFNode with SpikingJelly's defaults computes."""
    settings = dict(tau=2.0, surrogate=Sigmoid(), fire_at_threshold=True)
    return snnkern.lif(x, v, **{**settings, **changes})


def feed(node, x):
    """``x`` [T, N, ...] through the node in its step mode."""
    return node(x) if node.step_mode == "m" else torch.stack([node(step) for step in x])


# LIF


@backends
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.9, "threshold": 0.7, "reset": None},
        {"decay": 0.25, "reset": -0.2, "surrogate": Rectangle(2.0), "detach_reset": True},
        {"tau": 3.0, "decay_input": False, "fire_at_threshold": True, "time_dim": 1},
    ],
)
def test_lif_module_gives_spikes_and_gradients_of_lif(backend, settings):
    x = current(6, 4, 3).requires_grad_()
    y = current(6, 4, 3).requires_grad_()
    spikes = LIF(**settings, backend=backend)(x)
    expected = snnkern.lif(y, **settings, backend=backend)[0]
    weight = current(6, 4, 3, seed=1)
    (spikes * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(spikes, expected)
    assert torch.equal(x.grad, y.grad)


def test_lif_module_keeps_no_state_and_is_skipped_by_resets():
    layer = LIF()
    x = current(5, 3)
    assert torch.equal(layer(x), layer(x))
    assert not hasattr(layer, "reset")
    assert layer.state_dict() == {}
    assert nn.Sequential(nn.Linear(3, 4), layer)(x).shape == (5, 4)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"decay": 1.5}, ValueError, "decay"),
        ({"decay": 0.5, "tau": 2.0}, ValueError, "decay and tau"),
        ({"tau": 0.0}, ValueError, "tau"),
        ({"threshold": "1"}, TypeError, "threshold"),
        ({"surrogate": torch.sigmoid}, TypeError, "surrogate"),
        ({"detach_reset": "no"}, TypeError, "detach_reset"),
        ({"backend": "fpga"}, ValueError, "backend"),
    ],
)
def test_lif_module_rejects_wrong_parameters_when_made(settings, error, name):
    with pytest.raises(error, match=name):
        LIF(**settings)


@pytest.mark.parametrize("layer", [LIF(), SmoothLIF(), snnkern.nn.BNLIF(4)], ids=lambda layer: type(layer).__name__)
def test_a_residual_is_a_tensor(layer):
    for residual in (3, np.ones((3, 2, 4), np.float32), [1.0]):
        with pytest.raises(TypeError, match="residual must be a tensor or None, got"):
            layer(torch.zeros(3, 2, 4), residual)


def test_layers_copy_and_pickle_after_their_neuron_has_run():
    x = torch.randn(5, 4)
    for layer in (LIF(), SmoothLIF(Triangle()), snnkern.nn.BNLIF(4).eval(), snnkern.nn.LIFNode(step_mode="m")):
        y = x.unsqueeze(1) if isinstance(layer, snnkern.nn.BNLIF) else x
        wanted = layer(y)
        if isinstance(layer, snnkern.nn.LIFNode):
            layer.reset()
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert all(torch.equal(each(y), wanted) for each in copies)


def test_lif_module_prints_what_differs_from_the_defaults():
    assert repr(LIF()) == "LIF()"
    assert repr(LIF(decay=0.9, reset=None)) == "LIF(decay=0.9, reset=None)"


# SmoothLIF


@pytest.mark.parametrize("k", [1.0, 10.0])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_smooth_lif_is_the_loop_with_a_sigmoid_for_the_spike(k, detach_reset):
    x = current(5, 3, dtype=torch.float64).requires_grad_()
    v, wanted = torch.zeros(3, dtype=torch.float64), []
    for x_t in x:
        h = 0.25 * v + x_t
        s = torch.sigmoid(k * (h - 0.7))
        v = (1 - (s.detach() if detach_reset else s)) * h
        wanted.append(s)
    wanted = torch.stack(wanted)
    found = SmoothLIF(Sigmoid(k), decay=0.25, threshold=0.7, detach_reset=detach_reset)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    weight = current(5, 3, seed=1, dtype=torch.float64)
    gradients = [torch.autograd.grad((s * weight).sum(), x)[0] for s in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("surrogate", [Sigmoid(10.0), ATan(3.0)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"reset": None, "tau": 2.0, "time_dim": 1}])
def test_gradient_of_smooth_lif_is_exact(surrogate, settings):
    x, residual = (current(4, 3, 2, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(SmoothLIF(surrogate, **settings), (x, residual))


def test_gradient_of_a_network_of_smooth_lifs_is_exact():
    with torch.device("cpu"):
        model = CNN6(2, size=4, neuron=partial(SmoothLIF, Sigmoid(2.0))).double()
        assert torch.autograd.gradcheck(model, current(2, 1, 4, 4, dtype=torch.float64).requires_grad_())


# LIFNode: the neuron


@backends
@step_modes
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_node_gives_spikes_state_and_gradients_of_lif(backend, step_mode, v_reset):
    node = LIFNode(v_reset=v_reset, step_mode=step_mode, backend=backend)
    x = current(7, 4, 3).requires_grad_()
    y = current(7, 4, 3).requires_grad_()
    first, second = feed(node, x[:3]), feed(node, x[3:])
    expected, v = lif_of_node(y, reset=v_reset, backend=backend)
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(node.v, v)
    weight = current(7, 4, 3, seed=1)
    (first * weight[:3]).sum().add((second * weight[3:]).sum()).add(node.v.sum()).backward()
    (expected * weight).sum().add(v.sum()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


@backends
def test_node_fires_at_the_threshold(backend):
    assert LIFNode(step_mode="m", backend=backend)(torch.tensor([[1.9375, 2.0, 2.0625]])).tolist() == [[0.0, 1.0, 1.0]]


@backends
@step_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_spikes_have_the_dtype_of_x_and_the_state_at_least_float32(backend, step_mode, dtype):
    node = LIFNode(step_mode=step_mode, backend=backend)
    x = current(5, 3, 4, dtype=dtype)
    spikes = feed(node, x)
    expected, v = lif_of_node(x, backend=backend)
    assert spikes.dtype == dtype
    assert node.v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(spikes, expected) and torch.equal(node.v, v)


@backends
@step_modes
def test_node_takes_inputs_that_are_not_contiguous(backend, step_mode):
    x = current(4, 6, 5, 3).permute(3, 1, 0, 2)[:, ::2]
    node = LIFNode(step_mode=step_mode, backend=backend)
    assert torch.equal(feed(node, x), lif_of_node(x.contiguous())[0])


@backends
@pytest.mark.parametrize("store_v_seq", [False, True])
def test_node_takes_no_steps_and_no_neurons(backend, store_v_seq):
    node = LIFNode(v_reset=-0.3, step_mode="m", backend=backend, store_v_seq=store_v_seq)
    assert node(torch.empty(0, 2, 3)).shape == (0, 2, 3)
    assert torch.equal(node.v, torch.full((2, 3), -0.3))
    assert node.v_seq is None or node.v_seq.shape == (0, 2, 3)
    node.reset()
    assert node(torch.empty(4, 0, 3)).shape == (4, 0, 3)
    assert node.v.shape == (0, 3)


@backends
@pytest.mark.parametrize(
    ("attribute", "value", "keyword"),
    [
        ("tau", 5.0, "tau"),
        ("tau", 3, "tau"),
        ("decay_input", False, "decay_input"),
        ("v_threshold", 0.5, "threshold"),
        ("v_reset", None, "reset"),
        ("surrogate_function", ATan(), "surrogate"),
        ("detach_reset", True, "detach_reset"),
    ],
)
def test_attributes_changed_at_run_time_take_effect_at_the_next_forward(backend, attribute, value, keyword):
    node = LIFNode(step_mode="m", backend=backend)
    x = current(6, 50).requires_grad_()
    node(x)
    node.reset()
    setattr(node, attribute, value)
    spikes, weight = node(x), current(6, 50, seed=1)
    expected, _ = lif_of_node(x, backend=backend, **{keyword: value})
    assert torch.equal(spikes, expected)
    gradients = [torch.autograd.grad((s * weight).sum(), x)[0] for s in (spikes, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"tau": 0.0}, ValueError, "tau"),
        ({"tau": None}, TypeError, "tau"),
        ({"v_threshold": "1"}, TypeError, "v_threshold"),
        ({"v_reset": "0"}, TypeError, "v_reset"),
        ({"surrogate_function": torch.sigmoid}, TypeError, "surrogate_function"),
        ({"detach_reset": None}, TypeError, "detach_reset"),
        ({"step_mode": "multi"}, ValueError, "step_mode"),
        ({"backend": "fpga"}, ValueError, "backend"),
    ],
)
def test_node_rejects_wrong_parameters_when_made(settings, error, name):
    with pytest.raises(error, match=name):
        LIFNode(**settings)


def test_parameters_of_a_node_may_be_tensors():
    x = current(6, 2, 3, 4).requires_grad_()
    tau, threshold = nn.Parameter(torch.tensor([[1.5], [2.0], [3.0]])), torch.tensor([[0.2], [0.5], [1.0]])
    node = LIFNode(tau, v_threshold=threshold, step_mode="m")
    assert [*node.state_dict()] == ["tau"] and node.v_threshold is threshold
    expected = lif_of_node(x, tau=tau, threshold=threshold)[0]
    spikes, weight = node(x), current(6, 2, 3, 4, seed=1)
    assert torch.equal(spikes, expected) and spikes.any()
    for got, wanted in zip(
        *(torch.autograd.grad((s * weight).sum(), [x, tau]) for s in (spikes, expected)), strict=True
    ):
        assert torch.equal(got, wanted)
    assert node.to("meta").v_threshold.device.type == "meta"


@pytest.mark.parametrize("bad", [dict(init_tau=1.0), dict(init_tau="2"), dict(step_mode="x"), dict(backend="fpga")])
def test_parametric_node_rejects_wrong_parameters_when_made(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        ParametricLIFNode(**bad)


def test_integer_node_counts_and_takes_no_other_surrogate():
    assert torch.equal(ILIFNode(step_mode="m")(torch.tensor([[0.4, 0.6, 2.5, 9.0]])), torch.tensor([[0.0, 1, 2, 4]]))
    with pytest.raises(TypeError, match="surrogate_function must count spikes"):
        ILIFNode(surrogate_function=ATan())
    with pytest.raises(ValueError, match="tau must be at least 1"):
        ILIFNode(tau=0.5)


def test_multi_step_classes_cannot_drop_time():
    x = torch.full((8, 1), 1.2)  # 0.6 a step
    assert LIFNode()(x).sum() == 0 and MultiStepLIFNode()(x).sum() == 2
    for node in (MultiStepLIFNode(backend="cupy"), MultiStepIFNode(), MultiStepParametricLIFNode()):
        assert node.step_mode == "m"
        with pytest.raises(ValueError, match="step_mode"):
            node.step_mode = "s"
    assert isinstance(node, ParametricLIFNode) and isinstance(MultiStepLIFNode(), LIFNode)
    with pytest.raises(ValueError, match="backend"):
        MultiStepLIFNode(backend="lava")


def test_a_bool_for_the_backend_is_store_v_seq():
    both = [LIFNode(2.0, True, 1.0, 0.0, ATan(), False, "m", *last) for last in ((True,), (None, True))]
    assert all(node.store_v_seq and node.backend is None for node in both)


def test_node_accepts_any_positive_tau_and_integers():
    x = current(5, 3)
    assert torch.equal(LIFNode(tau=2, step_mode="m")(x), LIFNode(step_mode="m")(x))
    assert torch.equal(LIFNode(tau=0.5, step_mode="m")(x), lif_of_node(x, tau=0.5)[0])
    assert LIFNode(v_reset=0).v == 0.0


def test_step_mode_is_s_at_first_and_checked_when_set():
    node = LIFNode()
    assert node.step_mode == "s" and node.supported_step_mode() == ("s", "m")
    node.step_mode = "m"
    with pytest.raises(ValueError, match="step_mode"):
        node.step_mode = "x"
    assert node.step_mode == "m"


@pytest.mark.parametrize("name", [None, "torch", "cupy", "inductor"])
def test_backend_names_of_spikingjelly_leave_the_choice_open(name):
    node = LIFNode(step_mode="m", backend=name)
    assert node.backend == name
    assert name is None or name in node.supported_backends
    x = current(5, 3)
    assert torch.equal(node(x), lif_of_node(x)[0])


def test_backend_set_at_run_time_is_obeyed():
    node = LIFNode(step_mode="m")
    assert {"cuda", "triton", "cpu", "reference"} <= set(node.supported_backends)
    node.backend = "cuda"
    with pytest.raises(RuntimeError, match="cuda"):
        node(current(5, 3))
    node.backend = "reference"
    node(current(5, 3))
    with pytest.raises(ValueError, match="backend"):
        node.backend = "fpga"


def test_surrogate_function_may_be_a_module_and_may_be_replaced():
    ours, module = ATan(), nn.Identity()
    node = LIFNode(surrogate_function=ours)
    assert node.surrogate_function is ours
    node.surrogate_function = module
    assert node.surrogate_function is module and list(node.children()) == [module]
    with pytest.raises(TypeError, match="surrogate_function"):
        node(current(3))
    node.surrogate_function = ours
    assert node.surrogate_function is ours and list(node.children()) == []


def test_subclass_with_its_own_dynamics_is_refused():
    with pytest.raises(TypeError, match="neuronal_charge"):

        class Leaky(LIFNode):
            def neuronal_charge(self, x):
                self.v = self.v + x


def test_node_prints_its_settings():
    text = repr(LIFNode(tau=3.0, v_reset=None, step_mode="m", surrogate_function=Triangle()))
    for setting in ("tau=3.0", "v_threshold=1.0", "v_reset=None", "step_mode='m'", "Triangle(gamma=1.0, peak=1.0)"):
        assert setting in text


# LIFNode: the state


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_state_is_a_float_at_first_and_after_reset(v_reset):
    node = LIFNode(v_reset=v_reset, step_mode="m")
    for _ in range(2):
        assert node.v == (v_reset or 0.0) and isinstance(node.v, float)
        first = node(current(4, 3))
        assert node.v.shape == (3,)
        node.reset()
        assert torch.equal(node(current(4, 3)), first)
        node.reset()


def test_resets_by_name_reach_the_node():
    net = nn.Sequential(nn.Linear(3, 4), LIFNode(step_mode="m"), LIF())
    net(current(2, 5, 3))
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()
    assert net[1].v == 0.0


def test_state_is_in_no_state_dict_and_no_buffer():
    node = LIFNode(step_mode="m", store_v_seq=True)
    node(current(4, 3))
    assert node.state_dict() == {}
    assert list(node.buffers()) == list(node.parameters()) == []
    node.load_state_dict({})


@backends
@pytest.mark.parametrize(
    "value",
    [0.4, -1, torch.full((50,), 0.4), torch.full((50,), 0.4, dtype=torch.float64), torch.full((50,), 0.5).half()],
    ids=["float", "int", "float32", "float64", "float16"],
)
def test_state_may_be_assigned(backend, value):
    node = LIFNode(step_mode="m", backend=backend)
    node.v = value
    x = current(2, 50)
    v = value.float() if isinstance(value, torch.Tensor) else torch.full((50,), float(value))
    spikes, v_last = lif_of_node(x, v)
    assert torch.equal(node(x), spikes) and torch.equal(node.v, v_last)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_reaches_an_assigned_state(backend, dtype):
    v, w = current(3, seed=2, dtype=dtype).requires_grad_(), current(3, seed=2).requires_grad_()
    node = LIFNode(step_mode="m", backend=backend)
    node.v = v
    x = current(5, 3)
    node(x).sum().backward()
    lif_of_node(x, w, backend=backend)[0].sum().backward()
    assert v.grad.dtype == dtype and v.grad.abs().sum() > 0
    torch.testing.assert_close(v.grad.float(), w.grad)


@step_modes
def test_state_follows_the_dtype_of_the_input(step_mode):
    node = LIFNode(step_mode=step_mode)
    v = None
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        x = current(4, 3, seed=1, dtype=dtype)
        spikes = feed(node, x)
        expected, v = lif_of_node(x, None if v is None else v.to(torch.promote_types(dtype, torch.float32)))
        assert torch.equal(spikes, expected) and torch.equal(node.v, v)


@step_modes
def test_shape_change_starts_anew_with_a_warning_but_not_after_reset(step_mode):
    node = LIFNode(step_mode=step_mode)
    feed(node, current(4, 3))
    other = current(4, 2, 5)
    with pytest.warns(UserWarning, match=r"reset\(\)"):
        spikes = feed(node, other)
    assert torch.equal(spikes, lif_of_node(other)[0])
    node.reset()
    feed(node, current(4, 3))


def test_state_moves_with_the_node_but_keeps_its_dtype():
    node = LIFNode(step_mode="m")
    node(current(4, 3))
    v = node.v
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        convert(nn.Sequential(node))
        assert torch.equal(node.v, v) and node.v.dtype == torch.float32
    nn.Sequential(node).to("meta", torch.float16)
    assert node.v.device.type == "meta" and node.v.dtype == torch.float32
    node.reset()
    node.to("meta")
    assert node.v == 0.0


@backends
@step_modes
def test_copies_and_pickles_of_a_node_inside_a_graph_are_detached_and_independent(backend, step_mode):
    node = LIFNode(tau=3.0, step_mode=step_mode, backend=backend, store_v_seq=True)
    spikes = feed(node, current(4, 3).requires_grad_())
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert torch.equal(twin.v, node.v) and torch.equal(twin.v_seq, node.v_seq)
        assert not twin.v.requires_grad and node.v.requires_grad
        assert repr(twin) == repr(node)
        feed(twin, current(4, 3))
        assert not torch.equal(twin.v, node.v)
    spikes.sum().backward()


def test_replica_for_data_parallel_has_its_own_state():
    node = LIFNode(step_mode="m", store_v_seq=True)
    node(current(4, 3))
    v, v_seq = node.v, node.v_seq
    replica = node._replicate_for_data_parallel()
    replica(current(4, 3))
    assert node.v is v and node.v_seq is v_seq
    assert not torch.equal(replica.v, v)


def test_a_forward_that_fails_leaves_the_state_alone():
    node = LIFNode(step_mode="m")
    node(current(4, 3))
    v = node.v
    with pytest.raises(TypeError, match="x must be"):
        node(torch.ones(4, 3, dtype=torch.int64))
    assert node.v is v


@backends
@step_modes
def test_detach_keeps_the_values_and_cuts_the_graph(backend, step_mode):
    node = LIFNode(step_mode=step_mode, backend=backend, store_v_seq=True)
    expected, _ = lif_of_node(current(9, 3))
    chunks = []
    for x in current(9, 3).split(3):
        x.requires_grad_()
        chunks.append(feed(node, x))
        chunks[-1].sum().backward()
        assert x.grad.abs().sum() > 0
        v = node.v
        node.detach()
        assert torch.equal(node.v, v) and not node.v.requires_grad and not node.v_seq.requires_grad
    assert torch.equal(torch.cat(chunks), expected)


@backends
@step_modes
@pytest.mark.parametrize("store_v_seq", [False, True])
@pytest.mark.parametrize("second", [torch.float32, torch.float64])
def test_state_of_a_freed_graph_is_refused_until_reset_or_detach(backend, step_mode, store_v_seq, second):
    def again(dtype=second):
        return feed(node, x.to(dtype)).sum() + node.v.sum()

    node = LIFNode(step_mode=step_mode, backend=backend, store_v_seq=store_v_seq)
    x = current(3, 4).requires_grad_()
    again(torch.float32).backward()
    # The reference is plain PyTorch, and the last of a sequence is its slice: noticed in backward, in its own words.
    own = backend != "reference" and not (store_v_seq and step_mode == "m")
    with pytest.raises(RuntimeError, match=r"reset\(\) or detach\(\)" if own else None):
        again().backward()
    node.reset()
    again(torch.float32).backward()
    node.detach()
    again().backward()


@backends
def test_state_of_a_retained_graph_may_be_fed_again(backend):
    node = LIFNode(step_mode="m", backend=backend)
    x = current(3, 4).requires_grad_()
    node(x).sum().backward(retain_graph=True)
    (gradient,) = torch.autograd.grad(node(x).sum(), x)
    (expected,) = torch.autograd.grad(lif_of_node(torch.cat([x, x]))[0][3:].sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_registered_memories_are_attributes_with_a_reset_value():
    node = LIFNode(v_reset=-0.3)
    node.register_memory("trace", torch.zeros(2))
    with pytest.raises(KeyError, match="tau"):
        node.register_memory("tau", 1.0)
    with pytest.raises(KeyError):
        node.get_reset_value("missing")
    node.trace.add_(1)
    assert dict(node.named_memories())["v"] == -0.3 and torch.equal(list(node.memories())[1], torch.ones(2))
    node.reset()
    assert torch.equal(node.trace, torch.zeros(2))
    node.trace.add_(1)
    node.set_reset_value("v", 0.25)
    node.reset()
    assert node.v == node.get_reset_value("v") == 0.25 and torch.equal(node.trace, torch.zeros(2))
    with pytest.raises(AttributeError, match="missing"):
        _ = node.missing


# LIFNode: v_seq


@backends
@step_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v_seq_holds_the_potential_after_every_step(backend, step_mode, dtype):
    x = current(6, 3, 2, dtype=dtype)
    node = LIFNode(v_reset=-0.3, step_mode=step_mode, backend=backend, store_v_seq=True)
    assert node.v_seq is None
    spikes = feed(node, x)
    assert torch.equal(spikes, lif_of_node(x, reset=-0.3, backend=backend)[0])
    expected = [lif_of_node(x[: t + 1], reset=-0.3, backend=backend)[1] for t in range(6)]
    assert torch.equal(node.v_seq, torch.stack(expected)) and node.v_seq.dtype == torch.float32
    assert torch.equal(node.v, expected[-1])


@backends
@step_modes
def test_v_seq_is_differentiable(backend, step_mode):
    x, weight = current(6, 3).requires_grad_(), current(6, 3, seed=1)
    node = LIFNode(step_mode=step_mode, backend=backend, store_v_seq=True)
    feed(node, x)
    (gradient,) = torch.autograd.grad((node.v_seq * weight).sum(), x)
    potentials = torch.stack([lif_of_node(x[: t + 1], backend=backend)[1] for t in range(6)])
    (expected,) = torch.autograd.grad((potentials * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_v_seq_grows_over_single_steps_and_starts_anew_over_sequences():
    single, multi = LIFNode(store_v_seq=True), LIFNode(step_mode="m", store_v_seq=True)
    x = current(5, 3)
    for t in range(5):
        single(x[t])
        if t % 2:
            assert single.v_seq.shape == (t + 1, 3)
    multi(x)
    assert torch.equal(single.v_seq, multi.v_seq) and single.v_seq is single.v_seq
    multi(x[:2])
    assert multi.v_seq.shape == (2, 3)


def test_v_seq_of_single_steps_is_safe_from_writes_into_the_state():
    node = LIFNode(store_v_seq=True)
    node(current(3))
    before = node.v.clone()
    node.v.zero_()
    node(current(3, seed=1))
    assert torch.equal(node.v_seq[0], before)


def test_v_seq_of_single_steps_starts_anew_when_the_shape_changes():
    node = LIFNode(store_v_seq=True)
    node(current(3))
    with pytest.warns(UserWarning, match="shape"):
        node(current(2, 3))
    assert node.v_seq.shape == (1, 2, 3)


def test_v_seq_is_cleared_by_reset_and_by_the_switch():
    node = LIFNode(step_mode="m", store_v_seq=True)
    node(current(4, 3))
    node.reset()
    assert node.v_seq is None
    node(current(4, 3))
    node.store_v_seq = False
    assert node.store_v_seq is False and node.v_seq is None
    node(current(4, 3))
    assert node.v_seq is None


def test_spikingjelly_is_not_imported():
    code = (
        "import sys, snnkern.nn; snnkern.nn.LIFNode(); sys.exit(any(m.startswith('spikingjelly') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_integers_as_binary_steps():
    spikes = ILIFNode(step_mode="m")(3 * current(5, 2, 6))
    layer, to_binary = nn.Linear(spikes.shape[-1], 3, bias=False), BinarySteps(4)
    assert torch.equal(to_binary(spikes), spikes)
    binary = to_binary.eval()(spikes)
    assert set(spikes.unique().tolist()) > {0.0, 1.0} and set(binary.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(snnkern.ttm(binary, 5), spikes)
    assert torch.allclose(snnkern.ttm(layer(binary), 5), layer(spikes), atol=1e-6)
    with pytest.raises(ValueError, match="levels must be at least 1"):
        BinarySteps(0)


def test_lif_learns_its_parameters():
    layer = LIF(decay=nn.Parameter(torch.full((6,), 0.7)), threshold=torch.ones(1), reset=None)
    assert repr(layer) == "LIF(decay=(6,), threshold=(1,), reset=None)"
    assert [name for name, _ in layer.named_parameters()] == ["decay"] and "threshold" in layer.state_dict()
    layer(current(5, 2, 6)).sum().backward()
    assert layer.decay.grad.abs().min() > 0
    with pytest.raises(TypeError, match=r"lif must be plain .* got decay, threshold"):
        snnkern.nn.BNLIF(6, layer)
