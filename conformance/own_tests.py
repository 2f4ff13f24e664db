"""SpikingJelly's own tests, with its nodes and with ours; as a plugin of pytest, what puts ours there.

The processes that its tests start are without ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from .stand_ins import imported, module

OURS = "SNNKERN_CONFORMANCE_OURS"

if OURS in os.environ:
    imported("torchvision", "torchaudio", "requests")()
    module("test").__path__ = [str(Path("test").resolve())]  # a folder without __init__, beside Python's own package
    if os.environ[OURS] == "1":
        import snnkern.hook  # noqa: F401


def compare_tests(checkout: Path, select: list[str]) -> dict:
    """Counts of outcomes both ways, and the tests whose outcome differs."""
    theirs, ours = (_run(checkout, select, with_ours) for with_ours in (False, True))
    if not theirs:
        return {"reason": f"pytest collected nothing in {checkout}"}
    names = sorted({name for name in {**theirs, **ours} if theirs.get(name, _NONE)[0] != ours.get(name, _NONE)[0]})
    differ = {
        name: [*(each.get(name, _NONE)[0] for each in (theirs, ours)), ours.get(name, _NONE)[1]] for name in names
    }
    counts = [dict(Counter(outcome for outcome, _ in each.values())) for each in (theirs, ours)]
    return {"theirs": counts[0], "ours": counts[1], "differ": differ}


# Why a test's outcome differs, by a part of its name.
REASONS = {
    "test_compile_compat::": "it counts the kernels that SpikingJelly's own compiler keeps",
    "test_inductor_cache::": "it counts the kernels that SpikingJelly's own compiler keeps",
    "test_op_counter_": "it counts the operations of a plain loop, where ours is one",
    "test_roofline::": "it counts the operations of a plain loop, where ours is one",
    "test_ilif_reuses_lif_dynamics_": "SpikingJelly's ILIFNode, which is its own, is no subclass of our LIFNode",
    "_rejects_non_spiking_": "the same refusal comes as another error",
}
_NONE = "not run", ""


def reason(name: str) -> str | None:
    return next((why for part, why in REASONS.items() if part in name), None)


def _run(checkout: Path, select: list[str], ours: bool) -> dict[str, tuple[str, str]]:
    """Outcome of every test, and the last line of what it raised."""
    root = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.xml"
        env = {**os.environ, OURS: str(int(ours)), "PYTHONDONTWRITEBYTECODE": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance.own_tests", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]
        subprocess.run([*command, f"--junitxml={out}", *select], cwd=checkout, env=env, stdout=subprocess.DEVNULL)
        if not out.exists():
            return {}
        cases = ET.parse(out).iter("testcase")  # noqa: S314, pytest wrote it just now
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ET.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            said = (found.get("message") or "").strip().splitlines()
            return {"failure": "failed"}.get(kind, kind), said[0] if said else ""
    return "passed", ""
