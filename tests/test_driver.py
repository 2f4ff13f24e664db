"""Loading and launching through the driver (``csrc/cuda/driver.cpp``), with one that writes down what it is asked."""

import ctypes
import os
import subprocess
import sys

import pytest

from snnkern.backend.cuda import program

extension = pytest.importorskip("snnkern._C", reason="conftest.py says why the extension is missing")

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int fails(const char* call) { const char* f = getenv("FAILS"); return f && !strcmp(f, call) ? 999 : 0; }
int cuLibraryLoadData(void** library, const char* image, void* a, void* b, unsigned n, void* c, void* d, unsigned m) {
  printf("load %s\n", image);
  return *library = "library", fails("cuLibraryLoadData");
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  printf("get %s of %s\n", name, (char*)library);
  return *kernel = "kernel", 0;
}
int cuKernelGetFunction(void** function, void* kernel) { return *function = "function", 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = 10 + ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  printf("retain %d\n", device);
  return *context = "context", 0;
}
static void* current;
int cuCtxSetCurrent(void* context) { return printf("set %s\n", (char*)context), current = context, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return printf("attribute %d = %d\n", attribute, value), 0;
}
int cuGetErrorString(int status, const char** text) { return *text = status == 999 ? "it is broken" : 0, 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (getenv("NO_CONTEXT")) { unsetenv("NO_CONTEXT"); return 201; }
  const char *one = parameters[0], *other = parameters[1];
  long long* words = parameters[2];
  printf("launch %s %u %u %u of %u %u %u, %u bytes, stream %lld: %.3s %.5s %lld %lld %lld\n", (char*)function, x, y, z,
         bx, by, bz, shared, (long long)stream, one, other, words[0], words[1], words[2]);
  return fails("cuLaunchKernel");
}
"""
KERNEL = """
import ctypes, importlib.util, sys
ctypes.CDLL(sys.argv[1])  # dlopen finds what is loaded under that name
spec = importlib.util.spec_from_file_location("_C", sys.argv[3])  # without PyTorch, which takes seconds
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
kernel = _C.CudaKernel(b"image", "name", 1)
"""
CALLS = f"""{KERNEL}
_C.CudaLaunch(kernel, 4, 3, 128, int(sys.argv[2]), [b"one", b"other"])(77, 5, -6)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    compiler = (os.environ.get("CXX") or "c++").split()
    flags = ["-x", "c", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"]
    subprocess.run([*compiler, *flags], cwd=folder, check=True)
    return folder / "libcuda.so.1"


def said(driver, shared=64, calls=CALLS, **environment):
    command = [sys.executable, "-c", calls, driver, str(shared), extension.__file__]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, errors="replace")


LAUNCH = "launch function 4 3 1 of 128 1 1, {} bytes, stream 77: one other 5 -6 0"
LOADED = ["retain 11", "set context", "load image", "get name of library"]


def test_a_kernel_is_loaded_for_its_device_and_launched_with_its_words(driver):
    run = said(driver)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [*LOADED, LAUNCH.format(64)]


def test_more_shared_memory_is_asked_for(driver):
    assert said(driver, 100_000).stdout.splitlines()[4:] == ["attribute 8 = 100000", LAUNCH.format(100_000)]
    assert said(driver, 48 << 10).stdout.splitlines()[4:] == [LAUNCH.format(48 << 10)]
    three = f"{KERNEL}\nfor n in (60_000, 50_000, 70_000): _C.CudaLaunch(kernel, 1, 1, 32, n, [])"
    assert said(driver, calls=three).stdout.splitlines()[4:] == [f"attribute 8 = {n}" for n in (60_000, 70_000)]


def test_a_thread_without_a_context_gets_the_device_s(driver):
    assert said(driver, NO_CONTEXT="1").stdout.splitlines()[4:] == ["set context", LAUNCH.format(64)]


@pytest.mark.parametrize(
    "call, message",
    {
        "cuLibraryLoadData": "RuntimeError: loading name: it is broken (999)",
        "cuLaunchKernel": "RuntimeError: launching 4 x 3 blocks of 128 threads: it is broken (999)",
    }.items(),
)
def test_what_the_driver_refuses_is_told(driver, call, message):
    assert message in said(driver, FAILS=call).stderr


def test_without_a_driver_there_is_no_kernel():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RuntimeError, match=r"the NVIDIA driver cannot be loaded: libcuda\.so\.1"):
            extension.CudaKernel(b"image", "name", 0)
    else:
        pytest.skip("there is a driver here")


def test_launches_take_so_many_constants_and_words(driver):
    assert "too many constants" in said(driver, calls=CALLS.replace('b"one", ', 'b"one", ' * 4)).stderr
    assert "too many words" in said(driver, calls=CALLS.replace("5, -6", "*range(41)")).stderr


WHOLE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
import torch
from snnkern.backend.cuda import lif
from snnkern.spec.layout import layout_of
from snnkern.spec.neuron import make_spec
from snnkern.surrogate import ATan
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False
lif.processors = lambda device: 132
spec = make_spec(None, 2.0, True, 1.0, 0.0, ATan(), False, False)
made = lif._forward(spec, layout_of(torch.empty((4, 1024)), 0), torch.float32, True, False, 1)
made.kernels[0](77, 5, -6)
"""


@pytest.mark.skipif(program.missing() is not None, reason=str(program.missing()))
def test_from_the_sources_to_the_launch(driver, tmp_path):
    """All that a GPU's first call does, but for asking what the GPU is."""
    for _ in range(2):  # compiled, then from disk
        run = said(driver, calls=WHOLE, SNNKERN_CACHE=str(tmp_path))
        assert run.returncode == 0, run.stderr
        *loaded, name, launch = run.stdout.splitlines()
        assert loaded[0] == "retain 11" and loaded[2].startswith("load \x7fELF")
        assert "lif_forward" in name and launch.startswith("launch function 8 1 1 of 128 1 1, 0 bytes, stream 77:")
        assert launch.endswith(" 5 -6 0")
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".sm_90"
