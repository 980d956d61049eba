"""One suite for every implementation of matmul, against float64 NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.test_util import check_grads

import pallas_kernels as pk
from pallas_kernels._backend import BACKENDS, Problem
from pallas_kernels._layout import as_prepared

IMPLEMENTATIONS = ["xla", "triton"]
# What runs interpreted, which is slow: everything on prepared matrices but for these, canonical ones forwards only.
CANONICAL = {"test_shapes", "test_counts"}
NOT_INTERPRETED = {
    "test_gradients_by_finite_differences",  # the same gradients are compared with float64
    "test_vmap_over_activations",
    "test_jit_remat_and_donation",
    "test_the_same_call_compiles_once",
}
LAYOUTS = ["token_major", "feature_major"]
NUMPY_ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.where(y.real > 0, y, 0),
    "gelu": lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + np.exp(-y)),
}
JAX_ACTIVATIONS = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}

# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

matmul = jax.jit(pk.matmul, static_argnames=("activation", "layout", "implementation"))
to_dense = jax.jit(pk.to_dense)
to_dense_stacked = jax.jit(jax.vmap(pk.to_dense))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def ieee():
    """On a GPU float32 products are TF32 by default; here they are compared with float64."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=[False, True], ids=["canonical", "prepared"])
def arrange(request, implementation):
    """What a matrix goes through before the product; where the implementation cannot do it, the test is skipped."""
    interpreted = implementation == "triton" and jax.default_backend() == "cpu"
    name = request.function.__name__
    if interpreted and (name in NOT_INTERPRETED or (not request.param and name not in CANONICAL)):
        pytest.skip("interpreted kernels are slow: on a GPU everything runs")

    def arranged(matrix):
        skip_unless_able(matrix, implementation)
        return pk.prepare(matrix, implementation) if request.param else matrix

    return arranged


def skip_unless_able(matrix, implementation):
    layout = as_prepared(matrix).layout
    if reasons := BACKENDS[implementation].why_not(Problem.of_layout("forward", layout, 16, matrix.dtype)):
        pytest.skip(f"{implementation}: {'; '.join(reasons)}")


def random_kept(rng, r, k, counts):
    kept = np.zeros((r, k), bool)
    for group, count in enumerate(counts):
        kept[group, rng.permutation(k)[:count]] = True
    return kept


def random_rows(rng, m, r, v, spread=False):
    """A permutation with sentinels at the end, or at any slot."""
    rows = np.full(r * v, m, np.int32)
    rows[rng.permutation(r * v)[:m] if spread else slice(m)] = rng.permutation(m)
    return rows


