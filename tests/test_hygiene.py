"""House rules that a machine can check: layers, light import, docstrings, sizes, banned calls, doctests.

Each checker is a function of a source tree, and is itself tested on a small tree that breaks the rule.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import types
from pathlib import Path

import pytest

import pmcmc
from tests.helpers.sources import PACKAGE, imports, run_python, source_trees

# A room may import from itself and from earlier levels; rooms of one level may not import from each other.
LEVELS = [
    {"_pytree", "_progress", "_arguments", "_warnings"},
    {"_xla"},
    {"random"},
    {"recurrence"},
    {"target"},
    {"starts"},
    {"interop"},
    {"kernels"},
    {"warmup", "stability"},
    {"planning"},
    {"chain"},
    {"sampling"},
    {"numpyro_samplers", "numpyro_states", "plots"},
    {"drop_in"},
    {"demo", "doctor"},
    {"__main__"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FACE = "__init__"  # may import any room; only these may import it:
FACE_USERS = {"demo", "doctor", "__main__"}
ROOMS_OF_FOREIGN = {
    "numpyro": {"interop", "drop_in", "numpyro_samplers", "demo"},
    "blackjax": {"interop", "drop_in"},
    "arviz": {"interop", "drop_in", "demo"},
    "matplotlib": {"plots", "demo"},
    "sklearn": {"demo"},
    "xarray": {"interop"},
    "zarr": {"interop"},
}
LAZY = {"tqdm"}  # anywhere, inside functions only


# Imports inside functions: of packages that are slow to import, and of what is declared here, as (file, module).
LINKS = {
    ("__init__.py", "pmcmc.drop_in"),
    ("__main__.py", "pmcmc.demo"),
    ("__main__.py", "pmcmc.doctor"),
    ("chain/chain.py", "pmcmc.sampling.session"),
    ("chain/chain.py", "pmcmc.sampling.streaming"),
    ("chain/stored.py", "pmcmc.sampling.streaming"),
}


def is_link(root: Path, path: Path, name: list[str]) -> bool:
    """Whether an import inside a function is declared in `LINKS`."""
    file = str(path.relative_to(root))
    return any(file == link and ".".join(name).startswith(target) for link, target in LINKS)


def may_import(room: str, other: str) -> bool:
    if room in (other, FACE):
        return True
    if other == FACE:
        return room in FACE_USERS
    return LEVEL_OF[other] < LEVEL_OF[room]


def layer_violations(root: Path) -> list[str]:
    """Return every import under root that violates LEVELS or names a foreign package in the wrong room."""
    found = []
    for path, tree in source_trees(root):
        relative = path.relative_to(root)
        room = relative.parts[0].removesuffix(".py")
        if room not in LEVEL_OF and room != FACE:
            found.append(f"{relative}: unknown room {room}: give it a level in LEVELS of tests/test_hygiene.py")
            continue
        for line, name, lazy in imports(tree, (root.name, *relative.parent.parts)):
            where = f"{relative}:{line}: {room} imports {'.'.join(name)}"
            if name[0] == root.name:
                other = name[1] if len(name) > 1 and name[1] in LEVEL_OF else FACE
                if lazy and is_link(root, path, name):
                    continue
                if lazy:
                    found.append(f"{where} inside a function: declare it in LINKS")
                elif not may_import(room, other):
                    found.append(f"{where}, but {other} is not below {room}")
                elif any(part.startswith("_") for part in name[2:]) and name[1] != room:
                    found.append(f"{where}, which is private to {other}")
            elif room not in ROOMS_OF_FOREIGN.get(name[0], {room}):
                found.append(f"{where}: only {sorted(ROOMS_OF_FOREIGN[name[0]])} may")
            elif name[0] in LAZY and not lazy:
                found.append(f"{where}: only inside functions")
    return found


def test_imports_run_one_way() -> None:
    assert layer_violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("recurrence/scan.py", "from toy.kernels import HMC", "kernels is not below recurrence"),
        ("recurrence/scan.py", "from ..kernels.hmc import HMC", "kernels is not below recurrence"),
        ("kernels/hmc.py", "def f():\n    from toy.target import Target", "inside a function: declare it in LINKS"),
        ("kernels/hmc.py", "from toy.recurrence.scan import _compose", "private to recurrence"),
        ("kernels/hmc.py", "from toy.recurrence._scan import compose", "private to recurrence"),
        ("warmup/base.py", "from .. import stability", "stability is not below warmup"),
        ("stability/evidence.py", "import toy.warmup", "warmup is not below stability"),
        ("chain.py", "from toy import sampling", "sampling is not below chain"),
        ("chain/stored.py", "from toy import Anything", "__init__ is not below chain"),
        ("target.py", "import toy", "__init__ is not below target"),
        ("kernels/hmc.py", "def f():\n    import numpyro.infer", "'interop', 'numpyro_samplers'] may"),
        ("sampling.py", "import importlib\nimportlib.import_module('arviz')", "['demo', 'drop_in', 'interop'] may"),
        ("chain.py", "import matplotlib.pyplot as plt", "only ['demo', 'plots'] may"),
        ("plots.py", "from sklearn import datasets", "only ['demo'] may"),
        ("chain.py", "from tqdm.auto import tqdm", "only inside functions"),
        ("surprise.py", "", "unknown room surprise"),
    ],
)
def test_layer_checker_sees(tmp_path: Path, file: str, source: str, message: str) -> None:
    violations = layer_violations(toy_package(tmp_path, file, source))
    assert len(violations) == 1
    assert message in violations[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from toy.sampling import sample"),
        ("kernels/hmc.py", "from toy._pytree import x\nfrom ..target import y\nfrom .base import _z\nimport jax"),
        ("chain/stored.py", "from . import report\ndef f():\n    from tqdm import tqdm"),
        ("interop/numpyro.py", "import numpyro"),
        ("__main__.py", "import toy\nfrom toy import demo"),
    ],
)
def test_layer_checker_lets_pass(tmp_path: Path, file: str, source: str) -> None:
    assert layer_violations(toy_package(tmp_path, file, source)) == []


def import_cycles(root: Path) -> list[str]:
    """Modules that import each other, directly or by way of others, when they are loaded; a line for each."""
    modules = {}
    for path, tree in source_trees(root):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        modules[tuple(parts[:-1] if parts[-1] == FACE else parts)] = (path, tree)
    graph: dict[tuple, set[tuple]] = {}
    for module, (path, tree) in modules.items():
        package = (root.name, *path.relative_to(root).parent.parts)
        named = [name for _, name, lazy in imports(tree, package) if name[0] == root.name and not lazy]
        # the longest prefix that is a module; what a package's own face names comes from its modules
        found = {next(tuple(name[:n]) for n in range(len(name), 0, -1) if tuple(name[:n]) in modules) for name in named}
        graph[module] = {other for other in found if other != module and other != module[: len(other)]}

    def reaches(start: tuple) -> bool:
        seen, stack = set(), list(graph[start])
        while stack:
            module = stack.pop()
            if module == start:
                return True
            if module not in seen:
                seen.add(module)
                stack += graph[module]
        return False

    return [".".join(module) for module in graph if reaches(module)]


def test_no_import_cycles() -> None:
    assert import_cycles(PACKAGE) == []


def test_cycle_checker_sees(tmp_path: Path) -> None:
    toy_package(tmp_path, "kernels/hmc.py", "from toy.kernels.base import Info")
    (tmp_path / "toy" / "kernels" / "base.py").write_text("from .mala import x")
    (tmp_path / "toy" / "kernels" / "mala.py").write_text("def f():\n    from .hmc import y\nimport toy.kernels.hmc")
    found = import_cycles(tmp_path / "toy")
    assert found == ["toy.kernels.base", "toy.kernels.hmc", "toy.kernels.mala"]
    (tmp_path / "toy" / "kernels" / "mala.py").write_text("def f():\n    from .hmc import y")
    assert import_cycles(tmp_path / "toy") == []


def toy_package(tmp_path: Path, file: str, source: str) -> Path:
    """Make a package ``toy`` of empty rooms, and one file with the given source."""
    path = tmp_path / "toy" / file
    path.parent.mkdir(parents=True)
    (tmp_path / "toy" / "__init__.py").touch()
    path.write_text(source)
    return tmp_path / "toy"


IMPORT_EFFECTS = """
import importlib, json, sys
import jax
modules, config = set(sys.modules), dict(jax.config.values)
importlib.import_module(sys.argv[1])
changed = sorted(k for k, v in jax.config.values.items() if k not in config or config[k] != v)
print(json.dumps({"modules": sorted({m.split(".")[0] for m in set(sys.modules) - modules}), "config": changed}))
"""


def import_effects(package: str, cwd: Path) -> tuple[set[str], list[str]]:
    """Return the heavy packages that importing package loads besides jax, and the jax settings it changes."""
    effects = json.loads(run_python(IMPORT_EFFECTS, package, cwd=cwd))
    return set(effects["modules"]) & (ROOMS_OF_FOREIGN.keys() | LAZY), effects["config"]


def test_import_is_light() -> None:
    assert import_effects("pmcmc", PACKAGE.parent) == (set(), [])


def test_import_checker_sees(tmp_path: Path) -> None:
    source = "import jax, tqdm\njax.config.update('jax_enable_x64', True)"
    (tmp_path / "toy.py").write_text(source)
    assert import_effects("toy", tmp_path) == ({"tqdm"}, ["jax_enable_x64"])


def undocumented(module: types.ModuleType) -> list[str]:
    """Return names in __all__ whose docstring is inherited or has fewer than two lines (one is enough for a module)."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            enough = bool(value.__doc__)
        elif callable(value):  # classes inherit __doc__, so only their own counts
            doc = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
            enough = len(doc.strip().splitlines()) > 1
        else:
            enough = True  # constants
        if not enough:
            found.append(f"{module.__name__}.{name}")
    return found


