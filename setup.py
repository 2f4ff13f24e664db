"""Builds the extension snnkern._C with CMake. Everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same, without the extension (``snnkern doctor`` says so); a compiler
that fails is an error. SNNKERN_CUDA=auto|0|1: compile the CUDA kernels if nvcc is found (the default), never, always.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSNNKERN_CUDA={os.environ.get('SNNKERN_CUDA', 'auto')}",
            "-GNinja",
        ]
        subprocess.run(["cmake", str(ROOT), *configure], cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)


compiler = os.environ.get("CXX", "c++").split()[0]
found = shutil.which(compiler) is not None
if not found:
    print(
        f"snnkern: no C++ compiler ({compiler!r} not found): installing without the compiled extension", file=sys.stderr
    )
setup(ext_modules=[Extension("snnkern._C", [])] if found else [], cmdclass={"build_ext": CMakeBuild})
