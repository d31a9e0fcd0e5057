"""Divergences in more than 1 % of the draws give one warning with a remedy; fewer give none."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential

OPTIONS = dict(num_warmup=0, num_samples=400, num_chains=2, solver=Sequential(), progress_bar=False)


def edges(x):
    """Flat on (-1, 1) in each coordinate, and -inf outside: a trajectory that leaves it diverges."""
    return jnp.where(jnp.all(jnp.abs(x) < 1), 0.0, -jnp.inf)


def sample(step_size: float, **options) -> pmcmc.Chain:
    kernel = options.pop("kernel", pmcmc.HMC(step_size=step_size, num_integration_steps=1))
    return pmcmc.sample(edges, jnp.zeros(2), 0, kernel=kernel, **{**OPTIONS, **options})


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_many_are_one_warning() -> None:
    chain = []
    (words,) = warned(lambda: chain.append(sample(0.5)))
    num = int(chain[0].report.num_divergent.sum())
    assert num > 8
    assert words.startswith(f"{num} of 800 draws ({num / 800:.1%}) were divergent.")
    for remedy in ("reparametrise", "EnsembleAdaptation(target_acceptance_rate=0.95)", "target_accept_prob=0.95"):
        assert remedy in words
    (more,) = warned(lambda: chain[0].extend(200, progress_bar=False))  # counted over the new draws
    assert "of 400 draws" in more


def test_few_are_none() -> None:
    tails = lambda x: jnp.where(jnp.abs(x) < 2.9, -0.5 * x**2, -jnp.inf)  # 0.4 % of the mass is cut off
    chain = pmcmc.sample(tails, 0.0, 0, kernel=pmcmc.HMC(1.0, 1), **OPTIONS)  # warnings are errors
    assert 0 < chain.report.num_divergent.sum() <= 8


def test_a_random_walk_may_leave_the_support() -> None:
    chain = sample(0.5, kernel=pmcmc.RandomWalk(step_size=0.5))
    assert chain.report.num_divergent.sum() > 8


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Strict(pmcmc.RandomWalk):
    """A kernel of the user's own without gradients, for which divergences are faults."""

    @property
    def divergences_matter(self):
        return True


def test_a_kernel_without_gradients_is_not_tuned_like_hmc() -> None:
    (words,) = warned(lambda: sample(0.5, kernel=Strict(step_size=0.5)))
    assert words.endswith("or take smaller steps.")


def test_draws_on_disk_are_counted_too(tmp_path) -> None:
    pytest.importorskip("zarr")
    (words,) = warned(
        lambda: pmcmc.sample(
            edges,
            jnp.zeros(2),
            0,
            kernel=pmcmc.HMC(step_size=0.5, num_integration_steps=1),
            **{**OPTIONS, "num_samples": 10},
        ).stream(tmp_path / "draws", 300, progress_bar=False)
    )
    assert "of 600 draws" in words


def test_conditionals_that_are_not_finite_have_a_remedy_of_their_own() -> None:
    kernel = pmcmc.Gibbs({"k": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.array([0.0, jnp.nan]))})
    (words,) = warned(lambda: pmcmc.sample(None, {"k": 0}, 0, kernel=kernel, **OPTIONS))
    assert "800 of 800 draws (100.0%)" in words
    assert "check the updates for NaN" in words
    assert "step size" not in words


def test_the_drop_in_warns_too() -> None:
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("edge", jnp.where(jnp.abs(x) < 0.5, 0.0, -jnp.inf))

    sampler = numpyro.infer.HMC(model, step_size=0.5, num_steps=1, trajectory_length=None)
    mcmc = pmcmc.ParallelMCMC(sampler, **OPTIONS)
    (words,) = warned(lambda: mcmc.run(jax.random.key(0), init_params={"x": jnp.zeros(2)}))
    assert "were divergent" in words


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Halves(RecurrenceSolver):
    """A user's own solver."""

    def solve_problem(self, problem):
        return Sequential().solve_problem(problem)


def test_solvers_are_reported_by_what_they_are() -> None:
    class Named(Halves):
        decision = "by halves"

    decision = lambda solver: sample(0.01, num_samples=20, solver=solver).report.decision
    assert decision(Sequential()) == "sequential"
    assert decision(MultipleShooting(2)) == "shooting"
    assert pmcmc.recurrence.deer().decision == pmcmc.recurrence.quasi_elk().decision == "newton"
    assert pmcmc.recurrence.Windowed(pmcmc.recurrence.deer()).decision == "newton"
    assert decision(Halves()) == "Halves"
    assert Named().decision == "by halves"
