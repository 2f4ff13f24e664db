"""Scripts written for SpikingJelly, run with our nodes: where it is installed, with ``clock_driven``, and where not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from snnkern.cli import app

# A SpikingJelly 0.0.0.0.12 as far as the tests go: single-step LIFNode, MultiStepLIFNode, a VGG's walk through layers.
INSTALLED = {
    "__init__.py": "",
    "clock_driven/__init__.py": "",
    "clock_driven/neuron.py": """
import torch

class BaseNode(torch.nn.Module):
    def neuronal_fire(self):
        raise AssertionError("called")

class LIFNode(BaseNode):
    def neuronal_charge(self, x):
        raise AssertionError("called")

class MultiStepLIFNode(LIFNode):
    def to_lava(self):
        raise AssertionError("called")

class QIFNode(BaseNode):
    pass
""",
    "clock_driven/functional.py": """
from . import neuron

def sequential_forward(layers, x_seq):
    for layer in layers:
        if isinstance(layer, neuron.BaseNode):
            x_seq = layer(x_seq)
        else:
            x_seq = layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])
    return x_seq
""",
}
JOINED = """
import json, sys
import torch
from snnkern.nn import LIFNode, MultiStepLIFNode, TernaryLIFNode

early = [LIFNode(step_mode="m"), MultiStepLIFNode(), TernaryLIFNode()]
from spikingjelly.clock_driven import neuron, functional

theirs = neuron.LIFNode
classes = neuron.BaseNode, neuron.LIFNode, neuron.MultiStepLIFNode
kinds = [[isinstance(node, cls) for cls in classes] for node in early]
missing = [hasattr(node, name) for node in early for name in ("neuronal_charge", "neuronal_fire", "to_lava")]
x = torch.full((8, 3, 1), 0.6) * 2
spikes = [functional.sequential_forward([torch.nn.Identity(), node], x).sum().item() for node in early[:2]]

import snnkern.hook

class Quadratic(neuron.LIFNode):
    def neuronal_charge(self, x):
        pass

print(json.dumps([
    issubclass(Quadratic, theirs) and not issubclass(Quadratic, LIFNode),
    kinds,
    any(missing),
    spikes,
    neuron.LIFNode is LIFNode and neuron.MultiStepLIFNode is MultiStepLIFNode,
    issubclass(neuron.LIFNode, theirs),
    neuron.QIFNode.__module__,
    type(neuron.__loader__).__name__,
]))
"""
TRAIN = """
import json, os, sys
import helper
import torch
from spikingjelly.clock_driven import functional, layer, neuron, surrogate
from spikingjelly.clock_driven.neuron import MultiStepLIFNode, MultiStepParametricLIFNode
from spikingjelly.activation_based import functional as later, neuron as nodes
from spikingjelly.activation_based.surrogate import Rect

def refused(statement):
    try:
        exec(statement)
    except (ImportError, AttributeError) as error:
        return str(error)

torch.manual_seed(0)
node = MultiStepLIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan(), backend='cupy')
net = torch.nn.Sequential(layer.SeqToANNContainer(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)), node)
x = 3 * torch.rand(6, 2, 3)
net(x).sum().backward()
state = list(node.v.shape)
functional.reset_net(net)
at_zero, u = surrogate.ATan(alpha=3.0), torch.zeros(1, requires_grad=True)
spike = at_zero(u)
spike.backward()
steps = layer.MultiStepContainer(nodes.LIFNode())
twin = nodes.LIFNode(step_mode="m")
later.set_step_mode(twin, "s")
print(json.dumps({
    "argv": sys.argv,
    "name": __name__,
    "first": sys.path[0],
    "helper": helper.here,
    "time": MultiStepLIFNode()(torch.full((8, 1), 1.2)).sum().item(),
    "step by step": torch.equal(steps(x), nodes.LIFNode(step_mode="m")(x)),
    "step mode": twin.step_mode,
    "gradient": bool(net[0][0].weight.grad.any()),
    "state": [state, node.v],
    "kinds": [isinstance(node, neuron.LIFNode), isinstance(node, neuron.BaseNode)],
    "at zero": [spike.item(), u.grad.item()],
    "refused": [refused(s) for s in (
        "from spikingjelly.datasets import cifar10_dvs",
        "from spikingjelly.clock_driven.neuron import QIFNode",
        "layer.Dropout",
    )],
}))
sys.exit(3)
"""
HIDDEN = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] == "spikingjelly" else find(name, path, target)
)
from snnkern.cli import main
main()
"""


def python(*arguments, path, cwd):
    checkout = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), checkout])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_nodes_made_before_are_of_the_classes_that_come_later_and_their_names_change_hands(tmp_path):
    for name, text in INSTALLED.items():
        file = tmp_path / "lib" / "spikingjelly" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "script.py").write_text(JOINED)
    ended = python("script.py", path=[tmp_path / "lib"], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    theirs, kinds, missing, spikes, ours, joined, other, loader = json.loads(ended.stdout)
    assert kinds == [[True, True, False], [True, True, True], [True, False, False]]
    assert not missing and spikes == [3 * 2.0] * 2
    assert ours and theirs and joined and other == "spikingjelly.clock_driven.neuron" and loader == "SourceFileLoader"
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("snnkern: ")]
    assert "spikingjelly.clock_driven.neuron" in line and "MultiStepLIFNode" in line


def test_run_takes_a_script_as_python_would_without_any_spikingjelly(tmp_path):
    folder = tmp_path / "of the script"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "helper.py").write_text("here = __file__")
    ended = python("-c", HIDDEN, "run", folder / "train.py", "--epochs", "2", "-h", path=[], cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    told = json.loads(ended.stdout)
    assert told["argv"] == [str(folder / "train.py"), "--epochs", "2", "-h"] and told["name"] == "__main__"
    assert told["first"] == str(folder) and told["helper"] == str(folder / "helper.py")
    assert told["time"] == 2.0 and told["step by step"] and told["step mode"] == "s" and told["gradient"]
    assert told["state"] == [[2, 5], 0.0] and told["kinds"] == [True, True]
    assert told["at zero"] == [1.0, 1.5]
    datasets, missing, attribute = told["refused"]
    assert "spikingjelly.datasets" in datasets and "not installed" in datasets
    assert "QIFNode" in missing and "hook.py" in missing
    assert "Dropout" in attribute and "stand-in by snnkern" in attribute
    lines = [line for line in ended.stderr.splitlines() if line.startswith("snnkern: ")]
    assert [line.split()[1] for line in lines] == [
        f"spikingjelly.{part}.neuron" for part in ("clock_driven", "activation_based")
    ]


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (EOFError("gone"), 1), (SystemExit(7), 7), (SystemExit("why"), 1), (None, 0)],
)
def test_run_ends_as_the_script_does(monkeypatch, tmp_path, capsys, raised, code):
    def run(script, arguments):
        if raised is not None:
            raise raised

    hook = ModuleType("snnkern.hook")  # the true one would change hands in this process too
    hook.run = run
    monkeypatch.setitem(sys.modules, "snnkern.hook", hook)
    script = tmp_path / "train.py"
    script.touch()
    ended = CliRunner().invoke(app, ["run", str(script)])
    assert ended.exit_code == code
    if isinstance(raised, EOFError):
        assert "EOFError: gone" in ended.output


def test_run_needs_a_script(tmp_path):
    ended = CliRunner().invoke(app, ["run", str(tmp_path)])
    assert ended.exit_code == 2 and "SCRIPT.py must be a file" in ended.output
