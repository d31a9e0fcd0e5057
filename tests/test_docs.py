"""The site: every public name has its entry, every example runs, and tables show what the result files contain."""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_ext"))
pytest.importorskip("sphinx", reason="the docs extra is not installed")

import benchmark_tables  # noqa: E402
import public_names  # noqa: E402

pytestmark = pytest.mark.optimized

# The examples of this page are run by tests/test_from_numpyro.py.
ELSEWHERE = {"from-numpyro"}
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
EXAMPLES = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}


def missing(modules: list, entries: list[str]) -> list[str]:
    """Return public names of the modules that no entry shows; a name that several modules share needs one entry."""
    shown = [getattr(pkgutil.resolve_name(e.rpartition(".")[0]), e.rpartition(".")[2]) for e in entries]
    names = [(f"{module.__name__}.{name}", getattr(module, name)) for module in modules for name in module.__all__]
    return [name for name, value in names if not (type(value) is type(pmcmc) or any(value is s for s in shown))]


def public_modules() -> list:
    rooms = [m.name for m in pkgutil.iter_modules(pmcmc.__path__) if not m.name.startswith("_")]
    modules = [pmcmc, pmcmc.recurrence.trust_region, *(importlib.import_module(f"pmcmc.{room}") for room in rooms)]
    return [module for module in modules if hasattr(module, "__all__")]


def test_every_public_name_has_one_entry() -> None:
    entries = public_names.documented()
    assert missing(public_modules(), entries) == []
    assert len(entries) == len(set(entries))


def test_missing_entries_are_seen() -> None:
    entries = public_names.documented()
    entries.remove("pmcmc.recurrence.Newton")
    assert missing(public_modules(), entries) == ["pmcmc.recurrence.Newton"]


def paths_not_there(text: str) -> list[str]:
    """Return the files that a page names and that do not exist, relative to the repository or to the package."""
    named = re.findall(r"`([\w/]+/[\w/]*\.(?:py|json|md|rst))", text)
    return sorted({path for path in named if not any((root / path).exists() for root in (ROOT, ROOT / "pmcmc", DOCS))})


@pytest.mark.parametrize("page", sorted(p for p in DOCS.rglob("*.md") if p.stem != "HISTORY"), ids=lambda p: p.stem)
def test_files_that_pages_name_exist(page: Path) -> None:
    assert paths_not_there(page.read_text(encoding="utf-8")) == []


def test_stale_paths_are_seen() -> None:
    text = "`recurrence/shooting/repair.py`, `tests/test_docs.py::test_x`, `chain/rebuild.py` and `benchmarks/old.py`"
    assert paths_not_there(text) == ["benchmarks/old.py", "chain/rebuild.py"]


@pytest.mark.slow  # a process for each page
@pytest.mark.parametrize("page", [name for name, codes in EXAMPLES.items() if codes and name not in ELSEWHERE])
def test_examples_run_as_printed(page: str, tmp_path: Path) -> None:
    code = "\n".join(EXAMPLES[page])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_report_page_explains_every_line() -> None:
    page = (DOCS / "report.md").read_text(encoding="utf-8").lower()
    chain = pmcmc.sample(
        lambda x: -0.5 * (x**2), 0.0, 0, num_samples=2_000, solver=MultipleShooting(num_blocks=8), progress_bar=False
    )
    fresh = str(chain.report)
    shown = (DOCS / "reports" / "eight_schools.txt").read_text(encoding="utf-8")
    for line in fresh.splitlines() + shown.splitlines():
        label = re.match(r"[A-Z][a-z]+( [a-z]+)*", line)[0].lower()
        assert label in page, line


def test_tables_show_what_the_files_say() -> None:
    for path in benchmark_tables.RESULTS.glob("*.json"):
        (header, *body), source = benchmark_tables.render(path)
        assert body
        assert all(len(row) == len(header) for row in body)
        assert path.name in source
    rows = json.loads((benchmark_tables.RESULTS / "kernels_cpu.json").read_text(encoding="utf-8"))["rows"]
    (header, *body), _ = benchmark_tables.render(benchmark_tables.RESULTS / "kernels_cpu.json")
    assert [row[header.index("speedup")] for row in body] == [f"{row['speedup']:#.3g}".rstrip(".") for row in rows]


def test_wide_tables_are_shown_in_parts() -> None:
    header = ["case", "T", *(f"c{n}" for n in range(9)), "empty"]
    table = [header, ["a", "1", *"123456789", "-"], ["a", "2", *"123456789", ""]]
    first, second = benchmark_tables.parts(table, 8)
    assert first == [["case", "T", *(f"c{n}" for n in range(6))], ["a", "1", *"123456"], ["a", "2", *"123456"]]
    assert second == [["case", "T", "c6", "c7", "c8"], ["a", "1", *"789"], ["a", "2", *"789"]]
    for path in benchmark_tables.RESULTS.glob("*.json"):
        assert all(len(part[0]) <= 8 for part in benchmark_tables.parts(benchmark_tables.render(path)[0]))


def test_docstrings_become_markup() -> None:
    docstring = """A step of size h_, `Newton` or ``|x|``s.

    The equation, with *a* and |b|:

        x = y

    Args:
        tol: Largest residual,
            relative.
        *others: `Newton`.

    Returns:
        The states: shape (T,).

    Raises:
        ValueError: tol is *odd*.

    Source: Author & Author (2020).

    Example:
        >>> 1 * 1
        1
    """
    text = "\n".join(public_names.prepare(inspect.cleandoc(docstring).splitlines()))
    assert text.startswith("A step of size h\\_, `Newton` or ``|x|``\\ s.\n")
    assert "with \\*a\\* and \\|b\\|:\n\n::\n\n    x = y\n" in text
    assert "Args:\n    tol: Largest residual,\n        relative.\n    \\*others: `Newton`.\n" in text
    assert "Returns:\n    : The states: shape (T,).\n" in text  # else "The states" would be its type
    assert "ValueError: tol is \\*odd\\*." in text
    assert "Example:\n    >>> 1 * 1\n    1\n" in text


def test_a_summary_is_the_first_sentence() -> None:
    def function() -> None:
        """Solve ``x = f(x). y``, at once. More follows.

        Further text.
        """

    assert public_names.summary(function) == "Solve ``x = f(x). y``, at once."
