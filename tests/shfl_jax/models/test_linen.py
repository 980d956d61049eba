"""Compressed inference of unmodified Linen models, against the same model with masked dense weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from jax.extend import core

import pallas_kernels as pk
import shfl_jax
from pallas_kernels import _window as windows
from pallas_kernels import tune
from shfl_jax import VW, Mask, Masks, Plan
from shfl_jax.models import linen

PATTERN = VW(0.6, group_size=4)


class Block(nn.Module):
    """A Transformer block with everything that a real one has."""

    @nn.compact
    def __call__(self, x, train=False):
        attention = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, name="attn")
        x = x + attention(nn.LayerNorm()(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        h = nn.gelu(nn.Dense(13, name="up")(x))
        return x + nn.Dense(10, name="down")(nn.Dropout(0.5, deterministic=not train)(h)), None


class Stacked(nn.Module):
    """Scanned, rematerialized and vmapped layers."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(Block), {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x)
        heads = nn.vmap(nn.Dense, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return heads(5, name="heads")(x)


def random_mask(spec, rng):
    """Shuffled rows in groups, every group with its own number of columns; the last group may be smaller."""
    (m, k), v = spec.matrix_shape, spec.pattern.group_size
    groups = -(-m // v)
    rows = np.full((*spec.batch_shape, groups * v), m, np.int32)
    rows[..., :m] = rng.permuted(np.broadcast_to(np.arange(m), (*spec.batch_shape, m)), axis=-1)
    share = 0.7 * rng.random((*spec.batch_shape, groups, 1))
    return Mask(jnp.asarray(rows), jnp.asarray(rng.random((*spec.batch_shape, groups, k)) < share), m)


def masked(model, x, pattern=PATTERN, rules=None, **kwargs):
    """The masked dense variables, the compressed ones, and the specs, of a model whose biases are not zero."""
    specs = linen.resolve(Plan(rules or {".*": pattern}), model, x, **kwargs)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), shapes["params"])
    masks = Masks({path: random_mask(spec, rng) for path, spec in specs.items()}, tuple(specs.values()))
    others = {name: jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes[name]) for name in shapes}
    return {**others, "params": jax.jit(masks.apply)(params)}, {**others, **shfl_jax.compress(params, masks)}, specs


def run(apply, model, variables, x, **kwargs):
    return jax.jit(lambda v, x: apply(model, v, x, **kwargs))(variables, x)


def same(model, dense, sparse, x, **kwargs):
    close(run(linen.apply, model, sparse, x, **kwargs), run(nn.Module.apply, model, dense, x, **kwargs))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 7, 10))


@pytest.fixture(scope="module")
def stacked(x):
    return masked(Stacked(), x)


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def test_resolve_finds_the_axes_of_stacked_and_general_layers(stacked):
    found = {path: (s.shape, s.batch_axes, s.in_axes, s.out_axes) for path, s in stacked[2].items()}
    assert found["layers/attn/query/kernel"] == ((3, 10, 3, 4), (0,), (1,), (2, 3))
    assert found["layers/attn/out/kernel"] == ((3, 3, 4, 10), (0,), (1, 2), (3,))
    assert found["layers/up/kernel"] == ((3, 10, 13), (0,), (1,), (2,))
    assert found["heads/kernel"] == ((2, 10, 5), (0,), (1,), (2,))  # one shared input: the shape of the trace lies
    assert len(found) == 7


def test_resolve_needs_shapes_only(stacked):
    abstract = linen.resolve(Plan({".*": PATTERN}), Stacked(), jax.ShapeDtypeStruct((2, 7, 10), jnp.float32))
    assert abstract == stacked[2]


def test_stacked_models_give_what_the_masked_dense_ones_give(x, stacked):
    dense, sparse, _ = stacked
    assert sparse["params"]["layers"]["up"]["kernel"].shape[0] == 3
    counts = np.diff(sparse["topology"]["layers"]["up"]["kernel"].topology.group_ptr, axis=-1)
    assert len({tuple(slice_) for slice_ in counts.tolist()}) == 3  # every slice has counts of its own
    same(Stacked(), dense, sparse, x)
    same(Stacked(), dense, shfl_jax.prepare(sparse), x)


