"""Memory and threads on the CPU: flat over many calls, offsets beyond 32 bits, many callers, forks, exits, signals."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import THOROUGH, needs_thorough
from test_cpu import with_threads

import snnkern
from snnkern.backend import cpu

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks")


def outcome(script, *arguments, timeout=600):
    """Runs the script in a process of its own, which says where it was if it crashes."""
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, f"ended with {ended.returncode}: {ended.stdout[-2000:]}{ended.stderr[-4000:]}"
    return ended.stdout


# What the scripts below share: calls of every op, and what a call gives.
CALLS = """
import gc, os, random, signal, sys, threading
import torch, snnkern
from snnkern import nn

torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork
torch.get_num_threads = lambda: 4
torch.manual_seed(0)
node = nn.LIFNode(step_mode="m", store_v_seq=True)
norm = nn.BNLIF(6)
recurrent = nn.RecurrentLIF(24)
windows = nn.Windows(torch.nn.Sequential(nn.LinearLIF(24, 24), torch.nn.Linear(24, 24)), steps=17)
weight = torch.randn(96, 128)

def layer(x):
    return snnkern.lif(x)

def stateful(x):
    if isinstance(node.v, torch.Tensor) and node.v.shape != x.shape[1:]:
        node.reset()
    node.detach()
    return node(x), node.v, node.v_seq

def state_given(x):
    return snnkern.lif(x, torch.zeros(x.shape[1:]), tau=2.0, reset=None, threshold=torch.full((24,), 0.7))

def normalised(x):
    return (norm(x.unflatten(2, (6, 4))),)

def packed(x):
    with snnkern.packed_spikes():
        return (torch.nn.functional.linear(snnkern.lif(x)[0], weight[:24, :24]),)

def converted(x):
    net = torch.nn.Sequential(torch.nn.Linear(24, 24), nn.LIFNode(step_mode="m"))
    snnkern.convert(net)
    return (net(x),)

def sparse(x):
    spikes = (x.reshape(-1)[: 2048 * 1].abs() > 2.2).float().repeat(128).view(2048, 128)
    return (snnkern.linear(spikes, weight.clone().requires_grad_()),)

