import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shfl_jax
from shfl_jax import BW, NM, TW, VW, ShflBW, Unstructured
from shfl_jax.patterns import _ranking as ranking

SHAPE = (22, 18)
RAGGED_SHARDS = ShflBW(0.75, 4, balanced=True, shards=2)
PATTERNS = [
    Unstructured(0.75),
    NM(),
    NM(1, 4),
    BW(0.75, 4),
    VW(0.75, 4),
    VW(0.75, 4, balanced=True),
    VW(0.75, 4, min_share=0.5),
    RAGGED_SHARDS,
    TW(0.75, 4),
    TW(0.75, 4, outputs=False),
]
each = functools.partial(pytest.mark.parametrize, "pattern", ids=repr)


def draw(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def assert_valid(mask, m):
    rows = np.asarray(mask.rows)
    assert np.array_equal(np.sort(rows)[:m], np.arange(m))
    assert (np.sort(rows)[m:] == m).all()
    assert mask.rows.dtype == jnp.int32
    assert mask.kept.dtype == bool


@each(PATTERNS)
def test_exact_counts_and_the_same_under_jit(pattern):
    scores = draw()
    count = pattern.count(SHAPE)
    eager = shfl_jax.mask(scores, pattern)
    jitted = jax.jit(lambda s, c: shfl_jax.mask(s, pattern, c))(scores, count)
    assert_valid(eager, SHAPE[0])
    np.testing.assert_array_equal(eager.rows, jitted.rows)
    np.testing.assert_array_equal(eager.kept, jitted.kept)
    if isinstance(pattern, TW):
        # Half of the largest unit, an input of one tile.
        assert abs(int(eager.elements().sum()) - count) <= 2
    elif isinstance(pattern, BW):
        assert int(eager.kept[:, ::4].sum()) == count == round(6 * 5 * 0.25)
    else:
        assert int(eager.kept.sum()) == count
    assert eager.group_size == pattern.group_size


@each([Unstructured(0.0), NM(4, 4), BW(0.0, 4), VW(0.0, 4), VW(0.0, 4, balanced=True), ShflBW(0.0, 4), TW(0.0, 4)])
def test_nothing_pruned(pattern):
    assert shfl_jax.mask(draw(), pattern).elements().all()
    assert shfl_jax.mask(draw((1, 1)), pattern).elements().all()


@each(PATTERNS)
def test_a_fraction_of_zero_keeps_all_and_traced_counts_compile_once(pattern):
    compiled = []

    @jax.jit
    def run(scores, fraction):
        compiled.append(None)
        return shfl_jax.mask(scores, pattern, pattern.count(SHAPE, fraction=fraction)).elements()

    kept = [int(run(draw(), jnp.float32(f)).sum()) for f in (0, 0.5, 1)]
    assert len(compiled) == 1
    assert kept[0] == SHAPE[0] * SHAPE[1] > kept[1] > kept[2]
    assert kept[2] == int(shfl_jax.mask(draw(), pattern).elements().sum())


@each([p for p in PATTERNS if p.name not in ("tw", "shfl_bw")])
def test_ties_go_to_the_lower_index(pattern):
    mask = shfl_jax.mask(jnp.ones((8, 16)), pattern)
    kept = np.asarray(mask.kept)
    if isinstance(pattern, NM):
        per_unit = kept.reshape(-1, 4)
    elif isinstance(pattern, VW) and (pattern.balanced or pattern.min_share):
        per_unit = kept
    else:
        per_unit = kept[:, :: 4 if isinstance(pattern, BW) else 1].ravel()
    assert (np.diff(np.atleast_2d(per_unit).astype(int), axis=-1) <= 0).all()


@each([Unstructured(0.5), BW(0.5, 2), VW(0.5, 2), VW(0.5, 2, balanced=True), NM()])
def test_retained_score_is_the_best_of_all_choices(pattern):
    for seed in range(3):
        scores = draw((4, 4), seed)
        kept = float((scores * shfl_jax.mask(scores, pattern).elements()).sum())
        if isinstance(pattern, Unstructured):
            units, limits = scores.reshape(1, -1), 8
        elif isinstance(pattern, NM):
            units, limits = scores, 2
        elif isinstance(pattern, BW):
            units, limits = scores.reshape(2, 2, 2, 2).sum((1, 3)).reshape(1, -1), 2
        else:
            units = scores.reshape(2, 2, 4).sum(1)
            units, limits = (units, 2) if pattern.balanced else (units.reshape(1, -1), 4)
        best = sum(max(sum(c) for c in itertools.combinations(row.tolist(), limits)) for row in units)
        np.testing.assert_allclose(kept, best, rtol=1e-6)


@each(PATTERNS)
def test_stacked_layers(pattern):
    scores = draw((2, 3, *SHAPE))
    stacked = shfl_jax.mask(scores, pattern)
    single = [[shfl_jax.mask(s, pattern) for s in row] for row in scores]
    expected = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *itertools.chain(*single))
    np.testing.assert_array_equal(stacked.rows, expected.rows)
    np.testing.assert_array_equal(stacked.kept, expected.kept)


