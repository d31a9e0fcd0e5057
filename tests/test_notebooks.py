"""The notebooks as committed: pairs agree, outputs are clean and small, and installing keeps the GPU's jax.

`make notebooks` checks that they run.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
MAX_BYTES = 400_000


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_every_notebook_has_a_pair() -> None:
    assert "quickstart" in NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_pair_agrees(name: str) -> None:
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(read(name)) == cells(jupytext.read(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_complete_clean_and_small(name: str) -> None:
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES
    assert [cell.execution_count for cell in code_of(name)] == list(range(1, len(code_of(name)) + 1))
    outputs = [output for cell in code_of(name) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text  # warnings and progress bars
        assert str(Path.home()) not in str(output)


@pytest.mark.parametrize("name", NAMES)
def test_badge_opens_this_notebook(name: str) -> None:
    address = rf"\(https://colab\.research\.google\.com/github/[\w-]+/pmcmc/blob/main/notebooks/{name}\.ipynb\)"
    assert re.search(r"colab-badge\.svg\)\]" + address, read(name).cells[0].source)


def test_notebooks_begin_alike() -> None:
    """All begin with the same text: the install, then the device."""
    assert len({tuple(cell.source for cell in code_of(name)[:2]) for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_links_between_notebooks(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", text)) <= set(NAMES)


def run_first_cell(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], spec: object) -> list[list[str]]:
    """Return what the first cell asks of pip, on a machine with these packages."""
    calls: list[list[str]] = []
    distributions = [SimpleNamespace(name=name, version=version) for name, version in installed.items()]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "distributions", lambda: distributions)
        patch.setattr(importlib.util, "find_spec", lambda name: spec)
        patch.setattr(subprocess, "run", lambda command, check: calls.append(command))
        exec(code_of("quickstart")[0].source, {})
    return calls


def test_install_holds_what_runs_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    held = dict.fromkeys(["jax", "jaxlib", "jax-cuda12-plugin", "jax_cuda12_pjrt"], "0.7.2") | {"numpy": "2.1.3"}
    other = {"jaxtyping": "0.2.0", "numpyro": "0.10", "jaxopt": "0.8"}
    (command,) = run_first_cell(monkeypatch, held | other, spec=None)
    assert command[1:] == ["-m", "pip", "install", "-q", "pmcmc", *(f"{name}=={held[name]}" for name in held)]


def test_install_is_skipped_where_pmcmc_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_first_cell(monkeypatch, {"jax": "0.7.2"}, spec=object()) == []


@pytest.mark.parametrize("name", NAMES)
def test_sizes_hang_on_one_variable(name: str) -> None:
    source = "\n".join(cell.source for cell in code_of(name))
    assert source.count('"PMCMC_SMALL" in os.environ') == source.count("os.environ") == 1
