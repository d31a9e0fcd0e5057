"""What needs an optional package names the extra that installs it, before anything runs."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import pmcmc
from pmcmc import demo, plots
from pmcmc.__main__ import main
from pmcmc.interop.arviz import open_lazily, read_arrays
from tests.helpers.sources import PACKAGE, imports, source_trees

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"scikit-learn": "sklearn"}  # the others have the names of their packages
# Every import of these was checked; a new one needs a test below.
KNOWN = {"zarr", "matplotlib", "sklearn"}


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        (["sklearn"], ["logistic"], "needs sklearn, which is not installed: pip install 'pmcmc[demo]'"),
        (["sklearn", "matplotlib"], [], "needs matplotlib and sklearn, which are not installed"),
        (["matplotlib"], ["eight_schools"], "needs matplotlib, which is not installed"),
    ],
)
def test_demo(missing, arguments, words: str, monkeypatch, capsys, tmp_path) -> None:
    hide(monkeypatch, *missing)
    with pytest.raises(SystemExit):
        main(["demo", *arguments, "--output", str(tmp_path / "plots")])
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out
    assert not (tmp_path / "plots").exists()
    with pytest.raises(ImportError, match="pip install"):
        demo.run(arguments or list(demo.EXAMPLES), tmp_path / "plots")


def test_demo_needs_no_data_of_others_for_eight_schools(monkeypatch) -> None:
    hide(monkeypatch, "sklearn")
    demo.check_packages(["eight_schools"])


def test_stores(monkeypatch, tmp_path: Path) -> None:
    chain = pmcmc.sample(
        lambda x: -(x**2), 0.0, 0, kernel=pmcmc.MALA(step_size=0.5), num_warmup=0, num_samples=10, progress_bar=False
    )
    hide(monkeypatch, "zarr")
    with pytest.raises(ImportError, match=r"Chain.stream needs zarr, which is not installed: pip install 'pmcmc\[zarr"):
        chain.stream(tmp_path / "draws", 10**9, progress_bar=False)
    assert not (tmp_path / "draws").exists()
    with pytest.raises(ImportError, match=r"StoredChain.to_arviz needs zarr.*pmcmc\[zarr\]"):
        open_lazily(tmp_path, 10)
    with pytest.raises(ImportError, match=r"StoredChain.get_samples needs zarr.*pmcmc\[zarr\]"):
        read_arrays(tmp_path, "posterior", ["x"])


def test_plots(monkeypatch) -> None:
    hide(monkeypatch, "matplotlib", "matplotlib.pyplot")
    with pytest.raises(ImportError, match=r"pmcmc.plots needs matplotlib.*pip install 'pmcmc\[plots\]'"):
        plots.speedup([{"length": 10, "speedup": 2.0}])


def test_every_optional_package_is_known() -> None:
    """A package of an extra that the code imports, and that a plain install does not include."""
    brought = {requirement.split(">=")[0] for requirement in PROJECT["dependencies"]}
    extras = {r.split(">=")[0] for name in ("zarr", "plots", "demo") for r in PROJECT["optional-dependencies"][name]}
    optional = {IMPORTED_AS.get(name, name) for name in extras - brought}
    assert optional == KNOWN
    used = {
        name[0]
        for path, tree in source_trees(PACKAGE)
        for _, name, lazy in imports(tree, (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts))
        if lazy or isinstance(tree, ast.Module)
    }
    allowed = {
        "pmcmc",
        "jax",
        "jaxlib",
        "numpy",
        "tqdm",
        "numpyro",
        "blackjax",
        "arviz",
        "jaxtyping",
        "scipy",
        "optax",
        "xarray",
    }
    assert used - set(sys.stdlib_module_names) - allowed == KNOWN
