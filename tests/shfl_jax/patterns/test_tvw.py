"""TVW and Shfl-TVW: what 2:4 inside groups keeps, and how much the order of the columns gives."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shfl_jax
from shfl_jax import TVW, ShflTVW
from shfl_jax.patterns import padded_rows
from shfl_jax.patterns.search import _fours as fours

PATTERNS = [TVW(0.75, 16), TVW(0.75, 16, outputs=False), ShflTVW(0.75, 16), ShflTVW(0.75, 16, balanced=True)]
KINDS = ("normal", "columns", "correlated")
SHAPES = [(64, 32), (50, 37), (7, 3), (130, 41), (16, 1)]


def scores(m, k, seed=0):
    return jnp.asarray(np.abs(np.random.default_rng([seed, m, k]).standard_normal((m, k))), jnp.float32)


def assert_two_of_four(mask):
    """The order holds a group's kept columns once, in full fours, and a row keeps two of each (or all of fewer)."""
    m, k = mask.shape
    rows, order = np.asarray(mask.rows).reshape(-1, mask.group_size), np.asarray(mask.order)
    elements, total = np.asarray(mask.elements()), 0
    for group, slots, kept in zip(rows, order, np.asarray(mask.kept), strict=True):
        columns = slots[slots < k]
        np.testing.assert_array_equal(np.sort(columns), np.flatnonzero(kept))
        assert kept.sum() % 4 == 0 or kept.all()
        widths = (slots < k).reshape(-1, 4).sum(1)
        assert ((widths == 4).sum(), (widths > 0).sum()) == (len(columns) // 4, -(-len(columns) // 4))
        for four in slots.reshape(-1, 4):
            real = four[four < k]
            assert (elements[np.ix_(group[group < m], real)].sum(1) == min(2, len(real))).all()
            total += min(2, len(real)) * (group < m).sum()
    assert elements.sum() == total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_row_keeps_two_of_every_four(pattern, shape):
    assert_two_of_four(shfl_jax.mask(scores(*shape), pattern))


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.875, 0.9375])
@pytest.mark.parametrize("kind", [TVW, ShflTVW])
def test_the_total_sparsity_is_that_of_the_tiles_and_then_half(kind, sparsity):
    mask = shfl_jax.mask(scores(128, 128), kind(sparsity, 16))
    assert float(mask.density()) == pytest.approx(1 - sparsity, abs=32 / 128**2)
    assert float(mask.density()) == pytest.approx(float(mask.elements().mean()))
    assert_two_of_four(mask)


ANY_COUNT = [TVW(0.5, 4), TVW(0.5, 4, outputs=False), ShflTVW(0.5, 4), ShflTVW(0.5, 4, balanced=True)]


@functools.partial(jax.jit, static_argnames="pattern")
def mask_of(pattern, scores, count):
    """The mask, with rows in order where the pattern would search them: their order is of no account here."""
    if pattern.searches_rows:
        return pattern.mask_of_rows(scores, padded_rows(scores.shape[0], 4), count)
    return pattern.mask(scores, count)


