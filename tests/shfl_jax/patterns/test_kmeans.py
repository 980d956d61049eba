import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from k_means_constrained import KMeansConstrained

from shfl_jax.patterns.search import _kmeans as permutation


def low_rank(rng, m, k, rank, noise):
    return np.abs(rng.normal(size=(m, rank)) @ rng.normal(size=(rank, k)) + noise * rng.normal(size=(m, k)))


def random_binary(rng):
    return rng.random((256, 96)) < 0.5, 32


def clustered_binary(rng):
    prototypes = rng.random((8, 128)) < 0.4
    return prototypes[rng.permutation(np.repeat(np.arange(8), 32))] ^ (rng.random((256, 128)) < 0.1), 32


def low_rank_magnitudes(rng):
    return low_rank(rng, 192, 80, 5, 0.5), 16


def odd_sizes(rng):
    return low_rank(rng, 207, 71, 8, 0.5) > 1.5, 23


def larger(rng):
    scores = low_rank(rng, 768, 256, 12, 1.0)
    return scores > np.median(scores), 64


@pytest.mark.parametrize("case", [random_binary, clustered_binary, low_rank_magnitudes, odd_sizes, larger])
def test_objective_is_within_one_percent_of_the_package(case):
    features, v = case(np.random.default_rng(7))
    features = features.astype(np.float32)
    groups = len(features) // v
    reference = KMeansConstrained(n_clusters=groups, size_min=v, size_max=v, random_state=0).fit(features).inertia_
    search = jax.jit(functools.partial(permutation.kmeans, group_size=v))
    grouping = np.asarray(search(features, key=jax.random.key(0)))
    members = features[grouping].astype(np.float64)
    objective = ((members - members.mean(1, keepdims=True)) ** 2).sum()
    assert np.array_equal(np.sort(grouping, axis=None), np.arange(len(features)))
    assert objective <= 1.01 * reference
    np.testing.assert_allclose(permutation.inertia(features, grouping), objective, rtol=1e-5)


@pytest.mark.parametrize(("m", "v"), [(1, 4), (5, 4), (13, 4), (7, 1)])
def test_groups_are_full_but_the_last(m, v):
    features = np.random.default_rng(m).random((m, 6))
    grouping = np.asarray(permutation.kmeans(features, v, jax.random.key(1)))
    assert grouping.shape == (-(-m // v), v)
    assert np.array_equal(np.sort(grouping, axis=None)[:m], np.arange(m))
    assert (grouping[:-1] < m).all()
    assert (np.diff(grouping, axis=1) > 0)[grouping[:, 1:] < m].all()
    assert (np.diff(grouping[:-1, 0]) > 0).all()


def test_equal_rows_stay_in_order():
    grouping = permutation.kmeans(jnp.ones((12, 3)), 4, jax.random.key(0))
    np.testing.assert_array_equal(grouping, np.arange(12).reshape(3, 4))


def test_separated_clusters_are_found():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 8))
    grouping = np.asarray(permutation.kmeans(np.eye(6)[labels], 8, jax.random.key(0)))
    assert (labels[grouping] == labels[grouping][:, :1]).all()


def test_a_start_is_never_made_worse():
    rng = np.random.default_rng(3)
    features = rng.random((48, 20)).astype(np.float32)
    start = jnp.asarray(rng.permutation(48).reshape(6, 8), jnp.int32)
    for sweeps in range(2):
        found = permutation.kmeans(features, 8, jax.random.key(0), start=start, seeds=1, restarts=1, sweeps=sweeps)
        assert permutation.inertia(features, found) <= permutation.inertia(features, start) * (1 + 1e-6)
    assert permutation.inertia(features, found) < permutation.inertia(features, start)


def test_inner_products_on_demand_give_the_same_groups(monkeypatch):
    features = (np.random.default_rng(4).random((50, 30)) < 0.5).astype(np.float32)
    kept = permutation.kmeans(features, 8, jax.random.key(0))
    monkeypatch.setattr(permutation, "GRAM_ROWS", 0)
    permutation.kmeans.clear_cache()
    np.testing.assert_array_equal(permutation.kmeans(features, 8, jax.random.key(0)), kept)


def test_deterministic_under_jit_and_vmap():
    features = (np.random.default_rng(5).random((3, 40, 16)) < 0.5).astype(np.float32)
    search = functools.partial(permutation.kmeans, group_size=8, key=jax.random.key(2))
    eager = np.stack([search(f) for f in features])
    np.testing.assert_array_equal(np.stack([jax.jit(search)(f) for f in features]), eager)
    np.testing.assert_array_equal(jax.vmap(search)(features), eager)
