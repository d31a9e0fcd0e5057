"""`vmap_last` means what ``jax.vmap`` means, whatever a program holds: values, gradients, shapes and dtypes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pmcmc._xla.content import inner_programs
from pmcmc._xla.lane_rules import SMALL_PRODUCT
from pmcmc._xla.lanes_last import vmap_last

LANES = 4
KEY = jax.random.key(3)
INDEX = np.array([2, 0, 1, 1, 2, 4])
LARGE = round(SMALL_PRODUCT**0.5) + 5


def normal(*shape):
    """Return numbers that depend on the shape alone."""
    return np.random.default_rng(shape).normal(size=shape)


def agree(fn, *arguments, in_axes=-1, gradient=True):
    """Compare `vmap_last` with ``jax.vmap``; with gradients of the sum of all results, if asked for."""
    floating = [n for n, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
    total = lambda *args: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(fn(*args)) if is_floating(jnp.asarray(x)))
    both = lambda *args: (fn(*args), jax.grad(total, floating)(*args)) if gradient and floating else fn(*args)
    found = jax.jit(vmap_last(both, in_axes))(*arguments)
    axes = in_axes if in_axes == -1 else tuple(in_axes)
    expected = jax.jit(jax.vmap(both, in_axes=axes, out_axes=-1))(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        bound = 1e-5 if x.dtype in (jnp.float32, jnp.complex64) else 1e-11
        x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


def is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


UNARY = {
    "cumulative": lambda x: (jnp.cumsum(x, 0), jnp.cumprod(x, 1), lax.cummax(x, 1), lax.cumlogsumexp(x, 0)),
    "reversed": lambda x: lax.cumsum(x, 0, reverse=True),
    "reduced": lambda x: (x.sum(0), x.prod(1), x.max(), x.min(0), jnp.any(x > 0, 1), jnp.all(x > 0), jnp.argmax(x, 1)),
    "softmax": lambda x: (jax.nn.softmax(x, 0), jax.nn.logsumexp(x, 1), jax.nn.relu(x), jax.nn.softplus(x)),
    "axes": lambda x: (x.T, x[None, :, None], x.reshape(5, 3), x[::-1, 1:4:2], jnp.squeeze(x[:1, :1])),
    "parts": lambda x: (jnp.split(x, [1], 0), jnp.concatenate([x, jnp.ones((2, 5), x.dtype)]), jnp.stack([x, x], 1)),
    "padded": lambda x: lax.pad(x, jnp.asarray(0.5, x.dtype), ((1, 0, 1), (-1, 2, 0))),
    "padded with a lane's number": lambda x: lax.pad(x, x[0, 0], ((1, 0, 1), (-1, 2, 0))),
    "tiled": lambda x: (jnp.tile(x, (2, 1)), jnp.repeat(x, 2, 1)),
    "clamped": lambda x: (lax.clamp(x[0, 0], x, x[1, 1] + 1), lax.clamp(-0.1, x, 0.5), jnp.clip(x, -0.2, x[2, 2])),
    "selected": lambda x: (
        jnp.where(x[0, 0] > 0, x, 1.0),
        jnp.where(np.eye(3, 5) > 0, x, x.sum()),
        jnp.where(x > 0, 1, x),
    ),
    "selected by a number": lambda x: lax.select_n(jnp.argmax(x[:, 0]).astype(jnp.int32), x, 2 * x, -x),
    "sorted": lambda x: (jnp.sort(x, 0), jnp.sort(x, 1, descending=True), jnp.argsort(x, 1)),
    "sorted with shared keys": lambda x: lax.sort((jnp.array([2, 0, 1]), x[:, 0]), num_keys=1),
    "median": lambda x: (jnp.median(x), jnp.quantile(x, 0.3, axis=0), lax.top_k(x, 2)),
    "special": lambda x: (
        lax.lgamma(x + 3),
        lax.digamma(x + 3),
        lax.erf(x),
        lax.igamma(x + 3, x + 3),
        x**3,
        jnp.abs(x) ** 1.5,
    ),
    "bits": lambda x: (lax.bitcast_convert_type(x, jnp.uint8), lax.reduce_precision(x, 8, 10), jnp.nextafter(x, 1.0)),
    "complex": lambda x: jnp.abs(jnp.fft.fft(x[0])) + jnp.real(jnp.conj(lax.complex(x, x))).sum(),
    "dtypes": lambda x: (x.astype(jnp.float32), x > 0, (10 * x).astype(int) // 3, (10 * x).astype(jnp.int8) % 4),
    "constant": lambda x: (jnp.arange(3.0), 1.0, x),
    "gathered": lambda x: (
        x[INDEX % 3],
        x[:, INDEX % 5],
        x[np.ix_([0, 2], [1, 3])],
        x[1],
        jnp.take(x, INDEX, 1, mode="fill"),
    ),
    "gathered at a lane's index": lambda x: (
        x[jnp.argmax(x[:, 0])],
        x[:, jnp.argmax(x[0])],
        jnp.arange(5.0)[jnp.argmax(x[0])],
    ),
    "scattered": lambda x: (
        x.at[1].set(0.0),
        x.at[INDEX % 3, INDEX % 5].add(2.0),
        x.at[:, 2].mul(x[:, 1]),
        x.at[0].max(0.1),
    ),
    "scattered to zeros": lambda x: jnp.zeros(7).at[INDEX].add(jnp.concatenate([x[0], x[1, :1]])),
    "scattered out of bounds": lambda x: x.at[np.array([0, 9])].set(jnp.ones(5), mode="drop"),
    "scattered at a lane's index": lambda x: x.at[jnp.argmax(x[:, 0])].add(1.0),
    "segments": lambda x: jax.ops.segment_sum(x.reshape(-1), np.arange(15) % 4, 4),
    "sliced": lambda x: (lax.dynamic_slice(x, (1, 2), (2, 2)), lax.dynamic_update_slice(x, x[:2, :2], (1, 0))),
    "sliced at a lane's index": lambda x: (
        lax.dynamic_slice(x, (jnp.argmax(x[:, 0]), 0), (2, 2)),
        lax.dynamic_update_slice(x, x[:2, :2], (jnp.argmax(x[:, 0]), 0)),
    ),
    "shared array updated": lambda x: lax.dynamic_update_slice(jnp.ones((4, 6)), x, (1, 0)),
    "factorised": lambda x: (jnp.linalg.cholesky(x @ x.T + jnp.eye(3)), jnp.linalg.slogdet(x @ x.T + jnp.eye(3))[1]),
    "solved": lambda x: jax.scipy.linalg.solve_triangular(jnp.tril(x[:, :3]) + 3 * jnp.eye(3), x[:, 3], lower=True),
    "solved for a lane's right side": lambda x: jnp.linalg.solve(np.eye(3) + 0.1, x),
    "convolved": lambda x: jnp.convolve(x[0], x[1, :3]),
    "differenced": lambda x: (jnp.diff(x, axis=1), jnp.roll(x, 2, 0), jnp.interp(x[0], jnp.arange(5.0), x[1])),
    "pooled": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"),
    "reduced by a function": lambda x: lax.reduce(x, np.ones((), x.dtype), lax.mul, (0,)),
    "barrier": lambda x: lax.optimization_barrier((x, jnp.arange(3.0))),
    "rematerialised": jax.checkpoint(lambda x: jnp.tanh(x @ x.T)),
    "called": lambda x: jax.jit(lambda y, z: (jnp.tanh(y), z + 1))(x, 2.0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", UNARY)
def test_programs(name, dtype):
    smooth = name not in ("bits", "clamped", "median", "reduced by a function")
    with jax.enable_x64(dtype == jnp.float64):
        agree(UNARY[name], jnp.asarray(normal(3, 5, LANES), dtype), gradient=smooth)


DOTS = {
    "vectors": ("i,i->", (5,), (5,)),
    "matrix by vector": ("ij,j->i", (3, 5), (5,)),
    "vector by matrix": ("j,ij->i", (5,), (3, 5)),
    "matrices": ("ij,jk->ik", (3, 5), (5, 2)),
    "outer": ("i,j->ij", (3,), (5,)),
    "batch": ("bij,bjk->bik", (2, 3, 5), (2, 5, 4)),
    "batch in the middle": ("ibj,jkb->bik", (3, 2, 5), (5, 4, 2)),
    "two contracted": ("ijk,jkl->il", (3, 5, 2), (5, 2, 4)),
    "two free": ("abi,icd->abcd", (2, 3, 5), (5, 2, 2)),
    "large": ("ij,jk->ik", (LARGE, LARGE), (LARGE, 2)),
    "large batch": ("ibj,jkb->bik", (3, 2, LARGE), (LARGE, 9, 2)),
    "large two free": ("abi,icd->abcd", (2, 3, LARGE), (LARGE, 4, 2)),
}


@pytest.mark.parametrize("wide", [(-1, -1), (-1, None), (None, -1)])
@pytest.mark.parametrize("name", DOTS)
def test_products(name, wide):
    formula, *shapes = DOTS[name]
    operands = [normal(*shape, *(() if axis is None else (LANES,))) for shape, axis in zip(shapes, wide, strict=True)]
    agree(partial(jnp.einsum, formula), *operands, in_axes=wide)


def test_products_keep_their_dtype_and_precision():
    x, y = jnp.asarray(normal(LARGE, LARGE), jnp.float32), jnp.asarray(normal(LARGE, LANES), jnp.float32)
    agree(partial(jnp.dot, preferred_element_type=jnp.float64), x, y, in_axes=(None, -1), gradient=False)
    precise = partial(jnp.dot, precision=("highest", "default"))
    agree(precise, y, x, in_axes=(-1, None))
    (product,) = [
        e for e in jax.make_jaxpr(vmap_last(precise, (-1, None)))(y, x).eqns if e.primitive.name == "dot_general"
    ]
    assert [p.name for p in product.params["precision"]] == ["DEFAULT", "HIGHEST"]  # for the operands as they are now
    agree(jnp.dot, jnp.arange(6 * LANES).reshape(6, LANES), jnp.arange(6), in_axes=(-1, None))
    agree(jnp.dot, jnp.ones((6, LANES), bool), jnp.ones((6, LANES), bool))


def newton(x):
    """A while loop whose number of rounds differs between lanes."""
    return lax.while_loop(
        lambda s: jnp.abs(s[0] ** 2 - x) > 1e-6, lambda s: (0.5 * (s[0] + x / s[0]), s[1] + 1), (x, 0)
    )


def horner(x):
    """A while loop whose counter stays shared, and reads a shared array and a wide one."""
    body = lambda s: (s[0] + 1, jnp.sin(s[1]) * x[s[0]] + jnp.arange(5.0)[s[0]])
    return lax.while_loop(lambda s: s[0] < 5, body, (0, x[0]))


def chained(x):
    """Carries that become wide one after the other, by way of each other."""
    body = lambda c, u: ((c[1] + 1.0, c[2] * 0.5, jnp.sum(x) + c[0], c[3] + 1), (c[0] + u, c[3]))
    return lax.scan(body, (0.0, 0.0, 0.0, 0), jnp.arange(4.0))


LOOPS = {
    "newton": lambda x: newton(jnp.abs(x[0]) + 1),
    "horner": horner,
    "chained": chained,
    "scan": lambda x: lax.scan(lambda c, u: (jnp.tanh(c + u), c * u), jnp.zeros(()), x),
    "reverse": lambda x: lax.scan(lambda c, u: (jnp.tanh(c + u), c * u), 0.3, x, reverse=True, unroll=2),
    "scan of shared": lambda x: lax.scan(lambda c, u: (jnp.tanh(c + u), u + 1), x[0], jnp.arange(4.0)),
    "fori": lambda x: lax.fori_loop(0, 5, lambda i, s: s + x[i] * jnp.arange(5.0)[i], 0.0),
    "fori of a lane's length": lambda x: lax.fori_loop(0, jnp.argmax(x), lambda i, s: s + x[i], 0.0),
    "nested": lambda x: lax.scan(lambda c, u: (lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + x[i], c), u), 0.1, x),
    "shared branch": lambda x: lax.scan(
        lambda c, i: (lax.cond(i % 2 == 0, lambda v: v + x[i], lambda v: v * 2, c), i), 0.0, jnp.arange(5)
    ),
    "wide branch": lambda x: lax.cond(x[0] > 0, jnp.sin, lambda v: v**2, x),
    "wide branch of a constant": lambda x: lax.cond(x[0] > 0, lambda: 1.0, lambda: 2.0),
    "wide switch": lambda x: lax.switch(jnp.argmax(x), [jnp.sin, jnp.cos, lambda v: v * 0.0, jnp.exp, jnp.tanh], x),
    "shared branch, one constant": lambda x: lax.scan(
        lambda c, i: (c, lax.cond(i > 2, lambda: x, lambda: jnp.zeros(5))), 0, jnp.arange(4)
    ),
    "map": lambda x: lax.map(lambda u: jnp.sum(x) * u, x),
    "associative": lambda x: lax.associative_scan(jnp.multiply, x),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, dtype):
    backwards = name not in ("newton", "horner", "fori of a lane's length")
    with jax.enable_x64(dtype == jnp.float64):
        agree(LOOPS[name], jnp.asarray(normal(5, LANES), dtype), gradient=backwards)


def test_loops_differentiated_forwards():
    fn = lambda x, v: jax.jvp(lambda x: (horner(x)[1], newton(jnp.abs(x[0]) + 1)[0]), (x,), (v,))
    agree(fn, normal(5, LANES), normal(5, LANES) + 1, gradient=False)


def primitives(program):
    """Names of all primitives of a program, and the shapes of their results."""
    for equation in program.eqns:
        yield equation.primitive.name, [var.aval.shape for var in equation.outvars]
        for other in inner_programs(equation):
            yield from primitives(other)


def test_what_lanes_share_is_computed_once_and_read_by_slices():
    fn = lambda x, y: (jnp.tanh(y), lax.fori_loop(0, 5, lambda i, s: s + jnp.exp(y[i]) * x[i], 0.0))
    program = jax.make_jaxpr(vmap_last(fn, (-1, None)))(jnp.ones((5, LANES)), jnp.ones(5))
    found = list(primitives(program.jaxpr))
    assert ("tanh", [(5,)]) in found
    assert ("exp", [()]) in found
    assert not [name for name, _ in found if name in ("gather", "transpose")]


def test_lanes_are_last_in_every_value():
    def fn(x, matrix):
        y = tripled(jax.nn.softplus(jnp.tanh(matrix @ x + x.sum())), jnp.ones(6), 2)
        return jnp.sum(jnp.where(y > 0, y, -y)[:, None] * matrix, 0), y[INDEX], jnp.zeros(9).at[INDEX].add(y)

    arguments = jnp.ones((6, 11)), jnp.ones((6, 6))
    program = jax.make_jaxpr(vmap_last(jax.jacrev(lambda x, m: fn(x, m)[1].sum()), (-1, None)))(*arguments)
    program = program, jax.make_jaxpr(vmap_last(fn, (-1, None)))(*arguments)
    shapes = [shape for one in program for _, results in primitives(one.jaxpr) for shape in results]
    assert all(shape[-1] == 11 for shape in shapes if 11 in shape)
    assert sum(11 in shape for shape in shapes) > 20


@jax.custom_jvp
def doubled(x, n):
    return 2 * x * n


doubled.defjvp(lambda x, t: (2 * x[0] * x[1], 7.0 * t[0]))


@jax.custom_vjp
def tripled(x, y, n):
    return 3 * x * y * n


tripled.defvjp(lambda x, y, n: (3 * x * y * n, x), lambda x, t: (5.0 * t, x * t, None))


@pytest.mark.parametrize("axes", [(-1, -1), (-1, None), (None, -1)])
def test_derivatives_of_their_own_are_kept_inside_and_outside(axes):
    x, y = (normal(3, LANES) if axis else normal(3) for axis in axes)
    fn = lambda x, y: doubled(x, 2) + tripled(x, y, jnp.arange(3))
    agree(fn, x, y, in_axes=axes)
    outside = lambda mapped: jax.grad(lambda x, y: jnp.sum(jnp.sin(mapped(x, y))), (0, 1))(x, y)
    found, expected = outside(vmap_last(fn, axes)), outside(jax.vmap(fn, in_axes=axes, out_axes=-1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found, expected)


def test_derivatives_outside_of_loops_and_products():
    fn = lambda x, m: chained(jnp.tanh(m @ x))[0]
    outside = lambda mapped: jax.grad(lambda x, m: sum(map(jnp.sum, mapped(x, m)[:3])), (0, 1))
    x, m = normal(5, LANES), normal(5, 5)
    found, expected = (outside(f(fn, (-1, None)))(x, m) for f in (vmap_last, partial(jax.vmap, out_axes=-1)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found, expected)


def test_keys_integers_and_booleans():
    def fn(key, count, flag):
        new, other = jax.random.split(key)
        drawn = jax.random.normal(new, (3,)), jax.random.bits(jax.random.fold_in(other, count), (2,))
        return new, drawn, count + 1, ~flag, jnp.where(flag, new, other), jax.random.key_data(key)

    agree(fn, jax.random.split(KEY, LANES), jnp.arange(LANES), jnp.arange(LANES) > 1)
    agree(
        lambda words: jax.random.uniform(jax.random.wrap_key_data(words)),
        jnp.arange(2 * LANES, dtype=jnp.uint32).reshape(2, LANES),
    )


@pytest.mark.parametrize("lanes", [0, 1, 3])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_no_axes_empty_arrays_and_few_lanes(shape, lanes):
    agree(lambda x: (jnp.sin(x), jnp.sum(x), x.reshape(-1), jnp.ones(2), x[..., None]), jnp.ones((*shape, lanes)))


def test_pytrees_and_closures():
    shared = jnp.arange(3.0)
    fn = lambda tree, u: dict(a=tree["a"] * shared + u[0], b=(tree["b"], None))
    tree, u = dict(a=normal(3, LANES), b=jnp.arange(LANES)), (jnp.ones(()), jnp.ones(2))
    found = jax.jit(lambda tree, u: vmap_last(fn, (-1, None))(tree, u))(tree, u)
    expected = jax.vmap(fn, in_axes=(-1, None), out_axes=-1)(tree, u)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_callbacks_are_called_for_every_lane():
    agree(lambda x: jax.pure_callback(np.sin, x, x, vmap_method="sequential"), normal(3, LANES), gradient=False)


@pytest.mark.parametrize(
    ("arguments", "axes"),
    [((jnp.ones(3), jnp.ones(4)), -1), ((jnp.ones(3), jnp.ones(4)), (None, None)), ((jnp.ones(()), jnp.ones(4)), -1)],
    ids=["different", "none", "no axis"],
)
def test_arguments_that_cannot_be_mapped(arguments, axes):
    with pytest.raises(ValueError, match="last axis, the lanes"):
        vmap_last(lambda x, y: x + y, axes)(*arguments)


@pytest.mark.parametrize("start", [-15, -3, 0, 7, 30])
def test_indices_are_not_counted_from_the_end_twice(start: int) -> None:
    """The primitive clamps negative indices; that numpy's are counted from the end is said before it."""
    x = jnp.arange(30.0).reshape(10, 3)

    def both(x, i):
        options = dict(allow_negative_indices=False)
        piece = jax.lax.dynamic_slice(x, [i], [4], **options)
        return piece, jax.lax.dynamic_update_slice(x, -piece, [i], **options), jax.lax.dynamic_slice(x, [i], [4])

    found = vmap_last(both, (-1, None))(x, jnp.asarray(start))
    expected = jax.vmap(both, (-1, None), out_axes=-1)(x, jnp.asarray(start))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernel of the other branch would compile")
def test_branches_of_other_platforms_are_not_compiled():
    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    like = jax.ShapeDtypeStruct((3,), float)
    platform = lambda x: lax.platform_dependent(x, cpu=lambda x: 2 * x, cuda=pl.pallas_call(double, out_shape=like))
    x = jnp.asarray(normal(3, LANES))
    agree(platform, x, gradient=False)
    agree(lambda x: lax.scan(lambda c, _: (platform(c), c[0]), x, None, length=3), x, gradient=False)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_products_of_half_precision_are_summed_in_single(dtype):
    """1,000 numbers of about 1, whose sum half precision loses while it is taken."""
    x = jnp.asarray(1 + np.random.default_rng(0).uniform(size=(1000, LANES)) / 10, dtype)
    y = jnp.asarray(1 + np.random.default_rng(1).uniform(size=1000) / 10, dtype)
    found = jax.jit(vmap_last(lambda x: x @ y))(x)
    exact = np.asarray(x, float).T @ np.asarray(y, float)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, float), exact, rtol=0.51 * float(jnp.finfo(dtype).eps))
