"""A model with 2:4 inside its groups, from pruning to serving: every step keeps exactly the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import export

import shfl_jax
from shfl_jax import pruning
from shfl_jax.sparse import _checkpoint as checkpoint
from shfl_jax.sparse import _compress as compression
from shfl_jax.sparse import _report as reporting


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24)(nn.relu(nn.Dense(64)(x)))


def test_from_pruning_to_serving(tmp_path):
    model, x = Model(), jax.random.normal(jax.random.key(0), (8, 40))
    params = model.init(jax.random.key(1), x)["params"]
    patterns = {
        "Dense_0/kernel": shfl_jax.TVW(0.75, 16, rounds=2),
        "Dense_1/kernel": shfl_jax.ShflTVW(0.75, 16, rounds=2),
    }
    specs = shfl_jax.linen.resolve(shfl_jax.Plan(patterns), model, x)
    tx = pruning.prune(optax.adam(1e-2), specs, pruning.cubic(begin=0, end=3, every=1))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: (model.apply({"params": params}, x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    densities = []
    for _ in range(5):
        params, state = step(params, state)
        densities.append([float(mask.density()) for mask in pruning.masks(state).values()])
    assert densities[0] == [1, 1]
    np.testing.assert_allclose(densities[-1], 0.25, atol=0.01)
    assert (np.diff(densities, axis=0) <= 0).all()

    masks = pruning.masks(state)
    dense = masks.apply(params)
    jax.tree.map(np.testing.assert_array_equal, dense, params)
    sparse = compression.compress(params, masks)
    for layer in compression.layers(sparse).values():
        assert layer.topology.pairs is not None
    jax.tree.map(np.testing.assert_array_equal, compression.decompress(sparse), dense)
    expected = model.apply({"params": dense}, x)
    np.testing.assert_allclose(shfl_jax.linen.apply(model, sparse, x), expected, rtol=1e-5, atol=1e-5)
    prepared = compression.prepare(sparse, "xla")
    np.testing.assert_allclose(shfl_jax.linen.apply(model, prepared, x), expected, rtol=1e-5, atol=1e-5)

    checkpoint.save(tmp_path / "model", sparse)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(tmp_path / "model")["topology"], sparse["topology"])
    for layer in reporting.report(sparse).layers:
        assert layer.route == "2:4"
        np.testing.assert_allclose(layer.sparsity, 0.75, atol=0.01)
    run = jax.jit(lambda sparse, x: shfl_jax.linen.apply(model, sparse, x))
    restored = export.deserialize(export.export(run)(sparse, x).serialize())
    np.testing.assert_allclose(restored.call(sparse, x), expected, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda params: run({**sparse, "params": params}, x).sum())(sparse["params"])
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, sparse["params"])


def test_nnx_runs_packed_kernels():
    from flax import nnx

    model = nnx.Linear(40, 32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 40))
    specs = shfl_jax.nnx.resolve(shfl_jax.Plan({"kernel": shfl_jax.ShflTVW(0.75, 16, rounds=2)}), model, x)
    (path, spec), *_ = specs.items()
    scores = jnp.abs(spec.to_matrix(model.kernel[...]))
    masks = shfl_jax.Masks({path: shfl_jax.mask(scores, spec.pattern)}, (spec,))
    sparse = shfl_jax.nnx.sparsify(model, masks)
    kernel = spec.from_matrix(jnp.where(masks[path].elements(), spec.to_matrix(model.kernel[...]), 0))
    np.testing.assert_allclose(sparse(x), x @ kernel + model.bias[...], rtol=1e-5, atol=1e-5)
