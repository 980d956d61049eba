"""What kernels read: a row-grouped matrix with its groups and slots in some arrangement, the canonical one or another.

A backend arranges a matrix once, on the host (`prepare`); where that was not done its kernels read the canonical
arrangement as it is. Functions here see no difference.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._matrix import RowGrouped, Topology
from pallas_kernels._pairs import unpack, unpack_bits, wide_pairs
from pallas_kernels._promotion import standard_promotion

Segments = tuple[tuple[int, int], ...]
"""((groups, slots), ...): how long the segments of neighbouring groups are, in the order of the groups."""

DATA = ["columns", "group_ptr", "rows", "counts", "pairs", "chosen", "order"]
META = ["m", "k", "group_size", "max_count", "segments", "sentinels"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=META)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """Which weight stands where: what `Topology` says, as kernels read it. Stacked layers have leading axes.

    Attributes:
        columns: (P,) int32; on padding they repeat a column the group keeps or are the sentinel K.
        group_ptr: (R + 1,) int32, the bounds of segments, padding included.
        rows: (R * V,) int32, in the order of the groups here.
        counts: None where no segment is padded, else (R,) int32: the first `counts[r]` slots of group r are real, the
            others hold zeros.
        pairs: None, or under 2:4 in words of two bytes: (ceil(P / 16), V) uint16, see `wide_pairs`.
        chosen: as in `Topology`, in the order of the values.
        order: None where groups stand as in the canonical matrix, else (R,) int32: group r is its group `order[r]`.
        m: output features M.
        k: input features K.
        group_size: rows of a group, V.
        max_count: the longest segment, in slots.
        segments: the lengths of all segments, or None where they are not known when tracing.
        sentinels: whether a column may be the sentinel K; False saves a product the comparison.
    """

    columns: jax.Array
    group_ptr: jax.Array
    rows: jax.Array
    counts: jax.Array | None = None
    pairs: jax.Array | None = None
    chosen: jax.Array | None = None
    order: jax.Array | None = None
    m: int
    k: int
    group_size: int
    max_count: int
    segments: Segments | None = None
    sentinels: bool = True

    @property
    def num_groups(self) -> int:
        """R, the number of row groups."""
        return self.group_ptr.shape[-1] - 1

    @property
    def num_slots(self) -> int:
        """P, the number of slots, padding included."""
        return self.columns.shape[-1]

    @property
    def num_values(self) -> int:
        """Stored values of a row over all groups: P, or P / 2 under 2:4."""
        return self.num_slots if self.pairs is None else self.num_slots // 2

    @property
    def real_counts(self) -> jax.Array:
        """(R,) int32: how many slots of each group hold weights."""
        return jnp.diff(self.group_ptr, axis=-1) if self.counts is None else self.counts

    @property
    def multiple(self) -> int:
        """What all segments are known to be multiples of; 1 where their lengths are not known when tracing."""
        return 1 if self.segments is None else math.gcd(0, *(length for _, length in self.segments))

    @property
    def for_cpu(self) -> bool:
        """Whether this is the arrangement of XLA on a CPU, which no GPU kernel reads."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all integer arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def slot_values(self, values: jax.Array) -> jax.Array:
        """The values of a matrix without pairs in the order of the slots, (P, V)."""
        return values


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "layout"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A row-grouped matrix in the arrangement of a backend. Only `matmul`, `conv2d` and `to_dense` read it.

    Attributes:
        values: (P, V) floating, or (P / 2, V) under 2:4, where `layout` says.
        layout: which weights they are.
    """

    values: jax.Array
    layout: MatrixLayout

    @property
    def integers(self) -> MatrixLayout:
        """Everything but the values."""
        return self.layout

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the matrix it stands for."""
        return self.layout.m, self.layout.k

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of all integer arrays."""
        return self.values.nbytes + self.layout.nbytes


Matrix = RowGrouped | Prepared
"""A row-grouped matrix, canonical or prepared."""


def join(values: Float[Array, "*batch stored V"], integers: Topology | MatrixLayout) -> Matrix:
    """The matrix of some values and the `integers` of another one like it."""
    return RowGrouped(values, integers) if isinstance(integers, Topology) else Prepared(values, integers)


def as_prepared(matrix: Matrix) -> Prepared:
    """The matrix as kernels read it; a canonical one as it is, without moving a value. Traceable."""
    return matrix if isinstance(matrix, Prepared) else Prepared(matrix.values, canonical_layout(matrix.topology))


def canonical_layout(topology: Topology) -> MatrixLayout:
    """The layout of a canonical matrix."""
    return MatrixLayout(
        columns=topology.columns,
        group_ptr=topology.group_ptr,
        rows=topology.rows,
        pairs=None if topology.pairs is None else wide_pairs(topology.pairs),
        chosen=topology.chosen,
        m=topology.m,
        k=topology.k,
        group_size=topology.group_size,
        max_count=topology.max_count,
        segments=((topology.num_groups, topology.max_count),) if topology.equal_counts else None,
    )


def expand(matrix: Prepared) -> Prepared:
    """Spreads the values of a 2:4 matrix over their fours, zeros between them. Any other matrix stays as it is.

    Bit for bit, NaN and the sign of zero included. Slots without a column keep the sentinel K.
    """
    layout, v = matrix.layout, matrix.layout.group_size
    if layout.pairs is None:
        return matrix
    two = unpack(layout.pairs, layout.num_values).reshape(-1, 2, 1, v)
    values = matrix.values.reshape(-1, 2, 1, v)
    slot = jnp.arange(4, dtype=jnp.uint8)[:, None]
    fours = jnp.where(two[:, 0] == slot, values[:, 0], jnp.where(two[:, 1] == slot, values[:, 1], 0))
    return Prepared(fours.reshape(-1, v), dataclasses.replace(layout, pairs=None, chosen=None))


def select(layout: MatrixLayout, expanded: jax.Array) -> jax.Array:
    """Takes the stored values of a 2:4 layout out of (P, V) expanded ones: (P / 2, V), zero where none is kept."""
    v = layout.group_size
    assert layout.pairs is not None
    pairs = unpack(layout.pairs, layout.num_values).reshape(-1, 2, v)
    fours = jnp.where((layout.columns < layout.k)[:, None], expanded, 0).reshape(-1, 4, v)
    # Selects rather than a gather: XLA fuses them with whatever made the values.
    two = [jnp.where(p == 0, fours[:, 0], jnp.where(p == 1, fours[:, 1], jnp.where(p == 2, fours[:, 2], fours[:, 3])))
           for p in (pairs[:, 0], pairs[:, 1])]  # fmt: skip
    values = jnp.stack(two, axis=1).reshape(-1, v)
    if layout.chosen is None:
        return values
    return jnp.where(unpack_bits(layout.chosen, layout.num_values) != 0, values, 0)


def filled(layout: MatrixLayout) -> MatrixLayout:
    """The layout of the expanded form of a 2:4 one, for kernels that check no column ids.

    Slots without a column repeat the first one of their four; the values there are zero. Slots behind the last group
    stay sentinels.
    """
    fours = layout.columns.reshape(-1, 4)
    columns = jnp.where(fours < layout.k, fours, fours[:, :1]).reshape(-1)
    return dataclasses.replace(layout, columns=columns, pairs=None, chosen=None)


def slot_groups(layout: MatrixLayout) -> jax.Array:
    """The group that owns each slot: (P,) int32, R for slots behind the last group."""
    slots = jnp.arange(layout.num_slots, dtype=jnp.int32)
    if layout.segments is None:
        return jnp.searchsorted(layout.group_ptr, slots, side="right").astype(jnp.int32) - 1
    # Known when tracing: one fusion, where the search is a loop of kernels.
    start, first, groups = 0, 0, jnp.full_like(slots, layout.num_groups)
    for count, length in layout.segments:
        inside = (slots >= start) & (slots < start + count * length)
        groups = jnp.where(inside, first + (slots - start) // max(length, 1), groups)
        start, first = start + count * length, first + count
    return groups


def slot_is_real(layout: MatrixLayout) -> jax.Array:
    """Which slots hold a weight rather than padding: (P,) bool."""
    group = slot_groups(layout)
    if layout.counts is None:
        return group < layout.num_groups
    offset = jnp.arange(layout.num_slots) - layout.group_ptr[group]
    return offset < layout.counts.at[group].get(mode="fill", fill_value=0)


def slot_index(layout: MatrixLayout) -> jax.Array:
    """Where each weight vector is stored: (K, R) int32, the slot of column k of group r, P where it is pruned."""
    columns = jnp.where(slot_is_real(layout), layout.columns, layout.k)
    index = jnp.full((layout.k, layout.num_groups), layout.num_slots, jnp.int32)
    slots = jnp.arange(layout.num_slots, dtype=jnp.int32)
    return index.at[columns, slot_groups(layout)].set(slots, mode="drop")


def inverse_rows(layout: MatrixLayout) -> jax.Array:
    """The inverse of `rows`: (M,) int32, row j of W is stored row `inverse_rows[j]`."""
    stored = jnp.arange(layout.rows.shape[-1], dtype=jnp.int32)
    return jnp.zeros(layout.m, jnp.int32).at[layout.rows].set(stored, mode="drop")


def stored_rows_dense(matrix: Prepared) -> jax.Array:
    """Decompresses the transposed matrix in the order of the stored rows: (K, R * V), sentinel rows included."""
    layout = matrix.layout
    if layout.num_slots == 0:
        return jnp.zeros((layout.k, layout.rows.shape[-1]), matrix.dtype)
    # Rows of V are gathered; scattering single weights is many times slower on a CPU.
    vectors = layout.slot_values(matrix.values).at[slot_index(layout)].get(mode="fill", fill_value=0)
    return vectors.reshape(layout.k, -1)


@standard_promotion()
def to_dense(matrix: Matrix) -> Float[Array, "M K"]:
    """Decompresses a matrix without leading axes, under jit or not: (M, K), exact zeros where nothing is stored."""
    expanded = expand(as_prepared(matrix))
    return stored_rows_dense(expanded).T[inverse_rows(expanded.layout)]
