"""The script of docs/from-numpyro.md, as printed and with the one line changed: both give the same posterior."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size

from tests.helpers.statistics import z_bound

PAGE = Path(__file__).parents[1] / "docs" / "from-numpyro.md"


def standard_errors(grouped: np.ndarray) -> np.ndarray:
    """Return Monte Carlo standard errors of the means of draws (chain, draw, ...)."""
    return np.asarray(grouped).std(axis=(0, 1)) / np.sqrt(effective_sample_size(np.asarray(grouped)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    script, line, later, arviz = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    changed, number = re.subn(r"^mcmc = MCMC\(.*\n", lambda _: line, script, flags=re.MULTILINE)
    assert number == 1
    theirs: dict = {}
    ours: dict = {}
    with jax.numpy_rank_promotion("allow"):
        exec(script, theirs)
        exec(changed + later + arviz, ours)
    assert "Number of divergences" in capsys.readouterr().out
    both = [space["mcmc"].get_samples(group_by_chain=True) for space in (theirs, ours)]
    assert set(both[0]) == set(both[1])
    z = []
    for name in both[0]:
        a, b = (np.asarray(draws[name], float) for draws in both)
        assert a.shape == b.shape
        for f in (lambda x: x, np.square):
            fixed = f(a).std(axis=(0, 1)) == 0  # the zeros and the one of the LKJ factor
            errors = np.hypot(standard_errors(f(a)), standard_errors(f(b)))
            difference = f(a).mean(axis=(0, 1)) - f(b).mean(axis=(0, 1))
            np.testing.assert_allclose(difference[fixed], 0, atol=1e-12)
            z.append((difference[~fixed] / errors[~fixed]).ravel())
    z = np.concatenate(z)
    assert len(z) > 60
    assert np.max(np.abs(z)) < z_bound(len(z))
    assert ours["predicted"]["y"].shape == theirs["predicted"]["y"].shape == (8000, 64)
    chain, samples = ours["chain"], ours["mcmc"].get_samples(group_by_chain=True)
    assert chain.num_samples == 4000
    np.testing.assert_array_equal(chain.get_samples(group_by_chain=True)["noise"][:, :2000], samples["noise"])
    assert ours["data"].posterior["effect"].dims[:3] == ("chain", "draw", "group")
    assert set(ours["data"].constant_data.data_vars) == {"x", "group", "grade", "seen"}
