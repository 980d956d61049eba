"""Compressed inference of NNX models, against the same model with masked dense weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shfl_jax
from shfl_jax import VW, Mask, Masks, Plan

PATTERN = VW(0.6, group_size=4)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(10, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(3, 10, 12, rngs=rngs, decode=False)
        self.mlp = nnx.List([nnx.Linear(10, 13, rngs=rngs), nnx.Linear(13, 10, rngs=rngs)])
        self.batch_norm = nnx.BatchNorm(10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.batch_norm(x + self.attn(self.norm(x)))
        return x + self.mlp[1](self.dropout(nnx.gelu(self.mlp[0](x))))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Block)(rngs.split(3))
        self.mix = nnx.LinearGeneral((7, 10), (3, 5), axis=(-2, -1), rngs=rngs)
        self.heads = nnx.vmap(lambda rngs: nnx.Linear(5, 6, rngs=rngs))(rngs.split(2))

    def __call__(self, x):
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, None))(self.heads, self.mix(x))


def random_masks(specs):
    """Shuffled rows in groups, every group with its own number of columns; the last group may be smaller."""
    rng, masks = np.random.default_rng(0), {}
    for path, spec in specs.items():
        (m, k), v = spec.matrix_shape, spec.pattern.group_size
        groups = -(-m // v)
        rows = np.full((*spec.batch_shape, groups * v), m, np.int32)
        rows[..., :m] = rng.permuted(np.broadcast_to(np.arange(m), (*spec.batch_shape, m)), axis=-1)
        share = 0.7 * rng.random((*spec.batch_shape, groups, 1))
        masks[path] = Mask(jnp.asarray(rows), jnp.asarray(rng.random((*spec.batch_shape, groups, k)) < share), m)
    return Masks(masks, tuple(specs.values()))


def masked(model, x):
    """The model with masked dense weights, the compressed one, and the masks."""
    masks = random_masks(shfl_jax.nnx.resolve(Plan({".*": PATTERN}), model, x))
    dense = nnx.clone(model)
    nnx.update(dense, jax.jit(masks.apply)(nnx.state(dense, nnx.Param)))
    return dense, shfl_jax.nnx.sparsify(model, masks), masks


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), a, b)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 7, 10))


def test_attention_lists_scanned_and_vmapped_layers(x):
    model = Stacked(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    dense, sparse, masks = masked(model, x)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))
    found = {spec.path: (spec.batch_axes, spec.in_axes, spec.out_axes) for spec in masks.specs}
    assert found["layers/attn/out/kernel"] == ((0,), (1, 2), (3,))
    assert found["layers/mlp/0/kernel"] == ((0,), (1,), (2,))
    assert found["heads/kernel"] == ((0,), (1,), (2,))
    assert found["mix/kernel"] == ((), (0, 1), (2, 3))
    assert len(found) == 8
    assert isinstance(sparse.layers.mlp[1], shfl_jax.nnx.SparseLinear)
    run = nnx.jit(lambda model, x: model(x))
    close(run(sparse, x), run(dense, x))
    # What the call changes (batch statistics, dropout's counts) is the same too.
    rest = nnx.Not(nnx.Any(nnx.Param, shfl_jax.nnx.Topology))
    states = [nnx.state(model, rest) for model in (sparse, dense)]
    close(*(jax.tree.map(lambda a: jax.random.key_data(a) if a.dtype.name.startswith("key") else a, s) for s in states))


def test_abstract_models_resolve_too(x):
    abstract = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    plan = Plan({"attn/.*": PATTERN})
    assert shfl_jax.nnx.resolve(plan, abstract, shape) == shfl_jax.nnx.resolve(plan, Block(nnx.Rngs(0)), x)


def test_only_values_are_params_and_their_gradients_are_the_dense_ones_on_the_mask(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LinearGeneral(10, (2, 5), rngs=rngs)
            self.last = nnx.Linear(5, 9, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.sin(self.first(x)))

    dense, sparse, masks = masked(Model(nnx.Rngs(0)), x)
    floats = jax.tree.leaves(nnx.state(sparse, nnx.Param))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in floats)
    assert len(jax.tree.leaves(nnx.state(sparse, shfl_jax.nnx.Topology))) == 6
    gradient = nnx.jit(nnx.grad(lambda model, x: jnp.mean(jnp.sin(model(x)) ** 2)))
    found, expected = gradient(sparse, x), gradient(dense, x)
    compressed = shfl_jax.compress(nnx.state(dense, nnx.Param), masks)
    unpacked = shfl_jax.decompress({"params": found, "topology": compressed["topology"]})
    kept = jax.tree.map(jnp.ones_like, expected)
    close(unpacked, masks.apply(expected))
    assert jax.tree.structure(kept) == jax.tree.structure(unpacked)
    assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(found))


def test_a_bare_layer_becomes_a_sparse_layer(x):
    dense, sparse, _ = masked(nnx.Linear(10, 6, rngs=nnx.Rngs(0)), x)
    assert isinstance(sparse, shfl_jax.nnx.SparseLinear)
    close(sparse(x), dense(x))
    with pytest.raises(ValueError, match=r"kernel: expected inputs with 10 features \(M=6\), got \(9,\)"):
        sparse(x[..., :9])


def test_tied_variables_are_errors_that_name_both_paths(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encode = nnx.Linear(10, 10, rngs=rngs)
            self.decode = nnx.Linear(10, 10, rngs=rngs)
            self.decode.kernel = self.encode.kernel
            self.free = nnx.Linear(10, 10, rngs=rngs)

        def __call__(self, x):
            return self.free(self.decode(self.encode(x)))

    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(10, 10, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tied weights: 'decode/kernel' and 'encode/kernel' are one .*\(10, 10\)"):
        shfl_jax.nnx.resolve(Plan({".*": PATTERN}), model, x)
    with pytest.raises(ValueError, match="'a/kernel' and 'b/kernel'"):
        shfl_jax.nnx.resolve(Plan({".*": PATTERN}), Shared(nnx.Rngs(0)), x)
    assert list(shfl_jax.nnx.resolve(Plan({"free/.*": PATTERN}), model, x)) == ["free/kernel"]


def test_kernels_of_other_modules_are_errors_that_name_them(x):
    class Custom(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.odd = Custom(10, 6, rngs=rngs)

        def __call__(self, x):
            return self.odd(x)

    with pytest.raises(NotImplementedError, match=r"odd/kernel \(10, 6\): a Custom cannot run .* None in the plan"):
        masked(Model(nnx.Rngs(0)), x)