ANY_SIZE = [Unstructured(0.5), NM(), BW(0.5, 4), VW(0.5, 4, min_share=0.5), TW(0.5, 4)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 7), (9, 1), (7, 9)]),
    st.floats(0, 0.99),
    st.integers(0, 10**6),
    st.sampled_from(ANY_SIZE),
)
def test_any_size_and_sparsity(shape, sparsity, seed, pattern):
    scores, (m, k) = draw(shape, seed), shape
    mask = shfl_jax.mask(scores, pattern, pattern.count(shape, sparsity))
    assert_valid(mask, m)
    kept = np.asarray(mask.elements())
    assert kept.any()
    if isinstance(pattern, Unstructured):
        assert kept.sum() == max(1, m * k - round(m * k * sparsity))
        assert scores[kept].min() >= scores[~kept].max(initial=0)
    if isinstance(pattern, TW):
        tiles = np.asarray(mask.rows)[: 4 * -(-int(kept.any(1).sum()) // 4)]
        assert np.array_equal(tiles[tiles < m], np.flatnonzero(kept.any(1)))


@pytest.mark.parametrize("units", [2**24 + 1, 8192 * 8192, 2**31 - 1])
@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.1, 0.5, 0.7300000190734863, 0.999, 1.0])
def test_counts_are_exact_beyond_the_precision_of_float32(units, factor):
    factor = float(np.float32(factor))
    assert abs(int(jax.jit(ranking.scaled)(units, factor)) - units * factor) <= 1
    assert ranking.scaled(units, factor) == round(units * factor)


def test_a_large_unstructured_layer():
    pattern = Unstructured(0.9)
    count = pattern.count((8192, 8192))
    assert int(count) == 2**26 - round(0.9 * 2**26)
    assert int(jax.jit(lambda f: pattern.count((8192, 8192), fraction=f))(1.0)) == int(count)
    keys = jnp.arange(2**24 + 2**19, dtype=jnp.int32).reshape(-1, 8192) // 2  # more than float32 counts exactly
    kept = jax.jit(ranking.top)(keys, 2**24 + 3)
    assert int(kept.sum()) == 2**24 + 3
    assert kept.reshape(-1)[-(2**24 + 2) :].all()
    assert bool(kept.reshape(-1)[2**19 - 4])


@pytest.mark.parametrize("pattern", [VW(0.75, 4, balanced=True), ShflBW(0.75, 4, balanced=True, shards=1)], ids=repr)
def test_balanced_groups_keep_equally_many(pattern):
    mask = shfl_jax.mask(draw((20, 18)) * np.arange(1, 21)[:, None], pattern)
    counts = mask.kept.sum(1)
    assert (counts == counts[0]).all()
    assert int(counts.sum()) == int(pattern.count((20, 18)))
    odd = shfl_jax.mask(draw((20, 18)), pattern, 5 * 3 + 2)
    assert (odd.kept.sum(1) == 3).all()


def test_min_share_is_a_floor():
    scores = draw((16, 40)) + np.repeat([0, 1, 2, 3], 4)[:, None]
    free = shfl_jax.mask(scores, VW(0.75, 4)).kept.sum(1)
    held = shfl_jax.mask(scores, VW(0.75, 4, min_share=0.5)).kept.sum(1)
    assert int(free[0]) == 0
    assert held.tolist() == [5, 5, 5, 25]


def test_a_smaller_last_group_is_not_starved():
    kept = shfl_jax.mask(draw((17, 64)), VW(0.5, 16)).kept.sum(1)
    assert int(kept[1]) > 16
    blocks = shfl_jax.mask(jnp.ones((5, 5)).at[4, 4].set(1.5), BW(0.75, 4))
    assert blocks.elements().sum() == 1
    assert blocks.elements()[4, 4]


def test_shfl_bw_gathers_like_rows_within_their_shards():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), 8))
    scores = (np.repeat(np.eye(4), 8, axis=1)[labels] + 0.1 * rng.random((32, 32))).astype(np.float32)
    mask = shfl_jax.mask(scores, ShflBW(0.75, 8))
    in_order = shfl_jax.mask(scores, VW(0.75, 8))
    assert (scores * mask.elements()).sum() > 1.5 * (scores * in_order.elements()).sum()
    assert (labels[np.asarray(mask.rows)].reshape(4, 8).std(1) == 0).all()
    sharded = np.asarray(shfl_jax.mask(scores, ShflBW(0.75, 8, shards=2)).rows).reshape(2, 16)
    np.testing.assert_array_equal(np.sort(sharded, axis=1), np.arange(32).reshape(2, 16))
    ragged = np.asarray(shfl_jax.mask(draw(), RAGGED_SHARDS).rows).reshape(2, 3, 4)
    assert (ragged[0, ragged[0] < 22] < 11).all()
    assert (ragged[1] >= 11).all()
    assert (ragged[:, 2, 3] == 22).all()
    assert (ragged == 22).sum() == 2