def make(m, k, v, counts="ragged", seed=0, dtype=np.float32, spread=False):
    """A matrix, and the same one dense in float64 after rounding to `dtype`."""
    rng = np.random.default_rng([seed, m, k, v])
    r = -(-m // v)
    if isinstance(counts, str):
        counts = {
            "ragged": np.minimum(rng.lognormal(np.log(max(k / 4, 1)), 0.5, r).astype(int), k),
            "equal": np.full(r, max(1, k // 4)),
            "full": np.full(r, k),
            "mixed": np.resize([0, k, 1, max(1, k // 3)], r),
            "last": np.eye(1, r, r - 1, dtype=int)[0],
            "none": np.zeros(r, int),
        }[counts]
    kept, rows = random_kept(rng, r, k, counts), random_rows(rng, m, r, v, spread)
    weight = np.asarray(jnp.asarray(rng.standard_normal((m, k)), dtype))
    matrix = pk.from_dense(weight, rows, kept)
    group = np.empty(m, int)
    live = rows < m
    group[rows[live]] = np.arange(r * v)[live] // v
    return matrix, np.where(kept[group], weight.astype(np.float64), 0)


def product(dense, x, bias, activation, layout):
    """The float64 reference."""
    x = np.asarray(x, np.float64)
    y = x @ dense.T if layout == "token_major" else np.tensordot(dense, x, 1)
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        y = y + bias.reshape([1] * (y.ndim - 1) + [-1] if layout == "token_major" else [-1] + [1] * (y.ndim - 1))
    return NUMPY_ACTIVATIONS[activation](y)


@functools.partial(jax.jit, static_argnums=(3, 4))
def dense_product(dense, x, bias, activation, layout):
    """The dense product in the dtype of its arguments, whose own error sets the tolerance."""
    y = x @ dense.T if layout == "token_major" else jnp.tensordot(dense, x, 1)
    if bias is not None:
        y = y + bias.reshape([1] * (y.ndim - 1) + [-1] if layout == "token_major" else [-1] + [1] * (y.ndim - 1))
    return JAX_ACTIVATIONS[activation](y)


def assert_as_good_as_dense(actual, dense, reference, dtype):
    """At most twice the error of the dense product, and one unit of rounding where that is exact by chance."""
    actual, dense, reference = (np.asarray(a, np.float64) for a in (actual, dense, reference))
    assert actual.shape == reference.shape
    own = np.abs(dense - reference).max(initial=0)
    scale = np.abs(reference).max(initial=0)
    assert np.abs(actual - reference).max(initial=0) <= 2 * own + 2 * float(jnp.finfo(dtype).eps) * scale


def activations(rng, k, tokens, layout, dtype=np.float32):
    shape = (*tokens, k) if layout == "token_major" else (k, *tokens)
    return jnp.asarray(rng.standard_normal(shape), dtype)


SHAPES = [(37, 23, 16, (7,)), (100, 70, 32, (3, 5)), (64, 64, 64, ()), (300, 130, 128, (9,)), (129, 33, 64, (1,))]
SHAPES += [
    (64, 64, 64, (0,)),
    (100, 70, 32, (2, 5)),
    (13, 11, 1, (4,)),
    (29, 17, 3, (2, 2)),
    (23, 40, 5, (6,)),
    (16, 1, 16, (5,)),
    (1, 9, 16, (3,)),
]
COUNTS = ["ragged", "equal", "full", "mixed", "last", "none"]


@pytest.mark.parametrize(
    ("m", "k", "v", "tokens", "layout"), [(*shape, LAYOUTS[i % 2]) for i, shape in enumerate(SHAPES)]
)
def test_shapes(implementation, arrange, m, k, v, tokens, layout):
    matrix, dense = make(m, k, v, "ragged")
    x = activations(np.random.default_rng(1), k, tokens, layout)
    y = matmul(arrange(matrix), x, layout=layout, implementation=implementation)
    own = dense_product(jnp.asarray(dense, jnp.float32), x, None, None, layout)
    assert y.dtype == jnp.float32
    assert_as_good_as_dense(y, own, product(dense, x, None, None, layout), jnp.float32)


@pytest.mark.parametrize(("m", "v", "counts"), [*((70, 16, counts) for counts in COUNTS), (50, 64, "ragged")])
def test_counts(implementation, arrange, counts, m, v):
    k, rng = 45, np.random.default_rng(2)
    matrix, dense = make(m, k, v, counts, spread=True)
    x, bias = activations(rng, k, (6,), "token_major"), jnp.asarray(rng.standard_normal(m), jnp.float32)
    y = matmul(arrange(matrix), x, bias=bias, implementation=implementation)
    own = dense_product(jnp.asarray(dense, jnp.float32), x, bias, None, "token_major")
    assert_as_good_as_dense(y, own, product(dense, x, bias, None, "token_major"), jnp.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(jnp.bfloat16, "silu"), (jnp.float16, "gelu"), *((jnp.float32, name) for name in NUMPY_ACTIVATIONS)],
)
def test_dtypes_bias_and_activations(implementation, arrange, dtype, activation, layout):
    rng = np.random.default_rng(3)
    matrix, dense = make(70, 90, 32, "ragged", dtype=dtype)
    x, bias = activations(rng, 90, (3, 4), layout, dtype), jnp.asarray(rng.standard_normal(70), dtype)
    y = matmul(arrange(matrix), x, bias=bias, activation=activation, layout=layout, implementation=implementation)
    own = dense_product(jnp.asarray(dense, dtype), x, bias, activation, layout)
    assert y.dtype == dtype
    assert_as_good_as_dense(y, own, product(dense, x, bias, activation, layout), dtype)


def test_dtypes_are_promoted(implementation):
    matrix, dense = make(20, 12, 16)
    x = activations(np.random.default_rng(4), 12, (5,), "token_major", jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # where a user has set "strict", JAX's own error says so
        y, pull = jax.vjp(
            lambda values, x: pk.matmul(pk.join(values, matrix.integers), x, implementation=implementation),
            matrix.values,
            x,
        )
    assert y.dtype == jnp.float32
    assert [g.dtype for g in pull(y)] == [jnp.float32, jnp.bfloat16]
    own = dense_product(jnp.asarray(dense, jnp.float32), x.astype(jnp.float32), None, None, "token_major")
    assert_as_good_as_dense(y, own, product(dense, x, None, None, "token_major"), jnp.float32)


@pytest.mark.parametrize(
    ("m", "v", "counts", "activation", "dtype", "layout"),
    [
        (70, 32, "ragged", "gelu", jnp.float32, "token_major"),
        (70, 32, "ragged", "silu", jnp.float32, "feature_major"),
        (64, 16, "equal", None, jnp.float32, "token_major"),
        (64, 16, "equal", None, jnp.float32, "feature_major"),
        (50, 64, "mixed", "silu", jnp.float32, "token_major"),
        (20, 3, "mixed", "relu", jnp.float32, "feature_major"),
        (64, 32, "last", None, jnp.float32, "token_major"),
        (20, 16, "none", "gelu", jnp.float32, "feature_major"),
        (70, 32, "ragged", "gelu", jnp.bfloat16, "token_major"),
        (70, 32, "ragged", "gelu", jnp.bfloat16, "feature_major"),
    ],
)
def test_gradients(implementation, arrange, layout, m, v, counts, activation, dtype):
    rng, k = np.random.default_rng(5), 45
    matrix, dense = make(m, k, v, counts, dtype=dtype, spread=True)
    matrix = arrange(matrix)
    x, bias = activations(rng, k, (3, 2), layout, dtype), jnp.asarray(rng.standard_normal(m), dtype)

    @jax.jit
    def gradients(matrix, x, bias, dy):
        def sparse(values, x, bias):
            w = pk.join(values, matrix.integers)
            return pk.matmul(w, x, bias=bias, activation=activation, layout=layout, implementation=implementation)

        return jax.vjp(sparse, matrix.values, x, bias)[1](dy)

    @jax.jit
    def dense_gradients(dense, x, bias, dy):
        return jax.vjp(lambda w, x, bias: dense_product(w, x, bias, activation, layout), dense, x, bias)[1](dy)

    dy = jnp.asarray(rng.standard_normal((3, 2, m) if layout == "token_major" else (m, 3, 2)), dtype)
    dvalues, dx, dbias = gradients(matrix, x, bias, dy)
    own_dense, own_x, own_bias = dense_gradients(jnp.asarray(dense, dtype), x, bias, dy)
    ref_dense, ref_x, ref_bias = numpy_gradients(dense, x, bias, dy, activation, layout)
    assert_as_good_as_dense(dx, own_x, ref_x, dtype)
    assert_as_good_as_dense(dbias, own_bias, ref_bias, dtype)
    stored = np.asarray(to_dense(pk.join(jnp.ones_like(matrix.values), matrix.integers)), np.float64)
    spread = np.asarray(to_dense(pk.join(dvalues, matrix.integers)), np.float64)
    assert_as_good_as_dense(spread, np.asarray(own_dense, np.float64) * stored, ref_dense * stored, dtype)
    # What `to_dense` does not read, padding and sentinel rows, has no gradient.
    assert np.count_nonzero(np.asarray(dvalues, np.float64)) == np.count_nonzero(spread)


def numpy_gradients(dense, x, bias, dy, activation, layout):
    """Float64 gradients of `product`; the activation's derivative by a complex step, exact to rounding."""
    (m, k), (x, bias, dy) = dense.shape, (np.asarray(a, np.float64) for a in (x, bias, dy))
    token_major = layout == "token_major"
    flat = x.reshape(-1, k) if token_major else x.reshape(k, -1).T
    flat_dy = dy.reshape(-1, m) if token_major else dy.reshape(m, -1).T
    flat_dy = flat_dy * (NUMPY_ACTIVATIONS[activation](flat @ dense.T + bias + 1e-30j).imag / 1e-30)
    dx = flat_dy @ dense if token_major else (flat_dy @ dense).T
    return flat_dy.T @ flat, dx.reshape(x.shape), flat_dy.sum(0)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_by_finite_differences(implementation, arrange, activation):
    matrix, _ = make(21, 12, 16, "mixed")
    matrix = arrange(matrix)
    x = activations(np.random.default_rng(6), 12, (4,), "token_major")
    bias = jnp.linspace(-1, 1, 21)

    @jax.jit
    def f(values, x, bias):
        w = pk.join(values, matrix.integers)
        return pk.matmul(w, x, bias=bias, activation=activation, implementation=implementation).sum()

    # Padding is kept at zero: its gradient is zero by contract, whatever a probe there would do to the output.
    padding = np.asarray(jax.jit(jax.grad(f))(matrix.values, x, bias)) == 0
    check_grads(
        lambda values, x, bias: f(jnp.where(padding, 0, values), x, bias),
        (matrix.values, x, bias),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
        eps=1e-2,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counts", [(5, 0, 9, 1), (4, 4, 4, 4)])
def test_what_is_not_finite_and_unused_never_leaks(implementation, arrange, layout, counts, bad):
    m, k, v, rng = 60, 24, 16, np.random.default_rng(7)
    used = rng.permutation(k)[:12]
    unused = np.setdiff1d(np.arange(k), used)
    kept = np.zeros((4, k), bool)
    for group, count in enumerate(counts):
        kept[group, used[rng.permutation(12)[:count]]] = True
    rows = random_rows(rng, m, 4, v, spread=True)
    weight = rng.standard_normal((m, k)).astype(np.float32)
    weight[:, unused] = bad
    matrix = pk.from_dense(weight, rows, kept)
    sentinels = np.repeat(rows.reshape(4, v) == m, np.diff(matrix.integers.group_ptr), axis=0)
    matrix = arrange(pk.join(jnp.where(sentinels, bad, matrix.values), matrix.integers))
    x = np.array(activations(rng, k, (5,), "feature_major"))
    x[unused] = bad
    x = x if layout == "feature_major" else x.T

    def run(values, x):
        return pk.matmul(pk.join(values, matrix.integers), x, layout=layout, implementation=implementation)

    @jax.jit
    def run_and_pull(values, x):
        y, pull = jax.vjp(run, values, x)
        return y, *pull(jnp.ones_like(y))

    y, dvalues, dx = run_and_pull(matrix.values, jnp.asarray(x))
    dense = np.where(np.repeat(kept, v, 0)[np.argsort(rows)[:m]], weight, 0)
    clean = np.where(np.isfinite(x), x, 0)
    np.testing.assert_allclose(y, product(dense, clean, None, None, layout), rtol=1e-4, atol=1e-5)
    assert np.isfinite(dvalues).all()
    expected = np.repeat(dense.sum(0)[:, None], 5, 1)
    np.testing.assert_allclose(dx, expected if layout == "feature_major" else expected.T, rtol=1e-4, atol=1e-5)


def stacked(counts=((3, 7, 0, 5), (9, 1, 4, 4), (4, 4, 4, 4)), m=60, k=20, v=16):
    rng = np.random.default_rng(8)
    rows = np.stack([random_rows(rng, m, 4, v, spread=True) for _ in counts])
    kept = np.stack([random_kept(rng, 4, k, c) for c in counts])
    weight = rng.standard_normal((len(counts), m, k)).astype(np.float32)
    matrix = pk.from_dense(weight, rows, kept)
    return matrix, np.asarray(to_dense_stacked(matrix), np.float64)


@pytest.mark.parametrize(
    ("counts", "layout"),
    [
        (((3, 7, 0, 5), (9, 1, 4, 4)), "token_major"),
        (((4, 4, 4, 4), (4, 3, 2, 4)), "feature_major"),
        (((5,) * 4,) * 2, "feature_major"),
    ],
)
def test_vmap_and_scan_over_a_stacked_matrix(implementation, arrange, layout, counts):
    matrix, dense = stacked(counts)
    matrix = arrange(matrix)
    rng = np.random.default_rng(9)
    xs = jnp.stack([activations(rng, 20, (6,), layout) for _ in counts])

    def run(matrix, x):
        return pk.matmul(matrix, x, layout=layout, implementation=implementation)

    expected = np.stack([product(d, x, None, None, layout) for d, x in zip(dense, xs, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(matrix, xs), expected, rtol=1e-4, atol=1e-5)
    one = jax.jit(jax.vmap(run, (0, None)))(matrix, xs[0])[1]
    np.testing.assert_allclose(one, product(dense[1], xs[0], None, None, layout), rtol=1e-4, atol=1e-5)
    scanned = jax.jit(lambda args: lax.map(lambda a: run(*a), args))((matrix, xs))
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-5)

    def loss(values, xs):
        return jnp.square(jax.vmap(run)(pk.join(values, matrix.integers), xs)).sum()

    dvalues, dxs = jax.jit(jax.grad(loss, (0, 1)))(matrix.values, xs)
    for i, (d, x) in enumerate(zip(dense, xs, strict=True)):
        x64 = np.asarray(x, np.float64) if layout == "feature_major" else np.asarray(x, np.float64).T
        one = jax.tree.map(lambda a, i=i: a[i], pk.join(dvalues, matrix.integers))
        np.testing.assert_allclose(to_dense(one), 2 * d @ x64 @ x64.T * (d != 0), rtol=1e-3, atol=1e-4)
        dx = 2 * d.T @ (d @ x64)
        np.testing.assert_allclose(dxs[i], dx if layout == "feature_major" else dx.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_over_activations(implementation, arrange, layout):
    matrix, dense = make(70, 45, 32)
    matrix = arrange(matrix)
    rng = np.random.default_rng(10)
    xs = jnp.stack([activations(rng, 45, (6,), layout) for _ in range(3)])
    run = jax.vmap(lambda x: pk.matmul(matrix, x, layout=layout, activation="relu", implementation=implementation))
    for y, x in zip(jax.jit(run)(xs), xs, strict=True):
        np.testing.assert_allclose(y, product(dense, x, None, "relu", layout), rtol=1e-4, atol=1e-5)
    grad = jax.grad(lambda x: pk.matmul(matrix, x, layout=layout, implementation=implementation).sum())
    sliced = jax.jit(jax.vmap(grad))(xs)
    expected = np.broadcast_to(dense.sum(0), (6, 45))
    for dx in sliced:
        np.testing.assert_allclose(dx, expected if layout == "token_major" else expected.T, rtol=1e-4, atol=1e-5)


def test_jit_remat_and_donation(implementation, arrange):
    matrix, dense = make(45, 45, 32)
    matrix = arrange(matrix)
    x = activations(np.random.default_rng(11), 45, (8,), "token_major")
    expected = product(dense, product(dense, x, None, "silu", "token_major"), None, "silu", "token_major")

    def run(matrix, x):
        layer = jax.checkpoint(lambda x: pk.matmul(matrix, x, activation="silu", implementation=implementation))
        return layer(layer(x))

    np.testing.assert_allclose(jax.jit(run)(matrix, x), expected, rtol=1e-4, atol=1e-5)

    def plain(matrix, x):
        for _ in range(2):
            x = pk.matmul(matrix, x, activation="silu", implementation=implementation)
        return x

    grads = [jax.jit(jax.grad(lambda x, f=f: f(matrix, x).sum()))(x) for f in (run, plain)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-6)
    donated = jax.jit(run, donate_argnums=1)(matrix, x.copy())
    np.testing.assert_allclose(donated, expected, rtol=1e-4, atol=1e-5)


def test_export_round_trip(implementation, arrange):
    matrix, dense = make(45, 30, 16)
    matrix = arrange(matrix)
    x = activations(np.random.default_rng(12), 30, (8,), "token_major")
    run = jax.jit(
        lambda values, x: pk.matmul(
            pk.join(values, matrix.integers), x, activation="relu", implementation=implementation
        )
    )
    # JAX promises no stability of this call's format, so it lets it pass on request only.
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exported = export.export(run, disabled_checks=checks)(jax.ShapeDtypeStruct(matrix.values.shape, jnp.float32), x)
    restored = export.deserialize(exported.serialize())
    expected = product(dense, x, None, "relu", "token_major")
    np.testing.assert_allclose(restored.call(matrix.values, x), expected, rtol=1e-4, atol=1e-5)


def test_the_same_call_compiles_once(implementation, arrange):
    matrices = [arrange(make(45, 30, 16, "equal", seed=seed)[0]) for seed in range(2)]
    x = activations(np.random.default_rng(13), 30, (8,), "token_major")
    traces = itertools.count()

    @jax.jit
    def run(matrix, x):
        next(traces)
        return pk.matmul(matrix, x, implementation=implementation)

    first = [run(matrix, x) for matrix in matrices]
    assert next(traces) == 1
    assert not np.allclose(*first)


def test_the_gradient_of_values_makes_no_dense_weight(implementation, arrange):
    m, k, n = 256, 512, 8
    matrix, _ = make(m, k, 64, "equal")
    matrix = arrange(matrix)
    x = activations(np.random.default_rng(14), k, (n,), "token_major")
    grad = jax.grad(lambda values: pk.matmul(pk.join(values, matrix.integers), x, implementation=implementation).sum())
    text = str(jax.make_jaxpr(grad)(matrix.values))
    assert f"f32[{m},{k}]" not in text.replace(" ", "")
    sizes = [eqn_size for eqn_size in _sizes(jax.make_jaxpr(grad)(matrix.values).jaxpr)]
    assert max(sizes) < m * k


def _sizes(jaxpr):
    used = set()
    for eqn in reversed(jaxpr.eqns):
        # Equations nobody reads (dX, which XLA drops as well) are no temporary.
        if used.isdisjoint(eqn.outvars) and not set(jaxpr.outvars) & set(eqn.outvars):
            continue
        used.update(v for v in eqn.invars if not hasattr(v, "val"))
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(sub, "jaxpr"):
                yield from _sizes(sub.jaxpr)
        yield from (v.aval.size for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))


def test_prepared_matrices_stand_for_the_same_weights(implementation):
    for counts in COUNTS if implementation == "xla" else COUNTS[:-1]:  # Triton's kernels need a slot
        matrix, dense = make(70, 45, 16, counts, spread=True)
        np.testing.assert_array_equal(to_dense(pk.prepare(matrix, implementation)), dense)
    matrix, dense = stacked()
    np.testing.assert_array_equal(to_dense_stacked(pk.prepare(matrix, implementation)), dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addends(layout):
    matrix, dense = make(20, 12, 16)
    rng = np.random.default_rng(0)
    x, addend, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 12), (6, 20), (6, 20)))
    turn = jnp.transpose if layout == "feature_major" else lambda a: a
    tokens = (2, 3)

    @jax.jit
    def run(x, addend):
        x, addend = (a.reshape(*tokens, -1) if layout == "token_major" else a.reshape(-1, *tokens) for a in (x, addend))
        y = pk.matmul(matrix, x, addend=addend, activation="gelu", layout=layout, implementation="xla")
        return y.reshape(-1, 20) if layout == "token_major" else y.reshape(20, -1)

    y, pull = jax.vjp(run, turn(x), turn(addend))
    wanted, back = jax.vjp(lambda x, addend: jax.nn.gelu(x @ jnp.asarray(dense, jnp.float32).T + addend), x, addend)
    for found, want in zip((y, *pull(turn(dy))), (wanted, *back(dy)), strict=True):
        np.testing.assert_allclose(turn(found), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="addend must have the result's shape"):
        pk.matmul(matrix, turn(x), addend=turn(x), layout=layout)


def test_errors(implementation):
    matrix, _ = make(20, 12, 16)
    x = jnp.ones((4, 12))
    with pytest.raises(ValueError, match=r"x must have shape \(\*tokens, 12\).*\(20, 12\), got \(4, 13\)"):
        pk.matmul(matrix, jnp.ones((4, 13)), implementation=implementation)
    with pytest.raises(ValueError, match=r"x must have shape \(12, \*tokens\).*feature_major.*got \(4, 12\)"):
        pk.matmul(matrix, x, layout="feature_major", implementation=implementation)
    with pytest.raises(ValueError, match=r"x must have shape"):
        pk.matmul(matrix, jnp.float32(1), implementation=implementation)
    with pytest.raises(ValueError, match=r"x must be floating, got int32"):
        pk.matmul(matrix, x.astype(jnp.int32), implementation=implementation)
    with pytest.raises(ValueError, match=r"bias must have shape \(20,\).*got \(12,\)"):
        pk.matmul(matrix, x, bias=jnp.ones(12), implementation=implementation)
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'tanh'"):
        pk.matmul(matrix, x, activation="tanh", implementation=implementation)
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'rows'"):
        pk.matmul(matrix, x, layout="rows", implementation=implementation)
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*got 'cuda'"):
        pk.matmul(matrix, x, implementation="cuda")
    with pytest.raises(ValueError, match=r"implementation must be None or one of"):
        pk.prepare(matrix, "cuda")
    with pytest.raises(ValueError, match=r"values must have shape .*to fit their topology"):
        pk.matmul(pk.join(matrix.values[:-1], matrix.integers), x, implementation=implementation)
    with pytest.raises(ValueError, match=r"stacked matrix"):
        pk.matmul(stacked()[0], jnp.ones((4, 20)), implementation=implementation)


def test_a_matrix_is_prepared_once(implementation):
    prepared = pk.prepare(make(20, 12, 16, "mixed")[0], implementation)
    with pytest.raises(ValueError, match="prepared already"):
        pk.prepare(prepared, implementation)
