"""All nine patterns against references in NumPy integers, and products of what they keep against NumPy in float64.

Scores are small integers (many tie, many are zero) times a power of two, so that every sum is exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from shfl_jax import BW, NM, TEW, TVW, TW, VW, ShflBW, ShflTVW, Unstructured
from shfl_jax.sparse._compress import compress_kernel

V = 4
SHAPES = [(6, 9), (3, 5), (8, 12)]
EXPONENTS = [-99, -60, -7, 0, 30, 95]

drawn = given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(EXPONENTS))
some = settings(max_examples=30, deadline=None)


def draw(shape, seed):
    """Integers from 0 to 9 with whole rows and columns of zeros, and now and then equal ones only."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, rng.integers(2, 11), shape)
    return scores * (rng.random(shape[1]) < 0.9) * (rng.random((shape[0], 1)) < 0.9)


@functools.partial(jax.jit, static_argnames="pattern")
def masked(pattern, scores, count):
    return pattern.mask(scores, count)


def found(pattern, scores, count, exponent):
    mask = masked(pattern, jnp.asarray(np.ldexp(scores, exponent), jnp.float32), count)
    assert (np.sort(mask.rows)[: len(scores)] == np.arange(len(scores))).all()
    return mask


def best(values, count):
    """The highest so many, of equal ones the first: bool in the shape of the values."""
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(values.shape)


def groups(rows, m):
    """The rows of every group; sentinels are left out."""
    return [group[group < m] for group in np.asarray(rows).reshape(-1, V)]


def vectors(scores, rows):
    """Mean scores of every group's columns, times V: (R, K)."""
    return np.stack([scores[group].sum(0) * V / len(group) for group in groups(rows, len(scores))])


def expand(kept, rows, m):
    elements = np.zeros((m, kept.shape[1]), bool)
    for group, columns in zip(groups(rows, m), kept, strict=True):
        elements[group] = columns
    return elements


