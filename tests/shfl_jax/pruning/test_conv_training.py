"""A convolutional model with batch normalisation, from pruning during training to compressed inference."""

import jax
import numpy as np
import optax
from flax import linen as nn

import shfl_jax
from shfl_jax import pruning


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3), strides=2, name="stem")(x)))
        return nn.Conv(16, (3, 3), name="conv")(x).mean((1, 2))


def test_from_pruning_to_serving():
    model, x = Model(), jax.random.normal(jax.random.key(0), (4, 9, 9, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    params, statistics = variables["params"], variables["batch_stats"]
    plan = shfl_jax.Plan({"conv/.*": shfl_jax.VW(0.75, 8)})
    specs = shfl_jax.linen.resolve(plan, model, x)
    tx = pruning.prune(optax.adam(1e-2), specs, pruning.cubic(begin=0, end=3, every=1))
    state = tx.init(params)

    @jax.jit
    def step(params, statistics, state):
        def loss(params):
            variables = {"params": params, "batch_stats": statistics}
            y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return (y**2).mean(), updates["batch_stats"]

        grads, statistics = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state

    for _ in range(5):
        params, statistics, state = step(params, statistics, state)
    masks = pruning.masks(state)
    np.testing.assert_allclose(masks["conv/kernel"].density(), 0.25, atol=0.02)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(masks.apply)(params), params)
    sparse = {**shfl_jax.compress(params, masks), "batch_stats": statistics}
    assert sparse["params"]["conv"]["kernel"].ndim == 2
    expected = jax.jit(model.apply)({"params": params, "batch_stats": statistics}, x)
    found = jax.jit(lambda variables, x: shfl_jax.linen.apply(model, variables, x))(sparse, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
