"""The reference: ``.. public:: module`` with names below it gives a table of their summaries and an entry for each.

Docstrings are plain text in Google style. `prepare` escapes what reStructuredText would read as markup; napoleon then
turns the sections into fields. Single backticks link to the reference where the name has an entry; otherwise they are
shown as code.
"""

import builtins
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

REFERENCE = Path(__file__).parents[1] / "api"
DIRECTIVE = re.compile(r"^\.\. public:: (\S+)\n\n((?:   \w+\n?)+)", re.MULTILINE)
SECTION = re.compile(r"^[A-Z][a-z]+:$")
MARKUP = re.compile(r"(?P<code>``.+?``|`[^`]+`)(?P<tail>(?=\w))?|(?P<sign>[*|]|(?<=\w)_(?!\w))", re.DOTALL)

SENTENCE = re.compile(r"(?:``.+?``|`[^`]+`|[^`])*?(?:\.(?=\s+[A-Z`])|$)", re.DOTALL)


def documented(folder: Path = REFERENCE) -> list[str]:
    """Full names of all entries of the reference."""
    found = []
    for page in sorted(folder.glob("*.rst")):
        for module, names in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            found += [f"{module}.{name}" for name in names.split()]
    return found


# The entry that a short name links to.
LINKS = {name.rsplit(".", 1)[1]: name for name in documented()}


class Public(SphinxDirective):
    """``.. public:: module``, content: names."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module = pkgutil.resolve_name(self.arguments[0])  # a module, or one that another exports under this name
        names = "\n".join(self.content).split()
        lines = [".. list-table::", "   :class: summary", "   :widths: 30 70", ""]
        for name in names:
            lines += [f"   * - `{name} <{self.arguments[0]}.{name}>`", f"     - {summary(getattr(module, name))}"]
        for name in names:
            kind = "autoclass" if inspect.isclass(getattr(module, name)) else "autofunction"
            lines += ["", f".. {kind}:: {self.arguments[0]}.{name}"]
        return self.parse_text_to_nodes("\n".join(lines))


def summary(value: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join(prepare((inspect.getdoc(value) or "").split("\n\n", 1)[0].splitlines()))
    return SENTENCE.match(text)[0].strip()


def prepare(lines: list[str]) -> list[str]:
    """A docstring for napoleon: signs escaped, indented equations marked as code, examples unchanged.

    Napoleon takes the text before a colon in a result for its type. A colon in front says that the type is not given.
    """
    out: list[str] = []
    section = ""
    for block in _blocks(lines):
        if not block[0].startswith(" "):
            section = block[0] if SECTION.match(block[0]) else ""
        if section == "Example:":
            out += block
        elif block[0].startswith(" ") and not section:
            out += ["::", "", *block]
        else:
            if block[0] == "Returns:" and len(block) > 1:
                block[1] = re.sub(r"^\s+", r"\g<0>: ", block[1])
            out += MARKUP.sub(_escaped, "\n".join(block)).split("\n")
        out.append("")
    return out


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs; the header of a section begins one, too."""
    block: list[str] = []
    for line in [*lines, ""]:
        if block and (not line.strip() or SECTION.match(line)):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _escaped(match: re.Match) -> str:
    if match["sign"]:
        return "\\" + match["sign"]
    return match["code"] + ("\\ " if match["tail"] is not None else "")


def process(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = prepare(lines)
    if lines and what in ("attribute", "property"):
        lines[0] = ": " + lines[0]


def resolve(app: Any, env: Any, node: Any, shown: nodes.Element) -> nodes.Element | None:
    """Link a name from any module by its last part, also with a member behind it (``Chain.extend``).

    Other code in backticks, and Python's own exceptions, are shown without a link.
    """
    if node.get("refdomain") != "py":
        return None
    first, dot, rest = node["reftarget"].partition(".")
    domain = env.domains.python_domain
    name = LINKS.get(first, first) + dot + rest
    if name in domain.objects:
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, shown)
    return shown if node["reftype"] == "obj" or hasattr(builtins, first) else None


def skip(app: Any, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of NamedTuples, whose docstrings are Python's own."""
    return True if type(value).__name__ in ("_tuplegetter", "member_descriptor") else None


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
