"""Packed 2:4 matrices: the storage, and every case of the matmul suite."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels import _pairs as pairs

# A copy of the suite in which matrices are made packed.
_spec = importlib.util.spec_from_file_location("packed_suite", pathlib.Path(__file__).with_name("test_matmul.py"))
suite = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(suite)
FIXTURES = ("implementation", "arrange", "ieee", "pytestmark")
LEFT_OUT = {
    "test_what_is_not_finite_and_unused_never_leaks",  # below, where unused means something else
}


def random_order(rng, kept):
    """Kept columns in random fours, the last one filled up with sentinels."""
    k = kept.shape[-1]
    order = np.full((len(kept), 4 * -(-k // 4)), k, np.int32)
    for group, columns in enumerate(kept):
        order[group, : columns.sum()] = rng.permutation(np.flatnonzero(columns))
    return order


def random_choice(rng, m, k, rows, order):
    """Two random columns of every four, or as many as there are."""
    choice = np.zeros((m, k + 1), bool)
    v = len(rows) // len(order)
    for slot, row in enumerate(rows):
        if row < m:
            for four in np.sort(order[slot // v].reshape(-1, 4), axis=1):
                choice[row, rng.permutation(four[four < k])[:2]] = True
    return choice[:, :k]


def pack(rng, weight, rows, kept):
    order = random_order(rng, kept)
    choice = random_choice(rng, *weight.shape, rows, order)
    return order, choice


def packed_make(m, k, v, counts="ragged", seed=0, dtype=np.float32, spread=False):
    rng = np.random.default_rng([seed, m, k, v])
    plain, dense = suite.plain_make(m, k, v, counts, seed, dtype, spread)
    rows, ptr = np.asarray(plain.integers.rows), np.asarray(plain.integers.group_ptr)
    kept = np.zeros((len(ptr) - 1, k), bool)
    for group in range(len(kept)):
        kept[group, np.asarray(plain.integers.columns)[ptr[group] : ptr[group + 1]]] = True
    order, choice = pack(rng, dense, rows, kept)
    dense = np.where(choice, dense, 0)
    return pk.from_dense_two_four(np.asarray(jnp.asarray(dense, dtype)), rows, order, choice), dense


def packed_stacked(counts=((3, 7, 0, 5), (9, 1, 4, 4), (4, 4, 4, 4)), m=60, k=20, v=16):
    rng = np.random.default_rng(8)
    rows = np.stack([suite.random_rows(rng, m, 4, v, spread=True) for _ in counts])
    weight = rng.standard_normal((len(counts), m, k)).astype(np.float32)
    packs = [pack(rng, w, r, suite.random_kept(rng, 4, k, c)) for w, r, c in zip(weight, rows, counts, strict=True)]
    order, choice = (np.stack(arrays) for arrays in zip(*packs, strict=True))
    return pk.from_dense_two_four(weight, rows, order, choice), np.where(choice, weight, 0).astype(np.float64)


# The packed kernels' gradients are those of the row-grouped ones, which the other copy interprets.
suite.NOT_INTERPRETED |= {"test_gradients", "test_vmap_and_scan_over_a_stacked_matrix"}
suite.plain_make, suite.make, suite.stacked = suite.make, packed_make, packed_stacked
globals().update(
    {
        name: thing
        for name, thing in vars(suite).items()
        if name in ("implementation", "arrange", "ieee", "pytestmark")
        or (name.startswith("test_") and name not in LEFT_OUT)
    }
)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", suite.LAYOUTS)
def test_what_is_not_finite_and_unused_never_leaks(implementation, arrange, layout, bad):
    """Pruned weights may hold anything, and so may activations that no group keeps."""
    m, k, v, rng = 60, 24, 16, np.random.default_rng(7)
    used = np.sort(rng.permutation(k)[:11])
    kept = np.zeros((4, k), bool)
    for group, count in enumerate((5, 0, 9, 1)):
        kept[group, used[rng.permutation(11)[:count]]] = True
    rows = suite.random_rows(rng, m, 4, v, spread=True)
    order, choice = pack(rng, np.zeros((m, k)), rows, kept)
    weight = np.where(choice, rng.standard_normal((m, k)), bad).astype(np.float32)
    matrix = arrange(pk.from_dense_two_four(weight, rows, order, choice))
    x = np.array(suite.activations(rng, k, (5,), "feature_major"))
    x[np.setdiff1d(np.arange(k), used)] = bad
    x = x if layout == "feature_major" else x.T

    def run(values, x):
        matrix_of = pk.join(values, matrix.integers)
        return pk.matmul(matrix_of, x, layout=layout, implementation=implementation)

    y, pull = jax.vjp(run, matrix.values, jnp.asarray(x))
    dvalues, dx = pull(jnp.ones_like(y))
    dense, clean = np.where(choice, weight, 0), np.where(np.isfinite(x), x, 0)
    np.testing.assert_allclose(y, suite.product(dense, clean, None, None, layout), rtol=1e-4, atol=1e-5)
    assert np.isfinite(dvalues).all()
    expected = np.repeat(dense.sum(0)[:, None], 5, 1)
    np.testing.assert_allclose(dx, expected if layout == "feature_major" else expected.T, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 23),
    v=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_round_trips_bit_for_bit(m, k, v, seed, dtype):
    rng = np.random.default_rng(seed)
    r = -(-m // v)
    kept = rng.random((r, k)) < rng.random()
    rows = suite.random_rows(rng, m, r, v, spread=True)
    order, choice = pack(rng, np.zeros((m, k)), rows, kept)
    weight = rng.standard_normal((m, k))
    weight[rng.random((m, k)) < 0.2] = -0.0
    weight[rng.random((m, k)) < 0.1] = np.nan
    weight = np.asarray(jnp.asarray(weight, dtype))
    matrix = pk.from_dense_two_four(weight, rows, order, choice)
    assert matrix.values.shape == (matrix.integers.num_slots // 2, v)
    assert matrix.integers.pairs.shape == (-(-matrix.integers.num_slots // 8), v)
    back = np.asarray(jax.jit(pk.to_dense)(matrix))
    assert back.dtype == weight.dtype
    bits = np.uint32 if dtype == "float32" else np.uint16
    np.testing.assert_array_equal(back.view(bits), np.where(choice, weight, np.zeros_like(weight)).view(bits))
    checked = pk.row_grouped(
        matrix.values, matrix.integers.columns, matrix.integers.group_ptr, matrix.integers.rows, matrix.integers.pairs,
        m=m, k=k,
    )  # fmt: skip
    assert checked.topology.max_count == matrix.integers.max_count


@settings(max_examples=30, deadline=None)
@given(q=st.integers(0, 17), v=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_pairs_pack_four_to_a_byte(q, v, seed):
    positions = np.random.default_rng(seed).integers(0, 4, (q, v)).astype(np.uint8)
    packed = pairs.pack(positions)
    assert packed.shape == (-(-q // 4), v)
    np.testing.assert_array_equal(pairs.unpack(packed, q), positions)
    np.testing.assert_array_equal(pairs.unpack(jnp.asarray(packed), q), positions)
    if q:
        assert (packed[0] & 3 == positions[0]).all()


def test_a_quarter_of_the_weights_takes_at_most_30_percent_of_the_bytes():
    m = k = 1024
    rng = np.random.default_rng(0)
    kept = np.zeros((m // 128, k), bool)
    kept[:, ::2] = True
    rows = rng.permutation(m).astype(np.int32)
    order = random_order(rng, kept)
    choice = np.zeros((m, k), bool)
    for slot, row in enumerate(rows):
        choice[row, order[slot // 128][: k // 2].reshape(-1, 4)[:, :2]] = True
    matrix = pk.from_dense_two_four(jnp.ones((m, k), jnp.bfloat16), rows, order, choice)
    assert matrix.values.size == m * k // 4
    assert matrix.nbytes <= 0.30 * 2 * m * k


def broken(**changes):
    matrix, _ = packed_make(32, 20, 16, (8, 7))
    t = matrix.integers
    parts = {"values": matrix.values, "columns": t.columns, "group_ptr": t.group_ptr, "rows": t.rows, "pairs": t.pairs}
    parts = {name: np.array(part) for name, part in parts.items()}
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return lambda: pk.row_grouped(**parts, m=32, k=20)


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": lambda a: a.astype(np.int8)}, r"pairs must be uint8 of shape \(2, 16\)"),
        ({"pairs": lambda a: a[:-1]}, r"pairs must be uint8 of shape \(2, 16\)"),
        ({"pairs": put((0, 3), 0b00000000)}, "pairs must ascend strictly within every four"),
        ({"pairs": put((1, 0), 0b01000111)}, "pairs must ascend strictly within every four"),
        ({"values": lambda a: a[:-1], "columns": lambda a: a[:-2]}, "odd number"),
        ({"columns": lambda a: a[:-1]}, r"columns must have shape \(16,\)"),
        ({"columns": put(1, 21)}, r"columns must lie in 0\.\.19"),
        ({"columns": put(slice(0, 2), 5)}, "each column once within every group"),
        ({"columns": put(0, 20)}, "a four begins with a column"),
        ({"group_ptr": put(1, 6)}, "multiples of four"),
        ({"rows": put(0, 1)}, "rows must hold each of"),
    ],
)
def test_the_constructor_names_what_is_wrong(changes, message):
    broken()()
    with pytest.raises(ValueError, match=message):
        broken(**changes)()


def test_from_dense_names_what_is_wrong():
    rows, order = np.arange(16, dtype=np.int32), np.arange(8, dtype=np.int32)[None]
    weight, choice = np.ones((16, 8), np.float32), np.zeros((16, 8), bool)
    choice[:, [0, 2, 5]] = True
    pk.from_dense_two_four(weight, rows, order, choice)
    three = choice.copy()
    three[3, 3] = True
    with pytest.raises(ValueError, match="at most two weights of a row in every four"):
        pk.from_dense_two_four(weight, rows, order, three)
    with pytest.raises(ValueError, match="only kept columns"):
        pk.from_dense_two_four(weight, rows, np.where(order < 4, order, 8), choice)
    with pytest.raises(ValueError, match="do not fit a weight"):
        pk.from_dense_two_four(weight, rows, order[:, :6], choice)
    with pytest.raises(ValueError, match="order must hold"):
        pk.from_dense_two_four(weight, rows, order + 2, choice)
