"""The layout that XLA reads fastest on a CPU: groups sorted, segments padded to a few lengths, values K-contiguous."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from pallas_kernels import _layout as layouts
from pallas_kernels._layout import DATA, META, MatrixLayout, Prepared, canonical_layout
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._pairs import pack, pack_bits, unpack, unpack_bits, wide_pairs

# Lengths that `prepare` pads segments to. XLA runs the products of a batch in parallel since JAX 0.11. Before that only
# several independent products use all cores where single ones are small, so there may be more of them.
MAX_RUNS = 8 if jax.__version_info__ >= (0, 11) else 16
# What one more run costs a call, in slots of padding.
RUN_SLOTS = 32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[*DATA, "inverse_rows"], meta_fields=[*META, "k_contiguous"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CPULayout(MatrixLayout):
    """The layout of a CPU. Columns of padding are the sentinel K.

    Attributes:
        inverse_rows: (M,) int32, row j of W is stored row `inverse_rows[j]`.
        k_contiguous: whether the values of every segment are stored transposed, (V, slots); not under 2:4.
    """

    inverse_rows: jax.Array
    k_contiguous: bool

    @property
    @override
    def for_cpu(self) -> bool:
        """This is the arrangement of XLA on a CPU."""
        return True

    @override
    def slot_values(self, values: jax.Array) -> jax.Array:
        """The values of a matrix without pairs in the order of the slots, (P, V)."""
        return self._transposed(values, to_slots=True) if self.k_contiguous else values

    def stored_values(self, slots: jax.Array) -> jax.Array:
        """Undoes `slot_values`."""
        return self._transposed(slots, to_slots=False) if self.k_contiguous else slots

    def _transposed(self, values: jax.Array, *, to_slots: bool) -> jax.Array:
        parts: list[jax.Array] = []
        v, start = self.group_size, 0
        for groups, count in self.segments or ():
            shape = (groups, v, count) if to_slots else (groups, count, v)
            part = values[start : start + groups * count].reshape(shape)
            parts.append(part.swapaxes(1, 2).reshape(-1, v))
            start += groups * count
        return jnp.concatenate(parts)


def as_cpu(layout: MatrixLayout) -> CPULayout:
    """A layout as the products of this package read it; one of another kind as it is. Traceable."""
    if isinstance(layout, CPULayout):
        return layout
    fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(MatrixLayout)}
    return CPULayout(**fields, inverse_rows=layouts.inverse_rows(layout), k_contiguous=False)


def prepare(matrix: RowGrouped) -> Prepared:
    """Sorts the groups, heaviest first, pads their segments to a few lengths known when tracing, and transposes them.

    The runs of equally long segments are common to all slices of a stacked matrix: the r-th heaviest groups of all
    slices get the same length. Values of 2:4 are not transposed, and stacked ones stay as they are: slices differ in
    their fours.
    """
    topology = matrix.topology
    if topology.pairs is not None and matrix.values.ndim > 2:
        return Prepared(matrix.values, canonical_layout(topology))
    v, k, r = topology.group_size, topology.k, topology.num_groups
    batch = topology.columns.shape[:-1]
    ptr, columns, rows = (np.asarray(a) for a in (topology.group_ptr, topology.columns, topology.rows))
    counts = np.diff(ptr)
    order = np.argsort(-counts, axis=-1, kind="stable")
    counts = np.take_along_axis(counts, order, -1)
    runs = _choose_runs(counts.reshape(-1, r).max(0))
    lengths = np.repeat([slots for _, slots in runs], [groups for groups, _ in runs])
    new_ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    new_columns = np.full((*batch, new_ptr[-1]), k, np.int32)
    new_rows = np.zeros_like(rows)
    inverse_rows = np.zeros((*batch, topology.m + 1), np.int32)
    per_slot = 1 if topology.pairs is None else 2  # slots to a value
    values = np.asarray(matrix.values)
    new_values = np.zeros((*batch, new_ptr[-1] // per_slot, v), values.dtype)
    two = None if topology.pairs is None else unpack(np.asarray(topology.pairs), values.shape[-2])
    kept = None if topology.chosen is None else unpack_bits(np.asarray(topology.chosen), values.shape[-2])
    new_kept = np.zeros((new_ptr[-1] // 2, v), np.uint8)
    new_two = np.tile(np.arange(2, dtype=np.uint8)[:, None], (new_ptr[-1] // 4, v))  # those of padding ascend too
    for b in np.ndindex(*batch):
        new_rows[b] = rows[b].reshape(r, v)[order[b]].reshape(-1)
        inverse_rows[b][new_rows[b]] = np.arange(r * v)
        live = new_rows[b].reshape(r, v) < topology.m
        for i, group in enumerate(order[b]):
            new_columns[b][new_ptr[i] : new_ptr[i] + counts[b][i]] = columns[b][ptr[b][group] : ptr[b][group + 1]]
            old = slice(ptr[b][group] // per_slot, ptr[b][group + 1] // per_slot)
            new = slice(new_ptr[i] // per_slot, new_ptr[i + 1] // per_slot)
            segment = np.zeros((new.stop - new.start, v), values.dtype)
            segment[: old.stop - old.start] = np.where(live[i], values[b][old], 0)
            new_values[b][new] = segment.T.reshape(-1, v) if two is None else segment
            if two is not None:
                new_two[new.start : new.start + old.stop - old.start] = two[old]
            if kept is not None:
                new_kept[new.start : new.start + old.stop - old.start] = kept[old]
    layout = CPULayout(
        columns=jnp.asarray(new_columns),
        group_ptr=jnp.asarray(np.broadcast_to(new_ptr, (*batch, r + 1))),
        rows=jnp.asarray(new_rows),
        counts=jnp.asarray(counts.astype(np.int32)),
        pairs=None if two is None else jnp.asarray(wide_pairs(pack(new_two))),
        chosen=None if kept is None else jnp.asarray(pack_bits(new_kept)),
        order=jnp.asarray(order.astype(np.int32)),
        m=topology.m,
        k=k,
        group_size=v,
        max_count=int(lengths.max(initial=0)),
        segments=runs,
        sentinels=bool((new_columns == k).any()),
        inverse_rows=jnp.asarray(inverse_rows[..., : topology.m]),
        k_contiguous=two is None,
    )
    return Prepared(jnp.asarray(new_values), layout)


def _choose_runs(counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Cuts descending counts into runs: least padding plus `RUN_SLOTS` a run, at most `MAX_RUNS` runs."""
    lengths, groups = np.unique(-counts, return_counts=True)
    runs = [(int(g), int(-s)) for g, s in zip(groups, lengths, strict=True)]
    while len(runs) > 1:
        # Joining a run with the next one pads the next one's groups.
        costs = [after[0] * (run[1] - after[1]) for run, after in itertools.pairwise(runs)]
        i = int(np.argmin(costs))
        if costs[i] > RUN_SLOTS and len(runs) <= MAX_RUNS:
            break
        runs[i : i + 2] = [(runs[i][0] + runs[i + 1][0], runs[i][1])]
    return tuple(runs)
