"""Products, convolutions and gradients at the edges of what is allowed, on every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import pallas_kernels as pk
from benchmarks.packed import random_matrix as random_packed
from pallas_kernels import tune
from pallas_kernels._backend import BACKENDS, Problem
from pallas_kernels._layout import as_prepared

# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
IMPLEMENTATIONS = ("xla", "triton", None)
FORMS = {
    "plain": lambda: tune.random_matrix(32, 48, 0.5, 16, equal=False, dtype="float32"),
    "packed": lambda: random_packed("tvw", 40, 64, 0.75, 16, "float32"),
}
f32 = functools.partial(jnp.asarray, dtype=jnp.float32)


@pytest.fixture(autouse=True)
def ieee():
    """On a GPU float32 products are TF32 by default; here they are compared with float64."""
    with jax.default_matmul_precision("highest"):
        yield


def arranged(matrix, implementation, prepared):
    return pk.prepare(matrix, implementation) if prepared else matrix


@pytest.mark.parametrize("prepared", [False, True], ids=["canonical", "prepared"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation, form, prepared):
    matrix = arranged(FORMS[form](), implementation, prepared)
    m, k = matrix.shape
    for layout, tokens in (("token_major", (0,)), ("token_major", (3, 0)), ("feature_major", (0, 2))):
        shape = (*tokens, k) if layout == "token_major" else (k, *tokens)
        result = (*tokens, m) if layout == "token_major" else (m, *tokens)

        def run(values, x, bias, addend, layout=layout):
            return pk.matmul(pk.join(values, matrix.integers), x, bias=bias, addend=addend, activation="gelu",
                             layout=layout, implementation=implementation)  # fmt: skip

        args = matrix.values, f32(np.ones(shape)), f32(np.ones(m)), f32(np.ones(result))
        y, pull = jax.vjp(run, *args)
        assert y.shape == result
        for gradient, argument in zip(pull(y), args, strict=True):
            assert gradient.shape == argument.shape
            assert not gradient.any()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation, size):
    matrix = tune.random_matrix(32, 4 * size * size, 0.5, 16, equal=False, dtype="float32")
    for layout, shape in (("CHWN", (4, 6, 5, 0)), ("NHWC", (0, 6, 5, 4)), ("NCHW", (0, 4, 6, 5))):
        for filters in (matrix, arranged(matrix, implementation, True)):

            def run(values, x, bias, filters=filters, layout=layout):
                return pk.conv2d(pk.join(values, filters.integers), x, kernel_size=(size, size), bias=bias,
                                 activation="relu", layout=layout, implementation=implementation)  # fmt: skip

            args = filters.values, f32(np.ones(shape)), f32(np.ones(32))
            y, pull = jax.vjp(run, *args)
            assert y.size == 0
            assert jax.tree.map(jnp.shape, pull(y)) == jax.tree.map(jnp.shape, args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["token_major", "feature_major"])
def test_export_with_a_symbolic_number_of_tokens(layout, form):
    matrix = FORMS[form]()
    k = matrix.shape[1]
    (n,) = export.symbolic_shape("8*b")
    x = jax.ShapeDtypeStruct((n, k) if layout == "token_major" else (k, n), jnp.float32)

    def run(matrix, x):
        def loss(x):
            y = pk.matmul(matrix, x, layout=layout, activation="gelu")
            return y.sum(), y

        return jax.grad(loss, has_aux=True)(x)

    exported = export.export(jax.jit(run), platforms=["cpu", "cuda"])(matrix, x)
    for tokens in (8, 304):
        x = jax.random.normal(jax.random.key(0), (tokens, k) if layout == "token_major" else (k, tokens), "float32")
        for found, wanted in zip(exported.call(matrix, x), jax.jit(run)(matrix, x), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="a number of tokens that is known when tracing"):
        export.export(jax.jit(functools.partial(pk.matmul, layout=layout, implementation="triton")))(
            matrix, jax.ShapeDtypeStruct((n, k) if layout == "token_major" else (k, n), jnp.float32)
        )


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"x": [[1.0] * 48]}, TypeError, "x must be an array, got a list"),
    ({"bias": 1.0}, TypeError, "bias must be an array, got a float"),
    ({"x": jnp.ones((3, 48), jnp.float8_e4m3fn)}, ValueError, "x must be floating, of 16 bits .*, got float8_e4m3fn"),
    ({"bias": jnp.ones(32, jnp.float8_e5m2)}, ValueError, "bias must be floating, of 16 bits or more, got float8_e5m2"),
])  # fmt: skip
def test_what_is_no_array_of_a_known_dtype_gets_our_own_message(change, error, match):
    matrix = FORMS["plain"]()
    with pytest.raises(error, match=match):
        pk.matmul(matrix, **({"x": jnp.ones((3, 48), jnp.float32)} | change))
    small = pk.RowGrouped(matrix.values.astype(jnp.float8_e4m3fn), matrix.topology)
    with pytest.raises(ValueError, match="values must be floating, of 16 bits or more"):
        pk.matmul(small, jnp.ones((3, 48), jnp.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_derivatives_of_activations_do_not_overflow_in_float16(activation, implementation):
    """GELU has the cube of its argument, and float16 ends at 65504."""
    matrix = pk.from_dense(np.full((16, 1), 1.0, np.float16), np.arange(16, dtype=np.int32), np.ones((1, 1), bool))
    x = jnp.asarray([[-300.0], [-60.0], [-2.0], [0.5], [50.0], [900.0]], jnp.float16)
    run = functools.partial(pk.matmul, activation=activation, implementation=implementation)
    addend = jnp.zeros((6, 16), jnp.float16)
    y, pull = jax.vjp(lambda x: run(matrix, x, addend=addend), x)
    exact = jax.vmap(jax.vmap(jax.grad({"gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}[activation])))
    (dx,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(dx, 16 * exact(x.astype(jnp.float32)), rtol=2e-3, atol=2e-2)


def one_of_four():
    """A packed matrix whose rows keep two, one or none of a four: each value, and whether it is a weight."""
    rng = np.random.default_rng(0)
    choice = np.zeros((24, 16), bool)
    for row in range(24):
        for four in range(4):
            choice[row, 4 * four + rng.permutation(4)[: rng.integers(3)]] = True
    weight = rng.standard_normal((24, 16)).astype(np.float32)
    rows = np.minimum(np.arange(32), 24).astype(np.int32)
    order = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    return pk.from_dense_two_four(weight, rows, order, choice), np.where(choice, weight, 0), choice


@pytest.mark.parametrize("prepared", [False, True], ids=["canonical", "prepared"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [5, 144])
def test_what_is_not_chosen_has_no_gradient(implementation, prepared, tokens):
    canonical, dense, choice = one_of_four()
    assert canonical.topology.chosen is not None
    matrix = arranged(canonical, implementation, prepared)
    np.testing.assert_array_equal(pk.to_dense(matrix), dense)
    x = jax.random.normal(jax.random.key(0), (tokens, 16), "float32")

    def run(values):
        return pk.matmul(pk.join(values, matrix.integers), x, implementation=implementation)

    y, pull = jax.vjp(run, matrix.values)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-5)
    (gradient,) = pull(jnp.ones_like(y))
    moved = pk.to_dense(pk.join(matrix.values - 0.1 * gradient, matrix.integers))
    assert not np.asarray(moved)[~choice].any()
    np.testing.assert_allclose(moved, np.where(choice, dense - 0.1 * np.asarray(x).sum(0), 0), rtol=1e-4, atol=1e-4)


def test_full_pairs_need_no_flags():
    assert FORMS["packed"]().topology.chosen is None
    matrix, _, _ = one_of_four()
    t = matrix.topology
    with pytest.raises(ValueError, match=r"chosen must be uint8 of shape \(2, 16\)"):
        pk.row_grouped(matrix.values, t.columns, t.group_ptr, t.rows, t.pairs, t.chosen[:1], m=24, k=16)


BORDERS = [  # (M, K, V, N, sparsity): where kernels change, and where nothing fills a tile
    (128, 96, 64, 256, 0.5), (128, 96, 64, 257, 0.5), (128, 96, 64, 264, 0.5), (64, 80, 64, 1000, 0.5),
    (64, 80, 64, 1001, 0.5), (128, 5, 32, 17, 0.2), (128, 3, 128, 300, 0.0), (1, 40, 16, 9, 0.5), (1, 1, 16, 1, 0.0),
    (300, 130, 128, 128, 0.75), (300, 130, 128, 129, 0.75), (40, 70, 16, 64, 0.5), (40, 70, 16, 65, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
@pytest.mark.parametrize(("m", "k", "v", "n", "sparsity"), BORDERS)
def test_the_borders_of_dispatch(m, k, v, n, sparsity, equal, dtype):
    """Every implementation that can, and the default one, against float64; on a GPU with kernels that run there."""
    interpreted = jax.default_backend() == "cpu"
    if interpreted and (dtype == "bfloat16" or (n > 300 and equal)):
        pytest.skip("interpreted kernels are slow: on a GPU everything runs")
    matrix = tune.random_matrix(m, k, sparsity, v, equal=equal, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (k, n), dtype), jax.random.normal(keys[1], (m, n), dtype)
    bias = jax.random.normal(keys[2], (m,), dtype)
    w, x64, dy64, b64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (pk.to_dense(matrix), x, dy, bias))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name in (None, "xla", "triton", "mosaic_gpu"):
        prepared = pk.prepare(matrix, "triton" if name == "mosaic_gpu" else name)
        layout = prepared.layout
        problem = Problem.of_layout("forward", layout, n, dtype)
        if name == "mosaic_gpu" and (interpreted or BACKENDS[name].why_not(problem)):
            continue
        for arrangement in (matrix, prepared) if name in (None, "xla") and not interpreted else (prepared,):

            def run(values, x, arrangement=arrangement, name=name):
                return pk.matmul(pk.join(values, arrangement.integers), x, bias=bias, layout="feature_major",
                                 implementation=name)  # fmt: skip

            def with_gradients(values, x, run=run):
                y, pull = jax.vjp(run, values, x)
                return y, *pull(dy)

            y, dvalues, dx = jax.jit(with_gradients)(arrangement.values, x)
            for got, want in (
                (y, w @ x64 + b64[:, None]),
                (dx, w.T @ dy64),
                (pk.to_dense(pk.join(dvalues, arrangement.integers)), np.where(w != 0, dy64 @ x64.T, 0)),
            ):
                scale = np.abs(want).max(initial=1e-30)
                np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), want, rtol=0, atol=tolerance * scale)


def test_the_layout_of_a_problem_is_known():
    problem = Problem.of_layout("forward", as_prepared(FORMS["plain"]()).layout, 3, "float32")
    assert (problem.m, problem.k, problem.n, problem.equal, problem.multiple) == (32, 48, 3, False, 1)


def twice_differentiable():
    """Functions of (values, x, bias) and the float64 ones that they stand for, of products and convolutions."""
    matrix, packed = FORMS["plain"](), FORMS["packed"]()
    filters = tune.random_matrix(32, 36, 0.5, 16, equal=False, dtype="float32")

    def product(matrix, **options):
        def run(values, x, bias):
            y = pk.matmul(pk.join(values, matrix.integers), x, bias=bias, activation="gelu", implementation="xla",
                          **options)  # fmt: skip
            return jnp.sin(y)

        def dense(values, x, bias):
            y = x @ pk.to_dense(pk.join(values, matrix.integers)).T if not options else (
                pk.to_dense(pk.join(values, matrix.integers)) @ x
            )  # fmt: skip
            return jnp.sin(jax.nn.gelu(y + (bias[None] if not options else bias[:, None])))

        return run, dense

    def convolution(values, x, bias):
        y = pk.conv2d(pk.join(values, filters.integers), x, kernel_size=(3, 3), bias=bias, layout="NHWC",
                      implementation="xla")  # fmt: skip
        return jnp.sin(y)

    def dense_convolution(values, x, bias):
        kernel = pk.to_dense(pk.join(values, filters.integers)).T.reshape(3, 3, 4, 32)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sin(y + bias.reshape(1, 1, 1, -1))

    prepared = pk.prepare(matrix, "xla")
    return {
        "plain": (*product(matrix), (matrix.values, (3, 48), (32,))),
        "prepared": (*product(prepared), (prepared.values, (3, 48), (32,))),
        "feature-major": (*product(matrix, layout="feature_major"), (matrix.values, (48, 3), (32,))),
        "packed": (*product(packed), (packed.values, (3, 64), (40,))),
        "convolution": (convolution, dense_convolution, (filters.values, (2, 5, 4, 4), (32,))),
    }


@pytest.mark.parametrize("kind", ["plain", "prepared", "feature-major", "packed", "convolution"])
def test_forward_mode_and_second_derivatives_of_xla(kind):
    run, dense, (values, x, bias) = twice_differentiable()[kind]
    keys = jax.random.split(jax.random.key(0), 5)
    args = values, jax.random.normal(keys[0], x, "float32"), jax.random.normal(keys[1], bias, "float32")
    tangents = tuple(
        jnp.where(a == 0, 0, jax.random.normal(key, a.shape, "float32")) for key, a in zip(keys[2:], args, strict=True)
    )

    def pushed(function):
        return jax.jvp(function, args, tangents)

    def gradient(function):
        return jax.grad(lambda *args: function(*args).sum(), (0, 1, 2))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for of in (
            pushed,
            lambda function: jax.jvp(gradient(function), args, tangents),  # forward over reverse
            lambda function: jax.grad(lambda *args: jax.jvp(function, args, tangents)[1].sum(), (0, 1, 2))(*args),
            lambda function: jax.vjp(gradient(function), *args)[1](tangents),
            lambda function: jax.vmap(lambda a, b: gradient(function)(a, b, args[2]))(
                jnp.stack([args[0], args[0]]), jnp.stack([args[1], 2 * args[1]])
            ),
            lambda function: jax.grad(
                lambda a: jax.vmap(lambda b: function(a, b, args[2]))(jnp.stack([args[1]] * 2)).sum()
            )(args[0]),
        ):
            found, wanted = jax.jit(lambda of=of: (of(run), of(dense)))()
            for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                scale = float(jnp.abs(want).max())
                live = args[0] != 0 if got.shape[-2:] == args[0].shape else True
                np.testing.assert_allclose(got * live, want * live, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("implementation", ["triton", None])
def test_without_forward_mode_the_error_says_what_has_it(implementation):
    matrix, x = FORMS["plain"](), f32(np.ones((3, 48)))
    run = functools.partial(pk.matmul, matrix, implementation=implementation)
    with pytest.raises(TypeError, match=rf"implementation={implementation!r} has no forward mode.*'xla'"):
        jax.jvp(run, (x,), (x,))
    with pytest.raises(NotImplementedError, match=rf"implementation={implementation!r} has no second deriv.*'xla'"):
        jax.grad(lambda x: jax.grad(lambda x: jnp.square(run(x)).sum())(x).sum())(x)
