"""Sites that were not asked for are never computed, and the others are computed in pieces."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.chain import stored
from pmcmc.chain.draws import check_sites
from pmcmc.recurrence import Sequential

SIZES = dict(num_warmup=0, num_samples=30, num_chains=2, progress_bar=False)
KERNEL = pmcmc.MALA(step_size=0.3)
ROOT = Path(__file__).parents[2]


def counting_model():
    """A model with a deterministic site that records each computation, and for how many draws."""
    calls: list[int] = []

    def tell(slope):
        calls.append(np.size(slope))
        return np.broadcast_to(np.asarray(slope)[..., None], (*np.shape(slope), 4)).astype(slope.dtype)

    def model():
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        like = jax.ShapeDtypeStruct((4,), slope.dtype)
        numpyro.deterministic(
            "mu", jax.pure_callback(tell, like, jax.lax.stop_gradient(slope), vmap_method="expand_dims")
        )
        numpyro.deterministic("ratio", slope / sigma)

    return model, calls


def test_a_site_left_out_of_the_drop_in_is_never_computed() -> None:
    model, calls = counting_model()
    mcmc = pmcmc.ParallelMCMC(model, kernel=KERNEL, solver=Sequential(), **SIZES)
    mcmc.run(jax.random.key(0), extra_fields=("~z.mu",))
    assert set(mcmc.get_samples()) == {"slope", "sigma", "ratio"}
    mcmc.print_summary(exclude_deterministic=False)
    assert not calls
    mcmc.run(jax.random.key(0))
    assert calls


def test_chains_compute_what_is_asked_for(capsys, tmp_path: Path) -> None:
    model, calls = counting_model()
    chain = pmcmc.parallel_chain(model, 0, kernel=KERNEL, solver=Sequential(), **SIZES)
    some = chain.get_samples(sites=["ratio", "slope"])
    chain.print_summary(sites=["slope"])
    assert "sigma" not in capsys.readouterr().out
    assert list(some) == ["ratio", "slope"]
    assert not calls
    if find_spec("zarr"):
        chain.stream(tmp_path / "draws", 10, sites=["slope"], progress_bar=False)
        assert set(calls) <= {1}  # one draw, to describe the model's sites; 60 or more are written
    whole = chain.get_samples()
    assert sum(calls) >= 60
    for name in some:
        np.testing.assert_array_equal(some[name], whole[name])
        np.testing.assert_array_equal(chain.get_samples(True, sites=[name])[name].reshape(-1), whole[name])
    num_calls = len(calls)
    chain.get_samples(sites=["mu"])
    assert len(calls) == num_calls  # results are kept
    with pytest.raises(ValueError, match=r"no \['nu'\]: expected names out of \["):
        chain.get_samples(sites=["nu"])
    for wrong in ("mu", 3, [3]):
        with pytest.raises(TypeError, match="sequence of names"):
            check_sites(chain.target, wrong)
    assert check_sites(chain.target, iter(["ratio", "slope"])) == ("ratio", "slope")


def test_arviz_of_some_sites() -> None:
    model, _ = counting_model()
    chain = pmcmc.parallel_chain(model, 0, kernel=KERNEL, solver=Sequential(), **SIZES)
    assert set(chain.to_arviz(sites=["slope"]).posterior.data_vars) == {"slope"}
    assert set(chain.to_arviz().posterior.data_vars) == {"slope", "sigma", "mu", "ratio"}


def test_sites_of_a_plain_density() -> None:
    start = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    chain = pmcmc.sample(lambda x: -jnp.sum(x["a"] ** 2) - x["b"] ** 2, start, 0, kernel=KERNEL, **SIZES)
    np.testing.assert_array_equal(chain.get_samples(sites=["a"])["a"], chain.get_samples()["a"])
    alone = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, kernel=KERNEL, **SIZES)
    np.testing.assert_array_equal(alone.get_samples(sites=["x"])["x"], alone.get_samples())


def test_pieces_are_the_whole(monkeypatch) -> None:
    """Five draws of this model at a time, or all of them."""
    options = dict(kernel=KERNEL, solver=Sequential(), **{**SIZES, "num_samples": 33})
    whole, parts = (pmcmc.parallel_chain(counting_model()[0], 0, **options) for _ in range(2))
    expected = whole.get_samples()
    row = sum(x[0].size * x.dtype.itemsize for x in expected.values())
    monkeypatch.setattr(stored, "CONSTRAIN_BYTES", 5 * row + row // 2)
    sizes = []
    in_batches = stored.in_batches
    monkeypatch.setattr(stored, "in_batches", lambda *args: (sizes.append(args[2]), in_batches(*args))[1])
    jax.tree.map(np.testing.assert_array_equal, parts.get_samples(), expected)
    assert sizes == [5]


PEAK = """
import json, resource, sys
import jax, numpy as np, numpyro, numpyro.distributions as dist
def model(x):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    mu = numpyro.deterministic("mu", slope * x)
    numpyro.sample("y", dist.Normal(mu[:100], 1), obs=x[:100])
sizes = dict(num_warmup=100, num_samples=2000, num_chains=1, progress_bar=False)
if sys.argv[1] == "numpyro":
    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), **sizes)
else:
    import pmcmc
    mcmc = pmcmc.ParallelMCMC(numpyro.infer.NUTS(model), **sizes)
mcmc.run(jax.random.key(0), np.linspace(-1, 1, 100_000, dtype=np.float32), extra_fields=("~z.mu",))
jax.block_until_ready(mcmc.get_samples())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "sites": list(mcmc.get_samples())}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
def test_memory_with_a_large_site_left_out_is_numpyros() -> None:
    """1e5 rows x 2,000 draws of float32 are 763 MiB, which neither package allocates at any time."""

    def told(which: str) -> dict:
        command = [sys.executable, "-c", PEAK, which]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    theirs, ours = told("numpyro"), told("pmcmc")
    assert ours["sites"] == theirs["sites"] == ["slope"]
    assert ours["peak"] < 1.3 * theirs["peak"]