PUBLIC_ROOMS = [m.name for m in pkgutil.iter_modules(pmcmc.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", ["pmcmc", *(f"pmcmc.{room}" for room in PUBLIC_ROOMS)])
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        pytest.skip("no __all__")
    assert undocumented(module) == []


def test_docstring_checker_sees() -> None:
    def short() -> None:
        """One line."""

    def long() -> None:
        """One line.

        And more.
        """

    class Parent:
        """Two
        lines."""

    class Child(Parent):
        pass

    toy = types.ModuleType("toy")
    vars(toy).update(short=short, long=long, Parent=Parent, Child=Child, VERSION="1", __all__=[])
    toy.__all__ = ["short", "long", "Parent", "Child", "VERSION"]
    assert undocumented(toy) == ["toy.short", "toy.Child"]


def num_code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring, which may be long."""
    first = function.body[0]
    has_doc = ast.get_docstring(function) is not None
    doc_lines = first.end_lineno - first.lineno + 1 if has_doc else 0
    return function.end_lineno - function.lineno + 1 - doc_lines


# The files whose purpose is to change settings of jax, when the user calls them.
SETTERS = {"_xla/folder.py"}


def banned(node: ast.AST) -> str | None:
    """Return what is wrong with this node, or None."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() if num_code_lines(node) > 60:
            return f"{node.name} has {num_code_lines(node)} lines of code, at most 60 allowed"
        case ast.Assert():
            return "assert: raise an error that says what was expected, what came, and the fix"
        case ast.ExceptHandler(type=None):
            return "bare except"
        case ast.Name(id="nan_to_num") | ast.Attribute(attr="nan_to_num") | ast.alias(name="nan_to_num"):
            return "nan_to_num: never turn NaN into a number"
        case ast.Call() if ast.unparse(node.func) in {"jax.config.update", "config.update"}:
            return "jax.config.update: the user's settings are the user's"
    return None


def code_violations(root: Path) -> list[str]:
    """Return files over 450 lines, functions over 60, and banned constructs under root."""
    found = []
    for path, tree in source_trees(root):
        relative = path.relative_to(root)
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > 450:
            found.append(f"{relative}: {num_lines} lines, at most 450 allowed")
        for node in ast.walk(tree):
            if (fault := banned(node)) and not (fault.startswith("jax.config") and str(relative) in SETTERS):
                found.append(f"{relative}:{node.lineno}: {fault}")
    return found


def test_code_keeps_house_rules() -> None:
    assert code_violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n" * 451, "451 lines"),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("assert True", "assert"),
        ("try:\n    x = 1\nexcept:\n    pass", "bare except"),
        ("jnp.nan_to_num(x)", "nan_to_num"),
        ("from jax.numpy import nan_to_num", "nan_to_num"),
        ("def f():\n    jax.config.update('jax_enable_x64', True)", "jax.config.update"),
    ],
)
def test_code_checker_sees(tmp_path: Path, source: str, message: str) -> None:
    violations = code_violations(toy_package(tmp_path, "chain.py", source))
    assert len(violations) == 1
    assert message in violations[0]


