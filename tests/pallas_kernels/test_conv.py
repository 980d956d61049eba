"""One suite for every implementation of conv2d, against float64 NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
from pallas_kernels import _devices as devices
from pallas_kernels import _window as windows
from pallas_kernels import tune
from pallas_kernels._backend import Call
from pallas_kernels._layout import as_prepared
from pallas_kernels.triton._backend import Triton
from pallas_kernels.triton._configs import Config
from pallas_kernels.xla import _conv as xla_conv

H200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
IMPLEMENTATIONS = ["xla", "triton"]

# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@pytest.fixture(autouse=True)
def ieee():
    """On a GPU float32 products are TF32 by default; here they are compared with float64."""
    with jax.default_matmul_precision("highest"):
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: tuple[int, int]
    strides: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    padding: str | tuple = "SAME"
    image: tuple[int, int] = (7, 9)
    channels: int = 5
    m: int = 37
    v: int = 16
    batch: int = 3
    counts: str = "ragged"
    prepared: bool = False
    activation: str | None = None
    interpreted: bool = False  # whether the kernels run it too, slowly

    @property
    def name(self):
        return f"{self.kernel[0]}x{self.kernel[1]}-strides{self.strides}"

    @property
    def options(self):
        return {"kernel_size": self.kernel, "strides": self.strides, "dilation": self.dilation, "padding": self.padding}

    @property
    def window(self):
        return windows.window(self.image, self.channels, self.kernel, self.strides, self.padding, self.dilation)


CASES = [
    Case((1, 1), prepared=True),
    Case((1, 1), strides=2, image=(7, 8), batch=9, interpreted=True),
    Case((3, 3), counts="equal", activation="relu"),
    Case((3, 3), strides=2, image=(8, 6), prepared=True, interpreted=True),
    Case((3, 3), strides=2, dilation=2, padding="VALID", image=(9, 10), m=32),
    Case((5, 5), padding=((1, 3), (0, 2)), channels=3, m=20, v=32),
    Case((7, 7), strides=2, image=(11, 9), channels=3, m=20, prepared=True, interpreted=True),
    Case((1, 3), strides=(2, 1), dilation=(1, 2), batch=1, m=16, interpreted=True),
]


def make(case, seed=0, dtype=np.float32):
    """Shuffled filters, second group empty, last full, and the same ones dense in float64: (M, kh, kw, C)."""
    rng = np.random.default_rng([seed, *case.kernel, case.channels, case.m])
    (kh, kw), v, m = case.kernel, case.v, case.m
    k, r = kh * kw * case.channels, -(-m // v)
    share = np.full(r, 0.4) if case.counts == "equal" else rng.uniform(0.1, 0.7, r)
    kept = np.zeros((r, k), bool)
    for group, part in enumerate(share):
        kept[group, rng.permutation(k)[: max(1, round(part * k))]] = True
    if case.counts == "ragged" and r > 1:
        kept[-1], kept[1] = True, False
    rows = np.full(r * v, m, np.int32)
    rows[rng.permutation(r * v)[:m]] = rng.permutation(m)
    weight = np.asarray(jnp.asarray(rng.standard_normal((m, k)), dtype))
    group = np.empty(m, int)
    group[rows[rows < m]] = np.flatnonzero(rows < m) // v
    dense = np.where(kept[group], weight.astype(np.float64), 0)
    return pk.from_dense(weight, rows, kept), dense.reshape(m, kh, kw, case.channels)


def views(case, padded):
    """What every tap meets, as views of the padded images."""
    (di, dj), (si, sj) = (2 * (size,) if isinstance(size, int) else size for size in (case.dilation, case.strides))
    height, width = case.window.outputs
    for i, j in itertools.product(*map(range, case.kernel)):
        at = padded[:, i * di :: si, j * dj :: sj]
        yield i, j, at[:, :height, :width]


def reference(case, dense, x, bias, dy=None):
    """The float64 convolution; with dy (already times the activation's derivative) its three gradients."""
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), *case.window.padding, (0, 0)])
    if dy is None:
        y = sum(np.tensordot(dense[:, i, j], view, 1) for i, j, view in views(case, padded))
        return y + np.asarray(bias, np.float64).reshape(-1, 1, 1, 1)
    dx, dw = np.zeros_like(padded), np.zeros_like(dense)
    for (i, j, view), (_, _, out) in zip(views(case, padded), views(case, dx), strict=True):
        dw[:, i, j] = np.tensordot(dy, view, ((1, 2, 3), (1, 2, 3)))
        out += np.tensordot(dense[:, i, j], dy, (0, 0))
    (top, _), (left, _) = case.window.padding
    return dw.reshape(case.m, -1), dx[:, top:, left:][:, : case.image[0], : case.image[1]], dy.sum((1, 2, 3))


