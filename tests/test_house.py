"""The package's structure: arrows between its rooms go down only, and no two files import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import snnkern

PACKAGE = Path(snnkern.__file__).parent
# A room imports from the lines above it, and from itself. A file of the package's root is a room of its own.
FLOORS = (
    {"_version", "surrogate", "_C"},
    {"spec", "files"},
    {"backend"},
    {"ops"},
    {"nn", "check"},
    {"models", "data", "methods", "hook", "convert"},
    {"losses"},
    {"analysis"},
    {"train"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """The files of the package, as dotted names without the package's, and those that each imports, wherever in it."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                above = name.split(".")[: -node.level] if node.level else (node.module or "").split(".")[1:]
                if not node.level and (node.module or "").split(".")[0] != "snnkern":
                    continue
                base = ".".join([*above, *((node.module or "").split(".") if node.level and node.module else ())])
                found[name] |= {target(f"{base}.{alias.name}".lstrip("."), base, files) for alias in node.names}
            elif isinstance(node, ast.Import):
                ours = (alias.name for alias in node.names if alias.name.split(".")[0] == "snnkern")
                found[name] |= {target(full.partition(".")[2], "", files) for full in ours}
        found[name].discard(name)
    return found


def target(full: str, base: str, files) -> str:
    """The file that holds what ``full`` names."""
    for name in (full, f"{full}.__init__", base, f"{base}.__init__".lstrip(".")):
        if name in files or name == "_C":
            return name
    raise AssertionError(f"{full} is imported, but no file holds it")


IMPORTS = imports()


@pytest.mark.parametrize("name", sorted(IMPORTS.keys() - {"__init__"}))
def test_a_room_imports_from_the_floors_below(name):
    room = name.split(".")[0]
    for imported in IMPORTS[name]:
        other = imported.split(".")[0]
        assert other == room or FLOOR[other] < FLOOR[room], f"{name} imports {imported}"


def test_no_circle_of_files():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_walk_sees_every_kind_of_import():
    assert {"spec.split", "spec.layout"} <= IMPORTS["backend.cpu.lif"]  # from ...spec.split import
    assert "ops.library" in IMPORTS["ops.lif"]  # inside a function
    assert {"losses", "nn.__init__", "ops.lif"} <= IMPORTS["__init__"]  # from . import, from .ops.lif import


def test_a_stranger_sees_what_there_is():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