def repeated_decorators(root: Path) -> list[str]:
    """Return functions and classes under root that have the same decorator twice."""
    found = []
    for path, tree in source_trees(root):
        for node in ast.walk(tree):
            decorators = [ast.dump(one) for one in getattr(node, "decorator_list", [])]
            if len(decorators) > len(set(decorators)):
                found.append(f"{path.relative_to(root)}: {node.name}")
    return found


@pytest.mark.parametrize("folder", ["pmcmc", "benchmarks", "tests"])
def test_no_decorator_is_repeated(folder: str) -> None:
    assert repeated_decorators(PACKAGE.parent / folder) == []


def test_decorator_checker_sees(tmp_path: Path) -> None:
    root = toy_package(tmp_path, "chain.py", "@cache\n@wraps(f)\n@cache\ndef f(): pass\n@cache\ndef g(): pass\n")
    assert repeated_decorators(root) == ["chain.py: f"]


def test_code_checker_lets_docstrings_be_long(tmp_path: Path) -> None:
    source = 'def f():\n    """Long.\n' + "\n" * 100 + '    """\n' + "    x = 1\n" * 59
    assert code_violations(toy_package(tmp_path, "chain.py", source)) == []


DOCTESTS = """
import doctest, importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
modules = [package, *(importlib.import_module(n) for n in names if not n.endswith(".__main__"))]
flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
results = [doctest.testmod(m, optionflags=flags) for m in modules]
print(sum(r.attempted for r in results), "examples")
sys.exit(any(r.failed for r in results))
"""


@pytest.mark.slow  # one process for all
def test_docstring_examples_run() -> None:
    assert not run_python(DOCTESTS, "pmcmc").startswith("0 examples")


def test_doctest_checker_sees(tmp_path: Path) -> None:
    toy_package(tmp_path, "chain.py", '"""A module.\n\n>>> 1 + 1\n3\n"""')
    with pytest.raises(pytest.fail.Exception, match=r"Expected:\n    3\nGot:\n    2"):
        run_python(DOCTESTS, "toy", cwd=tmp_path)
