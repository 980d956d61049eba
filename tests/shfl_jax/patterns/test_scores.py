"""Saliency scores equal their definitions in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax.patterns import _scores as scores


def test_magnitude_and_wanda():
    rng = np.random.default_rng(0)
    weight, norms = rng.normal(size=(2, 5, 7)), rng.uniform(size=(2, 7))
    assert scores.magnitude(jnp.asarray(weight, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(scores.magnitude(jnp.asarray(weight, jnp.float32)), np.abs(weight), rtol=1e-6)
    expected = np.abs(weight) * norms[:, None]
    np.testing.assert_allclose(
        scores.wanda(jnp.asarray(weight, jnp.float32), jnp.asarray(norms, jnp.float32)), expected, rtol=1e-6
    )


def test_taylor_is_the_squared_gradient_times_weight_over_batches():
    model = nn.Dense(3)
    rng = np.random.default_rng(0)
    batches = [tuple(rng.normal(size=(6, n)).astype(np.float32) for n in (4, 3)) for _ in range(3)]
    params = model.init(jax.random.key(0), batches[0][0])["params"]
    specs = shfl_jax.linen.resolve(shfl_jax.Plan({".*": shfl_jax.Unstructured(0.5)}), model, batches[0][0])

    def loss(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    found = scores.taylor(loss, params, specs, iter(batches))
    kernel, expected = np.asarray(params["kernel"], np.float64), 0.0
    for x, y in batches:
        gradient = x.astype(np.float64).T @ (2 * (x @ kernel - y) / y.size)
        expected = expected + (gradient * kernel) ** 2
    np.testing.assert_allclose(found["kernel"], expected.T, rtol=1e-4)
    with pytest.raises(ValueError, match="at least one batch"):
        scores.taylor(loss, params, specs, [])
    batches[1][0][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"kernel \(4, 3\): NaN or inf in the gradient of batch 1"):
        scores.taylor(loss, params, specs, batches)
