import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import VW, ShflBW
from shfl_jax.patterns.search import _annealing as annealing
from shfl_jax.patterns.search import _kmeans as permutation

M, K, V = 46, 40, 8  # the last group has 6 rows; of two shards, 7 each
GROUPS = 6


def normal(rng):
    return rng.normal(size=(M, K))


def low_rank(rng):
    return rng.normal(size=(M, 3)) @ rng.normal(size=(3, K))


def planted(rng):
    prototypes = rng.random((GROUPS, K)) < 0.25
    return prototypes[rng.integers(0, GROUPS, M)] + 0.1 * rng.normal(size=(M, K))


def degenerate(rng):
    scores = np.round(rng.random((M, K)) * 2)
    scores[rng.random(M) < 0.3] = 0
    return scores


MATRICES = [
    jnp.asarray(np.abs(draw(np.random.default_rng(1))), jnp.float32) for draw in (normal, low_rank, planted, degenerate)
]
IN_ORDER = jnp.asarray(np.minimum(np.arange(GROUPS * V), M), jnp.int32).reshape(1, GROUPS, V)


def choose(count, balanced=False):
    pattern = VW(0.75, V, balanced=balanced)
    return lambda sums: pattern.vectors.choose(sums[0], count)[None]


@functools.partial(jax.jit, static_argnames="balanced")
def search(scores, count, starts, seed=0, steps=40, noise=0.25, balanced=False):
    key = jax.random.key(seed)
    return annealing.anneal(scores[None], choose(count, balanced), starts, key, steps=steps, noise=noise)


@functools.partial(jax.jit, static_argnames="balanced")
def retained(scores, count, grouping, balanced=False):
    sums = annealing.group_sums(scores[None], grouping)
    return jnp.sum(jnp.where(choose(count, balanced)(sums), sums, 0))


@pytest.mark.parametrize("balanced", [False, True])
def test_never_worse_than_any_start(balanced):
    shuffled = np.random.default_rng(0).permutation(M)
    shuffled = permutation.sort_groups(
        jnp.pad(jnp.asarray(shuffled, jnp.int32), (0, 2), constant_values=M).reshape(-1, V), M
    )
    starts = jnp.stack([IN_ORDER, shuffled[None]])
    for scores in MATRICES:
        for count in (GROUPS * K // 2, GROUPS * K // 10):
            found = search(scores, count, starts, balanced=balanced)
            assert np.array_equal(np.sort(found, axis=None)[:M], np.arange(M))
            assert (np.asarray(found)[0, :-1] < M).all()
            most = max(retained(scores, count, start, balanced) for start in starts)
            assert retained(scores, count, found, balanced) >= most
            np.testing.assert_array_equal(search(scores, count, starts, balanced=balanced), found)


def test_alternating_without_noise_never_loses():
    scores, starts = MATRICES[0], jnp.stack([IN_ORDER, IN_ORDER])
    found = [search(scores, 60, starts, steps=steps, noise=0.0) for steps in (0, 1, 2, 4, 40)]
    np.testing.assert_array_equal(found[0], IN_ORDER)
    kept = [float(retained(scores, 60, grouping)) for grouping in found]
    assert (np.diff(kept) >= 0).all()
    assert kept[-1] > kept[0]


def test_rows_that_are_alike_stay_in_order():
    for scores in (jnp.zeros((M, K)), jnp.ones((M, K)), jnp.broadcast_to(MATRICES[0][0], (M, K))):
        np.testing.assert_array_equal(search(scores, 60, jnp.stack([IN_ORDER, IN_ORDER])), IN_ORDER)


def test_keeps_no_less_than_kmeans_and_the_rows_in_order():
    pattern, published = (ShflBW(0.75, V, min_share=0.5, shards=2, search=name) for name in ("annealing", "kmeans"))
    in_order = jnp.asarray([[*range(23), M], [*range(23, 46), M]], jnp.int32).reshape(-1)
    gained = 0.0
    for scores in MATRICES:
        for sparsity in (0.5, 0.75, 0.9):
            count = pattern.count((M, K), sparsity)
            masks = [shfl_jax.mask(scores, p, count) for p in (pattern, published)]
            masks.append(pattern.mask_of_rows(scores, in_order, count))
            found, clustered, plain = (float(jnp.sum(mask.elements() * scores)) for mask in masks)
            assert found >= max(clustered, plain) * (1 - 1e-6)
            gained += found - clustered
    assert gained > 0
