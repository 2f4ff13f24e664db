"""The CUDA backend on a machine without a GPU: ``install()`` makes it serve CPU tensors, on a device of ours.

Everything of the package runs as on a GPU: the choice of kernel, grid and variant, NVRTC (for PTX in place of machine
code), the cache on disk. In place of the driver, ``ptx.cpp`` runs the PTX on the tensors' own memory and checks every
access of it: inside a tensor whose address was taken for this launch, aligned, nothing read that nobody wrote, no race
between barriers. What it finds is raised, as ``Fault``, by the launch. It shows neither time nor what ``ptxas`` makes
of the code, and .approx functions are exact on it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors

SOURCE = Path(__file__).with_name("ptx.cpp")
BINDING = SOURCE.parents[2] / "csrc" / "python" / "function.h"
BUILD = SOURCE.parents[2] / "build" / "emulator"  # kept, by content
FLAGS = ("-std=c++20", "-O1", "-fwrapv", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden")
POISON = 0xFF  # fresh memory: NaN in every dtype


class Fault(AssertionError):
    """A launch did what it must not do."""


@functools.cache
def _ptx():
    """``ptx.cpp``, compiled when it changed."""
    text = SOURCE.read_bytes() + BINDING.read_bytes() + repr((FLAGS, sys.version)).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    library = BUILD / key / "_ptx.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        include = f"-I{sysconfig.get_path('include')}"
        subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, include, SOURCE, "-o", made], check=True)
        made.replace(library)
    spec = importlib.util.spec_from_file_location("_ptx", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernel:
    """In place of ``_C.CudaKernel``."""

    def __init__(self, image: bytes, name: str, device: int | None = None):
        self.name, self.parsed = name, _ptx().Kernel(image, name)


class Launch:
    """In place of ``_C.CudaLaunch``."""

    made: list[Launch] = []  # noqa: RUF012  # those that ran, since somebody emptied it

    def __init__(self, kernel: Kernel, across: int, down: int, threads: int, shared: int, constants: list[bytes]):
        self.kernel, self.grid, self.constants = kernel, (across, down, threads, shared), constants

    def __call__(self, stream: int, *words: int) -> None:
        Launch.made.append(self)
        given = b"".join((word % (1 << 64)).to_bytes(8, "little") for word in words)
        memory = array("q", [number for region in _regions(words) for number in region]).tobytes()
        found = _ptx().launch(self.kernel.parsed, *self.grid, [*self.constants, given], memory)
        if found:
            raise Fault(f"{self.kernel.name}, {self.grid}:\n{found.decode()}")


# ------------------------------------------------------------------------------------------------ memory

_data_ptr, _empty, _empty_like = torch.Tensor.data_ptr, torch.empty, torch.empty_like


class Span(NamedTuple):
    """Memory that a tensor may be read and written in, while its storage lives."""

    begin: int
    end: int
    itemsize: int
    storage: StorageWeakRef


_taken: list[Span] = []  # of tensors whose addresses were taken for the next launches, or the last ones
_launched = False  # since then
_fresh: dict[int, tuple] = {}  # what torch.empty made, by address: Span, and a byte a number: whether a kernel wrote it


def _take(tensor: torch.Tensor) -> int:
    global _launched
    if _launched:
        _taken.clear()
        _launched = False
    at = _data_ptr(tensor)
    if tensor.numel():
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        storage = StorageWeakRef(tensor.untyped_storage())
        _taken.append(Span(at, at + (last + 1) * tensor.itemsize, tensor.itemsize, storage))
    return at


def _poisoned(make):
    @functools.wraps(make)
    def made(*args, **options):
        tensor = make(*args, **options)
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel():
            storage = tensor.untyped_storage()
            at, n = storage.data_ptr(), storage.nbytes()
            ctypes.memset(at, POISON, n)
            _fresh[at] = Span(at, at + n, tensor.itemsize, StorageWeakRef(storage)), (ctypes.c_uint8 * tensor.numel())()
        return tensor

    return made


def forget() -> None:
    """What earlier launches and tensors were."""
    _taken.clear()
    _fresh.clear()
    Launch.made.clear()


def _regions(words: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """What a launch with these words may touch: begin, end, the address of what says which numbers kernels wrote, or 0,
    and the bytes of a number."""
    global _launched
    _launched = True
    merged: list[list[int]] = []
    for begin, end, itemsize, storage in sorted(_taken, key=lambda span: span[:3]):
        if storage.expired() or not any(begin <= word < end for word in words):
            continue
        if merged and begin < merged[-1][1]:
            merged[-1][1:] = max(end, merged[-1][1]), min(itemsize, merged[-1][2])
        else:
            merged.append([begin, end, itemsize])
    found = []
    for begin, end, itemsize in merged:
        written = 0
        for span, numbers in _fresh.values():
            if span.begin <= begin and end <= span.end and span.itemsize == itemsize and not span.storage.expired():
                written = ctypes.addressof(numbers) + (begin - span.begin) // itemsize
        found.append((begin, end, written, itemsize))
    return found


# ------------------------------------------------------------------------------------------------ the device

device = SimpleNamespace(multi_processor_count=132, major=8, minor=0)


built: dict[str, tuple[str, str]] = {}  # by name: the header and the C++ that a kernel was compiled from


def install() -> None:
    """For good, in this process. Neurons are always many enough for wide kernels: small tensors have them too."""
    from snnkern.backend import cuda
    from snnkern.backend.cuda import lif, program

    os.environ.setdefault("SNNKERN_CACHE", str(BUILD / "kernels"))

    def build(header, expression, target):
        image, name = compiled(header, expression, target)
        built[name] = header, expression
        return image, name

    compiled, program.build = program.build, build
    lif._fill = lambda *_: True

    refuses = cuda.refuses
    cuda.unavailable = lambda: None
    cuda.refuses = lambda device_type, dtype: refuses("cuda", dtype)
    program._C = SimpleNamespace(CudaKernel=Kernel, CudaLaunch=Launch)
    program.architecture = lambda device: "compute_90"
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda.get_device_properties = lambda index=None: device
    torch.cuda.is_current_stream_capturing = lambda: False
    _device_constructors()  # by which torch.device, as a context, knows torch.empty
    torch.Tensor.data_ptr = _take
    torch.empty, torch.empty_like = _poisoned(_empty), _poisoned(_empty_like)
