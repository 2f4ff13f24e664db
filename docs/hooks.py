"""What the site has beside the pages in docs/: files that they link to, equations, docstrings, the command line."""

from __future__ import annotations

import ast
import re
from functools import cache
from html import unescape
from importlib.metadata import distribution
from pathlib import Path
from posixpath import normpath, relpath
from textwrap import dedent

import griffe
import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from snnkern.cli import app

ROOT = Path(__file__).parents[1]
PAGES = "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md", "benchmarks/results/*.md", "examples/*.py"
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".cuh": "cuda", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
SECTION = re.compile(
    r"^(Args|Raises|Returns|Gradient|Parameters|Buffers|Source):(?: ?\n((?:(?: {4}.*)?(?:\n|$))+))?", re.M
)
ITEM = r"^(\w[\w*, ]*): "  # an argument or several, and what is said of them
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def on_config(config):
    """In the navigation, ``examples/*.py`` stands for those files."""

    def expanded(entry):
        if isinstance(entry, dict):
            return {title: expanded(below) for title, below in entry.items()}
        if isinstance(entry, list):
            return [expanded(below) for below in entry]
        return [_uri(path) for path in sorted(ROOT.glob(entry))] if "*" in entry else entry

    config.nav = expanded(config.nav)


def on_files(files, config):
    """Pages from outside docs/, and what any page links to: pictures and data as they are, source as a page."""
    paths = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    for page in [*ROOT.glob("docs/**/*.md"), *paths]:
        if page.suffix == ".md":
            linked = (Path(normpath(page.parent / target)) for target in LINK.findall(page.read_text()))
            paths |= {path for path in linked if path.is_file() and ROOT / "docs" not in path.parents}
    paths.discard(ROOT / "README.md")
    for path in sorted(paths):
        given = {"content": _source(path)} if path.suffix in LANGUAGES else {"abs_src_path": str(path)}
        files.append(File.generated(config, _uri(path), **given))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    font = distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")
    files.append(File.generated(config, "math.ttf", abs_src_path=str(font)))


def _uri(path: Path) -> str:
    """A file of the repository as MkDocs knows it; for the README, which is the repository's first page, the site's."""
    uri = path.relative_to(ROOT).as_posix().removeprefix("docs/").replace("README.md", "index.md")
    return f"{uri}.md" if path.suffix in LANGUAGES else uri


def _source(path: Path) -> str:
    """A page that shows a file, the docstring of one of Python above it."""
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    told = ""
    if path.suffix == ".py" and (told := plain(ast.get_docstring(ast.parse(text)) or "")):
        text = text.split('"""', 2)[2].lstrip("\n")
    return f'# {path.name}\n\n{told}\n\n````{LANGUAGES[path.suffix]} title="{name}"\n{text.rstrip()}\n````\n'


def _command_line() -> str:
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="snnkern"), name="snnkern")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text.replace("# `snnkern`", "# Command line", 1))
    return re.sub(r"^(#+) `(.*)`$", r"\1 \2", text, flags=re.M)


def on_page_markdown(markdown, page, config, files):
    """Links as the repository has them become links of the site; tables of measurements come last in a search."""
    if page.file.src_uri.startswith("benchmarks/"):
        page.meta["search"] = {"boost": 0.5}
    place = page.file.src_uri if page.file.generated_by else f"docs/{page.file.src_uri}"

    def moved(match):
        path = ROOT / normpath(f"{place}/../{match[1]}")
        return relpath(_uri(path), page.file.src_uri.rpartition("/")[0] or ".") if path.is_file() else match[1]

    title = "" if markdown.startswith("# ") else f"# {page.title}\n\n"
    return title + referred(LINK.sub(moved, markdown))


def on_page_content(html, page, config, files):
    """Equations as MathML, which browsers draw by themselves."""

    def drawn(match):
        tex = unescape(match[3]).replace("{aligned}", "{align*}")  # as latex2mathml calls it
        return convert(tex, display="block" if match[2] == "[" else "inline")

    return EQUATION.sub(drawn, html)


@cache
def _reference() -> dict[str, str]:
    """What the reference calls its entries, and where they are defined."""
    text = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    entries = re.findall(
        r"^::: (\S+)\n(?:    options: {(?:heading: ([\w.]+)|(show_root_heading: false))?)?", text, re.M
    )
    return {called or path: path for path, called, module in entries if not module}


def referred(text: str) -> str:
    """Names that the reference has, such as `nn.LIF`, are links to them."""

    def link(match):
        path = _reference().get(f"snnkern.{match[2].removeprefix('snnkern.')}")
        return f"[{match[0]}][{path}]" if path else match[0]

    return re.sub(r"(?<![\[`])(`{1,2})(\w+\.[\w.]+)\1(?!`)", link, text)


def plain(text: str) -> str:
    """A docstring as Markdown: a block behind ``::`` is code by its indent, arguments and errors are lists."""
    text = re.sub(r"^::\n\n", "", re.sub(r"(\S)::(\n\n +)", r"\1:\2", text), flags=re.M)
    return SECTION.sub(_section, text)


def _section(match) -> str:
    block = dedent(match[2] or "")
    if not re.match(ITEM, block):
        return f"**{match[1]}:**{block and f' {block}'}"
    lines = (re.sub(ITEM, r"- `\1`: ", line) if re.match(ITEM, line) else f"    {line}" for line in block.splitlines())
    return f"**{match[1]}**\n\n" + "\n".join(lines) + "\n\n"


class Docstrings(griffe.Extension):
    """Docstrings as ``plain`` has them; those of tuples and dataclasses with the comments beside their fields."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = referred(plain(obj.docstring.value))

    def on_class_members(self, *, cls, **kwargs):
        fields = [field for field in cls.attributes.values() if field.annotation and not field.has_labels("property")]
        comments = [field.source.partition("  # ")[2].replace("[", "\\[") for field in fields]
        if "NamedTuple" in map(str, cls.bases) or (any(comments) and cls.decorators):
            listed = (
                f"- `{field.name}` (`{field.annotation}`){comment and f': {comment}'}"
                for field, comment in zip(fields, comments, strict=True)
            )
            text = cls.docstring.value if cls.docstring else ""
            cls.docstring = griffe.Docstring("\n\n".join([text, "**Fields**", "\n".join(listed)]), parent=cls)