def images(case, rng, dtype=np.float32):
    return jnp.asarray(rng.standard_normal((case.channels, *case.image, case.batch)), dtype)


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def value_and_gradients(matrix, x, bias, addend, dy, case, implementation):
    def run(values, x, bias, addend):
        return pk.conv2d(
            pk.join(values, matrix.integers), x, bias=bias, addend=addend, activation=case.activation,
            implementation=implementation, **case.options,
        )  # fmt: skip

    y, pull = jax.vjp(run, matrix.values, x, bias, addend)
    return y, *pull(dy)


def check(case, implementation, matrix, dense, rng, dtype=jnp.float32, tolerance=2e-5):
    x, bias = images(case, rng, dtype), jnp.asarray(rng.standard_normal(case.m), dtype)
    dy, addend = jnp.asarray(rng.standard_normal((2, case.m, *case.window.outputs, case.batch)), dtype)
    y, dvalues, dx, dbias, daddend = value_and_gradients(matrix, x, bias, addend, dy, case, implementation)
    assert [a.dtype for a in (y, dvalues, dx, dbias, daddend)] == [dtype] * 5
    expected, dy = reference(case, dense, x, bias) + np.asarray(addend, np.float64), np.asarray(dy, np.float64)
    if case.activation == "relu":
        # Where a half-precision sum is rounded to zero or across it the result has decided; it is compared below.
        positive = (expected if dtype == jnp.float32 else np.asarray(y)) > 0
        dy, expected = dy * positive, np.maximum(expected, 0)
    dw, *others = reference(case, dense, x, bias, dy)
    stored = np.asarray(pk.to_dense(pk.join(jnp.ones_like(dvalues), matrix.integers)), np.float64)
    spread = np.asarray(pk.to_dense(pk.join(dvalues, matrix.integers)), np.float64)
    for found, wanted in zip((y, spread, dx, dbias, daddend), (expected, dw * stored, *others, dy), strict=True):
        wanted = np.asarray(wanted)
        assert found.shape == wanted.shape
        scale = np.abs(wanted).max(initial=1e-30)
        np.testing.assert_allclose(np.asarray(found, np.float64) / scale, wanted / scale, atol=tolerance)
    # What `to_dense` does not read, padding and sentinel rows, has no gradient.
    assert np.count_nonzero(np.asarray(dvalues, np.float64)) == np.count_nonzero(spread)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, name) for case in CASES for name in IMPLEMENTATIONS if name == "xla" or case.interpreted],
    ids=lambda value: getattr(value, "name", value),
)
def test_values_and_gradients(case, implementation):
    matrix, dense = make(case)
    matrix = pk.prepare(matrix, implementation) if case.prepared else matrix
    check(case, implementation, matrix, dense, np.random.default_rng(1))


@pytest.mark.parametrize("implementation", ["triton"])
def test_half_precision(implementation):
    case = Case((3, 3), activation="relu", image=(5, 4), m=20)
    matrix, dense = make(case, dtype=jnp.bfloat16)
    check(case, implementation, matrix, dense, np.random.default_rng(2), jnp.bfloat16, 2e-2)


