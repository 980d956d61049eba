"""The row-grouped storage: round trips bit for bit, and what its constructor refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels._layout import as_prepared, canonical_layout, inverse_rows, slot_groups, slot_is_real

to_dense = jax.jit(pk.to_dense)


def numpy_dense(matrix):
    """Decompresses by loops over the arrays, slot by slot."""
    topology, dense = matrix.integers, np.zeros(matrix.shape, matrix.dtype)
    ptr, columns, rows = (np.asarray(a) for a in (topology.group_ptr, topology.columns, topology.rows))
    for group, row in enumerate(rows.reshape(-1, topology.group_size)):
        live = row < topology.m
        for slot in range(ptr[group], ptr[group + 1]):
            dense[row[live], columns[slot]] = np.asarray(matrix.values)[slot][live]
    return dense


@st.composite
def compressible(draw):
    """A weight of any bits, a row permutation with sentinels anywhere, and kept columns."""
    m, k, v = (draw(st.integers(1, most)) for most in (13, 9, 5))
    r = -(-m // v) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = np.full(r * v, m, np.int32)
    rows[rng.permutation(r * v)[:m]] = rng.permutation(m)
    kept = rng.random((r, k)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    weight = rng.integers(0, 2**32, (m, k), dtype=np.uint32).view(np.float32)
    return weight, rows, kept


@settings(max_examples=100, deadline=None)
@given(compressible())
def test_compressing_and_decompressing_keeps_every_bit(case):
    weight, rows, kept = case
    matrix = pk.from_dense(weight, rows, kept)
    group = np.argsort(rows, kind="stable")[: len(weight)] // (len(rows) // len(kept))
    expected = np.where(kept[group], weight, np.float32(0))
    np.testing.assert_array_equal(numpy_dense(matrix).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(matrix.integers.group_ptr), np.cumsum([0, *kept.sum(1)]))
    again = pk.row_grouped(
        matrix.values,
        *(getattr(matrix.integers, name) for name in ("columns", "group_ptr", "rows")),
        m=len(weight),
        k=kept.shape[1],
    )
    assert jax.tree.structure(again) == jax.tree.structure(matrix)


@settings(max_examples=8, deadline=None)
@given(compressible())
def test_to_dense_on_the_device_keeps_every_bit(case):
    matrix = pk.from_dense(*case)
    for form in (matrix, pk.prepare(matrix, "xla")):
        bits = np.asarray(to_dense(form)).view(np.uint32)
        np.testing.assert_array_equal(bits, numpy_dense(matrix).view(np.uint32))
        lengths = np.diff(form.integers.group_ptr)
        np.testing.assert_array_equal(
            slot_groups(as_prepared(form).layout), np.repeat(np.arange(len(lengths)), lengths)
        )
    np.testing.assert_array_equal(np.asarray(slot_groups(as_prepared(matrix).layout)), np.nonzero(case[2])[0])
    positions = np.asarray(inverse_rows(as_prepared(matrix).layout))
    np.testing.assert_array_equal(case[1][positions], np.arange(len(case[0])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_kept(dtype):
    weight = jnp.arange(12, dtype=dtype).reshape(4, 3)
    matrix = pk.from_dense(weight, np.arange(4, dtype=np.int32), np.ones((2, 3), bool))
    assert matrix.dtype == dtype
    assert to_dense(matrix).dtype == dtype
    np.testing.assert_array_equal(np.asarray(to_dense(matrix), np.float32), np.asarray(weight, np.float32))


def test_equal_counts_show_in_the_shapes():
    weight, rows = np.ones((2, 4, 6), np.float32), np.tile(np.arange(4, dtype=np.int32), (2, 1))
    kept = np.zeros((2, 2, 6), bool)
    kept[0, :, :3] = kept[1, 0, :3] = True
    ragged = pk.from_dense(weight, rows, kept)  # slice 0 fills every slot, slice 1 does not
    assert canonical_layout(ragged.topology).segments is None
    for b in range(2):
        one = jax.tree.map(lambda a, b=b: a[b], ragged)
        np.testing.assert_array_equal(to_dense(one), kept[b][np.arange(4) // 2])
    kept[1, 1, 3:] = True
    assert canonical_layout(pk.from_dense(weight, rows, kept).topology).segments == ((2, 3),)
    ragged_rows = {"columns": [0, 1, 0, 1], "group_ptr": [0, 2, 4]}, {"columns": [0, 1, 0, 2], "group_ptr": [0, 2, 3]}
    arrays = {name: np.array([a[name] for a in ragged_rows], np.int32) for name in ("columns", "group_ptr")}
    with pytest.raises(ValueError, match="4 slots say that all segments are of length 2"):
        pk.row_grouped(np.ones((2, 4, 1), np.float32), **arrays, rows=np.array([[0, 1]] * 2, np.int32), m=2, k=2)


def test_padding_of_a_prepared_matrix_is_no_weight():
    kept = np.zeros((3, 8), bool)
    kept[0, :5] = kept[1, :4] = True
    triton = pk.prepare(pk.from_dense(np.ones((48, 8)), np.arange(48, dtype=np.int32), kept), "triton").layout
    assert triton.segments == ((2, 64), (1, 0))
    np.testing.assert_array_equal(slot_groups(triton), np.repeat([0, 1], 64))
    assert int(slot_is_real(triton).sum()) == 9
    matrix = pk.prepare(pk.from_dense(np.ones((6, 8), np.float32), np.arange(6, dtype=np.int32), kept), "xla")
    assert int(slot_is_real(matrix.integers).sum()) == 9
    assert (np.asarray(matrix.integers.columns)[~np.asarray(slot_is_real(matrix.integers))] == 8).all()


def arrays():
    """Arguments of `row_grouped` for 3 rows in 2 groups of 2, 4 columns."""
    return {
        "values": np.ones((3, 2), np.float32),
        "columns": np.array([1, 3, 0], np.int32),
        "group_ptr": np.array([0, 2, 3], np.int32),
        "rows": np.array([2, 0, 1, 3], np.int32),
        "m": 3,
        "k": 4,
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": np.ones((3, 2), np.int32)}, "values must be floating, got int32"),
        ({"values": np.ones(3, np.float32)}, r"values must be \(..., P, V\)"),
        ({"values": np.ones((3, 0), np.float32)}, "V >= 1"),
        ({"values": np.ones((4, 2), np.float32)}, r"columns must have shape \(4,\) beside values \(4, 2\), got \(3,\)"),
        ({"columns": np.array([1, 3, 0])}, "columns must be int32, got int64"),
        ({"columns": np.array([3, 1, 0], np.int32)}, "columns must ascend strictly within every group"),
        ({"columns": np.array([1, 1, 0], np.int32)}, "columns must ascend strictly within every group"),
        ({"columns": np.array([1, 4, 0], np.int32)}, r"columns must lie in 0..3, got 0..4"),
        ({"columns": np.array([-1, 3, 0], np.int32)}, r"columns must lie in 0..3, got -1..3"),
        ({"group_ptr": np.array([0, 2, 2], np.int32)}, r"group_ptr must rise from 0 to P=3, got 0..2"),
        ({"group_ptr": np.array([1, 2, 3], np.int32)}, r"group_ptr must rise from 0 to P=3, got 1..3"),
        ({"group_ptr": np.array([0, 4, 3], np.int32)}, "group_ptr must rise from 0"),
        ({"group_ptr": np.array([0, 3], np.int32)}, r"rows must have shape \(2,\).*got \(4,\)"),
        ({"rows": np.array([2, 0, 1, 1], np.int32)}, r"rows must hold each of 0..2 once and the sentinel 3 elsewhere"),
        ({"rows": np.array([2, 0, 3, 3], np.int32)}, r"rows must hold each of 0..2 once"),
        ({"rows": np.array([2, 0, 1, -1], np.int32)}, r"rows must hold each of 0..2 once"),
        ({"m": 5}, "2 groups of 2 rows cannot hold 5 rows"),
        ({"m": 0}, "at least one row and one column, got M=0, K=4"),
    ],
)
def test_the_constructor_names_what_is_wrong(change, text):
    pk.row_grouped(**arrays())
    with pytest.raises(ValueError, match=text):
        pk.row_grouped(**(arrays() | change))


def test_the_constructor_names_the_slice():
    stacked = {name: np.stack([a, a]) if isinstance(a, np.ndarray) else a for name, a in arrays().items()}
    pk.row_grouped(**stacked)
    stacked["rows"][1, 0] = 0
    with pytest.raises(ValueError, match=r"rows of slice \(.*1.*\) must hold each of 0..2 once"):
        pk.row_grouped(**stacked)


@pytest.mark.parametrize(
    ("rows", "kept", "text"),
    [
        (np.arange(4), np.ones((2, 5), bool), r"rows \(4,\) and kept \(2, 5\) do not fit a weight of shape \(4, 3\)"),
        (np.arange(3), np.ones((2, 3), bool), "do not fit"),
        (np.array([0, 1, 2, 5]), np.ones((2, 3), bool), r"rows must lie in 0..4 \(the sentinel\), got 0..5"),
        (np.array([0, 1, 2, 2]), np.ones((2, 3), bool), "rows must hold each of 0..3 once"),
    ],
)
def test_from_dense_names_what_is_wrong(rows, kept, text):
    with pytest.raises(ValueError, match=text):
        pk.from_dense(np.ones((4, 3), np.float32), rows.astype(np.int32), kept)


def test_sizes():
    matrix = pk.row_grouped(**arrays())
    assert matrix.shape == (3, 4)
    assert matrix.nbytes == 4 * (6 + 3 + 3 + 4)
    assert (matrix.integers.num_groups, matrix.integers.num_slots, matrix.integers.max_count) == (2, 3, 2)
    assert not matrix.integers.equal_counts
