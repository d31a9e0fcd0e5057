"""Reference entries out of docstrings.

A page says ``.. public:: module`` with names below it, and gets a table of their first lines and an entry for each.
Docstrings of this package are plain text, not reStructuredText; `to_rst` makes it of them.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.util.docutils import SphinxDirective

REFERENCE = Path(__file__).parents[1] / "api"
DIRECTIVE = re.compile(r"^\.\. public:: (\S+)\n\n((?:   \w+\n?)+)", re.MULTILINE)
HEADER = re.compile(r"^(Raises|Warns|Returns|Example):(.*)$")
PARAMETER = re.compile(r"^([a-z_*][\w*]*(?:, [a-z_*][\w*]*)*): (.*)$")
CODE = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)


def documented(folder: Path = REFERENCE) -> list[str]:
    """Full names of all entries of the reference."""
    found = []
    for page in sorted(folder.glob("*.rst")):
        for module, names in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            found += [f"{module}.{name}" for name in names.split()]
    return found


# What `Name` in a docstring links to.
LINKS = {name.rsplit(".", 1)[1]: name for name in documented()}
LINKS |= {name: name for name in LINKS.values()}


def first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").split("\n", 1)[0]


class Public(SphinxDirective):
    """``.. public:: module``, content: names."""

    required_arguments = 1
    has_content = True

    def run(self) -> list:
        module = importlib.import_module(self.arguments[0])
        names = "\n".join(self.content).split()
        lines = [".. list-table::", "   :class: summary", "   :widths: 30 70", ""]
        for name in names:
            full = f"{module.__name__}.{name}"
            lines += [f"   * - :py:obj:`{name} <{full}>`", f"     - {inline(first_line(getattr(module, name)))}"]
        for name in names:
            kind = "autoclass" if inspect.isclass(getattr(module, name)) else "autofunction"
            lines += ["", f".. {kind}:: {module.__name__}.{name}"]
        return self.parse_text_to_nodes("\n".join(lines))


def inline(text: str) -> str:
    """Text with code in backticks: names of the reference become links, everything else stands as it is."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts.append(_escape(text[end : match.start()]))
        code = re.sub(r"\s+", " ", match[1] or match[2])
        target = LINKS.get(code) if match[2] else None
        parts.append(f":py:obj:`{code} <{target}>`" if target else f"``{code}``")
        end = match.end()
        if text[end : end + 1].isalnum():
            parts.append("\\ ")
    return "".join([*parts, _escape(text[end:])])


def _escape(text: str) -> str:
    return re.sub(r"([\\*|_])", r"\\\1", text)


def to_rst(lines: list[str]) -> list[str]:
    """A docstring of this package as reStructuredText: parameters as fields, equations and examples as code."""
    out: list[str] = []
    for block in _blocks(lines):
        if match := HEADER.match(block[0]):
            out += _section(match[1], [match[2], *block[1:]])
        elif block[0].startswith(" "):
            out += ["::", "", *block]
        else:
            out += _paragraph(block)
        out.append("")
    return out


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs; a header keeps what is indented below it, blank lines included."""
    block: list[str] = []
    for line in [*lines, ""]:
        within = block and (HEADER.match(block[0]) or block[0].startswith(" "))
        if line.strip() and (not within or line.startswith(" ")):
            block.append(line)
        elif line.strip() or not within:
            if block:
                yield block
            block = [line] if line.strip() else []
        else:
            block.append("")
    if block:
        yield block


def _section(name: str, block: list[str]) -> list[str]:
    body = inspect.cleandoc("\n".join(block)).splitlines()
    if name == "Example":
        return [".. rubric:: Example", "", "::", "", *("   " + line for line in body)]
    named = lambda line: line if name == "Returns" else re.sub(r"^([\w, ]+?): ", r"``\1``: ", line)
    text = [named(line).strip() for line in body]
    items = [":" + name + ": " + inline(text[0])]
    return items + ["   " + line for line in inline("\n".join(text[1:])).splitlines()]


def _paragraph(block: list[str]) -> list[str]:
    """Text, or parameters each of which goes on where lines are indented."""
    if not PARAMETER.match(block[0]):
        return inline("\n".join(block)).splitlines()
    out: list[str] = []
    rest = list(block)
    while rest and (match := PARAMETER.match(rest[0])):
        more = 1
        while more < len(rest) and rest[more].startswith(" "):
            more += 1
        text = "\n".join([match[2], *(line.strip() for line in rest[1:more])])
        names = ", ".join(f"{_escape(name)}" for name in match[1].split(", "))
        first, *others = inline(text).splitlines()
        out += [f":{names}: {first}", *("   " + line for line in others)]
        rest = rest[more:]
    return [*out, "", *_paragraph(rest)] if rest else out


def process(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def skip(app: Any, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of NamedTuples, whose docstrings are Python's own."""
    return True if type(value).__name__ in ("_tuplegetter", "member_descriptor") else None


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
