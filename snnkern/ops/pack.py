"""Spikes as bits: the ops ``pack`` and ``unpack``, and the context in which autograd keeps spikes that way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..backend import choose
from ..spec.layout import INTEGERS


def pack(x: torch.Tensor, kernels, check: bool = True) -> torch.Tensor | None:
    """Element i of n as bit ``i % 8`` of byte ``i // 8``: uint8 [ceil(n / 8)]; the bits after the last are 0.

    None if an element is neither 0 nor 1 (-0 is neither). Without ``check``, a backend that would have to wait for the
    answer does not look, and makes such elements 0. x is contiguous, of a dtype in ``INTEGERS``.
    """
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    return bits if kernels.pack(x, bits, check) else None


def unpack(bits: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, kernels) -> torch.Tensor:
    """As many of the numbers that were packed as make up ``shape``, in any dtype of ``INTEGERS``."""
    x = torch.empty(shape, dtype=dtype, device=bits.device)
    kernels.unpack(bits, x)
    return x


@contextmanager
def packed_spikes(detect: bool = False, backend: str | None = None) -> Iterator[None]:
    """What layers keep of spikes for their backward takes one bit per element.

    ::

        with snnkern.packed_spikes():
            loss = criterion(model(x), target)
        loss.backward()

    Spikes are the outputs of snnkern's neurons, compiled ones too, and all views of them, until they are edited in
    place. They are packed when a layer first keeps them; all layers share the bits, and each gets its own numbers back,
    exactly, when its backward asks for them. Dense spikes are freed as soon as nobody else holds them. Everything else
    is kept as it is. Also a decorator.

    Args:
        detect: look at all other floating-point tensors, too: for the spikes of other libraries, and for spikes cast,
            pooled or concatenated. Whatever holds only 0 and 1 is packed. On the CPU a look at anything else ends
            early; on a GPU every look waits for the device.
        backend: that packs; see ``snnkern.lif``.

    Holds for what this thread does inside, forward or backward. Saved-tensor hooks do not add up, the innermost apply:
    what ``torch.utils.checkpoint`` recomputes is kept its way, its inputs are packed. Enter it outside of compiled
    functions. On a GPU, edits that autograd does not see (through ``.data``) give wrong gradients; the ``cpu`` backend
    notices them.

    Gradients: the same bits as without, to any order. Spikes edited in place between forward and backward, at which
    PyTorch raises an error, count as what they were; the edits of everything else still raise it.

    Raises: ValueError, RuntimeError at the first spikes if ``backend`` does not exist, or cannot run here.

    Source: ``torch.autograd.graph.saved_tensors_hooks``. Specification: ``snnkern/backend/reference/pack.py``.
    """
    with saved_tensors_hooks(partial(_keep, detect, backend), lambda give_back: give_back()):
        _contexts.append(None)
        try:
            yield
        finally:
            _contexts.pop()


_contexts = []  # as many as are active, in all threads


def note(spikes: torch.Tensor) -> None:
    """For an op that makes spikes: says that the whole storage of ``spikes`` holds 0 and 1. Next to free."""
    if _contexts and type(spikes) is torch.Tensor and not spikes.is_inference():
        spikes.untyped_storage()._snnkern_spikes = _Spikes(spikes, check=False)


class _Spikes:
    """That a storage holds spikes, at one version: an attribute of the storage, which lives and dies with it.

    Views share storage and version with what they view, and a storage has one Python object for all its life.
    """

    __slots__ = "check", "dtype", "packed", "stream", "version"

    def __init__(self, t: torch.Tensor, check: bool):
        self.dtype, self.version, self.check = t.dtype, t._version, check
        self.packed = self.stream = None

    def pack(self, t: torch.Tensor, backend: str | None):
        """The bits and the backend that made them, at the first call and on another stream, which need not wait."""
        stream = None if t.is_cpu else torch.accelerator.current_stream(t.device)
        if self.packed is None or self.stream != stream:
            kernels = choose(t.device.type, t.dtype, backend)
            whole = t if _is_whole(t) else t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
            bits = pack(whole, kernels, self.check)
            if bits is None:
                self.dtype = None  # no spikes, nor to be looked at again
                return None
            self.packed, self.stream = (bits, kernels), stream
        return self.packed


def _keep(detect: bool, backend: str | None, t: torch.Tensor):
    """Keeps t, and returns the function that gives it back."""
    spikes = _spikes_of(t, detect)
    packed = spikes and spikes.pack(t, backend)
    if not packed:
        return partial(_unedited, t, t._version)
    if _is_whole(t):
        return partial(unpack, packed[0], t.shape, t.dtype, packed[1])
    return partial(_view, *packed, t.dtype, t.shape, t.stride(), t.storage_offset())


def _spikes_of(t: torch.Tensor, detect: bool) -> _Spikes | None:
    if type(t) is not torch.Tensor or t.layout is not torch.strided:
        return None
    storage = t.untyped_storage()
    spikes = getattr(storage, "_snnkern_spikes", None)
    if spikes is None or spikes.version != t._version:
        if not detect or t.dtype not in INTEGERS or t.is_meta or t.nbytes != storage.nbytes():
            return None
        spikes = storage._snnkern_spikes = _Spikes(t, check=True)
    return spikes if spikes.dtype == t.dtype and t.numel() and not t.is_neg() else None


def _is_whole(t: torch.Tensor) -> bool:
    """Whether t is all of its storage, in order."""
    return t.is_contiguous() and t.nbytes == t.untyped_storage().nbytes()


def _view(bits, kernels, dtype, shape, strides, offset) -> torch.Tensor:
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    first = offset // 8 * 8
    x = unpack(bits[first // 8 : last // 8 + 1], (last + 1 - first,), dtype, kernels)
    return x.as_strided(shape, strides, offset - first)


def _unedited(t: torch.Tensor, version: int) -> torch.Tensor:
    """PyTorch's own check, which it leaves out for what goes through hooks."""
    if t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{t.type()} {list(t.shape)}] is at version {t._version}; expected version {version} instead"
        )
    return t
