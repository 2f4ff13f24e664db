"""Batch norm over time, batch and space: alone, in one pass with the neurons behind it, or folded away."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..backend.reference.bn_lif import normalise
from ..ops.bn_lif import bn_lif
from ..spec.arguments import check_group, flag, number, positive
from ..spec.norm import Batch, Parameters
from .layers import LIF
from .node import LIFNode


class _TimeNorm(_NormBase):
    """What the two below share: parameters, running statistics and a state_dict as ``torch.nn.BatchNorm2d`` has them.

    Not a ``_BatchNorm``: conversions that look for those would replace the neurons along with the norm.
    """

    def __init__(self, num_features, eps, momentum, affine, track_running_stats, scale, process_group):
        flag("affine", affine)
        flag("track_running_stats", track_running_stats)
        number("eps", eps)
        if momentum is not None:
            number("momentum", momentum)
        check_group(process_group)
        super().__init__(positive("num_features", num_features), eps, momentum, affine, track_running_stats)
        self.scale = number("scale", scale)
        self.process_group = process_group

    def _batch(self) -> tuple[bool, float]:
        """Whether this call uses the statistics of its own batch, and their weight in the running ones."""
        if not self.training:
            return self.running_mean is None, 0.0
        if self.momentum is not None or self.running_mean is None:
            weight = self.momentum or 0.0
        else:
            weight = 1.0 / (self.num_batches_tracked.item() + 1)  # the average over all batches
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return True, weight

    def _check_input_dim(self, y: torch.Tensor) -> None:
        if y.dim() < 3 or y.shape[2] != self.num_features:
            raise ValueError(f"y must be [T, N, {self.num_features}, ...], got shape {tuple(y.shape)}")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.scale == 1 else f"{text}, scale={self.scale:g}"

    def _take(self, norm: nn.Module) -> None:
        """Parameters, buffers and mode of another norm: the same tensors, not copies."""
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.train(norm.training)


class TdBatchNorm(_TimeNorm):
    """Threshold-dependent batch norm of [T, N, C, ...]: ``weight * alpha * v_threshold * normalised + bias``.

    Statistics go over time, batch and space. With ``alpha`` and ``v_threshold`` 1 it is batch norm with time
    folded into the batch.

    Args:
        num_features: channels C.
        alpha: 1, or 1/sqrt(2) for a norm whose output is added to another's.
        v_threshold: of the neurons behind.
        constant: the factor stands beside weight (the paper); False: weight starts from it, which is the same function
            with other gradients and another effect of weight decay (as in some published code).
        eps, momentum, affine, track_running_stats: those of ``torch.nn.BatchNorm2d``; ``momentum=None`` averages over
            all batches.
        process_group: processes whose batches together make the statistics, on any device. None: this one alone.

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021, eq. 4-5.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 1.0,
        v_threshold: float = 1.0,
        constant: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        factor = number("alpha", alpha) * number("v_threshold", v_threshold)
        flag("constant", constant)
        if not constant and not affine:
            raise ValueError("constant=False needs affine=True: the factor is then where weight starts from")
        scale = factor if constant else 1.0
        super().__init__(num_features, eps, momentum, affine, track_running_stats, scale, process_group)
        if not constant:
            nn.init.constant_(self.weight, factor)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(y)
        training, momentum = self._batch()
        running = self.running_mean, self.running_var
        if self.process_group is not None and training:
            batch = Batch(training, momentum, self.eps, self.scale, self.process_group)
            return normalise(y, Parameters(self.weight, self.bias, *running), batch).to(y.dtype)
        weight = self.weight
        if self.scale != 1:
            weight = self.scale * weight if self.affine else y.new_full((self.num_features,), self.scale)
        folded = F.batch_norm(y.flatten(0, 1), *running, weight, self.bias, training, momentum, self.eps)
        return folded.unflatten(0, y.shape[:2])


