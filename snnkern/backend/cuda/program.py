"""CUDA kernels, compiled by NVRTC for what a call needs when a call first needs it.

A kernel is a template of ``csrc/cuda`` over a structure of constants, its variant: dtype, width, form of the neuron,
and whatever else a loop over time would have to ask. Compiled, it is kept on disk, by the text of the sources, the
variant and the architecture, in ``$SNNKERN_CACHE`` or ``~/.cache/snnkern``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import warnings
from functools import cache
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import torch

from ...files import replacing
from .._extension import _C

OPTIONS = ("-std=c++20", "-default-device", "--fmad=false", "-lineinfo")  # nothing is contracted but what says fma
_log = logging.getLogger("snnkern")
_lock = RLock()


def missing() -> str | None:
    """Why kernels cannot be compiled, or None."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        major = (torch.version.cuda or "13").partition(".")[0]
        return f"its kernels are compiled by NVRTC, through cuda-bindings: pip install 'cuda-bindings=={major}.*'"
    return None


class Grid(NamedTuple):
    """How a kernel is launched: blocks across and down, threads a block, bytes of dynamic shared memory a block."""

    across: int
    down: int
    threads: int
    shared: int


def prepare(header: str, name: str, variant: NamedTuple, grid: Grid, constants: list[bytes], device: int):
    """A launch of kernel ``name`` of ``csrc/cuda/<header>`` but for its stream and its words, called with these.

    Args:
        variant: The constants it is compiled for, by the names that they have in C++.
        constants: The structures it takes by value, before that of its words.

    Raises:
        RuntimeError: It would have to be compiled or loaded while a CUDA graph is captured; or that fails.
    """
    with _lock:
        kernel = _kernel(header, name, variant, device)
    return _C.CudaLaunch(kernel, *grid, constants)


@cache
def _kernel(header: str, name: str, variant: NamedTuple, device: int):
    expression = f"snnkern::{name}<{_cpp(variant)}>"
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{expression} is not loaded yet, and cannot be while a CUDA graph is captured: make the same call once "
            "before the capture"
        )
    made = build(header, expression, architecture(device))
    return load(*made, device)


def _cpp(variant: NamedTuple) -> str:
    """The structure of that name and those members, in C++."""
    name = f"snnkern::{type(variant).__name__}"
    given = ", ".join(f".{f} = decltype({name}::{f})({int(value)})" for f, value in variant._asdict().items())
    return f"{name}{{{given}}}"


def stream_of(device: int) -> int:
    """The current stream's handle."""
    return torch._C._cuda_getCurrentRawStream(device)


def load(image: bytes, name: str, device: int):
    return _C.CudaKernel(image, name, device)


@cache
def architecture(device: int) -> str:
    """What to compile for: the device's machine code."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def build(header: str, expression: str, target: str) -> tuple[bytes, str]:
    """The compiled kernel, from disk if it is there, and its name in it."""
    path = folder() / f"{_key(header, expression, target)}.{target}"
    try:
        _ours(path.parent)
        head, _, image = path.read_bytes().partition(b"\n")
        name, _, digest = head.decode(errors="replace").partition(" ")
        if digest == _digest(image):
            return image, name
        _log.warning("%s is damaged and is made anew", path)
    except OSError:
        pass
    image, name = compile(header, expression, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _ours(path.parent)
        own = path.with_name(f"{path.name}.{os.getpid()}")  # others may be writing it too
        with replacing(own) as file:
            file.write(f"{name} {_digest(image)}\n".encode() + image)
        os.replace(own, path)
    except OSError as error:
        _warn_once(f"compiled kernels cannot be kept, so that every process compiles them anew: {error}")
    return image, name


def _ours(path: Path) -> None:
    """PermissionError if another user can put a file into the folder: what is in there runs as ours."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"other users can write to {path}"
        raise PermissionError(f"{why}: empty it and `chmod go-w` it, or name a folder of your own in SNNKERN_CACHE")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def folder() -> Path:
    """Where compiled kernels are kept."""
    given = os.environ.get("SNNKERN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snnkern"


@cache
def sources() -> Path:
    """csrc: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[2]
    return next(p for p in (package / "csrc", package.parent / "csrc") if (p / "cuda").is_dir())


@cache
def _text() -> bytes:
    root = sources()
    return b"".join(path.read_bytes() for path in sorted((*root.glob("*.h"), *root.glob("cuda/*.cuh"))))


def _key(header: str, expression: str, target: str) -> str:
    told = "\n".join((header, expression, target, *OPTIONS)).encode()
    return _digest(told + _text())


def compile(header: str, expression: str, target: str) -> tuple[bytes, str]:
    """The kernel that a C++ expression names, as machine code, and its name there; as PTX for a target "compute_...",
    and for a device that is newer than this NVRTC: its driver compiles it further.

    Raises:
        RuntimeError: with the compiler's words.
    """
    from cuda.bindings import nvrtc

    known, own = _checked(nvrtc.nvrtcGetSupportedArchs())[-1], int(target.partition("_")[2])
    if own not in known:
        target = f"compute_{max(n for n in known if n < own)}"
    _log.debug("compiling %s for %s", expression, target)
    program = _checked(nvrtc.nvrtcCreateProgram(f'#include "cuda/{header}"\n'.encode(), b"snnkern", 0, [], []))[0]
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
        options = [*OPTIONS, f"-arch={target}", f"-I{sources()}"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0\n").decode()
            raise RuntimeError(f"{expression} does not compile for {target}: {status.name}\n{log}")
        name = _checked(nvrtc.nvrtcGetLoweredName(program, expression.encode()))[0]
        virtual = target.startswith("compute")
        size, get = (
            (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if virtual else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        )
        return _bytes(size, get, program), name.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(found: tuple) -> tuple:
    status, *values = found
    if int(status):
        raise RuntimeError(f"NVRTC: {status.name}")
    return values


def _bytes(size, get, program) -> bytes:
    room = bytearray(_checked(size(program))[0])
    _checked(get(program, room))
    return bytes(room)