OPS = {
    "lif": layer, "states": state_given, "node": stateful, "norm": normalised, "packed": packed,
    "recurrent": lambda x: (recurrent(x),), "windows": lambda x: (windows(x),), "convert": converted,
    "ttm": lambda x: (snnkern.ttm(x, 1 + len(x) // 3),), "linear": sparse,
}

def step(call, steps=60, batch=32):
    x = torch.randn(steps, batch, 24, requires_grad=True)
    outputs = [o for o in call(x) if o is not None]
    sum(o.sum() for o in outputs if o.requires_grad).backward()
    return x.grad
"""

HELD = """
from functools import _lru_cache_wrapper
from pathlib import Path

def held():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())

def measured(rounds, call):
    for i in range(2 * rounds):
        if i == rounds:
            before = held()
        call(i)
    print(*(b - a for a, b in zip(before, held())))
"""

FLAT = """
def every_op(_):
    for call in OPS.values():
        step(call)

measured(int(sys.argv[1]), every_op)
"""


# No two calls have the same numbers, and few the same shape; sampled surrogates and forms of layers are dear.
VARIED = """
x = torch.randn(3, 4, requires_grad=True)

def varied(i):
    surrogate = snnkern.surrogate.ATan(1 + i / 1e5)
    snnkern.lif(x, decay=1 / (i + 1), threshold=1 + i / 1e5, surrogate=surrogate)[0].sum().backward()
    nn.LIFNode(tau=2 + i / 1e5, step_mode="m")(x.detach().expand(1 + i % 700, 3, 4))
    snnkern.lif(x.detach(), surrogate=snnkern.surrogate.Dspike(torch.tensor(1 + i / 1e5)))
    if i % 7 == 0:
        table = snnkern.surrogate.Table(lambda x: 1 / (1 + x.abs() * (1 + i)), half_width=2.0, cells=64)
        snnkern.lif(x, surrogate=table)[0].sum().backward()

measured(int(sys.argv[2]), varied)
for cached in gc.get_objects():
    if isinstance(cached, _lru_cache_wrapper) and (cached.__module__ or "").startswith("snnkern"):
        size = cached.cache_info().currsize
        assert size <= (cached.cache_info().maxsize or 16), (cached, size)
"""


@linux
def test_memory_is_flat_over_many_calls(count):
    """A call that kept a tensor of x's size, 184 kB, would add nearly twice of what is allowed for, and 20 times in the
    thorough test, of 10,000 calls. Caches have up to 512 entries and do not grow with the numbers that they see."""
    same, different = (1000, 10_000) if THOROUGH else (40, 560)
    for line in outcome(CALLS + HELD + FLAT + VARIED, same, different, timeout=7200).splitlines():
        grown, objects = map(int, line.split())
        assert grown < (8 if THOROUGH else 4) << 20 and objects < 100
    count("calls", 2 * (10 * same + 3 * different))


OVERRUN = """
x, y = torch.zeros(20 * 33 - (sys.argv[1] == "read")), torch.zeros(7 * 33 - (sys.argv[1] == "write"))
shape = snnkern._C.TTMShape(0, 1, 20, 33, 0, 33, 7)
snnkern._C.ttm_cpu(shape, x.data_ptr(), y.data_ptr(), 1)
"""


@pytest.mark.skipif(os.environ.get("SNNKERN_SANITIZED") != "1", reason="for `make sanitize-cpu`")
@pytest.mark.parametrize("what", ["nothing", "read", "write"])
def test_an_access_beyond_a_tensor_is_seen(what):
    with nullcontext() if what == "nothing" else pytest.raises(AssertionError, match="heap-buffer-overflow"):
        outcome(CALLS + OVERRUN, what)


# More than 2**31 elements. x repeats a row of numbers of no simple length, so that an offset cut off to 32 bits finds
# others.


def long_row(shape):
    x = torch.empty(shape, dtype=torch.bfloat16)
    row, flat = torch.randn(1_048_583).bfloat16(), x.view(-1)
    whole = flat.numel() // len(row)
    flat[: whole * len(row)].view(whole, -1).copy_(row)
    flat[whole * len(row) :].copy_(row[: flat.numel() % len(row)])
    return x


HUGE = {  # shape, time_dim, the dimension that pieces are cut from: what lies far apart are steps, neurons, samples
    "steps": ((2_100_000, 1024), 0, 1),
    "neurons": ((1, 2_200_000_000), 0, 1),
    "samples": ((1_100_000, 2, 1000), 1, 0),
}


@needs_thorough
@pytest.mark.parametrize("name", HUGE)
def test_more_elements_than_32_bits_count(name, count):
    """9 GB of memory: x, which is the gradient of the spikes too, and one after the other spikes and the gradient of x.
    17 pieces, of 4 million elements each or more, from the first to the last, are computed apart."""
    shape, time_dim, dim = HUGE[name]
    x = long_row(shape).requires_grad_()
    assert x.numel() > 2**31
    spikes, _ = snnkern.lif(x, time_dim=time_dim, return_v=False)
    length = max(1, (1 << 22) // (x.numel() // x.shape[dim]))

    def check_pieces(made, wanted):
        for part in [round(i * (x.shape[dim] - length) / 16) for i in range(17)]:
            piece = x.detach().narrow(dim, part, length).contiguous().requires_grad_()
            got, _ = snnkern.lif(piece, time_dim=time_dim)
            assert torch.equal(wanted(got, piece), made.narrow(dim, part, length))

    check_pieces(spikes.detach(), lambda got, piece: got.detach())
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    assert cpu.pack(spikes.detach(), bits, True)
    edge = torch.autograd.graph.get_gradient_edge(spikes)
    del spikes
    (gradient,) = torch.autograd.grad(edge, x, x.detach())
    check_pieces(gradient, lambda got, piece: torch.autograd.grad(got, piece, piece.detach())[0])
    cpu.unpack(bits, gradient)
    check_pieces(gradient, lambda got, piece: got.detach())
    count("elements", x.numel())


@needs_thorough
def test_sums_over_more_elements_than_32_bits_count(count):
    x = long_row((2_100_000, 1024))
    y = snnkern.ttm(x, 3)
    for group, part in enumerate(x.tensor_split(3)):
        assert torch.equal(y[group], snnkern.ttm(part, 1)[0])
    assert torch.equal(snnkern.ttm(y, 2_100_000)[-1], y[-1])
    count("elements", x.numel())


# Many callers at once.

MIXED = [
    lambda x: snnkern.lif(x),
    lambda x: snnkern.lif(x.transpose(0, 1), tau=2.0, reset=None, time_dim=1, return_v="sequence"),
    lambda x: snnkern.lif(x, synapse_decay=0.5, threshold_decay=0.9, threshold_jump=0.1)[:1],
    lambda x: snnkern.lif(x, bias=x[0], steps_out=3),
    lambda x: (snnkern.ttm(x, 2),),
    lambda x: snnkern.bn_lif(x.unflatten(2, (8, -1)), None, None, None, None, training=True),
    lambda x: snnkern.recurrent_lif(x, x[:1, 0, :, None].sin().repeat(1, 1, x.shape[2])[0])[:1],
    lambda x: (snnkern.linear(torch.cat([x.gt(1.8).float()] * 5, 2), x.new_ones(512, 5 * x.shape[2])),),
]
SIZES = [(40, 3, 16), (300, 2, 64), (5, 40, 400), (1200, 1, 16)]


def with_gradient(call, x):
    x = x.clone().requires_grad_()
    outputs = call(x)
    wanted = [o for o in outputs if o.requires_grad]
    gradient = torch.autograd.grad(wanted, x, [torch.ones_like(o) for o in wanted]) if wanted else ()
    return [*outputs, *gradient]


def test_threads_that_come_and_go_with_all_ops_at_once(count):
    """Of every size and each with its backward, and some calls fail in their midst."""
    torch.manual_seed(0)
    cases = [(call, torch.randn(size)) for call in MIXED for size in SIZES]
    wanted = with_threads(1, lambda: [with_gradient(*case) for case in cases])
    wrong, rounds = [], 40 if THOROUGH else 1

    def work(first):
        for i in range(len(cases)):
            at = (first * 11 + i * 5) % len(cases)
            got = with_gradient(*cases[at])
            wrong.extend(at for g, w in zip(got, wanted[at], strict=True) if not torch.equal(g, w))
            for bad in ({"decay": 2.0}, {"surrogate": 1}) if i % 8 == first % 8 else ():
                try:
                    snnkern.lif(cases[at][1], **bad)
                except (TypeError, ValueError):
                    continue
                wrong.append("no error")

    def rush():
        for _ in range(rounds):
            threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    with_threads(4, rush)
    count("calls", rounds * 6 * len(cases) * 2)
    assert wrong == []


def test_one_graph_by_many_threads():
    """Each takes the gradient of its own part of what one forward gave."""
    x = torch.randn(300, 600, requires_grad=True)
    spikes, _ = snnkern.lif(x)

    def part(i):
        return torch.autograd.grad(spikes[:, i * 100 : i * 100 + 100], x, torch.ones(300, 100), retain_graph=True)[0]

    with ThreadPoolExecutor(6) as callers:
        parts = with_threads(4, lambda: list(callers.map(part, range(6))))
    whole = torch.autograd.grad(spikes, x, torch.ones_like(spikes))[0]
    assert all(
        torch.equal(p[:, i * 100 : i * 100 + 100], whole[:, i * 100 : i * 100 + 100]) for i, p in enumerate(parts)
    )


# Forks, exits and signals: x is large enough for several threads of the pool.

ALIVE = """
x = torch.randn(300, 600)
spikes, v = snnkern.lif(x)

def right(times=1):
    return all(torch.equal(snnkern.lif(x)[0], spikes) for _ in range(times))
"""

FORKS = """
stop = False
def busy():
    while not stop:
        right()
callers = [threading.Thread(target=busy) for _ in range(3)]
for caller in callers:
    caller.start()
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        os._exit(0 if right(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
for caller in callers:
    caller.join()
"""

WORKERS = """
class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, i):
        if i == 11:
            snnkern.lif(x, decay=2.0)
        return snnkern.lif(x + i)[0].sum()

loader = torch.utils.data.DataLoader(Set(), num_workers=2, multiprocessing_context="fork")
got = []
try:
    for i in loader:
        got.append(float(i))
except ValueError as error:
    assert "decay must be in" in str(error)
assert got == [float(snnkern.lif(x + i)[0].sum()) for i in range(11)] and right(3)
"""

# Daemon threads inside kernels while the interpreter goes away: the kernels alone, whose arguments are made before,
# since PyTorch's own functions do not promise to survive this.
DAEMONS = """
from snnkern import _C
from snnkern.backend import cpu
from snnkern.backend.cpu import lif as launches

class Recorder:
    def __getattr__(self, name):
        def call(*given):
            kept.append((getattr(_C, name), given))
            return getattr(_C, name)(*given)
        return call if name == "lif_forward_cpu" else getattr(_C, name)

kept, launches._C = [], Recorder()
keep = snnkern.lif(x)
(function, given), = kept
started = threading.Semaphore(0)
def forever():
    started.release()
    while True:
        function(*given)
for _ in range(4):
    threading.Thread(target=forever, daemon=True).start()
for _ in range(4):
    started.acquire()
"""

END = """
for _ in range(3):
    threading.Thread(target=lambda: right(10**6), daemon=True).start()
right()
print("to the end", flush=True)
os._exit(0)
"""

# A handler that raises, after a random time, in forward, in backward or between them.
SIGNALS = """
class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
big, draw, interrupted = torch.randn(600, 2000, requires_grad=True), random.Random(0), 0
spikes_of_big, gradient = snnkern.lif(big)[0].detach(), step(layer)
for _ in range(int(sys.argv[1])):
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 2e-2))
        while True:
            with snnkern.packed_spikes():
                snnkern.lif(big)[0].sum().backward()
            recurrent(torch.randn(60, 32, 24)).sum().backward()
    except Interrupt:
        interrupted += 1
    assert torch.equal(snnkern.lif(big)[0], spikes_of_big) and right()
assert interrupted == int(sys.argv[1])
try:
    os.kill(os.getpid(), signal.SIGINT)
    right(10**6)
except KeyboardInterrupt:
    assert right()
else:
    assert False
"""


@linux
def test_signals_and_forks_amid_calls_and_an_end_amid_them(count):
    signals, forks = (1000, 200) if THOROUGH else (8, 3)
    assert outcome(CALLS + ALIVE + SIGNALS + FORKS + WORKERS + END, signals, forks) == "to the end\n"
    count("signals", signals)
    count("forks", forks)


@linux
def test_the_interpreter_ends_amid_kernels(count):
    times = 40 if THOROUGH else 1
    for _ in range(times):
        outcome(CALLS + ALIVE + DAEMONS)
    count("exits", times)
