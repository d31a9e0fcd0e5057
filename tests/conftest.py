"""Settings of every test: float64, no implicit rank promotion, checked annotations, quick compilation."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

from tests.helpers.compilation import compile_quickly

install_import_hook("pmcmc", "beartype.beartype")  # before the first import of pmcmc anywhere

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

import pmcmc  # noqa: E402
from pmcmc._xla import disk  # noqa: E402
from pmcmc._xla.folder import user_folder  # noqa: E402

# Compiled programs of tests, for all checkouts: a second run takes two thirds of the time. Those that are found without
# tracing are not kept, since they know nothing of what a test has replaced.
pmcmc.cache_programs(f"{user_folder()}-of-tests")
disk.keep_in(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="compile every test's programs as users' are")


@pytest.fixture(autouse=True)
def optimization(request: pytest.FixtureRequest) -> None:
    """Compile quickly, since full compilation would be half of most tests' time; tests marked ``optimized`` get it."""
    marked = request.node.get_closest_marker("optimized")
    compile_quickly(not (marked or request.config.getoption("--optimized")))


MAX_MAPS = 30_000  # Linux allows 65,530 per process, and each compiled program takes several


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Drop compiled programs before a worker exceeds the limit on its memory maps, which would crash it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()


@pytest.fixture
def rng_key() -> jax.Array:
    """The one fixed seed; tests split it into named keys."""
    return jax.random.key(0)


@pytest.fixture
def free_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the costs of a large GPU, whatever this machine is and whatever else it runs.

    No run is too short for a plan, a pilot may take a fifth of it, and blocks always pay where chains merge. Programs
    are waited for, so that the steps sampled sequentially do not depend on compile times.
    """
    from pmcmc.planning import Costs
    from pmcmc.sampling import automatic, pilot

    monkeypatch.setattr(automatic, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(automatic, "num_cores", lambda: 1)
    monkeypatch.setattr(automatic, "is_compiling", lambda: False)
    monkeypatch.setattr(pilot, "TIMING_SECONDS", 1e-9)
    monkeypatch.setattr(pilot, "SHARE", 0.2)
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e6, 1e6, 1e4, 0.0))


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """Keep no program from before, so that a planted fault is compiled, and keep none of this test for others."""
    from pmcmc._xla.compile import forget_programs

    forget_programs()
    yield
    forget_programs()
