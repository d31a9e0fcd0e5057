"""Compile programs in a fraction of the usual time, to run more slowly: `compile_quickly`."""

from functools import cache
from typing import Any

import jax
from jax._src import compiler  # no public setting applies to all programs of a process and can be changed within it

OLD_EMITTERS = {"xla_cpu_use_fusion_emitters": False}
get_compile_options = compiler.get_compile_options


@cache
def options() -> dict[str, Any]:
    """Return the compiler options; None if this jaxlib does not know them."""
    try:
        jax.jit(lambda x: x, compiler_options=OLD_EMITTERS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return OLD_EMITTERS


def get_quick_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
    overrides = {**dict(env_options_overrides or {}), **options()}
    return get_compile_options(*args, env_options_overrides=overrides, **kwargs)


def compile_quickly(quickly: bool) -> None:
    """From here on, compile without LLVM's passes and XLA's newer emitters, or again as for users."""
    if jax.config.read("jax_disable_most_optimizations") != quickly:
        options()
        jax.config.update("jax_disable_most_optimizations", quickly)
        compiler.get_compile_options = get_quick_options if quickly else get_compile_options
        jax.clear_caches()  # they do not record how a program was compiled
