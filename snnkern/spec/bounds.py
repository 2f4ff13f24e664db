"""What may differ between backends. Spikes and potentials may not, in any dtype; gradients within these bounds."""

from __future__ import annotations

import torch

# Relative norm of the error of a gradient, per dtype of the gradient: the one table.
_GRADIENT = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def gradient_bound(dtype: torch.dtype, interpreted: bool = False) -> float:
    """``interpreted``: Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds."""
    return 2**-7 if interpreted and dtype == torch.bfloat16 else _GRADIENT[dtype]