def test_previous_mask_is_a_start():
    first = shfl_jax.mask(draw(), RAGGED_SHARDS)
    again = shfl_jax.mask(draw(), RAGGED_SHARDS, previous=first)
    np.testing.assert_array_equal(again.rows, first.rows)
    with pytest.raises(ValueError, match=r"previous mask, of shape \(22, 18\)"):
        shfl_jax.mask(draw((24, 18)), RAGGED_SHARDS, previous=first)


def test_tile_wise_by_hand():
    # Outputs 0 and 3 are the weakest; a half of the outputs, then a half of each tile's inputs.
    scores = np.ones((4, 4), np.float32) * np.array([[1], [3], [4], [2]])
    scores[1, 2] = scores[1, 3] = 9
    scores[2, 0] = scores[2, 3] = 8
    mask = shfl_jax.mask(scores, TW(0.75, 1))
    assert mask.rows.tolist() == [1, 2, 0, 3, 4]
    np.testing.assert_array_equal(mask.kept[:2], [[0, 0, 1, 1], [1, 0, 0, 1]])
    assert not mask.kept[2:].any()
    tiles = shfl_jax.mask(draw((10, 8)), TW(0.5, 4))
    alive = int((np.asarray(tiles.elements()).any(1)).sum())
    assert alive == round(10 * 0.5**0.5)
    assert tiles.rows.reshape(-1, 4)[1, alive - 4 :].tolist() == [10] * (8 - alive)
    only_inputs = shfl_jax.mask(draw((10, 8)), TW(0.5, 4, outputs=False))
    assert only_inputs.elements().any(1).all()
    least = shfl_jax.mask(draw((10, 8)), TW(0.99, 4, outputs=False))
    assert (least.kept[:3].sum(1) == 1).all()


def test_nm_keeps_n_of_every_m_along_the_inputs():
    kept = np.asarray(shfl_jax.mask(draw((6, 18)), NM(2, 4)).elements())
    assert (kept[:, :16].reshape(6, 4, 4).sum(-1) == 2).all()
    assert kept[:, 16:].all()
    half = np.asarray(shfl_jax.mask(draw((6, 16)), NM(2, 4), NM().count((6, 16), fraction=0.5)).elements())
    assert half.sum() == 72
    assert (half.reshape(-1, 4).sum(-1) >= 2).all()


def test_integer_scores_are_exact_and_zero_has_no_sign():
    scores = np.random.default_rng(0).integers(0, 50, (16, 12)).astype(np.float32)
    sums = scores.reshape(4, 4, 12).sum(1).reshape(-1)
    expected = np.zeros(48, bool)
    expected[np.argsort(-sums, kind="stable")[:12]] = True
    np.testing.assert_array_equal(shfl_jax.mask(scores, VW(0.75, 4)).kept.reshape(-1), expected)
    zeros = shfl_jax.mask(jnp.array([[-0.0, 0.0, 1.0, 2.0]]), Unstructured(0.25))
    assert zeros.kept.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Unstructured(1.0), r"sparsity .* \[0, 1\), got 1.0"),
        (lambda: VW(-0.1), "got -0.1"),
        (lambda: BW(float("nan")), "got nan"),
        (lambda: VW(0.5, 0), "VW's group_size must be an integer of at least 1, got 0"),
        (lambda: BW(0.5, 2.5), "BW's block_size"),
        (lambda: NM(5, 4), "n must not exceed m"),
        (lambda: ShflBW(0.5, search="magic"), "search must be one of 'annealing', 'kmeans'"),
        (lambda: VW(0.5, min_share=2), "min_share must lie"),
        (lambda: ShflBW(0.5, 4, shards=3).count((16, 8)), "shards=3 must divide the layer's 16 outputs"),
        (lambda: VW(0.5).count((0, 8)), r"non-empty \(M, K\) matrix, got shape \(0, 8\)"),
        (lambda: Unstructured(0.5).count((2**16, 2**15)), "2\\^31 weights or more"),
        (lambda: shfl_jax.mask(jnp.ones((4, 4), jnp.int32), VW(0.5)), "floating"),
    ],
)
def test_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_patterns_are_values():
    assert len({VW(0.5), VW(0.5), VW(0.5, 32), NM(), NM(2, 4), ShflBW(0.5)}) == 4
    assert NM().sparsity == 0.5
