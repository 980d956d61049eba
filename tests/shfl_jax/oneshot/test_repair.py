"""Repair finds the least-squares solution that float64 linear algebra finds, for every pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax.oneshot._repair import inverse_diagonal, output_error, repair
from shfl_jax.patterns import _scores as scores

PATTERNS = [
    shfl_jax.Unstructured(0.75),
    shfl_jax.NM(),
    shfl_jax.VW(0.75, group_size=16),
    shfl_jax.ShflBW(0.75, group_size=16),
    shfl_jax.BW(0.75, block_size=8),
    shfl_jax.TW(0.75, tile_size=16),
]


@pytest.fixture(scope="module")
def layer():
    """Weights (M, K) and correlated inputs (K, tokens) of uneven scales, float64."""
    rng = np.random.default_rng(3)
    m, k = 40, 36
    mixing = rng.normal(size=(k, k)) * np.exp(rng.normal(size=(k, 1)))
    return rng.normal(size=(m, k)), mixing @ rng.normal(size=(k, 200))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_repair_equals_least_squares_in_float64(layer, pattern):
    weight, x = layer
    gram = x @ x.T
    mask = jax.jit(shfl_jax.mask, static_argnums=1)(jnp.abs(jnp.asarray(weight, jnp.float32)), pattern)
    kept = np.asarray(mask.elements())
    repaired = repair(jnp.asarray(weight, jnp.float32), mask, jnp.asarray(gram, jnp.float32), tolerance=1e-5)
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    expected = np.zeros_like(weight)
    for row, columns in enumerate(map(np.flatnonzero, kept)):
        if len(columns):
            expected[row, columns] = np.linalg.solve(damped[np.ix_(columns, columns)], damped[columns] @ weight[row])
    np.testing.assert_allclose(repaired, expected, rtol=1e-3, atol=1e-3)
    assert not np.asarray(repaired)[~kept].any()
    before, after = (
        np.linalg.norm((weight - w) @ x) ** 2 / np.linalg.norm(weight @ x) ** 2 for w in (weight * kept, expected)
    )
    assert after < before
    np.testing.assert_allclose(output_error(weight, repaired, gram), after, rtol=1e-3)


def test_nothing_pruned_changes_nothing(layer):
    weight, x = (jnp.asarray(a, jnp.float32) for a in layer)
    mask = shfl_jax.mask(jnp.abs(weight), shfl_jax.VW(0.0, group_size=16))
    np.testing.assert_array_equal(repair(weight, mask, x @ x.T), weight)


def test_inputs_that_are_always_zero_leave_the_weights(layer):
    weight = jnp.asarray(layer[0], jnp.bfloat16)
    mask = shfl_jax.mask(jnp.abs(weight), shfl_jax.VW(0.5, group_size=16))
    repaired = repair(weight, mask, jnp.zeros((36, 36)))
    assert repaired.dtype == jnp.bfloat16
    np.testing.assert_array_equal(repaired, jnp.where(mask.elements(), weight, 0))


def test_repair_under_jit_and_vmap(layer):
    weight, x = (jnp.asarray(a, jnp.float32) for a in layer)
    gram = x @ x.T
    mask = shfl_jax.mask(jnp.abs(weight), shfl_jax.VW(0.5, group_size=8))
    stacked = jax.jit(jax.vmap(lambda w: repair(w, mask, gram)))(jnp.stack([weight, 2 * weight]))
    np.testing.assert_allclose(stacked[0], repair(weight, mask, gram), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stacked[1], 2 * stacked[0], rtol=1e-3, atol=1e-4)


def test_wrong_shapes_are_named(layer):
    weight, x = (jnp.asarray(a, jnp.float32) for a in layer)
    mask = shfl_jax.mask(jnp.abs(weight), shfl_jax.VW(0.5, group_size=8))
    with pytest.raises(ValueError, match=r"\(40, 36\).*\(200, 200\)"):
        repair(weight, mask, x.T @ x)


def test_obs_scores_are_the_cost_of_pruning_one_weight(layer):
    weight, x = layer
    gram = x @ x.T
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    diagonal = inverse_diagonal(jnp.asarray(gram, jnp.float32))
    np.testing.assert_allclose(diagonal, np.linalg.inv(damped).diagonal(), rtol=1e-3)
    score = scores.obs(jnp.asarray(weight, jnp.float32), diagonal)
    # Prune one weight, repair the others: the (damped) error that is left is the square of its score.
    for row, column in ((0, 0), (7, 30)):
        rest = np.delete(np.arange(36), column)
        best = np.zeros(36)
        best[rest] = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest] @ weight[row])
        change = weight[row] - best
        np.testing.assert_allclose(score[row, column] ** 2, change @ damped @ change, rtol=1e-3)