@pytest.mark.parametrize("counts", [[(2, 2), (1, 2)], [(0, 3), (2, 1)], [(0, 0), (4, 0)]])
def test_slices_whose_number_of_slots_looks_like_equal_counts(x, counts):
    model = nn.vmap(nn.Dense, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)(8)
    dense, _, specs = masked(model, x)
    kept = np.arange(10) < np.asarray(counts)[..., None]
    rows = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    masks = Masks({"kernel": Mask(rows, jnp.asarray(kept), 8)}, tuple(specs.values()))
    same(model, {"params": masks.apply(dense["params"])}, shfl_jax.compress(dense["params"], masks), x)


def test_layers_stacked_along_axis_1_work_and_along_axis_2_say_so(x):
    def stack(axis, **kwargs):
        return nn.vmap(nn.Dense, {"params": axis}, split_rngs={"params": True}, in_axes=None, axis_size=2)(5, **kwargs)

    dense, sparse, specs = masked(stack(1), x)
    assert specs["kernel"].batch_axes == (1,)
    same(stack(1), dense, sparse, x)
    _, sparse, _ = masked(stack(2, use_bias=False), x)
    with pytest.raises(
        NotImplementedError, match=r"kernel \(10, 5, 2\): layers stacked along axes \(2,\).*axis 0 or 1"
    ):
        linen.apply(stack(2, use_bias=False), sparse, x)


def test_gradients_with_respect_to_the_values_are_the_dense_ones_on_the_mask(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(nn.remat(Layer), {"params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(nn.DenseGeneral((2, 5), name="first")(x))[0]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 5), axis=(-2, -1), name="mix")(jnp.sin(x)), None

    dense, sparse, _ = masked(Model(), x)
    # Scanned, the loss must be smooth enough for float32: sums of squares of sines are.
    loss = lambda apply, variables: jnp.mean(jnp.sin(apply(Model(), variables, x)) ** 2)  # noqa: E731
    expected = jax.jit(jax.grad(lambda p: loss(nn.Module.apply, {"params": p})))(dense["params"])
    found = jax.jit(jax.grad(lambda p: loss(linen.apply, {**sparse, "params": p})))(sparse["params"])
    ones = jax.tree.map(jnp.ones_like, sparse["params"])
    gradient, kept = (jax.jit(shfl_jax.decompress)({**sparse, "params": tree}) for tree in (found, ones))
    close(gradient, jax.tree.map(jnp.multiply, expected, kept))
    assert sum(int((k == 0).sum()) for k in jax.tree.leaves(kept)) > 0
    assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(found))


def test_batch_norm_and_dropout_pass_through(x):
    dense, sparse, _ = masked(Block(), x)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}, "mutable": ["batch_stats"]}
    same(Block(), dense, sparse, x, **kwargs)
    _, updates = jax.eval_shape(lambda v: linen.apply(Block(), v, x, **{**kwargs, "mutable": True}), sparse)
    assert list(updates) == ["batch_stats"]
    with pytest.raises(ValueError, match="'params' cannot be mutable"):
        linen.apply(Block(), sparse, x, mutable=["params"])


def test_general_layers_with_batch_dims_methods_and_names_of_arguments(x):
    class Model(nn.Module):
        def setup(self):
            self.mix = nn.DenseGeneral((3, 5), axis=(-1, -2), name="mix")
            self.per_head = nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,), name="per_head")

        def encode(self, x):
            return self.mix(inputs=x), self.per_head(x)

    dense, sparse, specs = masked(Model(), x, method="encode")
    assert specs["mix/kernel"].in_axes == (0, 1)
    assert specs["per_head/kernel"].batch_axes == (0,)
    same(Model(), dense, sparse, x, method="encode")
    same(Model(), dense, sparse, x, method=lambda module, x: module.mix(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, None])
def test_dtypes_are_those_of_the_dense_layer(x, dtype):
    model = nn.Dense(9, dtype=dtype, use_bias=dtype is not None)
    dense, sparse, _ = masked(model, x)
    for inputs in (x, x.astype(jnp.bfloat16)):
        y, expected = run(linen.apply, model, sparse, inputs), run(nn.Module.apply, model, dense, inputs)
        assert y.dtype == expected.dtype
        # Roundings to the output's dtype may fall on either side.
        np.testing.assert_allclose(
            y.astype(np.float32), expected.astype(np.float32), rtol=2 * float(jnp.finfo(y.dtype).eps), atol=2e-2
        )


