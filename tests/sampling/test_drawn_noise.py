"""Blocks on a CPU draw the noise of a step where they take it: it is the noise that others read from memory."""

from dataclasses import dataclass

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from benchmarks.gibbs import SCHOOLS
from pmcmc import HMC, MALA, NUTS, RandomWalk, Target, from_blackjax
from pmcmc._pytree import PyTree, register_dataclass
from pmcmc._xla.compile import compiler_options
from pmcmc._xla.rewrites import FEW_LANES, own_program
from pmcmc.kernels import DiscreteGibbs, UniformLength
from pmcmc.random.streams import chain_keys, step_noise
from pmcmc.recurrence import MultipleShooting, Sequential, deer
from pmcmc.recurrence.abreast import prefers_lanes_last
from pmcmc.recurrence.sharding import AllLanes
from pmcmc.sampling import programs
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import Shape, draws_noise
from tests.helpers.gibbs import SCHOOLS_START
from tests.helpers.targets import gaussian, start_like

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices store noise"),
]

NUM_CHAINS, NUM_BLOCKS, CHUNK = 2, 6, 4
NUM_LANES = NUM_CHAINS * NUM_BLOCKS
FIRST, LENGTH = (3, 2**20), 2 * CHUNK  # first steps of the chains; steps of a block


@register_dataclass
@dataclass(frozen=True)
class OfUser(MALA):
    """A kernel that calls jax.random."""

    def sample_noise(self, rng_key, target):
        noise = super().sample_noise(rng_key, target)
        return noise._replace(normal=jax.random.normal(jax.random.wrap_key_data(rng_key), (target.dim,)))


KERNELS = {
    "MALA": MALA(step_size=0.5),
    "HMC": HMC(step_size=0.5, num_integration_steps=3),
    "HMC-uniform-length": HMC(step_size=0.5, num_integration_steps=UniformLength(1, 4)),
    "RandomWalk": RandomWalk(step_size=0.5),
    "RandomWalk-radial": RandomWalk(step_size=0.5, independence_share=None),
    "BlackJAX": from_blackjax(blackjax.mala, step_size=0.5),
    "of the user": OfUser(step_size=0.5),
    "NUTS": NUTS(step_size=0.5),
    "discrete": DiscreteGibbs(supports={"z": (0, 1), "w": (0, 1, 2)}),
    "Gibbs": SCHOOLS,
}
STORED = ("of the user", "NUTS", "Gibbs")  # hashes of jax.random, steps in stages, loops


def target_of(name: str) -> Target:
    if name == "Gibbs":
        return Target.from_logdensity(None, SCHOOLS_START)
    if name == "discrete":
        return Target.from_logdensity(lambda x: 0.1 * jnp.sum(x["z"]), dict(z=jnp.zeros(2, int), w=jnp.zeros((), int)))
    return Target.from_logdensity(gaussian, start_like(gaussian))


def keys() -> jax.Array:
    return chain_keys(jax.random.key(3), num_chains=NUM_CHAINS)


@jax.jit
def stored(target: Target, kernel: pmcmc.Kernel, keys: jax.Array) -> PyTree:
    """The noise of all lanes by `step_noise`, (lanes, steps, ...)."""
    lane, step = np.arange(NUM_LANES), np.arange(LENGTH)
    chain, block = np.divmod(lane, NUM_BLOCKS)
    steps = jnp.asarray(np.asarray(FIRST)[chain, None] + block[:, None] * LENGTH + step)
    return jax.vmap(lambda key, steps: step_noise(kernel, target, key, steps))(keys[chain], steps)


