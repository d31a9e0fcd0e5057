"""Settings of every test: float64, no silent broadcasting over ranks, checked annotations, a compilation cache."""

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("pmcmc", "beartype.beartype")  # before the first import of pmcmc anywhere

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # -1: no minimum, whatever the backend's default


@pytest.fixture
def rng_key() -> jax.Array:
    """The one fixed seed; tests split it into named keys."""
    return jax.random.key(0)
