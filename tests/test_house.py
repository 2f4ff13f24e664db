"""The package's structure: arrows between its rooms go down only, and no two files import each other."""

import ast
import socket
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


def test_the_tests_reach_no_network():
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for ask in (
            lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
            lambda: datagrams.sendto(b"we are here", ("192.0.2.1", 80)),
            lambda: socket.gethostbyname("example.org"),
            lambda: socket.getaddrinfo("example.org", 80),
        ):
            with pytest.raises(PermissionError, match=r"of (192\.0\.2\.1|example\.org): tests use no network"):
                ask()
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_nothing_is_unpickled_from_files():
    """The linter sees all else that may run what a file says."""
    folders = (PACKAGE.parent / name for name in ("snnkern", "experiments", "benchmarks", "conformance", "examples"))
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text()
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