def drawn(target: Target, kernel: pmcmc.Kernel) -> tuple[PyTree, PyTree]:
    """The noise of all lanes as the zeroth sweep draws it, and as repair does, (lanes, steps, ...)."""

    def draw(target: Target, kernel: pmcmc.Kernel, keys: jax.Array, first: jax.Array, length: jax.Array):
        shape = Shape(NUM_BLOCKS, LENGTH, draws=True)
        inputs = programs._inputs(target, kernel, keys, first, AllLanes(shape.layout(NUM_CHAINS, length)), shape)
        chunks = jax.lax.map(lambda n: inputs.of_chunk(n * CHUNK, CHUNK), jnp.arange(LENGTH // CHUNK))
        chunks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(LENGTH, *x.shape[2:]), -1, 0), chunks)
        steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.lax.map(inputs.of_step, jnp.arange(LENGTH)))
        return chunks, steps

    with own_program():
        program = jax.jit(draw, compiler_options=compiler_options("cpu"))
        return program(target, kernel, keys(), np.asarray(FIRST), np.asarray(LENGTH))


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", KERNELS)
def test_noise_is_that_of_the_step(name: str, x64: bool) -> None:
    """To the bit, except for a sum, which may be rounded differently."""
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(x64):
        target, kernel = target_of(name), KERNELS[name]
        expected = stored(target, kernel, keys())
        for found in drawn(target, kernel):
            if name == "RandomWalk":
                np.testing.assert_array_max_ulp(found.half_square, expected.half_square, 1)
                found = found._replace(half_square=expected.half_square)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert len(np.unique(jax.tree.leaves(expected)[0])) > 2  # there is something to compare


@pytest.mark.parametrize("name", KERNELS)
def test_which_kernels_draw(name: str) -> None:
    target, kernel = target_of(name), KERNELS[name]
    assert draws_noise(target, kernel, keys(), FEW_LANES + 1) == (name not in STORED)
    assert not draws_noise(target, kernel, keys(), FEW_LANES)


def many_data(x: jax.Array) -> jax.Array:
    """A regression of 30,000 rows: an operation takes more numbers than a kernel may."""
    return -0.5 * jnp.sum(x**2) - 0.5 * jnp.sum((ROWS @ x - 1) ** 2) / 100


ROWS = np.random.default_rng(0).standard_normal((30_000, 3)) / 50


def solve(density, name: str, draws: bool) -> tuple:
    target = Target.from_logdensity(density, jnp.zeros(3))
    bank = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))
    engine, solver = Engine(target, KERNELS[name], keys(), bank, jnp.ones(3)), MultipleShooting(NUM_BLOCKS)
    shape = engine.shape_for(solver, NUM_BLOCKS * 32)
    assert shape.draws
    segment, _ = engine.solve(solver, shape._replace(draws=draws), bank[:NUM_CHAINS], np.asarray(FIRST), 32)
    return jax.tree.map(np.array, (segment.chains(), segment.result, segment.stats.certified_steps))


@pytest.mark.parametrize(
    ("density", "name"), [(gaussian, "HMC-uniform-length"), (gaussian, "RandomWalk"), (many_data, "MALA")]
)
def test_blocks_that_draw_are_blocks_that_read(density, name: str) -> None:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, solve(density, name, True), solve(density, name, False))


def test_what_is_drawn_takes_no_memory() -> None:
    target = Target.from_logdensity(gaussian, jnp.zeros(3))
    engine = Engine(target, KERNELS["HMC"], keys(), jnp.zeros((8, 3)), None)
    noise = engine.bytes_per_step(MultipleShooting(FEW_LANES // NUM_CHAINS)) - engine.bytes_per_step(MultipleShooting())
    assert noise == NUM_CHAINS * 8 * (3 + 2)
    assert engine.bytes_per_step(Sequential()) == engine.bytes_per_step(MultipleShooting()) + noise


def test_others_read_their_noise() -> None:
    target = Target.from_logdensity(gaussian, jnp.zeros(3))
    engine = Engine(target, KERNELS["HMC"], keys(), jnp.zeros((8, 3)), None)
    assert prefers_lanes_last(NUM_LANES)
    assert engine.shape_for(MultipleShooting(NUM_BLOCKS), 1000).draws
    for solver in (Sequential(), deer(), MultipleShooting(NUM_BLOCKS, devices=jax.devices()[:1])):
        assert not engine.shape_for(solver, 1000).draws


def test_a_chain_whose_noise_is_drawn_follows_from_its_key() -> None:
    """`verify` draws the noise by another program; the number of blocks changes nothing."""
    options = dict(kernel=KERNELS["HMC"], num_warmup=0, num_samples=600, num_chains=2, progress_bar=False)
    chains = [pmcmc.sample(gaussian, jnp.zeros(3), 0, solver=MultipleShooting(n), **options) for n in (6, 30)]
    assert all(chain.verify() for chain in chains)
    np.testing.assert_allclose(chains[0].unknowns, chains[1].unknowns, rtol=0, atol=1e-9)