class BNLIF(_TimeNorm):
    """Batch norm of [T, N, C, ...] and the LIF neurons behind it, in one pass that never writes the normalised tensor.

    ``forward(y, residual=None, steps_out=None) -> spikes`` of ``lif(batch_norm(y) + residual)``; see
    ``snnkern.bn_lif``. ``steps_out``, if given, stands in place of the neurons' own. The state_dict is that of
    ``torch.nn.BatchNorm2d``.

    Args:
        num_features: channels C.
        lif: the neurons; default ``LIF()``. Its ``time_dim`` may be 1, for [N, T, C, ...].
        scale: a constant beside weight: ``alpha * v_threshold`` of ``TdBatchNorm``.
        eps, momentum, affine, track_running_stats, process_group: those of ``TdBatchNorm``.
    """

    def __init__(
        self,
        num_features: int,
        lif: LIF | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        scale: float = 1.0,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, scale, process_group)
        if lif is not None and not isinstance(lif, LIF):
            raise TypeError(f"lif must be an snnkern.nn.LIF or None, got {lif!r}")
        if lif is not None and lif.alone:
            raise TypeError(
                f"lif must be plain neurons with numbers behind a norm in one pass, got {', '.join(lif.alone)}"
            )
        self.lif = LIF() if lif is None else lif

    def forward(
        self, y: torch.Tensor, residual: torch.Tensor | None = None, steps_out: int | None = None
    ) -> torch.Tensor:
        self._check_input_dim(y)
        training, momentum = self._batch()
        settings = self.lif.settings if steps_out is None else {**self.lif.settings, "steps_out": steps_out}
        memory = self.lif._memory
        v = memory and memory.take(settings["steps_out"])
        spikes, v = bn_lif(
            y,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            v,
            training=training,
            momentum=momentum,
            eps=self.eps,
            scale=self.scale,
            residual=residual,
            process_group=self.process_group,
            return_v=memory is not None,
            **settings,
        )
        if memory is not None:
            memory.v = v
        return spikes

    @classmethod
    def from_modules(cls, norm: nn.Module, lif: LIF | LIFNode) -> BNLIF:
        """From a batch norm (PyTorch's, its SyncBatchNorm, TdBatchNorm) and the neurons behind it.

        Parameters and buffers are shared with ``norm``, not copied. A ``LIFNode`` must be in multi-step mode;
        every call then starts at rest, as the node does after ``reset()``.
        """
        if not isinstance(norm, (_BatchNorm, TdBatchNorm)):
            raise TypeError(f"norm must be a batch norm, got {norm!r}")
        if isinstance(lif, LIFNode):
            if lif.step_mode != "m" or lif.store_v_seq:
                raise ValueError(f"lif must be in step_mode 'm' and without store_v_seq, got {lif!r}")
            lif = LIF(**lif._neuron())
        group = getattr(norm, "process_group", None)
        if isinstance(norm, nn.SyncBatchNorm) and group is None:
            group = torch.distributed.group.WORLD
        options = norm.eps, norm.momentum, norm.affine, norm.track_running_stats, getattr(norm, "scale", 1.0), group
        made = cls(norm.num_features, lif, *options)
        made._take(norm)
        return made

    def to_modules(self) -> tuple[TdBatchNorm, LIF]:
        """The two layers that this one is; parameters and buffers are shared with it, not copied."""
        options = self.eps, self.momentum, self.affine, self.track_running_stats, self.process_group
        norm = TdBatchNorm(self.num_features, self.scale, 1.0, True, *options)
        norm._take(self)
        return norm, self.lif


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, in which batch norms are folded into the convolutions before them.

    ::

        W' = W k,  b' = beta + (b - mean) k,  k = gamma scale / sqrt(var + eps)

    A norm is folded where it is registered right behind a convolution or linear layer of as many channels, in the same
    parent: check that this is the order in which they run. In place of the norm stands the identity, in place of a
    BNLIF its neurons.

    Source: Deng et al., ICLR 2022, eq. 6; eps, left out there, belongs in: without it outputs differ.

    Raises: ValueError if there is nothing to fold.
    """
    folded = copy.deepcopy(model).eval()
    norms = (_BatchNorm, _TimeNorm)
    found = 0
    for parent in folded.modules():
        for (_, layer), (name, norm) in list(pairwise(parent.named_children())):
            channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
            if not isinstance(norm, norms) or channels != norm.num_features:
                continue
            if isinstance(layer, nn.modules.conv._ConvTransposeNd) or norm.running_mean is None:
                continue
            _fold(layer, norm)
            setattr(parent, name, norm.lif if isinstance(norm, BNLIF) else nn.Identity())
            found += 1
    if not found:
        raise ValueError(f"there is no batch norm behind a convolution or linear layer in {type(model).__name__}")
    return folded


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    factor = getattr(norm, "scale", 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.affine:
        factor = norm.weight.double() * factor
    offset = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = offset * factor + (norm.bias.double() if norm.affine else 0.0)
    weight = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