def test_shared_modules_are_one_layer_with_two_calls(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(10, name="shared")
            return layer(nn.relu(layer(x)))

    dense, sparse, specs = masked(Model(), x)
    assert list(specs) == ["shared/kernel"]
    same(Model(), dense, sparse, x)


def test_layers_kept_dense_run_as_they_are(x):
    dense, sparse, _ = masked(Block(), x, rules={"up/.*": None, ".*": PATTERN})
    assert "up" not in sparse["topology"]
    assert sparse["params"]["up"]["kernel"].shape == (10, 13)
    same(Block(), dense, sparse, x)


def test_jit_compiles_once(x):
    _, sparse, _ = masked(nn.Dense(8), x)
    traces = []

    @jax.jit
    def apply(variables, x):
        traces.append(1)
        return linen.apply(nn.Dense(8), variables, x)

    first = apply(sparse, x)
    changed = {**sparse, "params": jax.tree.map(lambda a: a * 1, sparse["params"])}
    assert (apply(changed, x) == first).all()
    assert len(traces) == 1


def arrays_in(jaxpr):
    """Sizes of every array in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            yield int(np.prod(var.aval.shape))
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr)):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


def test_inference_never_makes_a_dense_weight():
    model, x = nn.Dense(64), jnp.ones((2, 96))
    params = {"kernel": jnp.ones((96, 64)), "bias": jnp.ones(64)}
    specs = linen.resolve(Plan({".*": VW(0.75, group_size=32)}), model, x)
    mask = Mask(jnp.arange(64, dtype=jnp.int32), jnp.arange(96) < jnp.array([[20], [30]]), 64)
    dense, sparse = {"params": params}, shfl_jax.compress(params, Masks({"kernel": mask}, tuple(specs.values())))
    assert max(arrays_in(jax.make_jaxpr(model.apply)(dense, x).jaxpr)) >= 64 * 96
    jaxpr = jax.make_jaxpr(lambda v, x: linen.apply(model, v, x))(sparse, x).jaxpr
    assert max(arrays_in(jaxpr)) < 64 * 96


def test_export_round_trip(x, stacked):
    exported = export.export(jax.jit(lambda v, x: linen.apply(Stacked(), v, x)))(stacked[1], x)
    stored = bytearray(exported.serialize())
    assert b"shfl_jax.LayerTopology" in stored  # `CompressedLayer` in earlier exported programs
    restored = export.deserialize(stored)
    close(restored.call(stacked[1], x), run(nn.Module.apply, Stacked(), stacked[0], x))


def test_export_of_filters_that_were_prepared_for_a_window():
    window = windows.window((6, 6), 4, (3, 3), (2, 2), "SAME", (1, 1))
    filters = pk.prepare(tune.random_matrix(16, 36, 0.5, 16, dtype="float32"), "triton", window=window)
    assert filters.layout.window == window
    exported = export.export(jax.jit(lambda filters: filters.layout.columns + 1))(filters)
    restored = export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_array_equal(restored.call(filters), filters.layout.columns + 1)


def test_compressed_kernels_in_other_modules_are_errors_that_name_them(x):
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.lecun_normal(), (10, 8))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Custom(name="odd")(x)

    _, sparse, _ = masked(Model(), x)
    with pytest.raises(NotImplementedError, match=r"odd/kernel \(10, 8\): a Custom cannot run .* None in the plan"):
        linen.apply(Model(), sparse, x)
    own = nn.Dense(8, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs))
    _, sparse, _ = masked(own, x)
    with pytest.raises(NotImplementedError, match="own dot_general"):
        linen.apply(own, sparse, x)


def test_wrong_variables_and_inputs_are_errors(x):
    dense, sparse, _ = masked(nn.Dense(8), x)
    with pytest.raises(ValueError, match=r"expected the \{'params', 'topology'\}"):
        linen.apply(nn.Dense(8), dense, x)
    with pytest.raises(ValueError, match=r"kernel: expected inputs with 10 features \(M=8\), got \(9,\)"):
        linen.apply(nn.Dense(8), sparse, x[..., :9])


def test_embeddings_tied_by_attend_are_not_kernels_and_a_head_tied_to_them_stays_dense(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 10)
            return embed.attend(nn.Dense(10, name="mlp")(embed(ids)))

    ids = jnp.arange(6).reshape(2, 3)
    dense, sparse, specs = masked(Model(), ids)
    assert list(specs) == ["mlp/kernel"]
    same(Model(), dense, sparse, ids)
    with pytest.raises(ValueError, match="matches no kernel"):
        linen.resolve(Plan({"Embed_0/embedding": PATTERN}), Model(), ids)