def in_order(m):
    return np.minimum(np.arange(-(-m // V) * V), m)


@some
@drawn
def test_single_weights(shape, share, seed, exponent):
    scores, count = draw(shape, seed), max(round(share * np.prod(shape)), 1)
    np.testing.assert_array_equal(found(Unstructured(0.5), scores, count, exponent).elements(), best(scores, count))


@some
@drawn
def test_two_of_four_in_place(shape, share, seed, exponent):
    scores, count = draw(shape, seed), round(share * np.prod(shape))
    always = np.concatenate(
        [
            np.stack([best(row, 2) for row in scores[:, start : start + 4]])
            for start in range(0, shape[1], 4)
        ],
        axis=1,
    )  # fmt: skip
    wanted = best(np.where(always, 1000, scores), max(count, always.sum()))
    np.testing.assert_array_equal(found(NM(), scores, count, exponent).elements(), wanted)


@some
@drawn
def test_blocks(shape, share, seed, exponent):
    scores = draw(shape, seed)
    strips = vectors(scores, in_order(shape[0]))
    blocks = vectors(strips.T, in_order(shape[1])).T
    kept = best(blocks, max(round(share * blocks.size), 1))
    wanted = expand(np.repeat(kept, V, axis=1)[:, : shape[1]], in_order(shape[0]), shape[0])
    np.testing.assert_array_equal(found(BW(0.5, V), scores, kept.sum(), exponent).elements(), wanted)


@some
@drawn
def test_vectors(shape, share, seed, exponent):
    scores = draw(shape, seed)
    sums = vectors(scores, in_order(shape[0]))
    kept = best(sums, max(round(share * sums.size), 1))
    mask = found(VW(0.5, V), scores, kept.sum(), exponent)
    np.testing.assert_array_equal(mask.elements(), expand(kept, in_order(shape[0]), shape[0]))

    each = max(round(share * shape[1]), 1)
    mask = found(VW(0.5, V, balanced=True), scores, each * len(sums), exponent)
    wanted = expand(np.stack([best(row, each) for row in sums]), in_order(shape[0]), shape[0])
    np.testing.assert_array_equal(mask.elements(), wanted)


@some
@drawn
def test_vectors_of_searched_rows(shape, share, seed, exponent):
    scores = draw(shape, seed)
    count = max(round(share * vectors(scores, in_order(shape[0])).size), 1)
    mask = found(ShflBW(0.5, V), scores, count, exponent)
    kept = best(vectors(scores, mask.rows), count)
    np.testing.assert_array_equal(mask.elements(), expand(kept, mask.rows, shape[0]))
    given_order = expand(best(vectors(scores, in_order(shape[0])), count), in_order(shape[0]), shape[0])
    assert scores[mask.elements()].sum() >= scores[given_order].sum()


def in_tiles(scores, count):
    """TW by hand: (M, K) bool."""
    m, k = scores.shape
    outputs = int(np.round(np.float32(m) * np.sqrt(np.float32(count) / np.float32(m * k))))
    outputs = min(max(outputs, -(-count // k), 1), m)
    alive = np.flatnonzero(best((scores**2).sum(1), outputs))
    tiles = [alive[start : start + V] for start in range(0, outputs, V)]
    # Equal norms must tie, so they are compared as whole numbers: sums over the square of the length, times 144.
    norms = [(scores[tile] ** 2).sum(0) * (144 // len(tile) ** 2) for tile in tiles]
    ranked = [(np.inf if i == norm.argmax() else norm[i], t, i) for t, norm in enumerate(norms) for i in range(k)]
    ranked.sort(key=lambda unit: (-unit[0], *unit[1:]))
    costs = np.cumsum([len(tiles[t]) for _, t, _ in ranked])
    budget = max(count, costs[len(tiles) - 1])
    number = int((costs <= budget).sum())
    if number < len(costs) and costs[number] - budget < budget - costs[number - 1]:
        number += 1
    elements = np.zeros((m, k), bool)
    for _, t, i in ranked[:number]:
        elements[tiles[t], i] = True
    return elements


@some
@drawn
def test_tiles(shape, share, seed, exponent):
    scores, count = draw(shape, seed), max(round(share * np.prod(shape)), 1)
    np.testing.assert_array_equal(found(TW(0.5, V), scores, count, exponent).elements(), in_tiles(scores, count))


@some
@drawn
def test_tiles_and_restored_weights(shape, share, seed, exponent):
    scores, count, pattern = draw(shape, seed), max(round(share * np.prod(shape)), 1), TEW(0.5, V, restored=0.1)
    tiles = in_tiles(scores, max(count - round(0.1 * np.prod(shape)), 1))
    wanted = best(np.where(tiles, 1000, scores), max(count, tiles.sum()))
    np.testing.assert_array_equal(found(pattern, scores, count, exponent).elements(), wanted)


@pytest.mark.parametrize("pattern", [TVW(0.5, V), ShflTVW(0.5, V)], ids=lambda pattern: pattern.name)
@settings(max_examples=20, deadline=None)
@drawn
def test_two_of_four_inside_groups(pattern, shape, share, seed, exponent):
    (m, k), scores = shape, draw(shape, seed)
    count = max(int(share * m * (k // 4 * 2 + min(k % 4, 2))), pattern.least(shape))
    mask = found(pattern, scores, count, exponent)
    wanted, as_given = np.zeros(shape, bool), 0
    for group, order, kept in zip(groups(mask.rows, m), np.asarray(mask.order), np.asarray(mask.kept), strict=True):
        assert sorted(order[order < k]) == np.flatnonzero(kept).tolist()
        columns = np.flatnonzero(kept)
        for row in group:
            for four in order.reshape(-1, 4):
                four = np.sort(four[four < k])
                wanted[row, four[best(scores[row, four], 2)]] = True
            as_given += sum(np.sort(scores[row, columns[i : i + 4]])[-2:].sum() for i in range(0, len(columns), 4))
    np.testing.assert_array_equal(mask.elements(), wanted)
    assert scores[wanted].sum() >= as_given


STORED = [BW(0.5, V), VW(0.5, V), VW(0.5, V, balanced=True), ShflBW(0.5, V), TW(0.5, V), TVW(0.5, V), ShflTVW(0.5, V)]


@pytest.mark.parametrize("pattern", STORED, ids=repr)
def test_products_and_gradients_of_every_storage(pattern):
    for shape in SHAPES:
        rng = np.random.default_rng(shape)
        mask = masked(pattern, jnp.asarray(draw(shape, 1), jnp.float32), pattern.count(shape))
        weight = rng.integers(-9, 10, shape).astype(np.float32) * np.asarray(mask.elements())
        x, cotangent = rng.integers(-9, 10, (5, shape[1])), rng.integers(-9, 10, (5, shape[0]))
        matrix = compress_kernel(weight, mask)

        def product(values, x, integers=matrix.integers):
            return pk.matmul(pk.join(values, integers), x, implementation="xla")

        y, pull = jax.vjp(product, matrix.values, jnp.asarray(x, jnp.float32))
        into_values, into_x = pull(jnp.asarray(cotangent, jnp.float32))
        np.testing.assert_array_equal(y, x @ weight.T.astype(np.float64))
        np.testing.assert_array_equal(into_x, cotangent @ weight.astype(np.float64))
        into_weight = np.asarray(pk.to_dense(pk.join(into_values, matrix.integers)))
        np.testing.assert_array_equal(into_weight, (cotangent.T @ x) * np.asarray(mask.elements()))
