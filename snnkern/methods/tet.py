"""Temporal efficient training (TET): the loss at every time step, in place of the loss of the mean over time.

``outputs`` O_t are the pre-synaptic inputs of the last layer at each step, which neither leaks nor fires; T of them.

::

    L_SDT   = CE(mean_t O_t, y)                                    standard direct training    (eq. 7)
    L_TET   = mean_t CE(O_t, y)                                                                (eq. 9)
    L_MSE   = mean_t MSE(O_t, phi)                                 bounds their spread         (eq. 12)
    L_TOTAL = (1 - lamb) L_TET + lamb L_MSE                                                    (eq. 13)

For a sample, ``CE(O, y) = logsumexp(O) - O_y``, so that for any label ``L_TET - L_SDT = mean_t LSE(O_t) -
LSE(mean_t O_t) >= 0``, as logsumexp is convex (lemma 4.1).

Time inheritance training (section 4.3) is no code of its own: a recipe lists a stage of few steps, then stages of more
with ``inherit``, which start from its weights; ``recipes/tet-cifar10.toml`` is the published one.

Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["sdt", "tet"]


def sdt(outputs: torch.Tensor, target: torch.Tensor, time_dim: int = 0) -> torch.Tensor:
    """Standard direct training: ``CE(mean_t O_t, y)``, averaged over the batch.

    Args:
        outputs: [T, N, classes], or with time elsewhere (``time_dim``); 16-bit outputs are computed in float32.
        target: [N], int64 class indices.

    Returns: a scalar. Its gradient, ``(softmax(mean_t O_t) - onehot(y)) / (N T)``, is the same at every step.

    Source: eq. 7.
    """
    return F.cross_entropy(_time_first(outputs, target, time_dim).mean(0), target)


def tet(
    outputs: torch.Tensor, target: torch.Tensor, lamb: float = 0.0, phi: float = 1.0, time_dim: int = 0
) -> torch.Tensor:
    """Temporal efficient training: ``(1 - lamb) mean_t CE(O_t, y) + lamb mean_t MSE(O_t, phi)``, mean over the batch.

    Args:
        outputs: [T, N, classes], or with time elsewhere (``time_dim``); 16-bit outputs are computed in float32.
        target: [N], int64 class indices.
        lamb: weight in [0, 1] of the second term, which bounds the spread of the outputs. Published: 0.05 for CIFAR,
            0.001 for ImageNet and DVS-CIFAR10.
        phi: the value towards which that term pulls every class; published: the threshold, 1.

    Returns: a scalar. The gradient of the first term is ``(softmax(O_t) - onehot(y)) / (N T)``.

    Source: eq. 9, 12 and 13.
    """
    for name, value in (("lamb", lamb), ("phi", phi)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, got {value!r}")
    if not 0 <= lamb <= 1:
        raise ValueError(f"lamb must be in [0, 1], got {lamb!r}")
    if not math.isfinite(phi):
        raise ValueError(f"phi must be finite, got {phi!r}")
    outputs = _time_first(outputs, target, time_dim)
    loss = F.cross_entropy(outputs.flatten(0, 1), target.repeat(outputs.shape[0]))
    if lamb:
        loss = (1 - lamb) * loss + lamb * (outputs - phi).square().mean()
    return loss


def _time_first(outputs, target, time_dim) -> torch.Tensor:
    """Checks the arguments; returns the outputs as [T, N, classes] in at least float32."""
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        raise TypeError(f"outputs must be a floating-point tensor, got {_kind(outputs)}")
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor of class indices, got {_kind(target)}")
    if isinstance(time_dim, bool) or not isinstance(time_dim, int):
        raise TypeError(f"time_dim must be an int, got {time_dim!r}")
    if outputs.dim() != 3 or outputs.numel() == 0:
        raise ValueError(f"outputs must have three dimensions, none of them 0 long, got shape {tuple(outputs.shape)}")
    if not -3 <= time_dim < 3:
        raise ValueError(f"time_dim must name one of the three dimensions of outputs, got {time_dim}")
    outputs = outputs.movedim(time_dim, 0)
    if target.shape != outputs.shape[1:2]:
        raise ValueError(f"target must have shape ({outputs.shape[1]},), a class per sample, got {tuple(target.shape)}")
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _kind(value) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
