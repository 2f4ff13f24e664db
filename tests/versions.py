"""``make versions``: the CPU tests of ops, layers and trainings, with one wheel, on several Pythons and PyTorches.

What the kernels compute does not depend on either, so the tests are those of what touches PyTorch, NumPy, Python and
the libraries of the command line. Words choose rows: ``make versions ARGS="3.13 2.6.0"``. The wheel is the one in
build/versions; every row has an environment of its own there, which is kept, and its last result. What a row does not
name is as requirements-dev.txt pins it. A Python that is neither on the path nor among pyenv's is skipped. All results
go to build/versions/results.json.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from snnkern.files import versions, write_json

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "versions"
TESTS = "autograd checkpoint cli compile ddp lif losses nn recipes surrogate tensors train"
NEEDED = "numpy typer rich matplotlib pydantic safetensors scikit-learn tensorboard pytest pytest-xdist hypothesis"


class Row(NamedTuple):
    python: str
    torch: str
    rest: str = "pinned"  # or "lowest": what pyproject.toml has as lower bounds

    @property
    def folder(self) -> Path:
        return BUILD / "-".join(self)


ROWS = (
    Row("3.11", "2.6.0", "lowest"),
    Row("3.11", "2.13.0"),
    Row("3.12", "2.13.0"),
    Row("3.13", "2.6.0"),
    Row("3.13", "2.15.0"),
    Row("3.14", "2.15.0"),
)


def main(words: list[str]) -> bool:
    """Whether nothing failed."""
    (wheel,) = BUILD.glob("*.whl")
    for name in ("tests", "examples", "docs"):  # away from the checkout, whose package Python would import
        shutil.copytree(ROOT / name, BUILD / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", BUILD)
    for row in ROWS:
        if set(words) <= set(row):
            found = row._asdict() | {"date": str(date.today())} | tried(row, wheel)
            row.folder.mkdir(exist_ok=True)
            write_json(row.folder / "result.json", found)
    results = [json.loads(path.read_text()) for path in sorted(BUILD.glob("*/result.json"))]
    system = " ".join((platform.system(), platform.machine(), *platform.libc_ver()))
    told = {"processor": versions()["processor"], "system": system, "rows": results}
    write_json(BUILD / "results.json", told)
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "versions"))
    return not any("error" in row or row.get("failed") for row in results)


def tried(row: Row, wheel: Path) -> dict:
    """How many tests passed, failed and were skipped; or why none ran."""
    python = interpreter(row.python)
    if python is None:
        return {"not run": f"no Python {row.python} here"}
    folder = row.folder
    ours, wanted = folder / "bin" / "python", "\n".join(requirements(row))
    print(f"{' '.join(row)}: installing", flush=True)
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        if reason := failure(ours, "-m", "pip", "install", "-q", *wanted.split()):
            return {"error": reason}
        stamp.write_text(wanted)
    if reason := failure(ours, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel):
        return {"error": reason}
    print(f"{' '.join(row)}: testing", flush=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}
    files = [f"tests/test_{name}.py" for name in TESTS.split()]
    command = [ours, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *files]
    with open(folder / "output.txt", "w") as output:
        subprocess.run(command, cwd=BUILD, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if not report.exists():
        return {"error": f"pytest ran no test: {output.name}"}
    suite = ET.parse(report).getroot()[0]  # noqa: S314, pytest wrote it just now
    count = {name: int(suite.get(name)) for name in ("tests", "errors", "failures", "skipped")}
    failed = count["errors"] + count["failures"]
    return {
        "wheel": f"{wheel.name} {sha256(wheel.read_bytes()).hexdigest()[:12]}",
        "versions": installed(ours),
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def interpreter(version: str) -> str | None:
    """A Python of that version that starts."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if found and not failure(found, "-c", ""):
            return found
    return None


def requirements(row: Row) -> list[str]:
    names = NEEDED.split()
    lines = [line.partition(" ")[0] for line in (ROOT / "requirements-dev.txt").read_text().splitlines()]
    pinned = {line.partition("==")[0]: line for line in lines if "==" in line}
    if row.rest == "lowest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for declared in (project["dependencies"], *project["optional-dependencies"].values()):
            for name, bound in (re.match(r"([\w-]+)>=([\d.]+)", text).groups() for text in declared):
                pinned[name] = f"{name}=={bound}"
    return [f"torch=={row.torch}", *(pinned[name] for name in names)]


def failure(*command) -> str:
    """The last line of what a command that failed wrote; empty if it did not fail."""
    run = subprocess.run(command, capture_output=True, text=True)
    return (
        run.returncode and ((run.stderr or run.stdout).strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
    )


def installed(python: Path) -> dict[str, str]:
    names = json.dumps(["torch", *NEEDED.split()])
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