@pytest.mark.parametrize("shape", [(64, 5), (17, 9), (50, 30)])
def test_a_half_is_a_half_where_inputs_are_no_multiple_of_four(shape):
    half = shape[0] * shape[1] / 2
    for pattern in ANY_COUNT[:3]:
        mask = mask_of(pattern, scores(*shape), pattern.count(shape))
        assert_two_of_four(mask)
        assert abs(int(mask.elements().sum()) - half) <= 4


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ANY_COUNT), st.sampled_from([(17, 9), (10, 5), (3, 7)]), st.floats(0, 1), st.integers(0, 9))
def test_counts_are_met_to_half_a_four(pattern, shape, share, seed):
    m, k = shape
    count = max(round(share * m * k), pattern.least(shape))
    s = scores(m, k, seed) * (scores(m, 1, seed) < 1.5)  # some rows are zero
    mask = mask_of(pattern, s, count)
    kept = int(mask.elements().sum())
    if count > m * (k // 4 * 2 + min(k % 4, 2)):
        assert kept == count
        return
    assert_two_of_four(mask)
    rows = (np.asarray(mask.rows).reshape(-1, 4) < m).sum(1)
    # What is kept in any case: a four of every tile, or of all groups if balanced, or else one four alone.
    if isinstance(pattern, TVW):
        least, tolerance = 2 * rows[np.asarray(mask.kept.any(1))].sum(), 4
    else:
        least, tolerance = (2 * m, m) if pattern.balanced else (2 * min(4, m), 4)
    assert abs(kept - max(count, least)) <= tolerance


@pytest.mark.parametrize("kind", [TVW, ShflTVW])
@pytest.mark.parametrize("options", [{"sparsity": 0.49}, {"sparsity": 1.0}, {"sparsity": 0.75, "rounds": -1}])
def test_wrong_fields_are_errors(kind, options):
    with pytest.raises(ValueError, match=r"sparsity|rounds"):
        kind(**options)


@pytest.mark.parametrize("pattern", PATTERNS[::2], ids=repr)
def test_a_schedule_prunes_step_by_step(pattern):
    s = scores(64, 32)

    @jax.jit
    def at(fraction):
        return shfl_jax.mask(s, pattern, pattern.count(s.shape, fraction=fraction))

    masks = [at(fraction) for fraction in np.linspace(0, 1, 7)]
    assert masks[0].elements().all()
    kept = [int(mask.elements().sum()) for mask in masks]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] == int(pattern.count(s.shape, fraction=1 / 6))
    np.testing.assert_array_equal(masks[-1].elements(), shfl_jax.mask(s, pattern).elements())


@pytest.mark.parametrize("pattern", [TVW(0.75, 16), ShflTVW(0.75, 16, search="kmeans")], ids=repr)
def test_stacked_layers_are_searched_slice_by_slice(pattern):
    s = jnp.stack([scores(48, 20, seed) for seed in range(3)])
    stacked = jax.jit(lambda s: shfl_jax.mask(s, pattern))(s)
    for i in range(3):
        np.testing.assert_array_equal(stacked.elements()[i], shfl_jax.mask(s[i], pattern).elements())
    again = shfl_jax.mask(s, pattern, previous=stacked)
    assert again.elements().shape == s.shape


