"""The official models of published code: how each is built from a checkout, and which of its neurons ours replace."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from snnkern.nn import LIF, MultiStepLIFNode
from snnkern.surrogate import ATan, Dspike, Integer, Triangle

from . import stand_ins

# Where published code lives, and in which folder of one that holds all checkouts it is looked for.
CHECKOUTS = {
    "spikingjelly": "github.com/fangwei123456/spikingjelly",
    "temporal_efficient_training": "github.com/Gus-Lab/temporal_efficient_training",
    "temporal_flexibility_in_SNN": "github.com/brain-intelligence-lab/temporal_flexibility_in_SNN",
    "SEENN": "github.com/Intelligent-Computing-Lab-Yale/SEENN",
    "spikformer": "github.com/ZK-Zhou/spikformer",
    "QKFormer": "github.com/zhouchenlin2096/QKFormer",
    "Spike-Driven-Transformer": "github.com/BICLab/Spike-Driven-Transformer",
    "Spike-Element-Wise-ResNet": "github.com/fangwei123456/Spike-Element-Wise-ResNet",
    "SpikeGPT": "github.com/ridgerchu/SpikeGPT",
    "SpikeYOLO": "github.com/BICLab/SpikeYOLO",
}


class Case(NamedTuple):
    """A model. ``build`` and ``rules`` run in a process of their own, with ``folder`` of the checkout on the path."""

    checkout: str
    model: str
    build: Callable[[], tuple[nn.Module, tuple]]  # the model and the arguments of its forward
    rules: Callable[[], dict] = dict  # of ``snnkern.convert``
    folder: str = ""
    spikingjelly: bool = False  # whether it is written for SpikingJelly 0.0.0.0.12
    stand_ins: tuple[Callable[[], str], ...] = ()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def tet_vgg():
    from models.VGG_models import VGGSNN

    return VGGSNN(), (2 * images(2, 4, 2, 48, 48),)


def tet_resnet():
    from models.resnet_models import resnet19

    model = resnet19(num_classes=10)
    model.T = 2
    return model, (images(2, 3, 32, 32),)


def tet_rules():
    from models.layers import LIFSpike

    return {LIFSpike: lambda m: LIF(m.tau, threshold=m.thresh, surrogate=Triangle(m.gama), time_dim=1)}


def mtt_resnet():
    from models import TFSNN_ResNet18

    return TFSNN_ResNet18(10, [3, 3, 2, 2, 4, 4, 1, 3], 1.0, 0.5, 0), (images(2, 3, 3, 32, 32),)


def mtt_vgg():
    from models import TFSNN_VGG14

    return TFSNN_VGG14(10, [3, 3, 2, 2, 4, 4, 1, 3, 3, 3, 2, 2, 3], 1.0, 0.5, 0), (images(2, 3, 3, 32, 32),)


def mtt_rules():
    from models import SpikeLayer

    class OfSteps(LIF):
        """What comes second is a number of time steps."""

        def forward(self, x, now_T):
            return super().forward(x[:, :now_T])

    return {SpikeLayer: lambda m: OfSteps(m.decay, threshold=m.Vth, surrogate=Triangle(1.0), time_dim=1)}


def seenn_resnet():
    from models.resnet import resnet19

    model = resnet19(width_mult=4, num_classes=10, use_dspike=True, gamma=3)
    model.T = 3
    return model, (images(2, 3, 32, 32),)


def seenn_vgg():
    from models.spike_vgg import vgg16

    model = vgg16(width_mult=1, num_classes=10, dspike=True, gama=3)
    model.T = 3
    return model, (images(2, 3, 32, 32),)


def seenn_rules():
    from models.layers import DSPIKE, LIFSpike

    def lif(m: nn.Module) -> LIF:
        if isinstance(m.act, DSPIKE):  # fires at the threshold; its temperature is gama
            how = {"surrogate": Dspike(2 * m.gama * m.act.region, 2 * m.act.region), "fire_at_threshold": True}
        else:
            how = {"surrogate": Triangle(m.gama)}
        return LIF(m.tau, threshold=m.thresh, time_dim=1, **how)

    return {LIFSpike: lif}


def spikformer():
    import model

    sizes = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "in_channels": 3, "num_classes": 10, "T": 4}
    made = model.spikformer(**sizes, embed_dims=384, num_heads=12, mlp_ratios=4, depths=4, sr_ratios=1)
    return made, (images(2, 3, 32, 32),)


def qkformer():
    import model

    sizes = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "in_channels": 3, "num_classes": 10, "T": 4}
    made = model.QKFormer(**sizes, embed_dims=384, num_heads=8, mlp_ratios=4, depths=4, sr_ratios=1)
    return made, (images(2, 3, 32, 32),)


def spike_driven(spike_mode: str):
    def build():
        from model import sdt

        sizes = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "in_channels": 3, "num_classes": 10, "T": 4}
        options = {"num_heads": 8, "mlp_ratios": 4, "depths": 2, "pooling_stat": "0011", "spike_mode": spike_mode}
        return drawn(sdt(**sizes, embed_dims=256, **options)), (images(2, 3, 32, 32),)

    return build


def sew_resnet():
    from sew_resnet import sew_resnet18

    return sew_resnet18(T=4, connect_f="ADD"), (images(2, 3, 64, 64),)


def spiking_resnet():
    from spiking_resnet import spiking_resnet18

    return spiking_resnet18(T=4), (images(2, 3, 64, 64),)


def sew_dvs():
    from smodels import SEWResNet

    return drawn(SEWResNet("ADD")), (2 * images(1, 4, 2, 128, 128),)


def spikegpt():
    """Its recurrence, WKV, has a CUDA kernel alone; here it is a loop, for the few steps of a test."""
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda **options: None
    from src import model

    def wkv(B, T, C, w, u, k, v):
        decay = -torch.exp(w)
        above = below = torch.zeros(B, C)
        out = []
        for t in range(T):
            now = torch.exp(u + k[:, t])
            out.append((above + now * v[:, t]) / (below + now))
            kept = torch.exp(k[:, t])
            above, below = torch.exp(decay) * above + kept * v[:, t], torch.exp(decay) * below + kept
        return torch.stack(out, 1)

    model.RUN_CUDA = wkv
    made = model.GPT(model.GPTConfig(50, 32, model_type="RWKV", n_layer=3, n_embd=64))
    for name, weight in made.named_parameters():
        if name.endswith(("output.weight", "value.weight")):  # at its own initial values nothing fires
            nn.init.normal_(weight, std=0.5)
    tokens = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(1))
    return made, (tokens[:, :-1], tokens[:, 1:])


def spikegpt_rules():
    from src.spikingjelly.clock_driven import neuron

    def node(m: nn.Module) -> MultiStepLIFNode:
        surrogate = ATan(m.surrogate_function.alpha)  # a copy of SpikingJelly's under a name of its own
        return MultiStepLIFNode(m.tau, m.decay_input, m.v_threshold, m.v_reset, surrogate, m.detach_reset)

    return {neuron.MultiStepLIFNode: node}


def spikegpt_cupy() -> str:
    from src.spikingjelly.clock_driven import neuron

    neuron.check_backend = lambda backend: None
    return "CuPy: backend torch; WKV's CUDA kernel: a loop"


def spikeyolo():
    os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()  # it writes settings at its import
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("ultralytics/cfg/models/v8/snn_yolov8n.yaml", verbose=False), (images(1, 3, 64, 64),)


def spikeyolo_rules():
    from ultralytics.nn.modules import yolo_spikformer as code

    levels = {code.MultiSpike1: 1, code.MultiSpike2: 2, code.MultiSpike4: 4, code.MultiSpike8: 8}

    def ilif(m: nn.Module) -> LIF:
        return LIF(code.decay, reset=None, surrogate=Integer(levels[type(m.qtrick)]), detach_reset=True)

    return {code.mem_update: ilif}


def zoo(module: str, name: str, size: int = 32, neuron: str | None = None, **options):
    """Of SpikingJelly's own models, in multi-step mode."""

    def build():
        import importlib

        from spikingjelly.activation_based import functional, surrogate
        from spikingjelly.activation_based import neuron as nodes

        if neuron:
            surrogates = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
            options.update(spiking_neuron=getattr(nodes, neuron), **surrogates)
        made = getattr(importlib.import_module(f"spikingjelly.activation_based.model.{module}"), name)(**options)
        functional.set_step_mode(made, "m")
        return drawn(made), (images(4, 2, 3, size, size),)

    return build


