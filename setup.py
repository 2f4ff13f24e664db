"""Builds the extension snnkern._C with CMake. Everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same, without the extension, which its first slow call and
``snnkern doctor`` say; a compiler that fails, or a CXX that is not there, is an error. CXX=... chooses the compiler.
The sources of the CUDA kernels go along, as snnkern/csrc: they are compiled when they are first needed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = (shutil.which(tool) or tool for tool in ("cmake", "ninja"))
        configure = [cmake, str(ROOT)]
        configure += [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-GNinja",
        ]
        # CMake's cache remembers tools, of which an isolated build has new ones each time, and the first CXX for good.
        named = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        told, stamp = "\n".join([str(build), *configure, *named]), build / "configured"
        fresh = [] if stamp.exists() and stamp.read_text() == told else ["--fresh"]
        self.call([*configure, *fresh], build)
        stamp.write_text(told)
        self.call([cmake, "--build", "."], build)

    def copy_extensions_to_source(self):
        for other in ROOT.glob("snnkern/_C.*"):  # of an earlier version: Python prefers what is for it alone
            other.unlink()
        super().copy_extensions_to_source()

    def call(self, command, build):
        if subprocess.run(command, cwd=build).returncode:
            raise CompileError(
                f"snnkern: {' '.join(command)} failed in {build}; it says above why. "
                "The extension wants a C++17 compiler; CXX=... chooses another than the one found."
            )


class OnlyWhatIsThere(build_py):
    """setuptools leaves in build/lib what an earlier version of the package had, and installs it again."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "snnkern"), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for path in (*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh")):
                target = Path(self.build_lib, "snnkern", path.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


wish = os.environ.get("CXX")
found = any(shutil.which(name) for name in ([wish.split()[0]] if wish else ["c++", "g++", "clang++"]))
if wish and not found:
    raise SetupError(f"CXX={wish}: there is no such compiler")
if not found:
    print("snnkern: no C++ compiler found: installing without the compiled extension", file=sys.stderr)
setup(
    ext_modules=[Extension("snnkern._C", [], py_limited_api=True)] if found else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python from 3.11 on
    cmdclass={"build_ext": CMakeBuild, "build_py": OnlyWhatIsThere},
)
