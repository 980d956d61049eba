"""Convolutional models: masked and compressed give the same, in Linen and in NNX."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import shfl_jax
from shfl_jax import BW, NM, TEW, TVW, TW, VW, Mask, Masks, Plan, ShflBW
from shfl_jax.models import linen

PATTERN = VW(0.6, group_size=4)


class Residual(nn.Module):
    """A ResNet's stem and one block of it, odd numbers of channels and pixels."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(6, (5, 5), strides=2, use_bias=False, name="stem")(x)))
        y = nn.relu(norm()(nn.Conv(9, (1, 1), use_bias=False, name="reduce")(x)))
        y = norm()(nn.Conv(10, (3, 3), strides=(2, 2), padding=2, kernel_dilation=2, name="spatial")(y))
        x = nn.relu(y + norm()(nn.Conv(10, (1, 1), strides=(2, 2), name="shortcut")(x)))
        return nn.Dense(7, name="head")(x.mean((1, 2)))


class NnxResidual(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (5, 5), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.branch = nnx.List([nnx.Conv(6, 9, (1, 1), rngs=rngs), nnx.Conv(9, 6, (3, 3), padding=1, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return nnx.relu(x + self.branch[1](nnx.relu(self.branch[0](x))))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (2, 15, 13, 3))


def random_mask(spec, rng):
    """Shuffled rows in groups, every group with its own number of columns; the last group may be smaller."""
    (m, k), v = spec.matrix_shape, spec.pattern.group_size
    groups = -(-m // v)
    rows = np.full((*spec.batch_shape, groups * v), m, np.int32)
    rows[..., :m] = rng.permuted(np.broadcast_to(np.arange(m), (*spec.batch_shape, m)), axis=-1)
    share = 0.7 * rng.random((*spec.batch_shape, groups, 1))
    return Mask(jnp.asarray(rows), jnp.asarray(rng.random((*spec.batch_shape, groups, k)) < share), m)


def random_masks(specs):
    rng = np.random.default_rng(0)
    return Masks({path: random_mask(spec, rng) for path, spec in specs.items()}, tuple(specs.values()))


def masked(model, x, rules=None, **kwargs):
    """Masked dense variables and compressed ones, of parameters and statistics that are not the initial ones."""
    specs = linen.resolve(Plan(rules or {".*": PATTERN}), model, x, **kwargs)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))
    variables = jax.tree.map(lambda a: jnp.asarray(rng.normal(1, 0.3, a.shape), a.dtype), shapes)
    variables["params"] = jax.tree.map(lambda a: a - 1, variables["params"])
    masks = random_masks(specs)
    sparse = shfl_jax.compress(variables["params"], masks)
    return {**variables, "params": jax.jit(masks.apply)(variables["params"])}, {**variables, **sparse}, specs


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def same(model, dense, sparse, x, **kwargs):
    expected = jax.jit(lambda v, x: model.apply(v, x, **kwargs))(dense, x)
    close(jax.jit(lambda v, x: linen.apply(model, v, x, **kwargs))(sparse, x), expected)


def test_a_residual_network_in_linen(x):
    model = Residual()
    dense, sparse, specs = masked(model, x)
    assert {path: (s.in_axes, s.out_axes, s.matrix_shape) for path, s in specs.items()} == {
        "stem/kernel": ((0, 1, 2), (3,), (6, 75)),
        "reduce/kernel": ((0, 1, 2), (3,), (9, 6)),
        "spatial/kernel": ((0, 1, 2), (3,), (10, 81)),
        "shortcut/kernel": ((0, 1, 2), (3,), (10, 6)),
        "head/kernel": ((0,), (1,), (7, 10)),
    }
    assert sparse["params"]["spatial"]["kernel"].ndim == 2
    prepared = shfl_jax.prepare(sparse)

    def value_and_grad(apply, variables):
        def loss(params):
            y, updates = apply(model, {**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(y)), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (value, expected), (same_value, found) = (
        value_and_grad(nn.Module.apply, dense),
        value_and_grad(linen.apply, prepared),
    )
    close(same_value, value)
    ones = jax.tree.map(jnp.ones_like, prepared["params"])
    gradient, kept = (jax.jit(shfl_jax.decompress)({**prepared, "params": tree}) for tree in (found, ones))
    close(gradient, jax.tree.map(jnp.multiply, expected, kept), 1e-4)  # batch statistics of few pixels magnify rounding


def test_a_residual_network_in_nnx(x):
    model = NnxResidual(nnx.Rngs(0))
    specs = shfl_jax.nnx.resolve(Plan({".*": PATTERN}), model, x)
    masks = random_masks(specs)
    sparse = shfl_jax.nnx.sparsify(model, masks)
    assert isinstance(sparse.branch[1], shfl_jax.nnx.SparseConv)
    assert specs["branch/1/kernel"].matrix_shape == (6, 81)
    nnx.update(model, jax.jit(masks.apply)(nnx.state(model, nnx.Param)))
    run = nnx.jit(lambda model, x: model(x))
    close(run(sparse, x), run(model, x))
    rest = nnx.Not(nnx.Any(nnx.Param, shfl_jax.nnx.Topology))
    close(nnx.state(sparse, rest), nnx.state(model, rest))
    with pytest.raises(ValueError, match=r"stem/kernel: expected images with 3 channels last .*5 x 5 taps.*got \(2, 9"):
        sparse(jnp.ones((2, 9, 9, 4)))


# Every option of a Flax Conv, and images with other batch axes than one.
OPTIONS = [
    ((3, 3), (2, 7, 8, 3), {"strides": (2, 1), "padding": [(0, 1), (2, 0)], "kernel_dilation": (1, 2)}),
    ((3, 2), (7, 6, 3), {"strides": 2, "padding": "valid", "use_bias": False, "precision": "highest"}),
    ((1, 1), (2, 2, 5, 4, 3), {"padding": 1}),
    ((1, 1), (5, 4, 3), {"strides": None, "kernel_dilation": None}),
    ((5, 3), (2, 6, 7, 3), {"padding": "REFLECT", "kernel_dilation": (1, 2)}),
    ((2, 3), (2, 6, 7, 3), {"padding": "CIRCULAR", "strides": 2, "dtype": jnp.bfloat16}),
    ((3, 3), (0, 5, 5, 3), {"padding": (1, 0), "dtype": jnp.float16}),
    (4, (2, 9, 3), {"padding": "CAUSAL", "strides": 2, "kernel_dilation": 2}),
    ((3,), (9, 3), {"padding": "SAME_LOWER", "strides": 2}),
]


@pytest.mark.parametrize(("size", "shape", "options"), OPTIONS, ids=lambda value: str(value))
def test_options_of_a_convolution(size, shape, options):
    x = jax.random.normal(jax.random.key(2), shape)
    model = nn.Conv(7, size, **options)
    dense, sparse, specs = masked(model, x)
    assert specs["kernel"].convolution
    expected, found = jax.jit(model.apply)(dense, x), jax.jit(lambda v, x: linen.apply(model, v, x))(sparse, x)
    layer = nnx.Conv(3, 7, size, **options, rngs=nnx.Rngs(0))
    nnx.update(layer, shfl_jax.decompress(sparse))
    (spec,) = shfl_jax.nnx.resolve(Plan({".*": PATTERN}), layer, x).values()
    assert spec == specs["kernel"]
    other = shfl_jax.nnx.sparsify(layer, random_masks({"kernel": spec}))(x)
    tolerance = 1e-5 if expected.dtype == jnp.float32 else 2e-2
    for y in (found, other):
        assert y.dtype == expected.dtype
        close(y, expected, tolerance)


def test_layouts_are_not_flipped_between_layers(x):
    def moved(function, *arguments):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return set(re.findall(r"f32\[(\d+,\d+,\d+,\d+)\]\S* (?:transpose|copy)\(", text))

    # What XLA moves is the images that come in, and those that go out.
    model = Residual()
    _, sparse, _ = masked(model, x)
    assert moved(functools.partial(linen.apply, model), sparse, x) == {"3,15,13,2"}
    model = NnxResidual(nnx.Rngs(0))
    model.eval()
    masks = random_masks(shfl_jax.nnx.resolve(Plan({".*": PATTERN}), model, x))
    graph, state = nnx.split(shfl_jax.nnx.sparsify(model, masks))
    assert moved(lambda state, x: nnx.merge(graph, state)(x), state, x) == {"3,15,13,2", "2,8,7,6"}


def test_masks_of_patterns(x):
    patterns = {
        "nm": NM(), "tew": TEW(0.5, 4), "bw": BW(0.5, 4), "vw": VW(0.5, 4), "tw": TW(0.5, 4),
        "tvw": TVW(0.6, 4, rounds=0), "shfl_bw": ShflBW(0.5, 4, search="kmeans"),
    }  # fmt: skip

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [nn.Conv(8, (3, 3), strides=2, use_bias=False, name=name)(x) for name in patterns]

    model, x = Model(), jax.random.normal(jax.random.key(1), (2, 4, 5, 4))
    specs = linen.resolve(Plan({f"{name}/.*": pattern for name, pattern in patterns.items()}), model, x)
    params = jax.jit(model.init)(jax.random.key(2), x)["params"]
    found = {}
    for path, spec in specs.items():
        scores = jnp.abs(spec.to_matrix(params[path.split("/")[0]]["kernel"]))
        # Column (i * 3 + j) * 4 + c is tap (i, j) of channel c.
        np.testing.assert_array_equal(scores[3, 17], abs(params[path.split("/")[0]]["kernel"][1, 1, 1, 3]))
        found[path] = shfl_jax.mask(scores, spec.pattern)
        kept = np.asarray(found[path].elements()).mean()
        np.testing.assert_allclose(kept, 1 - spec.pattern.sparsity, atol=0.06)
    masks = Masks(found, tuple(specs.values()))
    sparse = shfl_jax.compress(params, masks)
    reasons = {path.split("/")[0]: layer.dense_because for path, layer in shfl_jax.path_leaves(
        sparse["topology"], lambda node: isinstance(node, shfl_jax.CompressedLayer)).items()}  # fmt: skip
    assert {name for name, reason in reasons.items() if reason} == {"nm", "tew"}
    expected = jax.jit(model.apply)({"params": masks.apply(params)}, x)
    close(jax.jit(lambda v, x: linen.apply(model, v, x))(sparse, x), expected)
    # A convolution is not timed as if it were a product.
    assert not any(layer.timings for layer in shfl_jax.report(sparse, tokens=8).layers)


def test_stacked_padded_and_one_dimensional_convolutions():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.relu(nn.Conv(3, (3, 3), padding="CIRCULAR", name="conv")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(Step, {"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x)
            heads = nn.vmap(nn.Conv, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
            rows = nn.Conv(5, 3, strides=2, padding="CAUSAL", name="rows")(x)
            return heads(4, (3, 2), name="heads")(x), rows

    model, x = Model(), jax.random.normal(jax.random.key(3), (2, 5, 6, 3))
    dense, sparse, specs = masked(model, x)
    found = {path: (s.batch_axes, s.in_axes, s.out_axes) for path, s in specs.items()}
    assert found["layers/conv/kernel"] == ((0,), (1, 2, 3), (4,))
    assert found["heads/kernel"] == ((0,), (1, 2, 3), (4,))
    assert found["rows/kernel"] == ((), (0, 1), (2,))
    same(model, dense, sparse, x)


def test_gradients_through_loops_and_remat():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            heads = nn.vmap(nn.Conv, {"params": 0}, split_rngs={"params": True}, axis_size=2)
            return nn.relu(nn.remat(heads)(3, (3, 3), name="heads")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Step, {"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x)[0]

    model, xs = Model(), jax.random.normal(jax.random.key(4), (3, 2, 2, 4, 5, 3))
    dense, sparse, specs = masked(model, xs[0])
    assert specs["layers/heads/kernel"].batch_axes == (0, 1)

    def gradients(apply, variables):
        def loss(params, x):
            return jnp.sin(apply(model, {**variables, "params": params}, x)).sum()

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)))(variables["params"], xs)

    (wanted, wanted_x), (found, found_x) = gradients(nn.Module.apply, dense), gradients(linen.apply, sparse)
    close(found_x, wanted_x, 1e-4)
    kept = shfl_jax.decompress({**sparse, "params": jax.tree.map(jnp.ones_like, sparse["params"])})
    for i in range(len(xs)):
        one = shfl_jax.decompress({**sparse, "params": jax.tree.map(lambda a, i=i: a[i], found)})
        close(one, jax.tree.map(lambda a, k, i=i: a[i] * k, wanted, kept), 1e-4)


def test_stacked_and_remat_convolutions_in_nnx(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Conv(3, 3, (3, 3), padding=1, rngs=rngs))
            self.layers = nnx.split_rngs(splits=2)(make)(rngs)
            self.out = nnx.Conv(3, 5, (3, 3), strides=2, kernel_dilation=2, rngs=rngs)

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: nnx.relu(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return nnx.remat(lambda layer, x: layer(x))(self.out, run(x, self.layers))

    model = Model(nnx.Rngs(0))
    specs = shfl_jax.nnx.resolve(Plan({".*": PATTERN}), model, x)
    assert specs["layers/kernel"].batch_axes == (0,)
    masks = random_masks(specs)
    sparse = shfl_jax.nnx.sparsify(model, masks)
    nnx.update(model, masks.apply(nnx.state(model, nnx.Param)))
    gradient = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sin(model(x)).sum()))
    (wanted, expected), (value, found) = gradient(model, x), gradient(sparse, x)
    close(value, wanted)
    for layer in ("layers", "out"):  # the biases' gradients have passed through all that follows
        close(found[layer]["bias"][...], expected[layer]["bias"][...], 1e-4)


def test_what_has_no_sparse_kernel_says_so(x):
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(6, (1, 1), name="point")(nn.Conv(6, (3, 3), feature_group_count=3, name="depth")(x))

    with pytest.raises(ValueError, match=r"depth/kernel \(3, 3, 1, 6\): .*groups of channels.*depth.*None in the plan"):
        linen.resolve(Plan({".*": PATTERN}), Depthwise(), x)
    dense, sparse, specs = masked(Depthwise(), x, {"depth/.*": None, ".*": PATTERN})
    assert list(specs) == ["point/kernel"]
    same(Depthwise(), dense, sparse, x)
    for layer, text in (
        (nn.Conv(4, (3, 3), input_dilation=2, padding=1), "input_dilation"),
        (nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 3, 4))), "a mask of its own"),
        (nn.Conv(4, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated), "own conv_general_dilated"),
        (nn.ConvTranspose(4, (3, 3)), "a ConvTranspose cannot"),
        (nn.ConvLocal(4, (15, 13), padding="VALID"), "a ConvLocal cannot"),
    ):
        _, sparse, _ = masked(layer, x)
        with pytest.raises(NotImplementedError, match=rf"kernel \(.*\): .*{text}.*None in the plan"):
            linen.apply(layer, sparse, x)
    for layer, text in (
        (nn.Conv(4, (3, 3), padding="VALID", kernel_dilation=9), "filters that span .* do not fit"),
        (nn.Conv(4, (3, 3), padding=-1), "none negative"),
    ):
        _, sparse, _ = masked(layer, x)
        with pytest.raises(ValueError, match=rf"kernel \(3, 3, 3, 4\): .*{text}"):
            linen.apply(layer, sparse, x)
    cube = nn.Conv(4, (3, 3, 3))
    _, sparse, _ = masked(cube, x[..., None])
    with pytest.raises(NotImplementedError, match="3 spatial axes has no sparse kernel"):
        linen.apply(cube, sparse, x[..., None])
    with pytest.raises(NotImplementedError, match=r"kernel \(3, 3, 3, 4\): convolutions are not calibrated"):
        shfl_jax.prune_one_shot(
            nn.Conv(4, (3, 3)), {"kernel": jnp.ones((3, 3, 3, 4)), "bias": jnp.ones(4)}, Plan({".*": PATTERN}), [(x,)]
        )