def drawn(model: nn.Module) -> nn.Module:
    """Parametric neurons, whose time constants all begin at 2, with others."""
    for module in model.modules():
        if "ParametricLIF" in type(module).__name__:
            nn.init.uniform_(module.w, -1.0, 1.0)
    return model


def chip():
    """The published network for event-driven chips: no leak, a lower bound, one spike a step."""
    from models.snn_speck import MembraneReset, SingleSpike, dvs_gesture_snn

    made = dvs_gesture_snn(batch_size=2, reset_fn=MembraneReset(), spike_fn=SingleSpike)
    return made, ((8 * images(2, 5, 2, 128, 128)).floor(),)


TRANSFORMER = (stand_ins.cupy, stand_ins.timm)
VISION = stand_ins.imported("torchvision")
YOLO = stand_ins.imported("torchvision", "cv2", "torchinfo", "thop", "psutil", "pandas", "seaborn", "PIL", "requests")

CASES = (
    *(
        Case("spikingjelly", title, build, stand_ins=(VISION,))
        for title, build in (
            ("Spiking ResNet-18, LIF", zoo("spiking_resnet", "spiking_resnet18", 64, "LIFNode")),
            ("SEW-ResNet-18, IF", zoo("sew_resnet", "sew_resnet18", 64, "IFNode", cnf="ADD")),
            ("VGG-11, LIF", zoo("spiking_vgg", "spiking_vgg11_bn", 32, "LIFNode", num_classes=10)),
            ("PLIF's for CIFAR-10", zoo("parametric_lif_net", "CIFAR10Net", 32, "ParametricLIFNode", channels=64)),
            ("Spikformer-Ti", zoo("spikformer", "spikformer_ti", 64, img_size_h=64, img_size_w=64)),
        )
    ),
    Case("temporal_efficient_training", "VGGSNN", tet_vgg, tet_rules),
    Case("temporal_efficient_training", "ResNet-19", tet_resnet, tet_rules),
    Case("temporal_flexibility_in_SNN", "ResNet-18, mixed time steps", mtt_resnet, mtt_rules, "train-time-stepped"),
    Case("temporal_flexibility_in_SNN", "VGG-14, mixed time steps", mtt_vgg, mtt_rules, "train-time-stepped"),
    Case("temporal_flexibility_in_SNN", "network for chips", chip, folder="train-event-driven"),
    Case("SEENN", "ResNet-19, half its width", seenn_resnet, seenn_rules),
    Case("SEENN", "VGG-16, a quarter of its width", seenn_vgg, seenn_rules),
    Case("spikformer", "CIFAR-10", spikformer, folder="cifar10", spikingjelly=True, stand_ins=TRANSFORMER),
    Case("QKFormer", "CIFAR-10", qkformer, folder="cifar10", spikingjelly=True, stand_ins=TRANSFORMER),
    *(
        Case("Spike-Driven-Transformer", f"CIFAR-10, {mode}", spike_driven(mode), spikingjelly=True,
             stand_ins=TRANSFORMER)
        for mode in ("lif", "plif")
    ),
    *(
        Case("Spike-Element-Wise-ResNet", title, build, folder=folder, spikingjelly=True,
             stand_ins=(stand_ins.cupy, stand_ins.cext))
        for title, build, folder in (
            ("SEW-ResNet-18", sew_resnet, "imagenet"),
            ("Spiking ResNet-18", spiking_resnet, "imagenet"),
            ("CIFAR10-DVS, parametric LIF", sew_dvs, "cifar10dvs"),
        )
    ),
    Case("SpikeGPT", "3 layers of 64", spikegpt, spikegpt_rules, stand_ins=(spikegpt_cupy,)),
    Case("SpikeYOLO", "n", spikeyolo, spikeyolo_rules, "", True, (*TRANSFORMER, stand_ins.cuda, YOLO)),
)  # fmt: skip
