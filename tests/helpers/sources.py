"""The source of the package as syntax trees."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def run_python(code: str, *arguments: str, cwd: Path = PACKAGE.parent) -> str:
    """Return the standard output of a fresh interpreter with jax's defaults: float32, no settings of this suite."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return done.stdout
