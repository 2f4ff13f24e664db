"""README and docs/: code runs, commands exist, links lead somewhere, the reference is whole.

Python blocks of a page run one after another in one namespace, in a temporary folder. Before a block may stand, in the
way of Markdown that nobody sees::

    <!-- needs: spikingjelly -->    a package, or cuda: elsewhere the block is left out
    <!-- slow -->                   left out but in thorough runs
    <!-- before: x = 1 -->          Python that the block needs and a reader does not; several lines too
"""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import signal
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
import typer
from conftest import THOROUGH
from test_cli import expanded

from experiments import promises
from snnkern.cli import app
from snnkern.nn.node import BaseNode
from snnkern.train.compare import named

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"((?:^<!--(?:(?!-->).)*-->\n)*)^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
REMARK = re.compile(r"<!--\s(needs|slow|before)(?::\s(.*?))?\s-->", re.DOTALL)
SECONDS = 300  # for a page, on a machine that is busy


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str):
    """Of a page: remarks, code and the line where that begins."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match[3] in languages:
            code = re.sub(f"^{match[2]}", "", match[4], flags=re.MULTILINE)
            yield dict(REMARK.findall(match[1])), code, text.count("\n", 0, match.start(4))


def absent(needed: str) -> bool:
    return not torch.cuda.is_available() if needed == "cuda" else importlib.util.find_spec(needed) is None


@pytest.fixture
def limit():
    def stop(*_):
        raise TimeoutError("the code of this page takes too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS * (10 if THOROUGH else 1))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name)
def test_code_runs(page, tmp_path, monkeypatch, limit, count):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    left_out = []
    for remarks, code, line in blocks(page, "python"):
        needed = [each for each in re.split(r"[, ]+", remarks.get("needs", "")) if each and absent(each)]
        if needed or ("slow" in remarks and not THOROUGH):
            left_out.append(f"line {line}: {', '.join(needed) or 'slow'}")
            continue
        exec(remarks.get("before", ""), namespace)
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
        count("blocks")
    if left_out and len(left_out) == len([*blocks(page, "python")]):
        pytest.skip("; ".join(left_out))


def commands(page: Path):
    """What a page has its readers type: lines of blocks without a language or of a shell, `snnkern ...` inline."""
    for _, code, _ in blocks(page, "", "sh", "bash", "console"):
        for line in code.replace("\\\n", "").splitlines():
            yield from line.strip().removeprefix("$ ").split(";")
    yield from re.findall(r"`((?:snnkern|make) [a-z][^`\n]*)`", BLOCK.sub("", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page, count):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for typed in commands(page):
        typed = re.sub(r"^([A-Z_]+=\S* )+", "", typed.strip())
        match typed.split()[:3]:
            case ["snnkern", str(command), *_] if not command.startswith("-"):
                words = [each for word in shlex.split(typed, comments=True) for each in expanded(word)]
                given = parsed(*words[1:])
                if command in ("train", "compare") and page.name != "papers.md":  # whose recipes test_cli.py reads
                    assert named(given) or not given, typed
            case ["make", target, *_] if target.islower() and "=" not in target:
                assert target in targets, typed
            case ["python" | "python3", "-m", module]:
                assert importlib.util.find_spec(module), typed
            case ["python" | "python3", script, *_] if "/" in script:
                assert (ROOT / script).is_file(), typed
            case _:
                continue
        count("commands")


COMMANDS = typer.main.get_command(app).commands


def parsed(name: str, *words: str) -> list[str]:
    """The recipes and overrides that a command is given, if it takes such; an error if it has no such option."""
    assert name in COMMANDS, f"there is no command {name}"
    command = COMMANDS[name]
    context = typer.Context(command, **command.context_settings)
    values, _, _ = command.make_parser(context).parse_args([word for word in words if word not in ("...", "|")])
    first = [values.get("recipe")] if isinstance(values.get("recipe"), str) else []
    given = [*first, *(values.get("words") or ()), *(values.get("overrides") or ())]
    mine = [word for word in given if word.isupper() or word.endswith(".toml")]  # what a reader has
    return [word for word in given if "..." not in word] if not mine else []


def slugs(page: Path) -> set[str]:
    """Anchors as GitHub and the site make them of headings, and those that the page names."""
    text = BLOCK.sub("", page.read_text())
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        found.append(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip()))
    return {*found, *re.findall(r'id="([^"]+)"', text)}


LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("benchmarks/**/*.md"))]


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page, count):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        count("links")
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        place = (page.parent / path).resolve() if path else page
        made = place == ROOT / "docs/reference/command-line.md"  # by docs/hooks.py
        assert place.is_file() or made, f"{link} is no file"
        if anchor and place.parent.name != "reference":
            assert anchor in slugs(place), f"{link}: no such heading"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(?:- |: )([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"), ROOT / "CHANGELOG.md"]
    made = {"CONTRIBUTING.md", "reference/command-line.md"}
    assert sorted(listed) == sorted({name(page).removeprefix("docs/") for page in pages} | made)


# Not the hook: to import it is to change SpikingJelly's modules for all tests that follow.
MODULES = """. nn surrogate losses models methods.dspike methods.mtt methods.mtt_search methods.seenn data analysis
convert train train.recipe train.evaluation train.compare train.plot train.search""".split()


def public(names=MODULES):
    """(module, name, value) of all that these modules offer."""
    for module in (importlib.import_module(f"snnkern.{name}".strip(".")) for name in names):
        yield from ((module, name, getattr(module, name)) for name in module.__all__ if name != "__version__")


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for module, name, value in public():
        full, defined = f"{module.__name__}.{name}", f"{getattr(value, '__module__', '')}.{name}"
        paths = {defined} if full in sys.modules else {full, defined}  # a page means the module where both are there
        assert inspect.ismodule(value) or paths & shown, full


@pytest.mark.parametrize("where", MODULES)
def test_docstrings_name_every_argument(where, count):
    """Their own, that of their module or of a base, or of a public name that they refer to."""
    known = {name: value for _, name, value in public() if callable(value)} | {"BaseNode": BaseNode}
    for module, name, value in public([where]):
        if not callable(value):
            continue
        assert value.__doc__, f"{name} has no docstring"
        told, referred = module.__doc__, [value]
        for each in referred:
            told += "".join(
                part.__doc__ or "" for part in (*getattr(each, "__mro__", (each,)), inspect.getmodule(each))
            )
            named = (known.get(name) for name in re.findall(r"``(?:[\w.]+\.)?(\w+)``", each.__doc__ or ""))
            referred += [other for other in named if other and other not in referred]
        if isinstance(value, type) and issubclass(value, (tuple, Exception)):
            continue  # the reference lists fields
        if is_dataclass(value):  # and those of a dataclass that have a comment
            told += " ".join(re.findall(r"^    (\w+): .*  #", inspect.getsource(value), re.MULTILINE))
        arguments = inspect.signature(value).parameters.keys() - {"args", "kwargs"}
        assert not [each for each in arguments if not re.search(rf"\b{each}\b", told)], name
        count("arguments", len(arguments))


def test_promises_name_tests_and_their_page_is_their_counts():
    made = json.loads((ROOT / "docs/promises.json").read_text())
    assert (ROOT / "docs/promises.md").read_text() == promises.page(made)
    for promise in (promise for room in promises.PROMISES.values() for promise in room):
        for test in promise.tests:
            path, _, function = test.partition("::")
            assert f"def {function}" in (ROOT / "tests" / path).read_text(), test
    assert not [numbers for places in made["counts"].values() for numbers in places.values() if numbers.get("failed")]
