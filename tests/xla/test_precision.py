"""Float32 products stay float32 on a GPU, and products of fewer bits are recognised."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._xla import compile as compiling
from pmcmc._xla import precision
from pmcmc._xla.compile import adapted, tuned_jit
from pmcmc._xla.equations import replacing
from pmcmc.recurrence import MultipleShooting
from pmcmc.sampling import reporting
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import solve_noise
from pmcmc.target import Basis, Target

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\(?[^\n]*")
PRECISION = re.compile(r"\b(DEFAULT|HIGH|HIGHEST)\b")
x = jnp.ones((4, 4), jnp.float32)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, fresh_programs: None) -> None:
    """Trace as for a GPU."""
    for module in (compiling, precision):
        monkeypatch.setattr(module, "default_platform", lambda: "gpu")


def products(fn: Callable, *args) -> list[str]:
    """Return the precision of each product in the program that a GPU would get."""
    return precisions(jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def precisions(text: str) -> list[str]:
    return ["/".join(sorted(set(PRECISION.findall(line)))) for line in PRODUCT.findall(text)]


HELD = {
    "plain": lambda x: x @ x,
    "gradient": jax.grad(lambda x: jnp.sum(jnp.tanh(x @ x))),
    "lanes": jax.vmap(lambda row: x @ row),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ x, x),
    "branch": lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x),
    "jitted": lambda x: jax.jit(lambda y: y @ y)(x) + jax.jit(lambda y: y @ y)(x + 1),
    "rematerialised": jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda y: jnp.sin(y @ y))(x))),
    "convolution": lambda x: jnp.convolve(x[0], x[1]),
    "complex": lambda x: (x + 1j) @ x.astype(jnp.complex64),
}


@pytest.mark.parametrize("name", HELD)
def test_every_product_is_in_full(name: str, on_gpu: None) -> None:
    before, after = products(HELD[name], x), products(adapted(HELD[name]), x)
    assert set(before) == {"DEFAULT"}
    assert after == ["HIGHEST"] * len(before)
    np.testing.assert_array_equal(jax.jit(adapted(HELD[name]))(x), jax.jit(HELD[name])(x))


def test_a_chosen_precision_stays(on_gpu: None) -> None:
    said = adapted(lambda x: (jnp.matmul(x, x, precision="default"), jnp.matmul(x, x, precision="tensorfloat32")))
    assert products(said, x) == ["DEFAULT", "HIGH"]
    with jax.default_matmul_precision("tensorfloat32"):
        assert products(adapted(lambda x: x @ x), x) == ["HIGH"]


def test_other_products_and_cpus_are_left_alone(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(adapted(lambda x: x @ x), x.astype(float)) == ["DEFAULT"]
    assert products(adapted(lambda x: x @ x), x.astype(jnp.bfloat16)) == ["DEFAULT"]
    monkeypatch.setattr(compiling, "default_platform", lambda: "cpu")
    assert products(adapted(lambda x: x @ x), x) == ["DEFAULT"]


def test_programs_without_products_are_the_same_program(on_gpu: None) -> None:
    plain = lambda x: jnp.sum(jnp.sin(x))
    lowered = lambda fn: jax.jit(fn).lower(x).as_text()
    assert lowered(replacing(precision.RULES, plain)) == lowered(plain)


def logistic(dim: int, product: Callable = jnp.matmul, dtype=jnp.float32) -> Callable:
    rng = np.random.default_rng(0)
    design = jnp.asarray(rng.standard_normal((60, dim)), dtype)
    good = jnp.asarray(rng.random(60) < 0.5, dtype)

    def logdensity(beta):
        logits = product(design, beta)
        return jnp.sum(good * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(beta**2)

    return logdensity


def test_products_of_a_solve(on_gpu: None) -> None:
    """Those of the model, of its gradient and of a dense basis of more than 32 rows, in sweeps and repair."""
    dim = 40
    start = jnp.zeros(dim, jnp.float32)
    target = Target.from_logdensity(logistic(dim), start).with_basis(Basis(start, jnp.eye(dim, dtype=jnp.float32)))
    bank = jnp.zeros((4, dim), jnp.float32)
    engine = Engine(target, pmcmc.HMC(0.1, 2), jax.random.split(jax.random.key(0), 1), bank, jnp.ones(dim, jnp.float32))
    solver = MultipleShooting(64)
    shape = engine.shape_for(solver, 64 * 32)._replace(draws=False, num_parts=1)  # a GPU reads its noise
    noise, record = engine._buffer_shapes(shape)
    number, numbers = jax.ShapeDtypeStruct((), int), jax.ShapeDtypeStruct((1,), int)
    arguments = (target, engine.kernel, solver, noise, bank[:1], numbers, numbers, number, bank, engine.scale, record)
    jitted = solve_noise._jitted(target)
    text = jitted.trace(*arguments, shape=shape).lower(lowering_platforms=("cuda",)).as_text()
    engine.background.close()
    found = precisions(text)
    assert len(found) >= 4
    assert set(found) == {"HIGHEST"}


def test_a_traced_model_follows_the_settings(on_gpu: None) -> None:
    """The model is traced when it is passed in, and its products are judged then."""
    value = tuned_jit()(lambda target, x: target.model.logdensity(target.data, x))

    def found() -> set[str]:
        target = Target.from_logdensity(logistic(3), jnp.zeros(3, jnp.float32))
        lowered = value._jitted(target).trace(target, jnp.zeros(3, jnp.float32)).lower(lowering_platforms=("cuda",))
        return set(precisions(lowered.as_text()))

    assert found() == {"HIGHEST"}
    with jax.default_matmul_precision("default"):
        assert found() == {"DEFAULT"}


@jax.custom_vjp
def cut_product(x, b):
    """What TF32 computes: both operands with 10 bits, the sum in more."""
    return cut(x) @ cut(b)


def cut(x):
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


cut_product.defvjp(lambda x, b: (cut_product(x, b), x), lambda x, g: (jnp.zeros_like(x), cut(g) @ cut(x)))


def sampled(product: Callable) -> pmcmc.Chain:
    logdensity, sizes = logistic(20, product, float), dict(num_samples=20_000, num_chains=1, num_warmup=300)
    return pmcmc.sample(logdensity, jnp.zeros(20), 0, kernel=pmcmc.HMC(), progress_bar=False, **sizes)


@pytest.mark.optimized
def test_auto_recognises_products_of_ten_bits(free_lanes: None) -> None:
    """With them no pair merges: the run is sampled sequentially, and the report says why."""
    full, coarse = sampled(jnp.matmul).report, sampled(cut_product).report
    assert full.decision == "shooting"
    assert coarse.decision == "sequential"
    assert coarse.reason.startswith("Only 0 of ")
    assert coarse.num_blocks == 1
    (said,) = coarse.diagnosis.suggestions
    assert re.match(r"Paths come within about \S+ sd of each other and no closer", said)
    assert "TF32" in str(coarse)
    near = float(re.search(r"within about (\S+) sd", said)[1])
    assert 1e-5 < near < 0.1


def test_the_report_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and where it is float32, nothing is said."""
    report = pmcmc.sample(lambda x: -0.5 * x**2, 0.0, 0, num_samples=20, num_warmup=100, progress_bar=False).report
    assert report.precision == ""
    assert "Matrix products" not in str(report)
    for name, said in (("tensorfloat32", "tensorfloat32"), ("highest", ""), ("float32", ""), (None, "")):
        with jax.default_matmul_precision(name):
            assert precision.asked_for() == ""
            monkeypatch.setattr(precision, "default_platform", lambda: "gpu")
            assert precision.asked_for() == said
            monkeypatch.undo()
    monkeypatch.setattr(reporting, "asked_for", lambda: "bfloat16")
    report = pmcmc.sample(lambda x: -0.5 * x**2, 0.0, 0, num_samples=20, num_warmup=100, progress_bar=False).report
    assert "Matrix products: bfloat16, below float32" in str(report)