def test_rows_stay_in_their_shard():
    mask = shfl_jax.mask(scores(64, 32), ShflTVW(0.75, 16, shards=2))
    assert (np.asarray(mask.rows).reshape(2, 32) // 32 == [[0], [1]]).all()


def test_vectors_are_chosen_for_what_2_4_keeps():
    """Columns of equal sums: in half of them a row's weights are all or nothing, and 2:4 loses nothing there."""
    rng = np.random.default_rng(0)
    flat = np.full((16, 32), 0.5)
    uneven = rng.permuted(np.repeat([[0.0, 1.0]], 16, 1).reshape(1, -1).repeat(16, 0), axis=1)
    s = jnp.asarray(np.concatenate([flat, uneven], 1), jnp.float32)
    mask = shfl_jax.mask(s, ShflTVW(0.75, 16))
    assert mask.kept[0, 32:].mean() > 0.9
    assert (mask.elements() * s).sum() > 0.9 * s.sum() / 2


def test_the_refinement_never_loses_and_wins_by_far_where_large_columns_stand_together():
    rng = np.random.default_rng(1)
    s = jnp.asarray(np.abs(rng.standard_normal((32, 64))) * np.repeat([4, 1, 1, 1], 16), jnp.float32)
    rows, kept = jnp.arange(32, dtype=jnp.int32), jnp.ones((2, 64), bool)
    sums = []
    for rounds in (0, 1, 4, 16, 64):
        order = fours.order_columns(s, rows, kept, 16, rounds=rounds)
        sums.append(float((fours.choose_two(s, rows, order, 16) * s).sum()))
    assert sums == sorted(sums)
    naive = jnp.tile(jnp.arange(64, dtype=jnp.int32), (2, 1))
    assert sums[-1] > 1.1 * float((fours.choose_two(s, rows, naive, 16) * s).sum())


def test_the_splits_are_all_ways_to_part_eight_columns():
    halves = {frozenset([frozenset(split[:4]), frozenset(split[4:])]) for split in fours.SPLITS.tolist()}
    every = {frozenset([frozenset(a), frozenset(range(8)) - frozenset(a)]) for a in itertools.combinations(range(8), 4)}
    assert halves == every
    assert fours.SPLITS[0].tolist() == list(range(8))


def test_two_of_every_four_against_a_sort():
    rng = np.random.default_rng(2)
    s = rng.integers(0, 4, (16, 12)).astype(np.float32)
    order = rng.permutation(12).astype(np.int32)[None]
    chosen = fours.choose_two(
        jnp.asarray(s), jnp.arange(16, dtype=jnp.int32), jnp.asarray(np.sort(order.reshape(1, 3, 4)).reshape(1, 12)), 16
    )
    for row in range(16):
        for four in np.sort(order.reshape(3, 4)):
            best = four[np.lexsort((four, -s[row, four]))[:2]]
            assert set(four[np.asarray(chosen)[row, four]]) == set(best)


def small_tiles(kind: str, tiles: int = 4, rows: int = 16, inputs: int = 12) -> Iterator[np.ndarray]:
    """Tiles of scores (rows, inputs), float32, small enough for `best_order`.

    Args:
        kind: "normal": magnitudes of independent normal weights; "columns": the same with inputs of different scale,
            like ones side by side; "correlated": rows of three kinds that need different inputs, as a row permutation
            finds.
        tiles: how many.
        rows: V.
        inputs: kept inputs, a multiple of four.
    """
    for tile in range(tiles):
        rng = np.random.default_rng([0, tile, KINDS.index(kind)])
        scores = np.abs(rng.standard_normal((rows, inputs)))
        if kind == "columns":
            scores *= np.repeat(rng.permutation([2.0, 1.0, 0.5]), inputs // 3)
        elif kind == "correlated":
            scores *= np.exp(rng.standard_normal((3, inputs)))[rng.integers(0, 3, rows)]
        yield scores.astype(np.float32)


def kept_by(scores: np.ndarray, order: np.ndarray) -> float:
    """What 2:4 keeps of the scores (rows, inputs) in this order of the inputs."""
    ordered = scores[:, order].astype(np.float64).reshape(len(scores), -1, 4)
    return float(np.sort(ordered, axis=2)[:, :, 2:].sum())


def best_order(scores: np.ndarray) -> np.ndarray:
    """The best order of all, by exhaustive search over the partitions into fours: 5775 for 12 inputs."""
    inputs = scores.shape[1]
    value = {
        four: np.sort(scores[:, four].astype(np.float64), axis=1)[:, 2:].sum()
        for four in itertools.combinations(range(inputs), 4)
    }

    def best(rest: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        if not rest:
            return 0.0, ()
        found = []
        for others in itertools.combinations(rest[1:], 3):
            four = (rest[0], *others)
            total, order = best(tuple(i for i in rest if i not in four))
            found.append((total + value[four], four + order))
        return max(found)

    return np.array(best(tuple(range(inputs)))[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_closes_a_quarter_of_the_gap_to_the_exhaustive_best(kind):
    naive = found = best = 0.0
    for tile in small_tiles(kind):
        naive += kept_by(tile, np.arange(tile.shape[1]))
        rows, kept = jnp.arange(tile.shape[0], dtype=jnp.int32), jnp.ones((1, tile.shape[1]), bool)
        found += kept_by(tile, np.asarray(fours.order_columns(jnp.asarray(tile), rows, kept, tile.shape[0]))[0])
        best += kept_by(tile, best_order(tile))
    assert naive < found <= best * (1 + 1e-6)
    assert found - naive >= 0.25 * (best - naive)
