"""The row-grouped matrix: the one storage behind every pattern that has a kernel.

Rows of a weight W (M x K) are permuted and cut into R groups of V = `group_size`; every group keeps its own columns.
`values` holds one row of V numbers per kept column of a group, groups one after another.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from pallas_kernels._pairs import unpack

INT32_MAX = np.iinfo(np.int32).max

HostArray = jax.Array | np.ndarray
"""What functions take that read their arrays on the host."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "group_ptr", "rows", "pairs", "chosen"],
    meta_fields=["m", "k", "group_size", "max_count"],
)
@dataclasses.dataclass(frozen=True)
class Topology:
    """The integer half of a row-grouped matrix: which weights exist. Never differentiated, never optimized.

    Every array may have the same leading axes (stacked layers). Slices are then padded to the longest: slots behind
    `group_ptr[R]` belong to no group, their column is the sentinel K. P is R * `max_count` only if every segment of
    every slice has that length.

    Attributes:
        columns: (P,) int32, kept columns, ascending within a group; with `pairs` in the order of the fours, and the
            sentinel K where a four has fewer than four columns.
        group_ptr: (R + 1,) int32, group r owns the slots `group_ptr[r]:group_ptr[r + 1]`.
        rows: (R * V,) int32, stored row i is row `rows[i]` of W; each of 0..M-1 once, every other slot the sentinel M.
        m: output features M.
        k: input features K.
        group_size: rows of a group, V.
        max_count: the longest segment, in slots.
        pairs: None where every row of a group uses every kept column. Under 2:4, (ceil(P / 8), V) uint8: slots stand in
            fours, each row uses two slots of a four, and `values` is (P / 2, V). Two bits say which slot of its four a
            value belongs to, the lower first; four of them make a byte along P / 2, the first in the lowest bits.
        chosen: None where every stored value is a kept weight or stands for no weight at all. Else, under 2:4,
            (ceil(P / 16), V) uint8, a bit for each value, the first of eight in the lowest bit: a row that keeps fewer
            than two of a four has values that are padding though their slot is a weight's. They are zero and stay so.
    """

    columns: jax.Array
    group_ptr: jax.Array
    rows: jax.Array
    m: int
    k: int
    group_size: int
    max_count: int
    pairs: jax.Array | None = None
    chosen: jax.Array | None = None

    @property
    def num_groups(self) -> int:
        """R, the number of row groups."""
        return self.group_ptr.shape[-1] - 1

    @property
    def num_slots(self) -> int:
        """P, the number of stored columns over all groups, padding of stacked slices included."""
        return self.columns.shape[-1]

    @property
    def equal_counts(self) -> bool:
        """Whether every group stores the same number of columns, as far as shapes alone tell."""
        return self.num_slots == self.num_groups * self.max_count

    @property
    def real_counts(self) -> jax.Array:
        """(R,) int32: how many slots of each group hold weights."""
        return jnp.diff(self.group_ptr, axis=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all integer arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "topology"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RowGrouped:
    """A row-grouped matrix in canonical form, as checkpoints hold it.

    Build it with `row_grouped` or `from_dense`, which validate; the class itself does not.

    Attributes:
        values: (P, V) floating, `values[p, i]` is W[rows[r * V + i], columns[p]] for the group r that owns slot p.
            Under 2:4, (P / 2, V): two of every four slots, see `Topology.pairs`.
        topology: which weights they are.
    """

    values: jax.Array
    topology: Topology

    @property
    def integers(self) -> Topology:
        """Everything but the values."""
        return self.topology

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the matrix it stands for."""
        return self.topology.m, self.topology.k

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of all integer arrays."""
        return self.values.nbytes + self.topology.nbytes


def row_grouped(
    values: Float[HostArray, "*batch stored V"],
    columns: Int32[HostArray, "*batch P"],
    group_ptr: Int32[HostArray, "*batch R+1"],
    rows: Int32[HostArray, "*batch R*V"],
    pairs: UInt8[HostArray, "*batch bytes V"] | None = None,
    chosen: UInt8[HostArray, "*batch bytes V"] | None = None,
    *,
    m: int,
    k: int,
) -> RowGrouped:
    """Builds a row-grouped matrix from its arrays and checks them. On the host.

    Args:
        values: (..., P, V) floating; with pairs (..., P / 2, V).
        columns: (..., P) int32, strictly ascending within a group; with pairs each once, in fours that begin with a
            column and end with sentinels K where they hold fewer than four.
        group_ptr: (..., R + 1) int32.
        rows: (..., R * V) int32.
        pairs: None, or (..., ceil(P / 8), V) uint8; the two of a four ascend strictly.
        chosen: None, or with pairs (..., ceil(P / 16), V) uint8, see `Topology`.
        m: output features M.
        k: input features K.

    Returns:
        The matrix, with `max_count` derived from `group_ptr`.

    Raises:
        ValueError: an array has a wrong shape, dtype or content; the text names the array and what it must hold.
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"values must be floating, got {values.dtype}")
    for name, array in (("columns", columns), ("group_ptr", group_ptr), ("rows", rows)):
        if array.dtype != np.int32:
            raise ValueError(f"{name} must be int32, got {array.dtype}")
    if values.ndim < 2 or values.shape[-1] == 0:
        raise ValueError(f"values must be (..., P, V) with V >= 1, got {values.shape}")
    batch, (p, v) = values.shape[:-2], values.shape[-2:]
    if pairs is not None:
        p *= 2
    if m < 1 or k < 1:
        raise ValueError(f"a matrix needs at least one row and one column, got M={m}, K={k}")
    r = group_ptr.shape[-1] - 1 if group_ptr.ndim else 0
    expected = {"columns": (*batch, p), "group_ptr": (*batch, r + 1), "rows": (*batch, r * v)}
    for name, array in (("columns", columns), ("group_ptr", group_ptr), ("rows", rows)):
        if array.shape != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]} beside values {values.shape}, got {array.shape}")
    if pairs is not None:
        _check_pairs(pairs, batch, p, v)
    if chosen is not None:
        wanted = (*batch, -(-p // 16), v)
        if pairs is None or chosen.dtype != np.uint8 or chosen.shape != wanted:
            raise ValueError(f"chosen must be uint8 of shape {wanted} beside pairs, got {chosen.dtype} {chosen.shape}")
    if r * v < m:
        raise ValueError(
            f"{r} groups of {v} rows cannot hold {m} rows: group_ptr needs at least {-(-m // v) + 1} entries"
        )
    if p > INT32_MAX:
        raise ValueError(f"{p} slots overflow int32 offsets; split the layer")
    slices = int(np.prod(batch))
    ptrs, cols, row_ids = (np.asarray(a).reshape(slices, a.shape[-1]) for a in (group_ptr, columns, rows))
    longest = int(np.diff(ptrs, axis=-1).max(initial=0))
    for b, (ptr, col, row) in enumerate(zip(ptrs, cols, row_ids, strict=True)):
        at = f" of slice {np.unravel_index(b, batch)}" if batch else ""
        if ptr[0] != 0 or (np.diff(ptr) < 0).any() or ptr[-1] > p or (not batch and ptr[-1] != p):
            raise ValueError(f"group_ptr{at} must rise from 0 to P={p}, got {ptr[0]}..{ptr[-1]}")
        live = col[: ptr[-1]]
        if pairs is not None:
            _check_fours(live, ptr, k, at)
            live = live[live != k]
        starts = np.zeros(len(live), bool)
        starts[ptr[:-1][ptr[:-1] < len(live)]] = True
        if len(live) and (live.min() < 0 or live.max() >= k):
            raise ValueError(f"columns{at} must lie in 0..{k - 1}, got {live.min()}..{live.max()}")
        if pairs is None and (np.diff(live) <= 0)[~starts[1:]].any():
            raise ValueError(f"columns{at} must ascend strictly within every group")
        if batch and p == r * longest and (np.diff(ptr) < longest).any():
            raise ValueError(f"{p} slots say that all segments are of length {longest}, but group_ptr{at} is ragged")
        if (col[ptr[-1] :] != k).any():
            raise ValueError(f"columns{at} behind the last group must be the sentinel K={k}")
        used = row[row != m]
        if len(used) != m or not np.array_equal(np.sort(used), np.arange(m)):
            raise ValueError(f"rows{at} must hold each of 0..{m - 1} once and the sentinel {m} elsewhere")
    arrays = (jnp.asarray(a) for a in (columns, group_ptr, rows))
    pairs, chosen = (None if a is None else jnp.asarray(a) for a in (pairs, chosen))
    topology = Topology(*arrays, m=m, k=k, group_size=v, max_count=longest, pairs=pairs, chosen=chosen)
    return RowGrouped(jnp.asarray(values), topology)


def _check_pairs(pairs: HostArray, batch: tuple[int, ...], p: int, v: int) -> None:
    expected = (*batch, -(-p // 8), v)
    if pairs.dtype != np.uint8 or pairs.shape != expected:
        raise ValueError(
            f"pairs must be uint8 of shape {expected} beside {p // 2} values a row, "
            f"got {pairs.dtype} of shape {pairs.shape}"
        )
    if p % 4:
        raise ValueError(f"2:4 stores two values of every four slots, but {p // 2} values a row are an odd number")
    two = unpack(np.asarray(pairs), p // 2).reshape(-1, 2, v)
    if (two[:, 0] >= two[:, 1]).any():
        raise ValueError("pairs must ascend strictly within every four, those of padding slots too")


def _check_fours(columns: np.ndarray, group_ptr: np.ndarray, k: int, at: str) -> None:
    if (group_ptr % 4).any():
        raise ValueError(f"group_ptr{at} must hold multiples of four under 2:4")
    real = columns.reshape(-1, 4) != k
    if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(f"columns{at}: a four begins with a column, and the sentinel K={k} stands only at its end")
    group = np.repeat(np.arange(len(group_ptr) - 1, dtype=np.int64), np.diff(group_ptr))
    keys = (group * (k + 1) + columns)[columns != k]
    if len(np.unique(keys)) != len(keys):
        raise ValueError(f"columns{at} must hold each column once within every group")


def from_dense(
    weight: Float[HostArray, "*batch M K"], rows: Int32[HostArray, "*batch R*V"], kept: Bool[HostArray, "*batch R K"]
) -> RowGrouped:
    """Compresses a matrix. On the host, because the number of slots depends on the data.

    Args:
        weight: (..., M, K) floating.
        rows: (..., R * V) int32, the row permutation with sentinels M.
        kept: (..., R, K) bool, the kept columns of every group.

    Returns:
        The matrix in canonical form. Weights outside the kept vectors are dropped, whatever they hold.

    Raises:
        ValueError: shapes disagree, or `rows` is no permutation with sentinels.
    """
    weight, rows, kept = np.asarray(weight), np.asarray(rows), np.asarray(kept)
    batch, (m, k), r = weight.shape[:-2], weight.shape[-2:], kept.shape[-2]
    if kept.shape != (*batch, r, k) or rows.shape[:-1] != batch or r == 0 or rows.shape[-1] % r:
        raise ValueError(f"rows {rows.shape} and kept {kept.shape} do not fit a weight of shape {weight.shape}")
    v = rows.shape[-1] // r
    if rows.size and (rows.min() < 0 or rows.max() > m):
        raise ValueError(f"rows must lie in 0..{m} (the sentinel), got {rows.min()}..{rows.max()}")
    counts = kept.sum(-1)
    num_slots = int(counts.sum(-1).max(initial=0))
    # One more slot where some slices are ragged and the fullest is not: equal counts must show in the shapes.
    num_slots += int(num_slots == r * counts.max(initial=0) and (counts < counts.max(initial=0)).any())
    values = np.zeros((*batch, num_slots, v), weight.dtype)
    columns = np.full((*batch, num_slots), k, np.int32)
    group_ptr = np.zeros((*batch, r + 1), np.int32)
    np.cumsum(counts, axis=-1, out=group_ptr[..., 1:])
    for b in np.ndindex(*batch):
        group, column = np.nonzero(kept[b])
        row = rows[b].reshape(r, v)[group]
        columns[b][: len(column)] = column
        values[b][: len(column)] = np.where(row < m, weight[b][np.minimum(row, m - 1), column[:, None]], 0)
    return row_grouped(values, columns, group_ptr, rows.astype(np.int32), m=m, k=k)
