"""The source of the package as syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pmcmc"
DYNAMIC_IMPORTS = {"import_module", "__import__", "find_spec"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def source_trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST, package: tuple[str, ...], lazy: bool = False) -> Iterator[tuple[int, list[str], bool]]:
    """Return (line, dotted name as a list, whether inside a function) of each import below node, also dynamic ones."""
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) + 1 - child.level] if child.level else ()
            prefix = [*base, *([child.module] if child.module else [])]
            names = [".".join([*prefix, alias.name]) for alias in child.names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in DYNAMIC_IMPORTS:
            names = [str(a.value) for a in child.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield child.lineno, name.split("."), lazy
        yield from imports(child, package, lazy or isinstance(child, (*FUNCTIONS, ast.Lambda)))