def make_two_four(case, rng, dtype=np.float32):
    """Shuffled filters, two of every four columns a row, with fours that lack columns, and the same ones dense."""
    (kh, kw), v, m = case.kernel, case.v, case.m
    k, r = kh * kw * case.channels, -(-m // v)
    rows = np.concatenate([rng.permutation(m), np.full(r * v - m, m)]).astype(np.int32)
    order = np.full((r, 4 * k), k, np.int32)
    choice = np.zeros((m, k), bool)
    for group, real in enumerate(rows.reshape(r, v)):
        columns = iter(rng.permutation(k)[: k // (group + 2)].tolist())
        for four in order[group].reshape(k, 4):
            live = np.fromiter(itertools.islice(columns, int(rng.integers(1, 5))), int)
            four[: len(live)] = live
            for row in real[real < m]:
                choice[row, rng.permutation(live)[:2]] = True
    weight = np.asarray(jnp.asarray(rng.standard_normal((m, k)), dtype))
    dense = np.where(choice, weight.astype(np.float64), 0)
    return pk.from_dense_two_four(weight, rows, order, choice), dense.reshape(m, kh, kw, case.channels)


@pytest.mark.parametrize(("implementation", "case"), [
    ("xla", Case((3, 3), channels=3, m=20, image=(5, 6))),
    ("triton", Case((3, 3), padding="VALID", channels=3, m=20, image=(5, 6))),
    ("triton", Case((1, 1), channels=20, m=20, image=(3, 5))),
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_two_of_every_four_inside_the_groups(implementation, case):
    rng = np.random.default_rng(3)
    check(case, implementation, *make_two_four(case, rng), rng)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_and_unused_never_leaks(implementation):
    case, rng = Case((3, 3), channels=4, m=30, image=(5, 6), padding="SAME"), np.random.default_rng(4)
    kept = rng.random((2, 3, 3, 4)) < 0.5
    kept[..., 1] = False  # no group reads channel 1, nor row 0 of the filters
    kept[:, 0] = False
    kept = kept.reshape(2, 36)
    rows = np.full(32, 30, np.int32)
    rows[rng.permutation(32)[:30]] = rng.permutation(30)
    weight = np.where(kept.any(0), rng.standard_normal((30, 36)), np.nan).astype(np.float32)
    matrix = pk.from_dense(weight, rows, kept)
    sentinels = np.repeat(rows.reshape(2, 16) == 30, np.diff(matrix.integers.group_ptr), axis=0)
    matrix = pk.join(jnp.where(sentinels, jnp.inf, matrix.values), matrix.integers)
    group = np.empty(30, int)
    group[rows[rows < 30]] = np.flatnonzero(rows < 30) // 16
    dense = np.where(kept[group], weight, 0).reshape(30, 3, 3, 4)
    x = np.array(images(case, rng))
    x[1] = np.nan
    bias, dy = jnp.zeros(30), np.ones((30, 5, 6, 3), np.float32)
    y, dvalues, dx, *_ = value_and_gradients(matrix, jnp.asarray(x), bias, None, dy, case, implementation)
    x[1] = 0
    np.testing.assert_allclose(y, reference(case, dense, x, bias), rtol=1e-4, atol=1e-5)
    assert np.isfinite(dvalues).all()
    np.testing.assert_allclose(dx, reference(case, dense, x, bias, np.asarray(dy))[1], rtol=1e-4, atol=1e-5)


def test_xla_takes_a_group_without_columns_as_triton_prepared_it():
    case, rng = Case((3, 3), channels=4, m=32, image=(5, 6)), np.random.default_rng(8)
    matrix, dense = make(case)
    prepared = pk.prepare(matrix, "triton")
    assert prepared.integers.segments[-1] == (1, 0)
    x, bias = images(case, rng), jnp.zeros(32)
    y = pk.conv2d(prepared, x, bias=bias, implementation="xla", **case.options)
    np.testing.assert_allclose(y, reference(case, dense, x, bias), rtol=1e-4, atol=1e-5)


def test_columns_are_those_of_a_flattened_flax_kernel_in_every_layout():
    case = Case((3, 2), strides=(2, 1), image=(7, 5), m=16)
    matrix, dense = make(case)
    kernel = jnp.asarray(dense.reshape(16, -1).T.reshape(3, 2, 5, 16), jnp.float32)
    x = images(case, np.random.default_rng(5))
    run = jax.jit(functools.partial(pk.conv2d, **case.options), static_argnames="layout")
    for layout, to, back in (("NHWC", (3, 1, 2, 0), (3, 1, 2, 0)), ("NCHW", (3, 0, 1, 2), (1, 2, 3, 0))):
        y = run(matrix, x.transpose(to), layout=layout)
        same = lax.conv_general_dilated(
            x.transpose(to), kernel, case.strides, "SAME", dimension_numbers=(layout, "HWIO", layout)
        )
        np.testing.assert_allclose(y, same, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y.transpose(back), run(matrix, x, layout="CHWN"), rtol=1e-4, atol=1e-5)


def test_one_by_one_convolutions_are_products():
    case = Case((1, 1))
    matrix, _ = make(case)
    x = images(case, np.random.default_rng(6))
    conv = functools.partial(pk.conv2d, kernel_size=(1, 1))
    y = pk.matmul(matrix, x.reshape(5, -1), layout="feature_major").reshape(37, 7, 9, 3)
    np.testing.assert_array_equal(conv(matrix, x), y)
    np.testing.assert_allclose(conv(matrix, x.T, layout="NHWC"), y.T, rtol=1e-4, atol=1e-5)
    text = lower(lambda m, x: conv(m, x), matrix, x).as_text()
    assert "row_grouped_matmul" in text
    assert "row_grouped_conv" not in text


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_images_and_over_stacked_filters(implementation):
    case = Case((3, 3), m=16, image=(4, 5), channels=2, batch=2)
    rng = np.random.default_rng(7)
    kept = rng.random((2, 1, 18)) < [[[0.3]], [[0.7]]]
    rows = np.stack([rng.permutation(16), rng.permutation(16)]).astype(np.int32)
    weight = rng.standard_normal((2, 16, 18)).astype(np.float32)
    stacked, dense = pk.from_dense(weight, rows, kept), np.where(kept, weight, 0).reshape(2, 16, 3, 3, 2)
    xs = jnp.stack([images(case, rng) for _ in range(2)])
    run = functools.partial(pk.conv2d, implementation=implementation, **case.options)
    ys = jax.jit(jax.vmap(run))(stacked, xs)
    shared = jax.jit(jax.vmap(run, (None, 0)))(jax.tree.map(lambda a: a[0], stacked), xs)
    for i, x in enumerate(xs):
        np.testing.assert_allclose(ys[i], reference(case, dense[i], x, np.zeros(16)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(shared[i], reference(case, dense[0], x, np.zeros(16)), rtol=1e-4, atol=1e-5)


def test_the_implicit_matrix_is_never_made():
    filters = tune.random_matrix(256, 9 * 128, 0.75, 64)
    x = jax.ShapeDtypeStruct((128, 28, 28, 16), jnp.bfloat16)
    grad = jax.grad(lambda v, x: pk.conv2d(
        pk.join(v, filters.integers), x, kernel_size=(3, 3), implementation="xla"
    ).astype(jnp.float32).sum(), (0, 1))  # fmt: skip
    jaxpr = jax.make_jaxpr(lambda v, x: grad(v, x))(filters.values, x)
    assert max(sizes(jaxpr.jaxpr)) < 9 * x.size / 3


def sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from sizes(getattr(inner, "jaxpr", inner))


def lower(function, *args):
    with use_abstract_mesh(H200):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("config", "equal"), [
    (Config(64, 128, 32), True), (Config(128, 64, 64, prefetch=True), False),
    (Config(32, 128, 64, num_warps=8, flip=True), True), (Config(64, 64, 32, split=2, tokens_first=True), False),
])  # fmt: skip
def test_configs_lower_for_cuda_and_compute_the_same(config, equal):
    matrix = tune.random_matrix(64, 72, 0.75, 64, equal=equal, dtype="float32")
    case = Case((3, 3), strides=2, channels=8, m=64, image=(9, 7), batch=4)
    small = dataclasses.replace(config, block_tokens=32, block_k=16)
    for window in (case.window, dataclasses.replace(case.window, padding=((0, 0), (0, 0)))):
        call = Call(window=window)

        def forward(matrix, x, bias, config, call=call):
            return Triton().forward(call, as_prepared(matrix), x, bias, None, config)

        def gradient(matrix, x, dy, call=call):
            return Triton().grad_values(call, as_prepared(matrix).layout, x, dy, config)

        x = images(case, np.random.default_rng(8))
        half, bias = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (matrix, x)), jnp.zeros(64, jnp.bfloat16)
        half = (pk.join(half[0].values, matrix.integers), half[1])
        text = lower(functools.partial(forward, config=config), *half, bias).as_text()
        assert "xla.gpu.triton" in text
        assert "row_grouped_conv" in text
        dy = jnp.zeros((64, window.outputs[0] * window.outputs[1] * 4), jnp.bfloat16)
        assert "xla.gpu.triton" in lower(gradient, matrix, half[1], dy).as_text()
        if window.is_padded:
            y = jax.jit(functools.partial(forward, config=small))(matrix, x, None)
            wanted = xla_conv.dense(pk.to_dense(matrix), x, window).reshape(64, -1)
            np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


GPU_CASES = [
    Case((1, 1), strides=2, image=(9, 11), channels=150, m=100, v=64, batch=16, activation="relu"),
    Case((3, 3), image=(7, 9), channels=37, m=200, v=64, batch=24),
    Case((3, 3), strides=2, image=(14, 13), channels=45, m=130, v=128, batch=8, activation="relu"),
    Case((3, 3), strides=2, dilation=2, padding="VALID", image=(13, 10), channels=33, m=250, v=256, batch=8),
    Case((3, 3), dilation=2, image=(11, 9), channels=20, m=128, v=64, batch=40, counts="equal"),
    Case((5, 5), padding=((1, 3), (0, 2)), image=(9, 8), channels=19, m=70, v=64, batch=16),
    Case((7, 7), strides=2, image=(31, 29), channels=3, m=64, v=64, batch=8),
    Case((1, 3), strides=(2, 1), dilation=(1, 2), image=(9, 15), channels=70, m=140, v=128, batch=64),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.name}-V{case.v}")
def test_values_and_gradients_on_a_gpu(gpu, case, implementation, dtype):
    if implementation == "mosaic_gpu" and not any(name in gpu for name in devices.HOPPER):
        pytest.skip("needs a Hopper GPU")
    matrix, dense = make(case, dtype=dtype)
    window = None if case.batch == 24 else case.window  # where the slots point is worked out before, or in the call
    matrix = pk.prepare(matrix, implementation, window)
    check(case, implementation, matrix, dense, np.random.default_rng(1), dtype, 2e-2)


TWO_FOUR_GPU_CASES = [
    Case((3, 3), strides=2, image=(9, 10), channels=21, m=150, v=64, batch=16, activation="relu"),
    Case((3, 3), dilation=2, padding="VALID", image=(7, 9), channels=24, m=256, v=128, batch=8),
    Case((1, 1), image=(7, 9), channels=200, m=150, v=64, batch=16, activation="relu"),
    Case((1, 1), strides=2, image=(7, 9), channels=130, m=128, v=128, batch=24),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("case", TWO_FOUR_GPU_CASES, ids=lambda case: f"{case.name}-V{case.v}")
def test_two_of_every_four_on_a_gpu(gpu, case, implementation, dtype):
    rng = np.random.default_rng(3)
    matrix, dense = make_two_four(case, rng, dtype)
    check(case, implementation, pk.prepare(matrix, implementation), dense, rng, dtype, 2e-2)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("case", GPU_CASES[1:4], ids=lambda case: f"{case.name}-V{case.v}")
def test_float32_on_a_gpu(gpu, case, implementation):
    check(case, implementation, *make(case), np.random.default_rng(1))


@pytest.mark.parametrize("case", [
    Case((3, 3), image=(9, 7), channels=24, m=70, v=32, batch=13),
    Case((3, 3), strides=2, image=(8, 6), m=37, v=16, batch=3, activation="relu"),
], ids=lambda case: f"{case.name}-batch{case.batch}")  # fmt: skip
def test_batches_that_fit_no_vector_on_a_gpu(gpu, case):
    matrix, dense = make(case, dtype=jnp.bfloat16)
    check(case, "triton", matrix, dense, np.random.default_rng(1), jnp.bfloat16, 2e-2)


def test_the_default_is_the_fastest_that_can_do_it():
    case = Case((3, 3), m=32)
    matrix, x = make(case)[0], images(case, np.random.default_rng(9))
    run = functools.partial(pk.conv2d, **case.options)
    assert "xla.gpu.triton" in lower(run, matrix, x).as_text()
    assert "triton" not in jax.jit(run).trace(matrix, x).lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(NotImplementedError, match="groups have"):
        run(matrix, x, implementation="mosaic_gpu")
    odd = make(dataclasses.replace(case, v=6))[0]
    assert "triton" not in lower(run, odd, x).as_text()
    with pytest.raises(NotImplementedError, match="groups have 16, 32, 64"):
        run(odd, x, implementation="triton")
    wide = pk.prepare(tune.random_matrix(128, 45, 0.5, 64), "mosaic_gpu")
    for batch, taken in ((256, "mosaic_gpu"), (8, "xla.gpu.triton"), (257, "xla.gpu.triton")):
        text = lower(run, wide, jnp.zeros((5, 7, 9, batch), jnp.bfloat16)).as_text()
        assert taken in text


@pytest.mark.parametrize("name", windows.PADDINGS)
def test_names_of_padding_in_lower_case_as_lax_takes_them(name):
    size = (8, 9), 3, (3, 2), 2
    assert windows.window(*size, name.lower(), 1) == windows.window(*size, name, 1)


def test_errors():
    case = Case((3, 3))
    matrix, x = make(case)[0], images(case, np.random.default_rng(10))
    conv = functools.partial(pk.conv2d, kernel_size=(3, 3))
    with pytest.raises(NotImplementedError, match="5 groups of channels has no sparse kernel: run it dense"):
        conv(matrix, x, groups=5)
    with pytest.raises(ValueError, match=r"3 \* 3 \* 9 = 81 columns .*NHWC.*\(5, 7, 3, 9\).*\(37, 45\)"):
        conv(matrix, x.transpose(0, 1, 3, 2), layout="NHWC")
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'CNHW'"):
        conv(matrix, x, layout="CNHW")
    with pytest.raises(ValueError, match=r"four axes, CHWN, got shape \(5, 7, 9\)"):
        conv(matrix, x[..., 0])
    with pytest.raises(ValueError, match=r"padding must be one of .*got 'FULL'"):
        conv(matrix, x, padding="FULL")
    for padding in (((1, 1),), ((1, 1), (-1, 0)), (1, 1)):
        with pytest.raises(ValueError, match=r"padding must be \(\(top, bottom\)"):
            conv(matrix, x, padding=padding)
    with pytest.raises(ValueError, match=r"strides must be two sizes of at least 1, got \(0, 0\)"):
        conv(matrix, x, strides=0)
    with pytest.raises(ValueError, match=r"span \(9, 9\) pixels do not fit an image of \(7, 9\)"):
        conv(matrix, x, dilation=4, padding="VALID")
    with pytest.raises(ValueError, match=r"bias must have shape \(37,\)"):
        conv(matrix, x, bias=jnp.ones(5))
    with pytest.raises(ValueError, match=r"addend must have the result's shape \(3, 7, 9, 37\), got \(37, 7, 9, 3\)"):
        conv(matrix, x.T.swapaxes(1, 2), layout="NHWC", addend=jnp.ones((37, 7, 9, 3)))
    with pytest.raises(ValueError, match="x must be floating"):
        conv(matrix, x.astype(jnp.int32))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        conv(matrix, x, implementation="cudnn")
